"""What a refresh of the reward model is worth: GRPO taught by a model that has seen little, with and without it.

A reward model learns from few comparisons of `task:preferences`, whose true reward is known; GRPO is then taught by it,
once as it is and once refreshed every few iterations. Printed for each seed: the true reward of 512 completions before
and after, and what the reward model says of them.

`python -m bench.refresh --seeds 1 2 3 --out DIR`
"""

from dataclasses import replace
from pathlib import Path

from bench import seeds
from upslope.language import grpo, models, prompts, reward_model, rollout
from upslope.language.generation import Sampling
from upslope.language.learner import AdamW
from upslope.language.refresh import Refresh
from upslope.runs import run as runs

PREFERENCES = prompts.Config("task:preferences")


def means(config: grpo.GRPO, model: models.Model, scorer: Path) -> dict[str, float]:
    """The true reward and the reward model's, of the same 512 completions."""
    asked = replace(config, reward="task", group_size=2)
    data = rollout.collect(rollout.source(asked, model), asked, 0, 256)
    judged = rollout.source(replace(config, reward=str(scorer)), model).reward
    texts = [prompts.decode(model, completion) for completion in data.completions]
    scores = judged([row["prompt"] for row in data.rows], texts)
    return {"true": float(data.reward.mean()), "model": sum(scores) / len(scores)}


def measure(seed: int, steps: int, out: Path) -> dict[str, float]:
    options = lambda name: runs.Config(seed=seed, run_dir=out / f"{name}-{seed}", quiet=True)  # noqa: E731
    few = replace(PREFERENCES, rows=64)
    reward_model.train(reward_model.RewardModel(data=few, total_steps=30, run=options("reward")))
    config = grpo.GRPO(
        data=PREFERENCES, sampling=Sampling(8), optimizer=AdamW(1e-4, warmup=10), total_steps=steps,
        reward=str(out / f"reward-{seed}"), run=options("kept"),
    )  # fmt: skip
    before = means(config, models.load(config.model, seed), out / f"reward-{seed}")
    kept = means(config, grpo.train(config), out / f"reward-{seed}")
    refreshed = replace(config, refresh=Refresh(interval=10), run=options("refreshed"))
    after = means(refreshed, grpo.train(refreshed), out / f"refreshed-{seed}" / "reward")
    named = {"before": before, "kept": kept, "refreshed": after}
    return {f"{name}_{kind}": value for name, both in named.items() for kind, value in both.items()}


if __name__ == "__main__":
    seeds.main(measure, __doc__, 200)
