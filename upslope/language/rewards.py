"""Rewards of completions: a task's own check, a function of the user's, or a reward model of ours.

A function has TRL's signature `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, sync or
async; `None` counts as 0. A process reward judges the steps of a completion: in place of a number it returns pairs
(the step's last token, its reward). Code runs only from a file that the user names.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upslope.language import files, models, reward_model, tiny
from upslope.language.prompts import Row, encode, encode_completion

Reward = Callable[..., Any]
Steps = list[tuple[int, float]]  # of a completion: the last token of each step, counted from 0, and the step's reward


def resolve(spec: str, source: str, seed: int, process: bool = False) -> Reward:
    """The reward that a specification names.

    Args:
        spec: `task`, the check of the data's task; `FILE.py:FUNCTION`; or the directory of a reward model's run.
        source: where the prompts come from.
        seed: of the run.
        process: of a task, the reward of its steps.

    Raises:
        ValueError: nothing of the kind is there.
    """
    if spec == "task":
        return task(source, process)
    path, _, name = spec.rpartition(":")
    if path.endswith(".py"):
        return _from_file(Path(path), name)
    if models.is_scorer(Path(spec)):
        return ModelReward(*models.scorer(models.Config(id=spec), seed))
    raise ValueError(
        f"reward is {spec!r}, allowed: 'task' with data task:NAME, FILE.py:FUNCTION, or the directory of a reward "
        "model's run"
    )


def task(source: str, process: bool = False) -> Reward:
    """The check that comes with `task:NAME`, or its process reward."""
    name = source.removeprefix("task:")
    if not source.startswith("task:") or (name not in tiny.TASKS and name != "preferences"):
        raise ValueError(
            f"reward is 'task', but data.source is {source!r}; allowed: task:NAME with NAME of "
            f"{', '.join([*tiny.TASKS, 'preferences'])}"
        )

    stepwise = [each for each, kind in tiny.TASKS.items() if kind.steps is not None]
    if process and name not in stepwise:
        raise ValueError(f"task {name!r} has no rewards of its steps; allowed: {', '.join(stepwise)}")

    def check(
        prompts: list[str], completions: list[str], completion_ids: Any, answer: list[str] | None = None, **_: Any
    ) -> list[Any]:
        if name == "preferences":
            return [tiny.vowels(completion) for completion in completions]
        assert answer is not None
        steps = tiny.TASKS[name].steps
        if process and steps is not None:
            return [
                steps(text, right, len(ids))
                for text, right, ids in zip(completions, answer, completion_ids, strict=True)
            ]
        return [tiny.TASKS[name].reward(*each) for each in zip(prompts, completions, answer, strict=True)]

    return check


@dataclass(frozen=True)
class ModelReward:
    """A reward model's score of prompt and completion."""

    scorer: models.Scorer
    model: models.Model

    def __call__(self, prompts: list[Any], completions: list[str], **_: Any) -> list[float]:
        written = [encode(self.model, prompt) for prompt in prompts]
        answers = [encode_completion(self.model, completion) for completion in completions]
        return reward_model.score(self.scorer, self.model, written, answers).tolist()


def _from_file(path: Path, name: str) -> Reward:
    function = files.attribute("reward", path, name)
    if not callable(function):
        raise ValueError(f"reward is '{path}:{name}': {path} has no function {name!r}")
    return function


def judge(reward: Reward, rows: Sequence[Row], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
    """Rewards of completions, one for each row; of a process reward the sum over its steps.

    Raises:
        ValueError: the function raised, or did not return a finite number (or None) or steps for every completion.
    """
    name, values = getattr(reward, "__name__", "reward"), []
    for i, value in enumerate(_asked(reward, rows, completions, completion_ids)):
        total = sum(each for _, each in _steps(name, i, value, completion_ids[i])) if isinstance(value, list) else value
        values.append(0.0 if total is None else _finite(name, i, total, completions[i]))
    return values


def judge_steps(
    reward: Reward, rows: Sequence[Row], completions: list[str], completion_ids: list[list[int]]
) -> list[Steps]:
    """The steps of completions with their rewards.

    Raises:
        ValueError: the function raised, or did not return pairs (last token, finite reward) for every completion.
    """
    name, found = getattr(reward, "__name__", "reward"), _asked(reward, rows, completions, completion_ids)
    return [_steps(name, i, value, completion_ids[i]) for i, value in enumerate(found)]


def _asked(reward: Reward, rows: Sequence[Row], completions: list[str], completion_ids: list[list[int]]) -> list[Any]:
    """What the function says, one thing for each completion."""
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
    name = getattr(reward, "__name__", "reward")
    try:
        found = reward(
            prompts=[row["prompt"] for row in rows], completions=completions, completion_ids=completion_ids, **columns
        )
        found = asyncio.run(_waited(found)) if inspect.isawaitable(found) else found
    except Exception as error:
        raise ValueError(
            f"the reward function {name!r} raised {type(error).__name__}: {error}; nothing was trained on this batch"
        ) from error
    if not isinstance(found, list | tuple) or len(found) != len(completions):
        what = f"{len(found)} values" if isinstance(found, list | tuple) else type(found).__name__
        raise ValueError(f"the reward function {name!r} returned {what}, expected a list of {len(completions)} numbers")
    return list(found)


def _finite(name: str, i: int, value: Any, completion: str) -> float:
    if not math.isfinite(float(value)):
        raise ValueError(
            f"the reward function {name!r} returned {value} for completion {i}, {completion!r}; allowed: finite"
        )
    return float(value)


def _steps(name: str, i: int, value: Any, ids: list[int]) -> Steps:
    pairs = isinstance(value, list | tuple) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value)
    if not pairs:
        raise ValueError(
            f"the reward function {name!r} returned {value!r} for completion {i}; "
            "allowed for process rewards: a list of pairs (last token of a step, its reward)"
        )
    for end, reward in value:
        if not (isinstance(end, int) and 0 <= end < len(ids)):
            raise ValueError(
                f"the reward function {name!r} ends a step of completion {i} at token {end!r}; "
                f"allowed: 0 to {len(ids) - 1}"
            )
        _finite(name, i, reward, f"the step that ends at token {end}")
    return [(end, float(reward)) for end, reward in value]


async def _waited(found: Any) -> Any:
    return await found
