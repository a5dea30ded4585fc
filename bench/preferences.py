"""What comparisons teach, measured against a known reward: `task:preferences`.

    python -m bench.preferences [--seeds 1 2 3 4 5] [--out docs/pictures/preferences.png]

For each seed: a reward model ranks held-out pairs as often right as the Bayes rule, which knows the reward; DPO's
implicit reward, β log π/π_ref, is correlated with the true one over held-out completions, β 0.3, one setting for all
seeds. For the first seed the reward–KL frontier: DPO at several β beside the best that any policy can do, the words
tilted by exp(r/β).
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

from upslope.language import batching, dpo, generation, models, prompts, reward_model, sft, tiny
from upslope.language.learner import AdamW
from upslope.language.models import Model
from upslope.runs import run as runs

TASK = "task:preferences"
BETA, BETAS = 0.3, (0.1, 0.3, 0.5, 1.0, 2.0)
STEPS, ROWS = 600, 20_000  # of DPO: about one epoch
PAIRS = 2_000  # held out
SAMPLES = 4_096  # completions a policy


def pairs(seed: int) -> list[dict[str, Any]]:
    return prompts.read(prompts.Config(TASK, PAIRS), seed=seed, held_out=True)


def ranking(seed: int, quiet: runs.Config) -> dict[str, float]:
    """How often the reward model, and the known reward, put the pair the way it was labelled."""
    config = reward_model.RewardModel(run=quiet)
    scorer = reward_model.train(config)
    _, model = models.scorer(config.model, seed)  # the tokenizer
    rows = pairs(seed)
    written, _ = prompts.encode_all(model, rows, None)
    rewards = [
        reward_model.score(scorer, model, written, prompts.encode_all(model, rows, column)[1]).double().numpy()
        for column in ("chosen", "rejected")
    ]
    true = [np.array([tiny.vowels(row[column]) for row in rows]) for column in ("chosen", "rejected")]
    right = lambda a, b: float(((a > b) + 0.5 * (a == b)).mean())  # noqa: E731
    return {"reward_model": right(*rewards), "bayes": right(*true),
            "correlation": float(np.corrcoef(np.concatenate(rewards), np.concatenate(true))[0, 1])}  # fmt: skip


def reference(seed: int, where: Path, quiet: runs.Config) -> str:
    """A model of the completions that are compared, whichever was chosen."""
    rows = prompts.read(prompts.Config(TASK), seed=seed)
    lines = [
        json.dumps({"prompt": row["prompt"], "completion": row[column]})
        for row in rows
        for column in ("chosen", "rejected")
    ]
    (where / "words.jsonl").write_text("\n".join(lines))
    config = sft.SFT(data=prompts.Config(str(where / "words.jsonl")), run=replace(quiet, run_dir=where / "sft"))
    sft.train(config)
    return str(where / "sft")


def preferred(path: str, beta: float, quiet: runs.Config) -> tuple[Model, Model]:
    """DPO's policy, and the one it started from."""
    config = dpo.DPO(
        models.Config(path), prompts.Config(TASK, ROWS), AdamW(3e-4, warmup=20, anneal=True), quiet, STEPS, beta=beta
    )
    return dpo.train(config), models.load(config.model, quiet.seed)


def implicit(policy: Model, before: Model, seed: int, beta: float) -> float:
    """The correlation of β log π/π_ref with the reward over held-out completions."""
    rows = pairs(seed)
    found, true = [], []
    for column in ("chosen", "rejected"):
        written, answers = prompts.encode_all(policy, rows, column)
        batch = batching.pad(written, answers, policy.pad)
        with torch.no_grad():
            logs = [dpo.completion_log_probs(model.network, batch) for model in (policy, before)]
        found.append(beta * (logs[0] - logs[1]).double().numpy())
        true.append(np.array([tiny.vowels(row[column]) for row in rows]))
    return float(np.corrcoef(np.concatenate(found), np.concatenate(true))[0, 1])


def sampled(policy: Model, before: Model, seed: int) -> tuple[float, float]:
    """Mean reward of a policy's completions, and their KL to the reference in nats."""
    written, _ = prompts.encode_all(policy, pairs(seed)[: SAMPLES // 8], None)
    how, random = generation.Sampling(16), torch.Generator().manual_seed(seed)
    done = generation.generate(policy, written, 8, how, random).tokens()
    rewards = np.array([tiny.vowels(prompts.decode(policy, completion)) for completion in done])
    batch = batching.pad([p for p in written for _ in range(8)], done, policy.pad)
    with torch.no_grad():
        logs = [dpo.completion_log_probs(model.network, batch) for model in (policy, before)]
    return float(rewards.mean()), float((logs[0] - logs[1]).mean())


def tilted(betas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean reward and KL of π exp(r/β)/Z, π the task's own words: 1 to 8 letters, each of a to j."""
    cells = [(n, v) for n in range(1, 9) for v in range(n + 1)]
    log_p = np.array([np.log(stats.binom.pmf(v, n, 0.3) / 8) for n, v in cells])
    rewards = np.array([tiny.VOWEL * v + tiny.LENGTH * n for n, v in cells])
    means, costs = [], []
    for beta in betas:
        log_q = log_p + rewards / beta
        log_q -= np.logaddexp.reduce(log_q)
        means.append(np.exp(log_q) @ rewards)
        costs.append(np.exp(log_q) @ (log_q - log_p))
    return np.array(means), np.array(costs)


def draw(points: list[tuple[float, float, float]], best: tuple[np.ndarray, np.ndarray]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(best[1], best[0], color="0.4", linestyle="--", label="best possible: π exp(r/β)/Z of the task's words")
    axes.plot([p[2] for p in points], [p[1] for p in points], "o-", label="DPO")
    for beta, reward, cost in points:
        axes.annotate(f"β {beta:g}", (cost, reward), xytext=(4, -10), textcoords="offset points", fontsize=8)
    axes.set_xlabel("KL to the reference, nats a completion")
    axes.set_ylabel("true reward, mean of sampled completions")
    axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/preferences.png"))
    options = parser.parse_args()
    for place, seed in enumerate(options.seeds):
        quiet = runs.Config(seed=seed, quiet=True)
        with tempfile.TemporaryDirectory() as directory:
            row: dict[str, Any] = {"seed": seed, **ranking(seed, quiet)}
            path = reference(seed, Path(directory), quiet)
            points = []
            for beta in BETAS if place == 0 else (BETA,):
                policy, before = preferred(path, beta, quiet)
                if beta == BETA:
                    row["implicit"] = implicit(policy, before, seed, beta)
                points.append((beta, *sampled(policy, before, seed)))
            row["dpo"] = [{"beta": b, "reward": r, "kl": k} for b, r, k in points]
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
            if place == 0:
                draw(points, tilted(np.geomspace(30, 0.15, 60))).savefig(options.out, dpi=150)


if __name__ == "__main__":
    main()
