"""PPO-RLHF's two brakes: does the adaptive KL hold its target, does PPO-ptx keep what was learned before?

A tiny model learns to sort (60 steps), then PPO has it write vowels (`task:preferences`, whose reward is known): once
with an adaptive KL penalty, once with none, once with none but sorting as pretraining text. Printed for each seed: the
KL over the last quarter of the iterations, and nats per token of held-out sorting rows before and after.

`python -m bench.rlhf --seeds 1 2 3 --out DIR`
"""

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

from bench import seeds
from upslope.language import models, ppo, prompts, sft
from upslope.language.generation import Sampling
from upslope.language.learner import AdamW
from upslope.runs import run as runs

SORTING = prompts.Config("task:sorting", rows=8000)
TARGET = 2.0  # nats per completion


@torch.no_grad()
def loss(directory: Path) -> float:
    """Nats per completion token of 500 held-out sorting rows."""
    model = models.load(models.Config(str(directory)), 0)
    rows = prompts.read(replace(SORTING, rows=500), "prompt", "completion", seed=0, held_out=True)
    written, completions = prompts.encode_all(model, rows, "completion")
    parts, total = sft.batches(model, written, completions, sft.SFT())
    return -sum(float(sft.objective(model.network, part, total)) for part in parts)


def measure(seed: int, steps: int, out: Path) -> dict[str, float]:
    options = lambda name: runs.Config(seed=seed, run_dir=out / f"{name}-{seed}", quiet=True)  # noqa: E731
    sorting = sft.SFT(data=SORTING, optimizer=AdamW(warmup=20, anneal=True), total_steps=60, run=options("sft"))
    sft.train(sorting)
    vowels = ppo.PPO(
        model=models.Config(str(out / f"sft-{seed}")), data=prompts.Config("task:preferences"), batch_size=64,
        sampling=Sampling(8), total_steps=steps, optimizer=AdamW(1e-4, warmup=10),
    )  # fmt: skip
    found = {"before": loss(out / f"sft-{seed}")}
    variants = {
        "kl": replace(vowels, kl_coef=0.1, kl_target=TARGET, kl_horizon=200.0),
        "plain": replace(vowels, kl_coef=0.0),
        "ptx": replace(vowels, kl_coef=0.0, ptx_coef=1.0, ptx=SORTING),
    }
    for name, config in variants.items():
        ppo.train(replace(config, run=options(name)))
        rows = [json.loads(line) for line in (out / f"{name}-{seed}" / "metrics.jsonl").read_text().splitlines()]
        last = rows[-len(rows) // 4 :]
        found |= {f"{name}_loss": loss(out / f"{name}-{seed}"), f"{name}_reward": mean(r["reward"] for r in last)}
        if name == "kl":
            found["kl"] = mean(row["kl"] for row in last)
    return found


if __name__ == "__main__":
    seeds.main(measure, __doc__, 100)
