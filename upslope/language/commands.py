"""The command line's language half: flags to settings, and what `eval` says of a trained language model."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

ALGORITHMS = {  # name -> where its train() and its configuration are
    "sft": ("upslope.language.sft", "SFT"),
    "reward-model": ("upslope.language.reward_model", "RewardModel"),
    "dpo": ("upslope.language.dpo", "DPO"),
    "lm-reinforce": ("upslope.language.reinforce", "REINFORCE"),
    "lm-ppo": ("upslope.language.ppo", "PPO"),
    "grpo": ("upslope.language.grpo", "GRPO"),
    "turn-ppo": ("upslope.language.turn_ppo", "TurnPPO"),
}


def parse(algorithm: str, kind: type, arguments: list[str]) -> Any:
    """Flags over the named preset over the defaults; `--model` and `--data` are ids and sources."""
    import argparse

    import tyro

    from upslope.language import presets

    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--variant", default=None)
    known, rest = early.parse_known_args(arguments)
    default = kind()
    if known.variant is not None:
        rows = presets.VARIANTS.get(algorithm, {})
        if known.variant not in rows:
            allowed = ", ".join(rows) or f"none, only {', '.join(presets.VARIANTS)} have variants"
            raise ValueError(f"variant is {known.variant!r}, allowed: {allowed}")
        default = dataclasses.replace(default, **rows[known.variant])
    names = {"--model": "--model.id", "--data": "--data.source"}
    rest = [names.get(word.split("=")[0], word.split("=")[0]) + word[len(word.split("=")[0]) :]
            if word.startswith("--") else word for word in rest]  # fmt: skip
    config = tyro.cli(
        kind, args=rest, default=default, prog=f"upslope train {algorithm}", config=(tyro.conf.AvoidSubcommands,),
        description=importlib.import_module(kind.__module__).__doc__,
    )  # fmt: skip
    if config.run.run_dir is None:
        name = f"{algorithm}-{Path(config.model.id).name}-{config.run.seed}"
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, run_dir=Path("runs") / name))
    return config


def evaluate(algorithm: str, config: Any, directory: Path, count: int, seed: int) -> dict[str, float | int]:
    """Of held-out rows: the greedy completion's reward, or for a reward model how often the better one scores higher.

    Raises:
        ValueError: the run is not finished, or its data has no reward of its own.
    """
    import torch

    from upslope.language import generation, models, prompts, reward_model, rewards

    if algorithm == "turn-ppo":
        return _evaluate_turns(config, directory, count, seed)
    held_out = config.data.source.startswith("task:")
    data = dataclasses.replace(config.data, rows=count)
    rows = prompts.read(data, "prompt", seed=seed, held_out=held_out)[:count]
    if algorithm == "reward-model":
        scorer, model = models.scorer(models.Config(str(directory)), seed)
        written, _ = prompts.encode_all(model, rows, None)
        ranked = [[prompts.encode_completion(model, text) for text in several] for several in reward_model.rank(rows)]
        better = reward_model.score(scorer, model, written, [several[0] for several in ranked])
        worse = reward_model.score(scorer, model, written, [several[-1] for several in ranked])
        returns = (better > worse).double()
    else:
        reward = rewards.resolve(getattr(config, "reward", "task"), config.data.source, seed)
        model = models.load(models.Config(str(directory)), seed)
        most = config.sampling.max_new_tokens if hasattr(config, "sampling") else 32
        sampling = generation.Sampling(max_new_tokens=most, temperature=0.0)
        written, _ = prompts.encode_all(model, rows, None, room=most)
        completions: list[list[int]] = []
        for first in range(0, len(rows), 256):
            part = written[first : first + 256]
            completions += generation.generate(model, part, 1, sampling, torch.Generator()).tokens()
        texts = [prompts.decode(model, completion) for completion in completions]
        returns = torch.tensor(rewards.judge(reward, rows, texts, completions), dtype=torch.float64)
    return {
        "mean_return": float(returns.mean()),
        "std_return": float(returns.std(correction=0)),
        "episodes": len(returns),
    }


def _evaluate_turns(config: Any, directory: Path, count: int, seed: int) -> dict[str, float | int]:
    """Greedy conversations from held-out openings: the sum of a conversation's rewards, and how many turns it had."""
    import torch

    from upslope.language import generation, models, turns

    make = turns.resolve(config.environment)
    rows = turns.openings(dataclasses.replace(config.data, rows=count), seed, held_out=True)[:count]
    model = models.load(models.Config(str(directory)), seed)
    sampling = generation.Sampling(config.sampling.max_new_tokens, temperature=0.0)
    parts = [
        turns.play(model, make, rows[first : first + 256], sampling, config.max_turns, lambda _: torch.Generator())
        for first in range(0, len(rows), 256)
    ]
    returns = torch.cat([part.reward.sum(1) for part in parts])
    return {
        "mean_return": float(returns.mean()),
        "std_return": float(returns.std(correction=0)),
        "mean_length": float(torch.cat([part.valid.sum(1) for part in parts]).double().mean()),
        "episodes": len(returns),
    }
