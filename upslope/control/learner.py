"""What the on-policy algorithms share around their four steps: how a run starts, goes on, and ends."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upslope.control import environments, networks, normalization, optimizers, rollout, tensor_rollout
from upslope.control.agent import Agent
from upslope.control.kfac import KFAC
from upslope.control.parameters import Net
from upslope.core import divergences, reductions
from upslope.runs import distributed
from upslope.runs import run as runs
from upslope.runs.randomness import derive, generator
from upslope.runs.run import Run


class State(NamedTuple):
    """Everything a resumed run needs to go on as if nothing had happened."""

    theta: Float[Tensor, " d"]
    optimizer: optimizers.State
    world: rollout.World
    iteration: int
    step: int  # environment steps so far, of all ranks
    remembered: dict[str, float]  # numbers of the algorithm's own: a moving average, a penalty's coefficient


Numbers = Mapping[str, float | Tensor]
Iteration = tuple[Float[Tensor, " d"], optimizers.State, Any, Numbers]
"""What an iteration makes: θ, the optimiser's memory, the world, numbers to report."""


class Counted(Protocol):
    """A state that knows how far the run is."""

    @property
    def step(self) -> int: ...


class Basic(Protocol):
    """What every algorithm's settings have."""

    @property
    def environment(self) -> environments.Config: ...
    @property
    def network(self) -> networks.Buildable: ...
    @property
    def normalize(self) -> normalization.Config: ...
    @property
    def run(self) -> runs.Config: ...
    @property
    def total_steps(self) -> int: ...


class Ascending(Basic, Protocol):
    """What the settings of an algorithm that follows a gradient have."""

    @property
    def optimizer(self) -> optimizers.Optimizer | KFAC: ...
    @property
    def max_grad_norm(self) -> float | None: ...
    @property
    def anneal_learning_rate(self) -> bool: ...


class Config(Ascending, Protocol):
    """What every on-policy algorithm's settings have."""

    @property
    def gamma(self) -> float: ...


def start(config: Ascending, session: Run, theta: Float[Tensor, " d"] | None = None) -> tuple[State, Net]:
    """The state a run begins with, or the one that its checkpoint holds; `theta` is where a new run starts from.

    Raises:
        ValueError: `theta` does not fit the network.
    """
    return begin(config, session, lambda net, theta: config.optimizer.start(theta), theta)


def begin(
    config: Basic,
    session: Run,
    remember: Callable[[Net, Float[Tensor, " d"]], optimizers.State],
    theta: Float[Tensor, " d"] | None = None,
) -> tuple[State, Net]:
    """As `start`, for whatever stands in the optimiser's place: `remember` is its memory when a run is new.

    Raises:
        ValueError: `theta` does not fit the network.
    """
    if config.run.compile and not session.compiled:
        raise ValueError("compile is True, but this algorithm is not compiled; allowed: PPO, by fast_ppo.train")
    seed, first = config.run.seed, distributed.rank() * config.environment.num_envs
    saved = None if session.restored is None else session.restored.tensors
    if saved is None:
        world = rollout.begin(config.environment, config.normalize, seed, first)
    else:
        mine = distributed.own("world", saved)
        world = rollout.unpack(mine, config.environment, config.normalize, seed, first)
    session.closes(world.envs)
    net = Net(config.network.build(world.envs.observation_space, world.envs.action_space, derive(seed, "network")))
    if saved is not None:
        numbers = {name.removeprefix("own."): float(v) for name, v in saved.items() if name.startswith("own.")}
        theta, memory = net.bind(saved["theta"]), optimizers.unpack(saved)
        return State(theta, memory, world, int(saved["iteration"]), int(saved["step"]), numbers), net
    initial = net.initial()
    if theta is not None:
        net.views(theta)  # refuses another shape
        initial.copy_(theta)
    theta = net.bind(initial)
    return State(theta, remember(net, theta), world, 0, 0, {}), net


def collect(
    net: Net, state: State, config: Config, length: int, episodes: int = 0, act: rollout.Act | None = None
) -> tuple[rollout.Rollout, Any]:
    """A rollout under the current policy, with this iteration's noise; the world after it."""
    if not isinstance(state.world, rollout.World):  # inside a compiled program
        return state.world.collect(net, state.theta)
    noise = generator(config.run.seed, "noise", state.iteration, distributed.rank())
    if state.world.envs.kind == "tensor" and not episodes and not net.module.memory_size:
        given = tensor_rollout.draw(net, state.world, length, noise)
        return tensor_rollout.collect(net, state.theta, state.world, given, config.normalize, config.gamma)
    return rollout.collect(
        net, state.theta, state.world, length, noise, config.normalize, config.gamma, episodes, act
    )  # fmt: skip


def learning_rate(state: Counted, config: Ascending) -> float:
    """The optimiser's, falling linearly to 0 over the run where the settings say so."""
    rate, progress = config.optimizer.learning_rate, state.step / config.total_steps
    return optimizers.linear(rate, progress, config.anneal_learning_rate)


def ascend(
    theta: Float[Tensor, " d"],
    memory: optimizers.State,
    gradient: Float[Tensor, " d"],
    config: Ascending,
    rate: float,
    part: slice = slice(None),
) -> tuple[Float[Tensor, " d"], optimizers.State, float]:
    """One step uphill along the mean gradient of all ranks, clipped, of all of θ or a part; its norm before clipping.

    Raises:
        ValueError: a gradient that is not finite; θ is as it was.
    """
    if not torch.compiler.is_compiling():  # a compiled program is one process' own
        distributed.average_(gradient)
    slope, averages = gradient[part], tuple(average[part] for average in memory.memory)
    norm = number(optimizers.clip_norm(slope, config.max_grad_norm))
    if isinstance(norm, float) and not math.isfinite(norm):
        raise ValueError(
            f"the gradient is not finite, its norm is {norm}, after {memory.step} gradient steps; θ was not changed"
        )
    _, moved = config.optimizer.ascend(theta[part], optimizers.State(memory.step, averages), slope, rate)  # in place
    return theta, memory._replace(step=moved.step), norm


def number(value: Float[Tensor, ""]) -> float:
    """As a number; inside a compiled program it stays a tensor, which goes wherever a number does."""
    return value if torch.compiler.is_compiling() else float(value)  # type: ignore[return-value]


def means(parts: NamedTuple, valid: Bool[Tensor, " B"] | None) -> dict[str, float]:
    """The mean of every named part of an objective over the transitions that count."""
    named = {name: part for name, part in parts._asdict().items() if part is not None}
    return {name: number(reductions.token_mean(part.detach(), valid)) for name, part in named.items()}


def kl(logp: Float[Tensor, " B"], batch: rollout.Batch) -> float:
    """KL[π_old || π_θ] by k3, the mean over the transitions of all ranks."""
    each = divergences.k3(batch.logp_old, logp.detach())
    mean = reductions.token_mean(each, batch.valid, rollout.counted(batch))
    return number(mean if torch.compiler.is_compiling() else distributed.average_(mean))


def advance(
    state: State,
    theta: Float[Tensor, " d"],
    optimizer: optimizers.State,
    world: rollout.World,
    remembered: dict[str, float] | None = None,
) -> State:
    """The state after an iteration."""
    step = int(distributed.total_(torch.tensor(world.steps)))
    return State(theta, optimizer, world, state.iteration + 1, step, remembered or {})


def report(session: Run, state: State, net: Net, config: Basic, numbers: Numbers) -> None:
    """An iteration's numbers to the metrics, the state to a checkpoint when one is due."""
    if state.iteration % config.run.log_interval == 0 or state.step >= config.total_steps:
        plain = {name: float(value) for name, value in numbers.items()}
        session.record(state.step, {**rollout.summary(state.world), **plain})
    if session.due():
        session.save(state.step, pack(state), {"layout": net.layout.table()})


def finish(session: Run, state: State, net: Net, config: Basic) -> Agent:
    """The last checkpoint, the summary, and the trained agent."""
    session.save(state.step, pack(state), {"layout": net.layout.table()})
    session.finish(state.step, rollout.summary(state.world))
    world = state.world
    return Agent(
        net, state.theta, config.environment, config.normalize, world.normalizer, world.envs.action_space
    )  # fmt: skip


def pack(state: State) -> dict[str, Tensor]:
    """All resumable state as tensors."""
    return {
        "theta": state.theta,
        **optimizers.pack(state.optimizer),
        **distributed.collected("world", rollout.pack(state.world)),
        **{f"own.{name}": torch.tensor(value, dtype=torch.float64) for name, value in state.remembered.items()},
        "iteration": torch.tensor(state.iteration),
        "step": torch.tensor(state.step),
    }
