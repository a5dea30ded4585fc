"""What the language trainers share around their four steps: how a run starts, goes on, and ends; the optimiser."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from upslope.language import models, prompts
from upslope.runs import run as runs
from upslope.runs import settings
from upslope.runs.randomness import generator
from upslope.runs.run import Run


@dataclass(frozen=True)
class AdamW:
    """AdamW of PyTorch, with a linear warm-up and a linear (or no) decay."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    warmup: int = 0  # iterations until the rate is full
    anneal: bool = False  # linearly to 0 over the run
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        settings.positive(self, "learning_rate", "epsilon", "max_grad_norm")
        settings.within(self, 0, None, "weight_decay", "warmup")
        settings.below_one(self, "beta1", "beta2")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        betas = (self.beta1, self.beta2)
        return torch.optim.AdamW(parameters, self.learning_rate, betas, self.epsilon, self.weight_decay, fused=True)

    def rate(self, iteration: int, total: int) -> float:
        """Of an iteration, counted from 0.

        >>> AdamW(learning_rate=1.0, warmup=4).rate(1, 10), AdamW(learning_rate=1.0, anneal=True).rate(5, 10)
        (0.5, 0.5)
        """
        warm = min(1.0, (iteration + 1) / self.warmup) if self.warmup else 1.0
        return self.learning_rate * warm * (1 - iteration / total if self.anneal else 1.0)


class Config(Protocol):
    """What every language trainer's settings have."""

    @property
    def model(self) -> models.Config: ...
    @property
    def data(self) -> prompts.Config: ...
    @property
    def optimizer(self) -> AdamW: ...
    @property
    def run(self) -> runs.Config: ...
    @property
    def total_steps(self) -> int: ...


class Attached(Protocol):
    """What else a run learns beside its policy."""

    def pack(self) -> dict[str, Tensor]: ...
    def restore(self, saved: dict[str, Tensor]) -> None: ...


class State(NamedTuple):
    """Everything a resumed run needs: randomness is derived from the iteration, so no generator is among it."""

    trained: nn.Module  # whose trainable parameters are learned
    optimizer: torch.optim.AdamW
    iteration: int
    remembered: dict[str, float]  # numbers of the algorithm's own: a moving average, a penalty's coefficient
    follower: nn.Module | None = None  # a frozen network that is set to the trained one now and then
    attached: Attached | None = None


def begin(
    trained: nn.Module,
    config: Config,
    session: Run,
    follower: nn.Module | None = None,
    attached: Attached | None = None,
) -> State:
    """The state a run begins with, or the one that its checkpoint holds."""
    optimizer = config.optimizer.build(models.trainable(trained).values())
    state = State(trained, optimizer, 0, {}, follower, attached)
    return state if session.restored is None else restored(state, session.restored.tensors)


def restored(state: State, saved: Mapping[str, Tensor]) -> State:
    """The state that `pack` gave; weights are copied in place."""
    optimizer, follower = state.optimizer, state.follower
    with torch.no_grad():
        for name, parameter in models.trainable(state.trained).items():
            parameter.copy_(saved[f"model.{name}"])
            moments = {key: saved[f"optimizer.{key}.{name}"] for key in ("exp_avg", "exp_avg_sq", "step")
                       if f"optimizer.{key}.{name}" in saved}  # fmt: skip
            if moments:
                optimizer.state[parameter] = {
                    key: value.to(parameter.device).clone() for key, value in moments.items()
                }  # fmt: skip
        for name, parameter in follower.named_parameters() if follower is not None else ():
            parameter.copy_(saved[f"follower.{name}"])
    numbers = {name.removeprefix("own."): float(value) for name, value in saved.items() if name.startswith("own.")}
    if state.attached is not None:
        prefix = "attached."
        own = {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}
        state.attached.restore(own)
    return state._replace(iteration=int(saved["iteration"]), remembered=numbers)


@torch.no_grad()
def follow(state: State) -> None:
    """The follower becomes what the trained network is now."""
    assert state.follower is not None
    now = dict(state.trained.named_parameters())
    for name, parameter in state.follower.named_parameters():
        parameter.copy_(now[name])


def pack(state: State) -> dict[str, Tensor]:
    """All resumable state as tensors."""
    tensors: dict[str, Tensor] = {"iteration": torch.tensor(state.iteration)}
    for name, parameter in models.trainable(state.trained).items():
        tensors[f"model.{name}"] = parameter
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    if state.follower is not None:
        tensors |= {f"follower.{name}": parameter for name, parameter in state.follower.named_parameters()}
    if state.attached is not None:
        tensors |= {f"attached.{name}": tensor for name, tensor in state.attached.pack().items()}
    return tensors | {f"own.{k}": torch.tensor(v, dtype=torch.float64) for k, v in state.remembered.items()}


def rows_of(iteration: int, size: int, total: int, seed: int, stream: str = "data") -> list[int]:
    """The rows that an iteration learns from: every row once an epoch, in a new random order each.

    >>> sorted(rows_of(0, 2, 4, seed=1) + rows_of(1, 2, 4, seed=1))
    [0, 1, 2, 3]
    """
    places = range(iteration * size, (iteration + 1) * size)
    orders = {
        epoch: torch.randperm(total, generator=generator(seed, stream, epoch)).tolist()
        for epoch in {place // total for place in places}
    }
    return [orders[place // total][place % total] for place in places]


def ascend(state: State, config: Config, objectives: Iterable[Callable[[], Tensor]]) -> dict[str, float]:
    """One step uphill along the sum of these objectives, one micro-batch each; weights are moved in place.

    Each must be its share of the whole batch's objective, so that the sum does not depend on how it was split.

    Raises:
        ValueError: an objective or a gradient that is not finite; the weights are as they were.
    """
    state.optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for objective in objectives:
        value = objective()
        total += value.item()
        (-value).backward()
    parameters = list(models.trainable(state.trained).values())
    most = config.optimizer.max_grad_norm
    norm = float(nn.utils.clip_grad_norm_(parameters, math.inf if most is None else most))
    if not (math.isfinite(norm) and math.isfinite(total)):
        state.optimizer.zero_grad(set_to_none=True)
        raise ValueError(
            f"the objective is {total} and its gradient's norm {norm} at iteration {state.iteration}: "
            "not finite, the weights were not changed"
        )
    rate = config.optimizer.rate(state.iteration, config.total_steps)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    return {"objective": total, "grad_norm": norm, "learning_rate": rate}


def report(session: Run, state: State, config: Config, numbers: Mapping[str, float]) -> None:
    """An iteration's numbers to the metrics, the state to a checkpoint when one is due."""
    if state.iteration % config.run.log_interval == 0 or state.iteration >= config.total_steps:
        session.record(state.iteration, numbers)
    if session.due():
        session.save(state.iteration, pack(state), {})


def finish(
    session: Run,
    state: State,
    network: Any,
    tokenizer: Any,
    numbers: Mapping[str, float],
    head: nn.Module | None = None,
) -> None:
    """The last checkpoint, the model for others to load, the summary."""
    session.save(state.iteration, pack(state), {})
    if session.directory is not None:
        models.save(network, tokenizer, session.directory / models.MODEL, head)
    session.finish(state.iteration, numbers)
