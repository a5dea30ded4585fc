"""Reward models from comparisons (Christiano et al. 2017; Stiennon et al. 2020; S4 3.2.1, 3.3.1).

Psi         none: a supervised loss
surrogate   - the mean over the C(K,2) pairs of a prompt of -log σ(r_better - r_worse), S4 eq 3.1   core/preferences.py
constraint  none
data        a fixed set of comparisons: `chosen` and `rejected`, or `completions` in order, best first
maximised   the mean over prompts

All K completions of a prompt are in one batch and one loss, weighted 1/C(K,2): each completion is fitted once, not
K - 1 times (S4 3.3.1). The head begins at N(0, 1/(d+1)); after training the rewards are shifted to mean 0 on
the training data.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.core import preferences
from upslope.language import batching, learner, models, prompts
from upslope.language.batching import Sequences
from upslope.language.learner import AdamW, State
from upslope.language.models import Model, Scorer
from upslope.runs import run as runs
from upslope.runs import settings
from upslope.runs.run import Run


@dataclass(frozen=True)
class RewardModel:
    """What is the reward model's own; model, data, optimizer and run are nested."""

    model: models.Config = field(default_factory=models.Config)
    data: prompts.Config = field(default_factory=lambda: prompts.Config("task:preferences"))
    optimizer: AdamW = field(default_factory=AdamW)
    run: runs.Options = field(default_factory=runs.Config)
    total_steps: int = 300  # gradient steps
    batch_size: int = 32  # prompts per gradient step
    micro_batch_size: int = 32  # prompts per forward pass

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "batch_size", "micro_batch_size")


def rank(rows: list[prompts.Row]) -> list[list[str]]:
    """Every row's completions, best first.

    Raises:
        ValueError: a row without `chosen` and `rejected` or a list of two or more `completions`.
    """
    ranked = []
    for i, row in enumerate(rows):
        if {"chosen", "rejected"} <= row.keys():
            ranked.append([row["chosen"], row["rejected"]])
        elif isinstance(row.get("completions"), list) and len(row["completions"]) > 1:
            ranked.append(list(row["completions"]))
        else:
            raise ValueError(
                f"row {i} has columns {', '.join(map(repr, row))}; allowed: 'chosen' and 'rejected', "
                "or 'completions' with two or more, best first"
            )
    return ranked


def objective(scorer: Scorer, batch: Sequences, sizes: list[int], total: int) -> tuple[Float[Tensor, ""], Tensor]:
    """Scalar to maximise: - Σ of the prompts' ranking losses / `total`, the prompts of the whole batch; and rewards."""
    rewards = scorer.last(batch)
    parts = rewards.split(sizes)
    alike = [torch.stack([part for part in parts if len(part) == size]) for size in sorted(set(sizes))]
    losses = torch.cat([preferences.ranking(several) for several in alike])
    return -losses.sum() / total, rewards.detach()


def batch_of(model: Model, written: list[list[int]], answers: list[list[list[int]]]) -> Sequences:
    """All completions of these prompts."""
    pairs = [(prompt, answer) for prompt, several in zip(written, answers, strict=True) for answer in several]
    return batching.pad([p for p, _ in pairs], [a for _, a in pairs], model.pad).to(model.device)


def update(
    state: State, scorer: Scorer, model: Model, written: list[Any], answers: list[Any], config: RewardModel
) -> dict[str, float]:
    """One gradient step over all micro-batches; and how often the better completion has the higher reward."""
    right: list[float] = []

    def part(first: int) -> Tensor:
        inside = slice(first, first + config.micro_batch_size)
        sizes = [len(several) for several in answers[inside]]
        value, rewards = objective(scorer, batch_of(model, written[inside], answers[inside]), sizes, len(written))
        right.extend(float((each[:-1] > each[1:]).double().mean()) for each in rewards.split(sizes))
        return value

    starts = range(0, len(written), config.micro_batch_size)
    numbers = learner.ascend(state, config, [lambda first=first: part(first) for first in starts])
    return numbers | {"loss": -numbers["objective"], "accuracy": sum(right) / len(right)}


@torch.no_grad()
def score(scorer: Scorer, model: Model, written: list[list[int]], answers: list[list[int]]) -> Float[Tensor, " N"]:
    """The reward of one completion for each prompt."""
    found = [
        scorer.last(batching.pad(written[i : i + 256], answers[i : i + 256], model.pad).to(model.device)).cpu()
        for i in range(0, len(written), 256)
    ]
    return torch.cat(found)


def centre(scorer: Scorer, model: Model, written: list[list[int]], answers: list[list[list[int]]]) -> None:
    """Shift the head's bias so that the rewards of these completions have mean 0: all that comparisons leave open."""
    flat = [(p, a) for p, several in zip(written, answers, strict=True) for a in several]
    rewards = score(scorer, model, [p for p, _ in flat], [a for _, a in flat])
    with torch.no_grad():
        scorer.head.bias.copy_(preferences.centred(scorer.head.bias.detach().cpu(), rewards))


def train(config: RewardModel, session: Run | None = None) -> Scorer:
    """Train and return the reward model.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
    """
    with session or Run("reward-model", config, config.total_steps) as session:
        rows = prompts.read(config.data, "prompt", seed=config.run.seed)
        scorer, model = models.scorer(config.model, config.run.seed)
        written, _ = prompts.encode_all(model, rows, None)
        answers = [[prompts.encode_completion(model, text) for text in several] for several in rank(rows)]
        state, numbers = learner.begin(scorer, config, session), {}
        while state.iteration < config.total_steps:
            # 1. collect: some prompts with all their completions
            chosen = learner.rows_of(state.iteration, config.batch_size, len(rows), config.run.seed)

            # 2. estimate: nothing; the order is given. 3. objective and 4. update
            numbers = update(
                state, scorer, model, [written[i] for i in chosen], [answers[i] for i in chosen], config
            )  # fmt: skip

            state = state._replace(iteration=state.iteration + 1)
            learner.report(session, state, config, numbers)
        centre(scorer, model, written[:1024], answers[:1024])
        learner.finish(session, state, model.network, model.tokenizer, numbers, scorer.head)
        return scorer
