"""DQN with tensor environments as one compiled program: the fast form of dqn.py, with its settings and gradient step.

A step acts in every environment, puts what it sees into the replay, draws a batch and takes one gradient step. All that
it moves on stays where it is from call to call: θ, the optimiser's memory, the environments, the replay. Chance is put
beside it for many steps at once, so that between two steps there is nothing but the call.

`train` is what `upslope train dqn` calls: it compiles where it can and is asked for or pays; else it is that of dqn.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from upslope.control import (
    ahead,
    compilation,
    dqn,
    offpolicy,
    offpolicy_program,
    optimizers,
    replay,
    tensor_environments,
    tensor_replay,
    tensor_rollout,
)
from upslope.control.agent import Agent
from upslope.control.dqn import DQN
from upslope.control.offpolicy import State
from upslope.control.parameters import Net
from upslope.control.replay import Ring, Rows
from upslope.control.rollout import World
from upslope.control.tensor_environments import TensorEnvironment
from upslope.control.tensor_rollout import Playing
from upslope.runs.randomness import BLOCK, Blocks
from upslope.runs.run import Run


class Standing(NamedTuple):
    """All that a step moves on, in place."""

    theta: Float[Tensor, " d"]
    others: dict[str, Tensor]
    steps: Float[Tensor, ""]  # float64, the optimiser's
    averages: tuple[Tensor, ...]  # the optimiser's own
    rows: Rows
    ring: Ring
    playing: Playing
    at: Int64[Tensor, " 1"]  # which of the steps for which chance is there


class Chance(NamedTuple):
    """What K steps are given; the first axis is the step."""

    epsilon: Float[Tensor, " K"]  # float64, share of random actions
    uniform: Float[Tensor, "K N"]
    any_action: Int64[Tensor, "K N"]
    places: Int64[Tensor, "K k"]  # where in the replay batches lie
    step: Float[Tensor, "K N s"]  # the environments' own
    reset: Float[Tensor, "K N r"]
    progress: Float[Tensor, " K"]  # float64, how far the run is


class Log(NamedTuple):
    """What K steps leave behind; the first axis is the step."""

    finite: Bool[Tensor, "K N"]  # what was seen before a step and after it
    ended: Bool[Tensor, "K N"]
    episode_return: Float[Tensor, "K N"]  # float64, after each step
    episode_length: Int64[Tensor, "K N"]
    grad_norm: Float[Tensor, " K"]  # float64


def step(
    now: Standing, chance: Chance, log: Log, net: Net, environment: TensorEnvironment, space: spaces.Space, config: DQN
) -> dqn.Terms:  # fmt: skip
    """One iteration of dqn.py: a step of every environment and a gradient step."""
    at, (state, total) = now.at, now.playing
    observe = functools.partial(tensor_environments.observe, environment)
    given = Chance(*(part.index_select(0, at).squeeze(0) for part in chance))

    # 1. collect: a step of every environment into the replay
    observation = observe(state)
    action = dqn.act(net, now.theta, observation, None, given.epsilon, given.uniform, given.any_action)
    acted = tensor_rollout.to_space(space, action)
    after, reward, terminated, truncated = environment.step(state, acted, given.step)
    ended, total = terminated | truncated, total + reward
    fresh = tensor_environments.restart(environment, after, ended, given.reset)
    kept = reward.sign() if config.normalize.reward_sign else reward
    seen = tensor_replay.Stepped(action, kept, terminated, ended, observe(after), observe(fresh))
    newest = tensor_replay.store(now.rows, now.ring, seen)

    # 2. to 4., see `dqn.learn`
    row = tensor_replay.uniform(now.rows, now.ring, given.places, config.batch_size, newest)
    batch = replay.gather(now.rows, replay.Drawn(row, None, config.gamma, config.n_step))
    nothing: Any = None
    memory, progress = optimizers.State(now.steps, now.averages), given.progress  # type: ignore[arg-type]
    inside = State(now.theta, now.others, {"theta": memory}, nothing, nothing, 0, progress, 0)  # type: ignore[arg-type]
    learned, part, numbers = dqn.learn(inside, net, batch, [None] * 3, config)

    finite = tensor_rollout.finite(observation, 1) & tensor_rollout.finite(seen.successor, 1)
    told = Log(finite, ended, total, after.time, torch.as_tensor(numbers["grad_norm"]))
    for column, value in zip(log, told, strict=True):
        column.index_copy_(0, at, value.to(column.dtype).unsqueeze(0))
    now.steps.copy_(learned.optimizer["theta"].step)  # type: ignore[arg-type]
    for old, new in zip((*state, now.playing.episode_return), (*fresh, torch.where(ended, 0.0, total)), strict=True):
        old.copy_(new)
    at.add_(1)
    return part


def program(net: Net, world: World, config: DQN) -> Callable[..., dqn.Terms]:
    """(now, chance, log) -> the objective's parts, of one step, compiled."""
    pure, settings = net.pure(), compilation.inside(config)
    environment, space = tensor_rollout.environment(world), world.envs.action_space

    def one(now: Standing, chance: Chance, log: Log) -> dqn.Terms:
        return step(now, chance, log, pure, environment, space, settings)

    return ahead.compiled(one, loops=False, kept=lambda: compilation.remember(config), steady=3)


def fits(config: DQN) -> bool:
    """Is an iteration of this run one step of tensor environments and one gradient step on uniform batches?"""
    n = config.environment.num_envs
    return (
        config.environment.vectorization == "tensor"
        and config.train_interval == 1
        and (config.gradient_steps or n) == 1
        and config.replay_capacity > 0
        and not config.priority_exponent
        and not config.normalize.observation
        and config.network.noisy == "none"
    )


def stretch(state: State, config: DQN) -> int:
    """How many iterations until something is to be done outside: a copy of the target, a row of metrics, other chance.

    It follows from where the run stands alone, so that a resumed run goes on with the same stretches.
    """
    n, target, log = config.environment.num_envs, config.target_interval, config.run.log_interval
    ends = [BLOCK - state.iteration % BLOCK, log - state.iteration % log, -(-(config.total_steps - state.step) // n)]
    if target:
        ends.append(-(-(target - state.step % target) // n))
    return min(ends)


def stand(state: State) -> tuple[Standing, Log]:
    """What the program moves on from here, and where it writes its log."""
    memory, n = state.optimizer["theta"], state.world.envs.num_envs
    playing = tensor_rollout.copied(tensor_rollout.begun(state.world))
    steps, at = torch.tensor(float(memory.step), dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    whole, real = torch.zeros(BLOCK, n, dtype=torch.int64), torch.zeros(BLOCK, n, dtype=torch.float64)
    now = Standing(
        state.theta, state.others, steps, memory.memory, state.replay.rows, state.replay.ring(), playing, at
    )  # fmt: skip
    return now, Log(whole.bool(), whole.bool(), real, whole, torch.zeros(BLOCK, dtype=torch.float64))


def foresee(
    state: State, behaviour: offpolicy.Behaviour, chances: Blocks[Any], count: int, config: DQN
) -> Chance:  # fmt: skip
    """What so many steps from here are given; the rest of the places is filled up, and not used."""
    n, nothing = config.environment.num_envs, torch.empty(0)
    coming = [state._replace(iteration=state.iteration + k, step=state.step + k * n) for k in range(count)]
    acts: Any = [behaviour(at, nothing, 0)[2:] for at in coming]
    places = [torch.from_numpy(chances.at(state.updates + k)[0]) for k in range(count)]
    progress = torch.tensor([at.step / config.total_steps for at in coming], dtype=torch.float64)
    noise = tensor_rollout.vector(state.world).noise(count)
    parts = (*(torch.stack(part) for part in zip(*acts, strict=True)), torch.stack(places), *noise, progress)
    return Chance(*(torch.cat([part, part[-1:].expand(BLOCK - count, *part.shape[1:])]) for part in parts))


def take(
    run: Callable[..., dqn.Terms], state: State, now: Standing, given: Chance, log: Log, count: int
) -> tuple[State, dqn.Terms, dict[str, float]]:
    """So many steps; the state, its world, replay and optimiser after them.

    Raises:
        ValueError: a reward, an observation or a gradient that is not finite; θ is then not to be used any more.
    """
    now.at.zero_()
    for _ in range(count):
        part = run(now, given, log)
    *rows, norms = (column[:count] for column in log)
    told = tensor_rollout.Log(torch.empty(state.world.envs.num_envs, count, 0), *(row.T for row in rows))
    world = tensor_rollout.advance(state.world, tensor_rollout.copied(now.playing), told)
    if not norms.isfinite().all():
        bad = int((~norms.isfinite()).nonzero()[0])
        raise ValueError(
            f"the gradient is not finite, grad_norm is {float(norms[bad])} at gradient step {state.updates + bad + 1}"
        )
    state.replay.advance(now.ring, rows[0].numel())
    memory = state.optimizer["theta"]._replace(step=int(now.steps))
    state = state._replace(world=world, optimizer={"theta": memory}, action=None)
    return state, part, {"grad_norm": float(norms[-1])}


def train(config: DQN, session: Run | None = None, theta: Float[Tensor, " d"] | None = None) -> Agent:
    """Train and return the agent, in a compiled program where that is asked for or pays.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
        theta: parameters that a new run starts from; by default the network's own initialisation.

    Raises:
        ValueError: a reward, an observation or a gradient that is not finite.
    """
    session = session or Run("dqn", config, config.total_steps)
    if not fits(config) or not offpolicy_program.chosen(config, session):
        return dqn.train(config, session, theta)
    with session:
        state, net = dqn.begin(config, session, theta)
        behaviour, chance = dqn.behaviour(net, state.world.envs, config), dqn.chances(net, config)
        choose = offpolicy.choosing(functools.partial(dqn.act, net), behaviour)
        run = program(net, state.world, config)
        standing: tuple[Standing, Log] | None = None
        nothing: dict[str, float] = {}
        part: dqn.Terms | None
        while state.step < config.total_steps:
            if state.step + config.environment.num_envs <= config.learning_starts:  # nothing to learn from yet
                state = offpolicy.collect(choose, state, config, 1)
                count, part, numbers = 0, None, nothing
            else:
                now, log = standing = standing or stand(state)
                count = stretch(state, config)
                given = foresee(state, behaviour, chance, count, config)
                state, part, numbers = take(run, state, now, given, log, count)
            dqn.refresh(state, config)
            state = offpolicy.advance(state, count)._replace(iteration=state.iteration + max(1, count))
            offpolicy.report(session, state, net, config, part, numbers)
        return offpolicy.finish(session, state, net, config)
