"""What the off-policy algorithms share around their four steps: how a run starts, goes on, and ends; the replay."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float
from torch import Tensor

from upslope.control import environments, learner, normalization, optimizers, replay, rollout
from upslope.control.agent import Agent
from upslope.control.networks import Observation, to_tensors
from upslope.control.parameters import Net
from upslope.control.replay import Replay
from upslope.core import values
from upslope.runs import distributed
from upslope.runs.randomness import Blocks, derive
from upslope.runs.run import Run


class State(NamedTuple):
    """Everything a resumed run needs to go on as if nothing had happened."""

    theta: Float[Tensor, " d"]  # of the network that acts
    others: dict[str, Tensor]  # every other θ by name: targets, critics, a temperature
    optimizer: dict[str, optimizers.State]  # by the name of what it moves, "theta" among them
    world: rollout.World
    replay: Replay
    iteration: int
    step: int  # environment steps so far
    updates: int  # gradient steps so far
    action: np.ndarray | None = None  # in answer to the world's observation, where the last gradient step gave it too


class Config(learner.Config, Protocol):
    """What every off-policy algorithm's settings have."""

    @property
    def replay_capacity(self) -> int: ...  # rows; 0: no replay, every transition is learned from once
    @property
    def learning_starts(self) -> int: ...
    @property
    def train_interval(self) -> int: ...
    @property
    def gradient_steps(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def gamma(self) -> float: ...


Start = Callable[[Float[Tensor, " d"]], tuple[dict[str, Tensor], dict[str, optimizers.State]]]
Act = Callable[..., Tensor]  # (θ, observation, noise, …) -> actions
Behaviour = Callable[[State, Observation, int], Tensor | tuple[Any, ...]]
"""(state, observation as the network sees it, step of the iteration) -> what `Act` takes after θ, or the actions."""
Choose = Callable[[State, Observation, int], Tensor]
"""As `Behaviour`, the actions."""


def start(
    config: Config,
    session: Run,
    begin: Start,
    theta: Float[Tensor, " d"] | None = None,
    prioritised: bool = False,
) -> tuple[State, Net]:
    """The state a run begins with, or the one that its checkpoint holds; `theta` is where a new run starts from.

    Args:
        config: all settings; `config.network.build(observation_space, action_space, seed)` makes the network that acts.
        session: the run.
        begin: the other parameters and all optimisers' memories of a new run, from its first θ.
        theta: parameters that a new run starts from; by default the network's own initialisation.
        prioritised: the replay keeps priorities.

    Raises:
        ValueError: `theta` does not fit the network; more than one rank; rewards normalised.
    """
    if distributed.world_size() > 1:
        raise ValueError(f"off-policy algorithms run in one process, got {distributed.world_size()} ranks")
    if config.normalize.reward:
        raise ValueError("normalize.reward is for on-policy algorithms: a replay's rewards are of many scales")
    seed = config.run.seed
    saved = None if session.restored is None else session.restored.tensors
    if saved is None:
        world = rollout.begin(config.environment, config.normalize, seed)
    else:
        world = rollout.unpack(distributed.own("world", saved), config.environment, config.normalize, seed)
    session.closes(world.envs)
    space, actions = world.envs.observation_space, world.envs.action_space
    net = Net(config.network.build(space, actions, derive(seed, "network")))
    stack = 1 if config.environment.atari is None else config.environment.atari.frame_stack
    rows = config.replay_capacity or 2 * (config.train_interval + 1 + stack) * world.envs.num_envs
    memory = Replay(space, actions, world.envs.num_envs, rows, prioritised, stack)
    if saved is not None:
        assert session.restored is not None
        memory.unpack(saved, session.restored.segments)
        named = {name.split(".")[1] for name in saved if name.startswith("optimizers.")}
        optimizer = {name: optimizers.unpack(_beneath(f"optimizers.{name}.", saved)) for name in sorted(named)}
        others, theta = _beneath("others.", saved), net.bind(saved["theta"])
        iteration, step, updates = (int(saved[name]) for name in ("iteration", "step", "updates"))
        # A pool's episodes begin anew. Of other environments that cannot be restored exactly the action is kept.
        known = "action" in saved and world.envs.kind != "pool"
        action = saved["action"].numpy() if known else None
        return State(theta, _sorted(others), optimizer, world, memory, iteration, step, updates, action), net
    memory.begin(world.observation)
    initial = net.initial()
    if theta is not None:
        net.views(theta)  # refuses another shape
        initial.copy_(theta)
    theta = net.bind(initial)
    others, optimizer = begin(theta)
    return State(theta, _sorted(others), _sorted(optimizer), world, memory, 0, 0, 0), net


def choosing(act: Act, behaviour: Behaviour) -> Choose:
    """What `act`, a function of θ and what the behaviour gives it, chooses."""

    def choose(state: State, observation: Observation, t: int) -> Tensor:
        given = behaviour(state, observation, t)
        return given if isinstance(given, Tensor) else act(state.theta, *given)

    return choose


def collect(choose: Choose, state: State, config: Config, length: int) -> State:
    """Some steps of every environment into the replay, observation statistics frozen; the state, its world after."""
    world, normalize = state.world, config.normalize
    returns, lengths = world.episode_return.copy(), world.episode_length.copy()
    raw, finished, taken, seen = world.observation, [], world.steps, []
    for t in range(length):
        if t > 0 or state.action is None:
            action = choose(state, sight(world, raw, config), t).detach().numpy()
        else:
            action = state.action
        before = to_tensors(raw) if normalize.observation else None
        step = world.envs.step(action)
        returns += step.reward
        lengths += 1 if step.valid is None else step.valid
        taken += len(returns) if step.valid is None else int(step.valid.sum())
        over = step.ended.nonzero()[0]
        if len(over):
            finished += [(float(returns[i]), int(lengths[i])) for i in over]
            returns[over], lengths[over] = 0.0, 0
        if normalize.reward_sign:
            step = step._replace(reward=np.sign(step.reward))
        state.replay.append(action, step)
        if before is not None:
            seen.append((before, step.valid))
        raw = step.observation
    statistics = world.normalizer
    for observation, valid in seen:
        statistics = normalization.observe(
            statistics, _one_step(observation), None if valid is None else torch.from_numpy(valid).unsqueeze(1)
        )
    recent = np.concatenate([world.recent, finished])[-rollout.RECENT :] if finished else world.recent
    after = rollout.World(
        world.envs, raw, returns, lengths, recent, world.episodes + len(finished), taken, statistics
    )  # fmt: skip
    return state._replace(world=after, action=None)


def sight(world: rollout.World, raw: environments.Observation, config: Config) -> Observation:
    """An observation as the network sees it."""
    return normalization.observation(world.normalizer, to_tensors(raw), config.normalize)


def random_actions(space: spaces.Space, num_envs: int, generator: torch.Generator) -> Tensor:
    """Uniform actions of a Discrete space (from 0) or a bounded Box."""
    if isinstance(space, spaces.Discrete):
        return torch.randint(int(space.n), (num_envs,), generator=generator)
    low, high = (torch.from_numpy(bound.reshape(-1)) for bound in (space.low, space.high))  # type: ignore[attr-defined]
    return low + (high - low) * torch.rand(num_envs, len(low), generator=generator)


def chances(
    config: Config,
    noise: Callable[[torch.Generator, int], Sequence[Any]] | None = None,
    each: int = 0,
    prioritised: bool = False,
) -> Blocks[tuple[np.ndarray, Any]]:
    """Of each gradient step: where in the replay its batch is drawn from, as far as chance says it, and its noise.

    Args:
        config: the algorithm's settings.
        noise: (generator, count) -> the noise of that many gradient steps; None: they have none.
        each: numbers that the noise of one is made of.
        prioritised: the replay keeps priorities.
    """
    size = config.batch_size
    spare = size // 4 + 8  # for rows from which no transition begins

    def draw(random: torch.Generator, count: int) -> list[tuple[np.ndarray, Any]]:
        if prioritised:
            places = torch.rand(count, size, generator=random, dtype=torch.float64)
        else:
            places = torch.randint(2**62, (count, size + spare), generator=random)
        return list(zip(places.numpy(), [None] * count if noise is None else noise(random, count), strict=True))

    return Blocks(draw, size + spare + each, config.run.seed, "replay")


def draw(state: State, config: Config, places: np.ndarray, n: int = 1, beta: float | None = None) -> replay.Drawn:
    """B transitions of n steps: uniform, or with β prioritised; without a replay those just collected."""
    weights = None
    if not config.replay_capacity:
        row = state.replay.recent(state.replay.transitions - state.step)
    elif beta is None:
        row = state.replay.uniform(config.batch_size, places)
    else:
        row, weights = state.replay.prioritised(places, beta)
    return replay.Drawn(row, weights, config.gamma, n)


def batch(state: State, config: Config, drawn: replay.Drawn) -> replay.Batch:
    """What was drawn, as the network sees it."""
    whole = state.replay.batch(drawn.row, drawn.gamma, drawn.n, drawn.weight)
    return seen(whole, state.world.normalizer, config)


def seen(batch: replay.Batch, normalizer: normalization.Normalizer, config: Config) -> replay.Batch:
    """With its observations normalised."""
    here, there = (
        normalization.observation(normalizer, observation, config.normalize)
        for observation in (batch.observation, batch.next_observation)
    )
    return batch._replace(observation=here, next_observation=there)


def gradient_steps(state: State, config: Config) -> int:
    """Of this iteration: the setting, or as many as there were environment steps; none before `learning_starts`."""
    fresh = state.world.steps - state.step  # none where every row was a reset row
    if state.world.steps <= config.learning_starts or not (fresh or config.replay_capacity):
        return 0
    return fresh if config.gradient_steps is None else config.gradient_steps


def ascend(
    state: State, name: str, net: Net, config: Config, objective: Callable[..., tuple[Tensor, Any]], *inputs: Any
) -> tuple[State, Any, float]:
    """One step of one θ along the gradient of objective(θ, *inputs), in place; what that returns beside its value."""
    theta = state.theta if name == "theta" else state.others[name]
    gradient, _, extra = net.gradient(objective, theta, *inputs)
    state, norm = climb(state, name, gradient, config)
    return state, extra, norm


def climb(state: State, name: str, gradient: Float[Tensor, " d"], config: Config) -> tuple[State, float]:
    """One step of one θ along this gradient, in place; the gradient's norm before clipping."""
    theta, rate = state.theta if name == "theta" else state.others[name], learner.learning_rate(state, config)
    _, memory, norm = learner.ascend(theta, state.optimizer[name], gradient, config, rate)
    return state._replace(optimizer={**state.optimizer, name: memory}), norm


def follow(target: Float[Tensor, " d"], theta: Float[Tensor, " d"], tau: float) -> None:
    """A target network's θ̄ moves a share of the way to θ, in place."""
    target.copy_(values.polyak(target, theta, tau))


def passed(interval: int, before: int, now: int) -> bool:
    """Has a multiple of the interval been reached since?

    >>> passed(10, 9, 10), passed(10, 10, 19), passed(10, 5, 40)
    (True, False, True)
    """
    return now // interval > before // interval


def advance(state: State, updates: int) -> State:
    """The state after an iteration."""
    return state._replace(
        iteration=state.iteration + 1, step=state.world.steps, updates=state.updates + updates
    )  # fmt: skip


def report(session: Run, state: State, net: Net, config: Config, part: Any, numbers: dict[str, float]) -> None:
    """The means of the last objective's parts and other numbers to the metrics, the state to a checkpoint when due."""
    if state.iteration % config.run.log_interval == 0 or state.step >= config.total_steps:
        means = {} if part is None else learner.means(part, None)
        summary = {**rollout.summary(state.world), "gradient_steps": state.updates}
        session.record(state.step, {**summary, **means, **numbers})
    if session.due():
        _save(session, state, net)


def finish(session: Run, state: State, net: Net, config: Config) -> Agent:
    """The last checkpoint, the summary, and the trained agent."""
    _save(session, state, net)
    session.finish(state.step, rollout.summary(state.world))
    world = state.world
    return Agent(
        net, state.theta, config.environment, config.normalize, world.normalizer, world.envs.action_space
    )  # fmt: skip


def _save(session: Run, state: State, net: Net) -> None:
    session.save(state.step, pack(state), {"layout": net.layout.table()}, state.replay.segments())


def pack(state: State) -> dict[str, Tensor]:
    """All resumable state as tensors, but for the replay's segments."""
    memories = {
        f"optimizers.{name}.{part}": value
        for name, memory in state.optimizer.items()
        for part, value in optimizers.pack(memory).items()
    }
    counts = {name: torch.tensor(getattr(state, name)) for name in ("iteration", "step", "updates")}
    others = {f"others.{name}": value for name, value in state.others.items()}
    world = distributed.collected("world", rollout.pack(state.world))
    chosen = {} if state.action is None else {"action": torch.from_numpy(state.action)}
    return {"theta": state.theta, **others, **memories, **world, **state.replay.pack(), **counts, **chosen}


def _sorted(named: dict[str, Any]) -> dict[str, Any]:
    """By name: a resumed run has the order of a new one, and so the same compiled programs."""
    return dict(sorted(named.items()))


def _beneath(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _one_step(observation: Observation) -> Observation:
    """[N, …] as [N, 1, …], the shape of a rollout."""
    if isinstance(observation, dict):
        return {name: part.unsqueeze(1) for name, part in observation.items()}
    return observation.unsqueeze(1)
