"""TD3, twin delayed DDPG (Fujimoto et al. 2018, arXiv:1802.09477), S4's rival of SAC: DDPG, three times more careful.

Psi         none: ∇π flows through Q and the action, ∇_a Q(s, a) ∇_θ π(s)
surrogate   Q1(s, π(s))
constraint  none; the targets' parameters follow slowly
data        a replay of π's own actions with noise, used many times
maximised   - ½ Σ_i (Q_i - target)²; every `policy_delay`-th time the surrogate

target is r + γ min(Q̄1, Q̄2)(s', a'), a' = π̄(s') + clipped noise, algorithm 1; r where the transition terminated.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.control import (
    action_noise,
    actors,
    environments,
    normalization,
    offpolicy,
    offpolicy_program,
    optimizers,
    replay,
)
from upslope.control.agent import Agent
from upslope.control.networks import seeded
from upslope.control.offpolicy import State
from upslope.control.parameters import Net
from upslope.core import distributions, values
from upslope.runs import run as runs
from upslope.runs import settings
from upslope.runs.randomness import derive
from upslope.runs.run import Run


@dataclass(frozen=True)
class TD3:
    """What is TD3's own; what every algorithm shares (environment, network, …, run) is nested."""

    environment: environments.Config = field(default_factory=lambda: environments.Config("Pendulum-v1", num_envs=1))
    network: actors.Config = field(default_factory=actors.Config)
    normalize: normalization.Config = field(default_factory=normalization.Config)
    optimizer: optimizers.Optimizer = field(default_factory=lambda: optimizers.Adam(learning_rate=1e-3, epsilon=1e-8))
    noise: action_noise.Config = field(default_factory=action_noise.Config)  # of behaviour
    run: runs.Options = field(default_factory=lambda: runs.Config(log_interval=200))
    total_steps: int = 20_000  # environment steps, all environments together
    replay_capacity: int = 1_000_000  # observations kept
    learning_starts: int = 100  # environment steps with random actions, before the first gradient step
    train_interval: int = 1  # steps of each environment per iteration
    gradient_steps: int | None = 1  # per iteration; None: as many as environment steps
    batch_size: int = 256  # transitions per gradient step
    gamma: float = 0.99  # discount per step
    n_step: int = 1  # rewards in a target, before the critic's own estimate
    target_tau: float = 0.005  # of the way that the targets move each time
    policy_delay: int = 2  # gradient steps of Q to one of π and of the targets
    smoothing_std: float = 0.2  # of the noise on the target's action, in fractions of its range [-1, 1]
    smoothing_clip: float = 0.5  # where that noise is cut
    max_grad_norm: float | None = None
    anneal_learning_rate: bool = False  # linearly to 0 over the run

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "train_interval", "gradient_steps", "batch_size", "policy_delay")
        settings.within(self, 1, None, "replay_capacity", "n_step")
        settings.within(self, 0, None, "learning_starts", "smoothing_std", "smoothing_clip")
        settings.within(self, 0, 1, "gamma", "target_tau")
        settings.positive(self, "max_grad_norm")


class Nets(NamedTuple):
    """The networks, and what goes with them."""

    actor: Net
    critic: Net  # Q1 and Q2
    judge: Float[Tensor, " q"]  # the critic's θ, the same memory, through which no gradient flows to it


class Terms(NamedTuple):
    """The objectives' parts per transition, before any reduction."""

    q_error: Float[Tensor, " B"]  # ½ Σ_i (Q_i - target)²
    q: Float[Tensor, " B"]  # Q1(s, a)


def critic_objective(
    theta: Float[Tensor, " q"], nets: Nets, batch: replay.Batch, target: Float[Tensor, " B"]
) -> tuple[Tensor, Terms]:
    """- the mean of ½ Σ_i (Q_i(s, a) - target)²; and its parts."""
    q = nets.critic(theta, batch.observation, batch.action)
    error = 0.5 * values.squared_error(q, target.expand_as(q)).sum(0)
    return -error.mean(), Terms(error.detach(), q[0].detach())


def objective(theta: Float[Tensor, " d"], nets: Nets, batch: replay.Batch) -> tuple[Tensor, tuple[()]]:
    """The mean of Q1(s, π(s))."""
    action = nets.actor(theta, batch.observation).mode()
    return nets.critic(nets.judge, batch.observation, action, 1).mean(), ()


@torch.no_grad()
def estimate(
    state: State, nets: Nets, batch: replay.Batch, noise: Float[Tensor, "B k"], config: TD3
) -> Float[Tensor, " B"]:
    """The target of Q: r + γ min(Q̄1, Q̄2)(s', π̄(s') + clipped noise)."""
    policy = nets.actor(state.others["actor_target"], batch.next_observation)
    shift = (config.smoothing_std * noise).clamp(-config.smoothing_clip, config.smoothing_clip)
    action = distributions.rescale((policy.unit + shift).clamp(-1, 1), policy.low, policy.high)
    q = nets.critic(state.others["critic_target"], batch.next_observation, action)
    return values.td_target(batch.reward, q.amin(0), batch.discount)


def update(
    state: State, nets: Nets, batch: replay.Batch, target: Float[Tensor, " B"], due: bool, config: TD3
) -> tuple[State, Terms, dict[str, float]]:
    """One step uphill of both Qs and, where due, of π, and of the targets; θs and memories are updated in place."""
    state, part, q_norm = offpolicy.ascend(state, "critic", nets.critic, config, critic_objective, nets, batch, target)
    if not due:
        return state, part, {"q_grad_norm": q_norm}
    state, _, norm = offpolicy.ascend(state, "theta", nets.actor, config, objective, nets, batch)
    offpolicy.follow(state.others["actor_target"], state.theta, config.target_tau)
    offpolicy.follow(state.others["critic_target"], state.others["critic"], config.target_tau)
    return state, part, {"grad_norm": norm, "q_grad_norm": q_norm}


def learn(
    state: State, nets: Nets, batch: replay.Batch, noise: Float[Tensor, "B k"], config: TD3, due: bool
) -> tuple[State, Terms, dict[str, float]]:
    """One gradient step of Q, where due of π; what is compiled where that pays."""
    # 2. estimate the target
    target = estimate(state, nets, batch, noise, config)

    # 3. objectives and 4. update: one step of Q, and of π when it is due
    return update(state, nets, batch, target, due, config)


def begin(config: TD3, session: Run, theta: Float[Tensor, " d"] | None = None) -> tuple[State, Nets]:
    """The networks, and the state a run begins or goes on with."""
    space, actions, _ = environments.describe(config.environment)
    seed = derive(config.run.seed, "critic")
    critic = Net(seeded(lambda: actors.Critics(space, actions, config.network, 2), seed))
    first = critic.initial()
    start = lambda theta: (  # noqa: E731
        {"critic": first, "critic_target": first.clone(), "actor_target": theta.clone(),
         **action_noise.start(config, len(actors.bounds(actions)[0]))},
        {"theta": config.optimizer.start(theta), "critic": config.optimizer.start(first)},
    )  # fmt: skip
    state, actor = offpolicy.start(config, session, start, theta)
    judge = critic.freeze(critic.bind(state.others["critic"]).detach())
    critic.freeze(state.others["critic_target"])
    actor.freeze(state.others["actor_target"])
    return state, Nets(actor, critic, judge)


def train(config: TD3, session: Run | None = None, theta: Float[Tensor, " d"] | None = None) -> Agent:
    """Train and return the agent.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
        theta: parameters that a new run's actor starts from; by default the network's own initialisation.
    """
    with session or Run("td3", config, config.total_steps) as session:
        state, nets = begin(config, session, theta)
        acts = action_noise.behaviour(nets.actor, state.world.envs, config)
        step, choose = offpolicy_program.of(learn, action_noise.act, acts, nets, config, session)
        shape = (config.batch_size, *state.replay.action.shape[1:])
        normal = lambda random, count: torch.randn(count, *shape, generator=random).unbind()  # noqa: E731
        chance = offpolicy.chances(config, normal, math.prod(shape))
        while state.step < config.total_steps:
            # 1. collect: steps of every environment into the replay
            state = offpolicy.collect(choose, state, config, config.train_interval)

            count, part = offpolicy.gradient_steps(state, config), None
            numbers: dict[str, float] = {}
            for k in range(count):
                where, noise = chance.at(state.updates + k)
                drawn = offpolicy.draw(state, config, where, config.n_step)
                due = (state.updates + k + 1) % config.policy_delay == 0
                state, part, now = step(state, nets, drawn, noise, config, due)  # 2. to 4., see `learn`
                numbers |= now

            state = offpolicy.advance(state, count)
            offpolicy.report(session, state, nets.actor, config, part, numbers)
        return offpolicy.finish(session, state, nets.actor, config)
