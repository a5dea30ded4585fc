"""Advantage actor–critic, A2C (Mnih et al. 2016, arXiv:1602.01783; S3 alg 8 and eqs 20-24, S4 2.3).

Psi         GAE(γ, λ) or the k-step advantage, from a learned V                S3 eqs 23, 24   core/advantages.py
surrogate   Ψ log π_θ                                                          S3 7.4.2        core/surrogates.py
constraint  none: one small step, then new data
data        a short rollout of the current policy, used once
maximised   surrogate - c1 (V - target)² + c2 entropy                          S4 eq 2.18 (S3 eq 26 has the wrong sign)

Differs from reinforce.py where the critic comes in: Ψ bootstraps from it, so a few steps are data enough. With
`critic_epochs` the critic is instead refitted after the policy's step: S3 alg 8's argmin with its κ, in critic.py.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from upslope.control import critic, environments, learner, networks, normalization, optimizers, rollout
from upslope.control.agent import Agent
from upslope.control.learner import State
from upslope.control.parameters import Net
from upslope.core import advantages, reductions, returns, statistics, surrogates
from upslope.runs import distributed, settings
from upslope.runs import run as runs
from upslope.runs.randomness import generator
from upslope.runs.run import Run


@dataclass(frozen=True)
class A2C:
    """What is A2C's own; what every algorithm shares (environment, network, …, run) is nested."""

    environment: environments.Config = field(default_factory=environments.Config)
    network: networks.Config = field(default_factory=networks.Config)
    normalize: normalization.Config = field(default_factory=normalization.Config)
    optimizer: optimizers.Optimizer = field(default_factory=optimizers.RMSProp)
    run: runs.Options = field(default_factory=lambda: runs.Config(log_interval=100))
    total_steps: int = 500_000  # environment steps, all environments together
    rollout_length: int = 5  # T, steps of each environment per iteration
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 1.0
    k_step: int | None = None  # Ψ from k steps instead of GAE (S3 eq 23)
    value_target: critic.Target = "lambda"  # Ψ + V; or S3 eq 22, S3 eq 21
    critic_epochs: int = 0  # passes of the critic's own fit after the policy's step; 0: one joint step
    critic_minibatch: int = 64  # transitions per gradient step of that fit
    kappa: float = 0.0  # κ of its κ‖φ - φ_i‖²
    value_coef: float = 0.5  # c1, of the squared error without ½
    entropy_coef: float = 0.0  # c2, per nat
    whiten_advantages: bool = False
    max_grad_norm: float | None = 0.5
    anneal_learning_rate: bool = False  # linearly to 0 over the run

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "rollout_length", "k_step", "critic_minibatch")
        settings.within(self, 0, 1, "gamma", "gae_lambda")
        settings.within(self, 0, None, "critic_epochs", "kappa", "value_coef", "entropy_coef")
        settings.positive(self, "max_grad_norm")
        if self.critic_epochs:
            rollout.refuse_cut_sequences(self, "critic_minibatch")
        if self.critic_epochs and self.network.shared:
            raise ValueError(
                f"critic_epochs is {self.critic_epochs}, but with network.shared the critic has no φ alone"
            )


class Terms(NamedTuple):
    """The objective's parts per transition, before any reduction."""

    surrogate: Float[Tensor, " B"]
    value_error: Float[Tensor, " B"]
    entropy: Float[Tensor, " B"]


def objective(theta: Float[Tensor, " d"], net: Net, batch: rollout.Batch, config: A2C) -> tuple[Tensor, Terms]:
    """Scalar to maximise: surrogate - c1 error + c2 entropy, without reset rows; and its parts."""
    policy, value = net(theta, batch.observation)
    logp, entropy = policy.log_prob_entropy(batch.action)
    psi = rollout.whitened(batch) if config.whiten_advantages else batch.psi
    part = Terms(surrogates.log_prob(logp, psi), critic.error(value, batch, None), entropy)
    value_coef = 0.0 if config.critic_epochs else config.value_coef
    each = part.surrogate - value_coef * part.value_error
    if config.entropy_coef:  # 0 times a gradient costs as much as another one
        each = each + config.entropy_coef * part.entropy
    return reductions.token_mean(each, batch.valid, rollout.counted(batch)), part


def update(
    state: State, net: Net, batch: rollout.Batch, config: A2C
) -> tuple[Float[Tensor, " d"], optimizers.State, dict[str, float]]:
    """One step uphill; θ and the optimiser's memory are updated in place."""
    rate = learner.learning_rate(state, config)
    gradient, _, part = net.gradient(objective, state.theta, net, batch, config)
    moved = net.part("policy") if config.critic_epochs else slice(None)
    theta, memory, norm = learner.ascend(state.theta, state.optimizer, gradient, config, rate, moved)
    numbers = learner.means(part, batch.valid) | {"grad_norm": norm, "learning_rate": rate}
    if config.critic_epochs:
        count = int(state.remembered.get("critic_steps", 0))
        shuffle = generator(config.run.seed, "shuffle", state.iteration, distributed.rank())
        numbers |= critic.fit(theta, memory._replace(step=count), net, batch, config, rate, shuffle)[1]
    return theta, memory, numbers


def train(config: A2C, session: Run | None = None, theta: Float[Tensor, " d"] | None = None) -> Agent:
    """Train and return the agent.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
        theta: parameters that a new run starts from; by default the network's own initialisation.
    """
    with session or Run("a2c", config, config.total_steps) as session:
        state, net = learner.start(config, session, theta)
        while state.step < config.total_steps:
            # 1. collect: T steps of every environment under the current policy
            data, world = learner.collect(net, state, config, config.rollout_length)

            # 2. estimate Ψ
            discounts, traces = returns.boundaries(data.terminated, data.truncated, config.gamma, config.gae_lambda)
            psi = advantages.gae(data.reward, data.value, data.next_value, discounts, traces)
            if config.k_step is not None:
                continues = returns.boundaries(data.terminated, data.truncated, config.gamma, 1.0).traces
                psi = advantages.k_step(data.reward, data.value, data.next_value, discounts, continues, config.k_step)
            batch = rollout.flatten(data, psi, critic.target(data, psi, config.gamma, config.value_target))

            # 3. objective and 4. update: one step
            theta, optimizer, numbers = update(state, net, batch, config)

            remembered = {"critic_steps": numbers["critic_steps"]} if config.critic_epochs else {}
            state = learner.advance(state, theta, optimizer, world, remembered)
            fit = statistics.explained_variance(batch.value_old, batch.value_target, batch.valid)
            learner.report(session, state, net, config, numbers | {"explained_variance": fit})
        return learner.finish(session, state, net, config)
