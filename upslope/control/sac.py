"""SAC, Soft Actor-Critic (Haarnoja et al. 2018; S4 2.5 and alg 3): reward and entropy, from a replay.

Psi         none: ∇π flows through Q and the reparametrised action, S4 eq 2.24
surrogate   min(Q1, Q2)(s, a) - α log π(a|s), a = f(noise; s), S4 eqs 2.23, 2.24       core/values.py
constraint  none; the target's parameters follow slowly
data        a replay of π's own actions, used many times
maximised   - ½ Σ_i (Q_i - target)², S4 eq 2.21;  the surrogate;  log α (log π + H̄)

target is r + γ (min(Q̄1, Q̄2)(s', a') - α log π(a'|s')), a' ~ π, as Stable-Baselines3 has it (S4 2.5.3), or with
`value_network` r + γ V̄(s'), S4 eq 2.22, V fitted to min(Q1, Q2) - α log π by - ½ (V - …)², S4 eq 2.20. S4 leaves out α,
one of the Qs and what happens where an episode terminates (then the target is r): they are put in here.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.control import (
    actors,
    environments,
    learner,
    normalization,
    offpolicy,
    offpolicy_program,
    optimizers,
    replay,
)
from upslope.control.agent import Agent
from upslope.control.networks import Observation, seeded
from upslope.control.offpolicy import State
from upslope.control.parameters import Net
from upslope.core import values
from upslope.runs import run as runs
from upslope.runs import settings
from upslope.runs.randomness import Blocks, derive, generator
from upslope.runs.run import Run


@dataclass(frozen=True)
class SAC:
    """What is SAC's own; what every algorithm shares (environment, network, …, run) is nested."""

    environment: environments.Config = field(default_factory=lambda: environments.Config("Pendulum-v1", num_envs=1))
    network: actors.Stochastic = field(default_factory=actors.Stochastic)
    normalize: normalization.Config = field(default_factory=normalization.Config)
    optimizer: optimizers.Optimizer = field(default_factory=lambda: optimizers.Adam(learning_rate=3e-4, epsilon=1e-8))
    run: runs.Options = field(default_factory=lambda: runs.Config(log_interval=200))
    total_steps: int = 20_000  # environment steps, all environments together
    replay_capacity: int = 1_000_000  # observations kept
    learning_starts: int = 100  # environment steps with random actions, before the first gradient step
    train_interval: int = 1  # steps of each environment per iteration
    gradient_steps: int | None = 1  # per iteration; None: as many as environment steps
    batch_size: int = 256  # transitions per gradient step
    gamma: float = 0.99  # discount per step
    target_tau: float = 0.005  # of the way that the target moves at each gradient step
    alpha: float = 1.0  # temperature, reward per nat; where it is learned, its first value
    learn_alpha: bool = True  # so that the entropy becomes target_entropy
    target_entropy: float | None = None  # nats, of actions as fractions of their range [-1, 1]; None: - their number
    value_network: bool = False  # S4's V and V̄; else Q̄1 and Q̄2
    max_grad_norm: float | None = None
    anneal_learning_rate: bool = False  # linearly to 0 over the run

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "train_interval", "gradient_steps", "batch_size")
        settings.within(self, 1, None, "replay_capacity")
        settings.within(self, 0, None, "learning_starts")
        settings.within(self, 0, 1, "gamma", "target_tau")
        settings.positive(self, "alpha", "max_grad_norm")


class Nets(NamedTuple):
    """The networks, and what goes with them."""

    actor: Net
    critic: Net  # Q1 and Q2
    judge: Float[Tensor, " q"]  # the critic's θ, the same memory, through which no gradient flows to it
    value: Net | None  # V
    log_range: float  # Σ log((high - low)/2): α and entropies do not depend on the units of actions
    target_entropy: float


class Terms(NamedTuple):
    """The objectives' parts per transition, before any reduction."""

    q_error: Float[Tensor, " B"]  # ½ Σ_i (Q_i - target)²
    q: Float[Tensor, " B"]  # Q1(s, a)
    entropy: Float[Tensor, " B"]  # - log π(a|s), nats, of actions as fractions of their range


def draw(
    theta: Float[Tensor, " d"], nets: Nets, observation: Observation, noise: Float[Tensor, "B k"]
) -> tuple[Float[Tensor, "B k"], Float[Tensor, " B"]]:
    """a ~ π(·|s) with its log π, of actions as fractions of their range."""
    action, logp = nets.actor(theta, observation).sample_log_prob(noise)
    return action, logp + nets.log_range


def critic_objective(
    theta: Float[Tensor, " q"], nets: Nets, batch: replay.Batch, target: Float[Tensor, " B"]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """- the mean of ½ Σ_i (Q_i(s, a) - target)², S4 eq 2.21."""
    q = nets.critic(theta, batch.observation, batch.action)
    error = 0.5 * values.squared_error(q, target.expand_as(q)).sum(0)
    return -error.mean(), (error.detach(), q[0].detach())


def value_objective(
    theta: Float[Tensor, " v"], nets: Nets, batch: replay.Batch, target: Float[Tensor, " B"]
) -> tuple[Tensor, tuple[()]]:
    """- the mean of ½ (V(s) - target)², S4 eq 2.20."""
    assert nets.value is not None
    return -0.5 * values.squared_error(nets.value(theta, batch.observation), target).mean(), ()


def objective(
    theta: Float[Tensor, " d"], nets: Nets, batch: replay.Batch, noise: Float[Tensor, "B k"], alpha: float
) -> tuple[Tensor, Tensor]:
    """The mean of min(Q1, Q2)(s, a) - α log π(a|s), S4 eq 2.24; and log π."""
    action, logp = draw(theta, nets, batch.observation, noise)
    q1, q2 = nets.critic(nets.judge, batch.observation, action)
    return values.soft_value(q1, q2, logp, alpha).mean(), logp.detach()


@torch.no_grad()
def estimate(
    state: State, nets: Nets, batch: replay.Batch, noise: Float[Tensor, "2 B k"], alpha: float, config: SAC
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"] | None]:
    """The target of Q, and V's where there is a V."""
    if nets.value is not None:
        action, logp = draw(state.theta, nets, batch.observation, noise[0])
        q1, q2 = nets.critic(nets.judge, batch.observation, action)
        following = nets.value(state.others["target"], batch.next_observation)
        return values.td_target(batch.reward, following, batch.discount), values.soft_value(q1, q2, logp, alpha)
    action, logp = draw(state.theta, nets, batch.next_observation, noise[1])
    q1, q2 = nets.critic(state.others["target"], batch.next_observation, action)
    return values.soft_target(batch.reward, q1, q2, logp, alpha, batch.discount), None


def update(
    state: State,
    nets: Nets,
    batch: replay.Batch,
    targets: tuple[Float[Tensor, " B"], Float[Tensor, " B"] | None],
    noise: Float[Tensor, "2 B k"],
    alpha: float,
    config: SAC,
) -> tuple[State, Terms, dict[str, float]]:
    """One step of V, of both Qs, of π and of α, each uphill; θs and memories are updated in place."""
    if nets.value is not None:
        state, _, _ = offpolicy.ascend(state, "value", nets.value, config, value_objective, nets, batch, targets[1])
    state, (error, q), q_norm = offpolicy.ascend(
        state, "critic", nets.critic, config, critic_objective, nets, batch, targets[0]
    )
    state, logp, norm = offpolicy.ascend(state, "theta", nets.actor, config, objective, nets, batch, noise[0], alpha)
    if config.learn_alpha:  # ∂ log α (log π + H̄) / ∂ log α
        state, _ = offpolicy.climb(state, "log_alpha", (logp.mean() + nets.target_entropy).reshape(1), config)
    return state, Terms(error, q, -logp), {"grad_norm": norm, "q_grad_norm": q_norm, "alpha": alpha}


def learn(
    state: State, nets: Nets, batch: replay.Batch, noise: Float[Tensor, "2 B k"], config: SAC
) -> tuple[State, Terms, dict[str, float]]:
    """One gradient step of everything; what is compiled where that pays."""
    # 2. estimate the targets
    alpha = temperature(state, config)
    targets = estimate(state, nets, batch, noise, alpha, config)

    # 3. objectives and 4. update: one step of each
    state, part, numbers = update(state, nets, batch, targets, noise, alpha, config)
    online = state.others["critic" if nets.value is None else "value"]
    offpolicy.follow(state.others["target"], online, config.target_tau)
    return state, part, numbers


def act(net: Net, theta: Float[Tensor, " d"], observation: Observation, noise: Tensor) -> Float[Tensor, "N k"]:
    """a ~ π(·|s)."""
    return net(theta, observation).sample(noise)


def behaviour(net: Net, envs: environments.Environments, config: SAC) -> offpolicy.Behaviour:
    """π's own actions; before `learning_starts` uniform ones. The noise is the step's own, gSDE's the iteration's."""
    n, head = envs.num_envs, net.module.policy.head  # type: ignore[union-attr]
    shape: tuple[int, ...] = (n, *head.noise_shape)  # type: ignore[union-attr]

    def draw(random: torch.Generator, count: int) -> list[Tensor]:
        return list(torch.randn(count, *shape, generator=random))

    steps = Blocks(draw, math.prod(shape), config.run.seed, "behaviour")

    def given(state: State, observation: Observation, t: int) -> Tensor | tuple[Any, ...]:
        place = state.iteration * config.train_interval + t
        if state.step + t * n < config.learning_starts:
            return offpolicy.random_actions(envs.action_space, n, generator(config.run.seed, "uniform", place))
        return observation, steps.at(state.iteration if head.state_dependent else place)  # type: ignore[union-attr]

    return given


def begin(config: SAC, session: Run, theta: Float[Tensor, " d"] | None = None) -> tuple[State, Nets]:
    """The networks, and the state a run begins or goes on with."""
    space, actions, _ = environments.describe(config.environment)
    seed, value = config.run.seed, None
    critic = Net(seeded(lambda: actors.Critics(space, actions, config.network, 2), derive(seed, "critic")))
    first = {"critic": critic.initial()}
    if config.value_network:
        value = Net(seeded(lambda: actors.Value(space, config.network), derive(seed, "value")))
        first["value"] = value.initial()
    if config.learn_alpha:
        first["log_alpha"] = torch.full((1,), math.log(config.alpha))
    target = (value or critic).initial()
    start = lambda theta: (  # noqa: E731
        {**first, "target": target},
        {name: config.optimizer.start(moved) for name, moved in {"theta": theta, **first}.items()},
    )  # fmt: skip
    state, actor = offpolicy.start(config, session, start, theta)
    judge = critic.freeze(critic.bind(state.others["critic"]).detach())
    if value is not None:
        value.bind(state.others["value"])
    (value or critic).freeze(state.others["target"])
    low, high = actors.bounds(actions)
    wanted = -float(len(low)) if config.target_entropy is None else config.target_entropy
    return state, Nets(actor, critic, judge, value, float(((high - low) / 2).log().sum()), wanted)


def temperature(state: State, config: SAC) -> float:
    """α, learned or fixed."""
    return learner.number(state.others["log_alpha"].exp().squeeze()) if config.learn_alpha else config.alpha


def train(config: SAC, session: Run | None = None, theta: Float[Tensor, " d"] | None = None) -> Agent:
    """Train and return the agent.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
        theta: parameters that a new run's actor starts from; by default the network's own initialisation.
    """
    with session or Run("sac", config, config.total_steps) as session:
        state, nets = begin(config, session, theta)
        acts = behaviour(nets.actor, state.world.envs, config)
        step, choose = offpolicy_program.of(learn, act, acts, nets, config, session)
        shape = (2, config.batch_size, *state.replay.action.shape[1:])
        normal = lambda random, count: torch.randn(count, *shape, generator=random).unbind()  # noqa: E731
        chance = offpolicy.chances(config, normal, math.prod(shape))
        while state.step < config.total_steps:
            # 1. collect: steps of every environment into the replay
            state = offpolicy.collect(choose, state, config, config.train_interval)

            count, part = offpolicy.gradient_steps(state, config), None
            numbers: dict[str, float] = {}
            for k in range(count):
                where, noise = chance.at(state.updates + k)
                drawn = offpolicy.draw(state, config, where)
                state, part, numbers = step(state, nets, drawn, noise, config)  # 2. to 4., see `learn`

            state = offpolicy.advance(state, count)
            offpolicy.report(session, state, nets.actor, config, part, numbers)
        return offpolicy.finish(session, state, nets.actor, config)
