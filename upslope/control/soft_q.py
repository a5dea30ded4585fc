"""Soft Q-learning (Haarnoja et al. 2017, arXiv:1702.08165), SAC's predecessor, for discrete actions, where it is exact.

Psi         none: values are regressed, π ∝ exp(Q/α) follows, S4 eq A.9 with its α
surrogate   - Huber(Q(s,a) - target); target r + γ α log Σ exp(Q̄(s',·)/α)             core/values.py
constraint  none; the target's θ̄ stands still between copies
data        a replay of π's own actions, used many times
maximised   - mean Huber(error)

The maximum of Q-learning becomes a soft one, the value of reward and entropy together: as α tends to 0 this is DQN.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
from upslope.core import distributions, values
from upslope.runs import run as runs
from upslope.runs import settings
from upslope.runs.randomness import Blocks
from upslope.runs.run import Run


@dataclass(frozen=True)
class SoftQ:
    """What is soft Q-learning's own; what every algorithm shares (environment, network, …, run) is nested."""

    environment: environments.Config = field(default_factory=lambda: environments.Config(num_envs=1))
    network: qnetworks.Boltzmann = field(default_factory=qnetworks.Boltzmann)
    normalize: normalization.Config = field(default_factory=normalization.Config)
    optimizer: optimizers.Optimizer = field(default_factory=lambda: optimizers.Adam(learning_rate=2.5e-4, epsilon=1e-8))
    run: runs.Options = field(default_factory=lambda: runs.Config(log_interval=100))
    total_steps: int = 500_000  # environment steps, all environments together
    replay_capacity: int = 100_000  # observations kept
    learning_starts: int = 1_000  # environment steps with random actions, before the first gradient step
    train_interval: int = 4  # steps of each environment per iteration
    gradient_steps: int | None = 1  # per iteration; None: as many as environment steps
    batch_size: int = 64  # transitions per gradient step
    gamma: float = 0.99  # discount per step
    target_interval: int = 500  # environment steps between updates of the target network
    target_tau: float = 1.0  # of the way that the target network moves; 1: a copy
    huber: float = 1.0  # where the loss turns linear, in reward units
    max_grad_norm: float | None = 10.0
    anneal_learning_rate: bool = False  # linearly to 0 over the run

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "train_interval", "gradient_steps", "batch_size")
        settings.within(self, 1, None, "replay_capacity", "target_interval")
        settings.within(self, 0, None, "learning_starts")
        settings.within(self, 0, 1, "gamma", "target_tau")
        settings.positive(self, "huber", "max_grad_norm")
        if self.network.noisy != "none":
            raise ValueError(f"network.noisy is {self.network.noisy!r}, allowed: 'none', π explores by itself")


class Terms(NamedTuple):
    """The objective's parts per transition, before any reduction."""

    huber: Float[Tensor, " B"]
    td_error: Float[Tensor, " B"]  # target - Q(s, a)
    q: Float[Tensor, " B"]  # Q(s, a)
    entropy: Float[Tensor, " B"]  # of π(·|s), nats


def objective(
    theta: Float[Tensor, " d"],
    net: Net,
    batch: replay.Batch,
    target: Float[Tensor, " B"],
    config: SoftQ,
) -> tuple[Tensor, Terms]:
    """Scalar to maximise: - the mean of Huber; and its parts."""
    every = net(theta, batch.observation)
    q = values.action_value(every, batch.action)
    entropy = distributions.Categorical(every.detach() / config.network.alpha).entropy()
    part = Terms(values.huber(q, target, config.huber), target - q, q, entropy)
    return -part.huber.mean(), part


@torch.no_grad()
def estimate(state: State, net: Net, batch: replay.Batch, config: SoftQ) -> Float[Tensor, " B"]:
    """r + γ α log Σ_a exp(Q̄(s', a)/α)."""
    judged = net(state.others["target"], batch.next_observation)
    return values.soft_q_target(batch.reward, judged, config.network.alpha, batch.discount)


def update(
    state: State, net: Net, batch: replay.Batch, target: Float[Tensor, " B"], config: SoftQ
) -> tuple[State, Terms, dict[str, float]]:
    """One step uphill; θ and the optimiser's memory are updated in place."""
    state, part, norm = offpolicy.ascend(state, "theta", net, config, objective, net, batch, target, config)
    return state, Terms(*(each.detach() for each in part)), {"grad_norm": norm}


def learn(
    state: State, net: Net, batch: replay.Batch, noise: None, config: SoftQ
) -> tuple[State, Terms, dict[str, float]]:
    """One gradient step; what is compiled where that pays."""
    # 2. estimate the target
    target = estimate(state, net, batch, config)

    # 3. objective and 4. update: one step
    return update(state, net, batch, target, config)


def act(
    net: Net, theta: Float[Tensor, " d"], observation: Observation, alpha: float, noise: Float[Tensor, "N A"]
) -> Int64[Tensor, " N"]:
    """a ~ exp(Q(s, ·)/α)."""
    return distributions.Categorical(net(theta, observation) / alpha).sample(noise)


def behaviour(envs: environments.Environments, config: SoftQ) -> offpolicy.Behaviour:
    """π's own actions; before `learning_starts` uniform ones. The noise is the step's own."""
    n, actions = envs.num_envs, int(envs.action_space.n)  # type: ignore[attr-defined]
    steps = Blocks(
        lambda random, count: distributions.gumbel((count, n, actions), random).unbind(), n * actions,
        config.run.seed, "behaviour",
    )  # fmt: skip

    def given(state: State, observation: Observation, t: int) -> Tensor | tuple[Any, ...]:
        noise = steps.at(state.iteration * config.train_interval + t)
        if state.step + t * n < config.learning_starts:
            even = torch.zeros_like(noise)
            if envs.masked:
                even = masks.apply(even, observation[masks.KEY])  # type: ignore[index]
            return distributions.Categorical(even).sample(noise)
        return observation, config.network.alpha, noise

    return given


def train(config: SoftQ, session: Run | None = None, theta: Float[Tensor, " d"] | None = None) -> Agent:
    """Train and return the agent.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
        theta: parameters that a new run starts from; by default the network's own initialisation.
    """
    with session or Run("soft-q", config, config.total_steps) as session:
        begin = lambda theta: ({"target": theta.clone()}, {"theta": config.optimizer.start(theta)})  # noqa: E731
        state, net = offpolicy.start(config, session, begin, theta)
        net.freeze(state.others["target"])
        step, choose = offpolicy_program.of(
            learn, act, behaviour(state.world.envs, config), net, config, session
        )  # fmt: skip
        chance = offpolicy.chances(config)
        while state.step < config.total_steps:
            # 1. collect: steps of every environment into the replay
            state = offpolicy.collect(choose, state, config, config.train_interval)

            count, part = offpolicy.gradient_steps(state, config), None
            numbers: dict[str, float] = {}
            for k in range(count):
                where, noise = chance.at(state.updates + k)
                drawn = offpolicy.draw(state, config, where)
                state, part, numbers = step(state, net, drawn, noise, config)  # 2. to 4., see `learn`

            if offpolicy.passed(config.target_interval, state.step, state.world.steps):
                offpolicy.follow(state.others["target"], state.theta, config.target_tau)
            state = offpolicy.advance(state, count)
            offpolicy.report(session, state, net, config, part, numbers)
        return offpolicy.finish(session, state, net, config)
