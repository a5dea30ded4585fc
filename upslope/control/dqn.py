"""Deep Q-learning, DQN (Mnih et al. 2015; S3 6.2 and alg 6), and what was added to it (S3 6.2.4).

Psi         none: values are regressed, no log-probability is weighed
surrogate   - Huber(Q(s,a) - target), S3 eq 12; target r + γ max Q̄(s',·), S3 alg 6     core/values.py
constraint  none; the target's θ̄ stands still between copies
data        a replay of ε-greedy (or noisy) behaviour, used many times
maximised   - mean w Huber(error)                                                      w = 1 without priorities

Approximate Q-learning (S3 6.2) is the plain setting: `replay_capacity` 0 learns from what was just seen, and
`target_interval` 0 has no target network. Double, dueling, prioritised, noisy and n-step are each a switch.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from upslope.control import (
    environments,
    masks,
    normalization,
    offpolicy,
    offpolicy_program,
    optimizers,
    qnetworks,
    replay,
)
from upslope.control.agent import Agent
from upslope.control.networks import Observation
from upslope.control.offpolicy import State
from upslope.control.parameters import Net
from upslope.core import exploration, values
from upslope.runs import run as runs
from upslope.runs import settings
from upslope.runs.randomness import Blocks
from upslope.runs.run import Run


@dataclass(frozen=True)
class DQN:
    """What is DQN's own; what every algorithm shares (environment, network, …, run) is nested."""

    environment: environments.Config = field(default_factory=lambda: environments.Config(num_envs=1))
    network: qnetworks.Config = field(default_factory=qnetworks.Config)
    normalize: normalization.Config = field(default_factory=normalization.Config)
    optimizer: optimizers.Optimizer = field(default_factory=lambda: optimizers.Adam(learning_rate=2.5e-4, epsilon=1e-8))
    run: runs.Options = field(default_factory=lambda: runs.Config(log_interval=100))
    total_steps: int = 500_000  # environment steps, all environments together
    replay_capacity: int = 100_000  # observations kept; 0: no replay, every transition is learned from once
    learning_starts: int = 1_000  # environment steps before the first gradient step
    train_interval: int = 4  # steps of each environment per iteration
    gradient_steps: int | None = 1  # per iteration; None: as many as environment steps
    batch_size: int = 64  # transitions per gradient step
    gamma: float = 0.99  # discount per step
    n_step: int = 1  # rewards in a target, before the network's own estimate
    target_interval: int = 500  # environment steps between updates of the target network; 0: none, θ̄ is θ
    target_tau: float = 1.0  # of the way that the target network moves; 1: a copy
    double: bool = False  # θ chooses the next action, θ̄ judges it
    priority_exponent: float = 0.0  # α of p^α, p = |error| + ε; 0: uniform
    priority_beta: float = 0.4  # β of the importance weights at the start, rising linearly to 1 over the run
    priority_epsilon: float = 1e-6  # ε, in reward units
    huber: float = 1.0  # where the loss turns linear, in reward units
    epsilon_start: float = 1.0  # share of random actions; with a noisy network there are none
    epsilon_end: float = 0.05
    epsilon_fraction: float = 0.1  # of the run, until ε stands at its end
    max_grad_norm: float | None = 10.0
    anneal_learning_rate: bool = False  # linearly to 0 over the run

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "train_interval", "gradient_steps", "batch_size", "n_step")
        settings.within(self, 0, None, "replay_capacity", "learning_starts", "target_interval")
        settings.within(self, 0, 1, "gamma", "target_tau", "priority_exponent", "priority_beta")
        settings.within(self, 0, 1, "epsilon_start", "epsilon_end", "epsilon_fraction")
        settings.positive(self, "huber", "priority_epsilon", "max_grad_norm")
        if self.priority_exponent and not self.replay_capacity:
            raise ValueError(f"priority_exponent is {self.priority_exponent}, but replay_capacity 0 has no priorities")


class Terms(NamedTuple):
    """The objective's parts per transition, before any reduction."""

    huber: Float[Tensor, " B"]
    td_error: Float[Tensor, " B"]  # target - Q(s, a)
    q: Float[Tensor, " B"]  # Q(s, a)


def objective(
    theta: Float[Tensor, " d"],
    net: Net,
    batch: replay.Batch,
    target: Float[Tensor, " B"],
    noise: Tensor | None,
    config: DQN,
) -> tuple[Tensor, Terms]:
    """Scalar to maximise: - the mean of w Huber; and its parts."""
    q = values.action_value(net(theta, batch.observation, noise), batch.action)
    part = Terms(values.huber(q, target, config.huber), target - q, q)
    return -(batch.weight * part.huber).mean(), part


@torch.no_grad()
def estimate(state: State, net: Net, batch: replay.Batch, noise: list[Tensor | None], config: DQN) -> Tensor:
    """r + γ max_a Q̄(s', a), or with double r + γ Q̄(s', argmax_a Q(s', a)); Q̄ is Q without a target network."""
    judged = net(state.others.get("target", state.theta), batch.next_observation, noise[0])
    if not config.double:
        return values.q_target(batch.reward, judged, batch.discount)
    chosen = net(state.theta, batch.next_observation, noise[1])
    return values.double_q_target(batch.reward, chosen, judged, batch.discount)


def update(
    state: State, net: Net, batch: replay.Batch, target: Float[Tensor, " B"], noise: Tensor | None, config: DQN
) -> tuple[State, Terms, dict[str, float]]:
    """One step uphill; θ and the optimiser's memory are updated in place."""
    state, part, norm = offpolicy.ascend(state, "theta", net, config, objective, net, batch, target, noise, config)
    return state, Terms(*(each.detach() for each in part)), {"grad_norm": norm}


def learn(
    state: State, net: Net, batch: replay.Batch, noise: list[Tensor | None], config: DQN
) -> tuple[State, Terms, dict[str, float]]:
    """One gradient step; what is compiled where that pays."""
    # 2. estimate the target
    target = estimate(state, net, batch, noise[:2], config)

    # 3. objective and 4. update: one step
    return update(state, net, batch, target, noise[2], config)


def act(
    net: Net,
    theta: Float[Tensor, " d"],
    observation: Observation,
    weights: Tensor | None,
    epsilon: Float[Tensor, ""],
    uniform: Float[Tensor, " N"],
    any_action: Int64[Tensor, " N"],
) -> Int64[Tensor, " N"]:
    """The best action, or with probability ε any legal one; for a network with noise in its weights always the best."""
    q = net(theta, observation, weights)
    if isinstance(observation, dict) and masks.KEY in observation:  # below ε, u/ε is uniform as well
        legal = (observation[masks.KEY] != 0).cumsum(-1)
        rank = (uniform / epsilon * legal[:, -1]).floor().clamp(max=legal[:, -1] - 1)
        any_action = (legal > rank.unsqueeze(-1)).long().argmax(-1)
    return q.argmax(-1) if weights is not None else exploration.epsilon_greedy(q, epsilon, uniform, any_action)


def behaviour(net: Net, envs: environments.Environments, config: DQN) -> offpolicy.Behaviour:
    """ε-greedy, or greedy for a network with noise in its weights; the noise is the step's own."""
    n, actions = envs.num_envs, int(envs.action_space.n)  # type: ignore[attr-defined]
    annealed = max(1, round(config.epsilon_fraction * config.total_steps))

    def draw(random: torch.Generator, count: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        uniform, any_action = (
            torch.rand(count, n, generator=random), torch.randint(actions, (count, n), generator=random)
        )  # fmt: skip
        return list(zip(uniform.unbind(), any_action.unbind(), noises(net, random, count), strict=True))

    steps = Blocks(draw, net.module.noise_size, config.run.seed, "behaviour")  # type: ignore[arg-type]

    def given(state: State, observation: Observation, t: int) -> tuple[Any, ...]:
        uniform, any_action, weights = steps.at(state.iteration * config.train_interval + t)
        epsilon = exploration.linear_schedule(state.step + t * n, config.epsilon_start, config.epsilon_end, annealed)
        return observation, weights, torch.from_numpy(np.array(epsilon)), uniform, any_action

    return given


def noises(net: Net, random: torch.Generator, count: int) -> list[Tensor | None]:
    """Noise for that many noisy networks; None for networks without noise."""
    size = net.module.noise_size
    return list(torch.randn(count, size, generator=random)) if size else [None] * count  # type: ignore[call-overload]


def begin(config: DQN, session: Run, theta: Float[Tensor, " d"] | None) -> tuple[State, Net]:
    """The state a run begins or goes on with, and the network."""
    first = lambda theta: (  # noqa: E731
        {"target": theta.clone()} if config.target_interval else {}, {"theta": config.optimizer.start(theta)}
    )  # fmt: skip
    state, net = offpolicy.start(config, session, first, theta, config.priority_exponent > 0)
    for frozen in state.others.values():
        net.freeze(frozen)
    return state, net


def chances(net: Net, config: DQN) -> Blocks[tuple[np.ndarray, Any]]:
    """Of each gradient step: where its batch is drawn from, and the noise of three networks."""
    three = lambda random, count: [noises(net, random, 3) for _ in range(count)]  # noqa: E731
    size = 3 * int(net.module.noise_size)  # type: ignore[arg-type]
    return offpolicy.chances(config, three, size, config.priority_exponent > 0)


def refresh(state: State, config: DQN) -> None:
    """The target network moves to θ, or a share of the way, where an interval has passed in this iteration."""
    if config.target_interval and offpolicy.passed(config.target_interval, state.step, state.world.steps):
        target = state.others["target"]
        target.copy_(values.polyak(target, state.theta, config.target_tau))


def train(config: DQN, session: Run | None = None, theta: Float[Tensor, " d"] | None = None) -> Agent:
    """Train and return the agent.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
        theta: parameters that a new run starts from; by default the network's own initialisation.
    """
    with session or Run("dqn", config, config.total_steps) as session:
        state, net = begin(config, session, theta)
        acts = behaviour(net, state.world.envs, config)
        step, choose = offpolicy_program.of(learn, act, acts, net, config, session)
        chance = chances(net, config)
        while state.step < config.total_steps:
            # 1. collect: steps of every environment into the replay
            state = offpolicy.collect(choose, state, config, config.train_interval)

            count, part, beta = offpolicy.gradient_steps(state, config), None, None
            numbers: dict[str, float] = {}
            if config.priority_exponent:
                beta = float(exploration.linear_schedule(state.step, config.priority_beta, 1.0, config.total_steps))
            for k in range(count):
                where, noise = chance.at(state.updates + k)
                drawn = offpolicy.draw(state, config, where, config.n_step, beta)
                state, part, numbers = step(state, net, drawn, noise, config)  # 2. to 4., see `learn`
                if config.priority_exponent:
                    state.replay.prioritise(
                        drawn.row, part.td_error.numpy(), config.priority_exponent, config.priority_epsilon
                    )

            refresh(state, config)
            state = offpolicy.advance(state, count)
            offpolicy.report(session, state, net, config, part, numbers)
        return offpolicy.finish(session, state, net, config)
