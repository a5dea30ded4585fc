"""ACKTR, actor–critic with a Kronecker-factored trust region (Wu et al. 2017, arXiv:1708.05144; S3 7.5.2).

Psi         GAE(γ, λ), from a learned V                                        S3 eqs 23, 24   core/advantages.py
surrogate   Ψ log π_θ                                                          S3 7.4.2        core/surrogates.py
constraint  ½ xᵀF x ≤ kl_clip for the natural step x                           1708.05144 3.2  core/kronecker.py
data        a short rollout of the current policy, used once
maximised   surrogate - c1 (V - target)² + c2 entropy                          S4 eq 2.18 (S3 eq 26 has the wrong sign)

Differs from actor_critic.py in the update alone: F⁻¹∇J in place of ∇J, F by layers and factored, in kfac.py.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from upslope.control import critic, environments, kfac, learner, networks, normalization, optimizers, rollout
from upslope.control.agent import Agent
from upslope.control.learner import State
from upslope.control.parameters import Net
from upslope.core import advantages, reductions, returns, statistics, surrogates
from upslope.runs import distributed, settings
from upslope.runs import run as runs
from upslope.runs.randomness import generator
from upslope.runs.run import Run


@dataclass(frozen=True)
class ACKTR:
    """What is ACKTR's own; what every algorithm shares (environment, network, …, run) is nested."""

    environment: environments.Config = field(default_factory=environments.Config)
    network: networks.Config = field(default_factory=networks.Config)
    normalize: normalization.Config = field(default_factory=normalization.Config)
    optimizer: kfac.KFAC = field(default_factory=kfac.KFAC)
    run: runs.Options = field(default_factory=lambda: runs.Config(log_interval=10))
    total_steps: int = 500_000  # environment steps, all environments together
    rollout_length: int = 20  # T, steps of each environment per iteration
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 1.0
    value_coef: float = 0.5  # c1, of the squared error without ½
    entropy_coef: float = 0.01  # c2, per nat
    whiten_advantages: bool = False
    max_grad_norm: float | None = None  # of the natural gradient, whose bound is the trust region
    anneal_learning_rate: bool = True  # linearly to 0 over the run

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "rollout_length")
        settings.within(self, 0, 1, "gamma", "gae_lambda")
        settings.within(self, 0, None, "value_coef", "entropy_coef")
        settings.positive(self, "max_grad_norm")
        if self.network.state_dependent_noise:
            raise ValueError("network.state_dependent_noise is True, allowed: False (K-FAC has no factors for gSDE)")
        networks.refuse_memory(self.network, "ACKTR")


class Terms(NamedTuple):
    """The objective's parts per transition, before any reduction."""

    surrogate: Float[Tensor, " B"]
    value_error: Float[Tensor, " B"]
    entropy: Float[Tensor, " B"]


def objective(theta: Float[Tensor, " d"], net: Net, batch: rollout.Batch, config: ACKTR) -> tuple[Tensor, Terms]:
    """Scalar to maximise: surrogate - c1 error + c2 entropy, without reset rows; and its parts."""
    policy, value = net(theta, batch.observation)
    logp, entropy = policy.log_prob_entropy(batch.action)
    psi = rollout.whitened(batch) if config.whiten_advantages else batch.psi
    part = Terms(surrogates.log_prob(logp, psi), critic.error(value, batch, None), entropy)
    each = part.surrogate - config.value_coef * part.value_error
    if config.entropy_coef:  # 0 times a gradient costs as much as another one
        each = each + config.entropy_coef * part.entropy
    return reductions.token_mean(each, batch.valid), part


def update(
    state: State, net: Net, batch: rollout.Batch, config: ACKTR
) -> tuple[Float[Tensor, " d"], optimizers.State, dict[str, float]]:
    """One natural step uphill; θ and the optimiser's memory are updated in place."""
    rate = learner.learning_rate(state, config)
    noise = generator(config.run.seed, "fisher", state.iteration, distributed.rank())
    seen: Any = batch.observation
    memory = kfac.observe(state.optimizer, net, state.theta, seen, batch.valid, config.optimizer, noise)
    gradient, _, part = net.gradient(objective, state.theta, net, batch, config)
    direction, region = kfac.natural(gradient, memory, net, config.optimizer, rate)
    theta, memory, norm = learner.ascend(state.theta, memory, direction, config, rate)
    return theta, memory, learner.means(part, batch.valid) | region | {"grad_norm": norm, "learning_rate": rate}


def train(config: ACKTR, session: Run | None = None, theta: Float[Tensor, " d"] | None = None) -> Agent:
    """Train and return the agent.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
        theta: parameters that a new run starts from; by default the network's own initialisation.
    """
    with session or Run("acktr", config, config.total_steps) as session:
        state, net = learner.start(config, session, theta)
        while state.step < config.total_steps:
            # 1. collect: T steps of every environment under the current policy
            data, world = learner.collect(net, state, config, config.rollout_length)

            # 2. estimate Ψ
            discounts, traces = returns.boundaries(data.terminated, data.truncated, config.gamma, config.gae_lambda)
            psi = advantages.gae(data.reward, data.value, data.next_value, discounts, traces)
            batch = rollout.flatten(data, psi, value_target=psi + data.value)

            # 3. objective and 4. update: one natural step
            theta, optimizer, numbers = update(state, net, batch, config)

            state = learner.advance(state, theta, optimizer, world)
            fit = statistics.explained_variance(batch.value_old, batch.value_target, batch.valid)
            learner.report(session, state, net, config, numbers | {"explained_variance": fit})
        return learner.finish(session, state, net, config)
