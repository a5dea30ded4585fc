"""Credit per turn beside the bandit treatment, on a game whose reward comes at its end.

`python -m bench.turns --seeds 1 2 3 4 5 --out DIR`: a Llama of 0.1 million parameters learns the rules of the game from
random legal moves, then the same model learns to win with either credit, everything else equal. `--picture` draws what
DIR holds.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch

from upslope.language import commands, models, prompts, sft, tiny, turn_ppo
from upslope.language.generation import Sampling
from upslope.language.learner import AdamW
from upslope.language.sft import SFT
from upslope.language.turn_ppo import TurnPPO
from upslope.runs import run as runs
from upslope.runs.run import Run

CREDITS = ("turn", "bandit")
LAMBDA = 0.3  # of the recursion: near 1 it would add up the luck of all later turns, as the bandit does


def small(seed: int, directory: Path) -> str:
    """A Llama of 2 layers of width 64 that knows the tiny tokenizer, as `--model` takes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=128, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        )
    )  # fmt: skip
    models.save(network, tiny.tokenizer(), directory)
    return str(directory)


def measure(game: str, seed: int, steps: int, out: Path) -> None:
    """The rules once, then each credit; numbers to DIR/SEED-CREDIT.json."""
    base = out / f"rules-{seed}"
    if not (base / "summary.json").exists():
        sft.train(
            SFT(
                model=models.Config(small(seed, out / f"random-{seed}")), data=prompts.Config(f"moves:{game}"),
                optimizer=AdamW(3e-3), total_steps=120, batch_size=32, run=options(seed, base),
            )
        )  # fmt: skip
    for credit in CREDITS:
        directory = out / f"{seed}-{credit}"
        if not (directory / "summary.json").exists():
            config = TurnPPO(
                model=models.Config(str(base)), environment=game, credit=credit, total_steps=steps, batch_size=64,
                sampling=Sampling(3), num_epochs=2, minibatches=2, optimizer=AdamW(1e-3), gae_lambda=LAMBDA,
                run=options(seed, directory),
            )  # fmt: skip
            began = (directory / "checkpoints").exists()
            turn_ppo.train(config, Run.resume(directory, "turn-ppo", config, steps) if began else None)
            result = commands.evaluate("turn-ppo", config, directory, 300, 0)
            directory.with_suffix(".json").write_text(json.dumps(result) + "\n")


def options(seed: int, directory: Path) -> Any:
    return runs.Config(seed=seed, run_dir=directory, quiet=True)


def draw(out: Path) -> None:
    """Mean return over iterations: every seed thin, the mean over seeds thick; and a table to the log."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), constrained_layout=True)
    for credit, colour in zip(CREDITS, ("tab:blue", "tab:orange"), strict=True):
        curves = []
        for path in sorted(out.glob(f"*-{credit}/metrics.jsonl")):
            rows = torch.tensor([json.loads(line)["reward"] for line in path.read_text().splitlines()])
            curves.append(rows.unfold(0, 10, 1).mean(1))
            axes.plot(range(10, 10 + len(curves[-1])), curves[-1], color=colour, alpha=0.3, linewidth=0.8)
            ended = json.loads((path.parent.with_suffix(".json")).read_text())["mean_return"]
            logging.info("%s: last 10 iterations %.3f, held out %.3f", path.parent.name, curves[-1][-1], ended)
        mean = torch.stack(curves).mean(0)
        axes.plot(range(10, 10 + len(mean)), mean, color=colour, linewidth=2, label=f"credit {credit}")
    axes.set(xlabel="iteration, 64 conversations each", ylabel="games won, mean of 10 iterations")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "turns.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--game", default="locks")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", action="store_true")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for seed in asked.seeds:
        measure(asked.game, seed, asked.steps, asked.out)
    if asked.picture:
        draw(asked.out)


if __name__ == "__main__":
    main()
