"""Trust Region Policy Optimization (Schulman et al. 2015, arXiv:1502.05477; S0 2.4.2, S3 alg 9, S4 2.4.2).

Psi         GAE(γ, λ) or the k-step advantage, whitened, from a learned V      S3 eqs 23, 24   core/advantages.py
surrogate   ρ Ψ, ρ = π_θ/π_old                                                 S3 7.5.2        core/surrogates.py
constraint  mean KL[π_old || π_θ] ≤ δ, exact between distributions             S4 2.4.2        core/trust_region.py
data        a rollout of the current policy, used for one step of the policy, or a few (S0 2.4.2)
maximised   the surrogate, by the natural step F⁻¹∇ shortened until it holds   TRPO appendix C

Differs from actor_critic.py in the policy's step alone: along F⁻¹ times the gradient instead of the gradient, as far as
the KL allows instead of as far as a learning rate says. The critic is fitted after it, in critic.py. (S3 7.5.2 prints
the KL the other way round; to second order they agree.)
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.control import critic, environments, learner, networks, normalization, optimizers, rollout
from upslope.control.agent import Agent
from upslope.control.learner import State
from upslope.control.parameters import Net
from upslope.core import advantages, reductions, returns, statistics, surrogates, trust_region
from upslope.core.distributions import Distribution
from upslope.runs import distributed, settings
from upslope.runs import run as runs
from upslope.runs.randomness import generator
from upslope.runs.run import Run


@dataclass(frozen=True)
class TRPO:
    """What is TRPO's own; what every algorithm shares (environment, network, …, run) is nested."""

    environment: environments.Config = field(default_factory=environments.Config)
    network: networks.Config = field(default_factory=networks.Config)
    normalize: normalization.Config = field(default_factory=normalization.Config)
    optimizer: optimizers.Optimizer = field(default_factory=lambda: optimizers.Adam(learning_rate=1e-3))
    run: runs.Options = field(default_factory=runs.Config)
    total_steps: int = 500_000  # environment steps, all environments together
    rollout_length: int = 2048  # T, steps of each environment per iteration
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95
    value_target: critic.Target = "lambda"  # Ψ + V; or S3 eq 22, S3 eq 21
    target_kl: float = 0.01  # δ in nats
    steps_per_batch: int = 1  # natural steps on a rollout, all within δ of the policy that collected it
    cg_iterations: int = 15  # of conjugate gradient, each a product with the Fisher matrix
    cg_damping: float = 0.1  # λ of F + λI
    shrink: float = 0.8  # of a step that fails the line search
    max_backtracks: int = 9  # how often; then θ stays
    critic_epochs: int = 10  # passes of the critic's own fit after the policy's step
    critic_minibatch: int = 128  # transitions per gradient step of that fit
    kappa: float = 0.0  # κ of its κ‖φ - φ_i‖²
    whiten_advantages: bool = True
    max_grad_norm: float | None = None  # of the critic
    anneal_learning_rate: bool = False  # the critic's, linearly to 0 over the run

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "rollout_length", "critic_minibatch", "critic_epochs")
        settings.within(self, 1, None, "steps_per_batch", "cg_iterations")
        settings.within(self, 0, 1, "gamma", "gae_lambda")
        settings.within(self, 0, None, "max_backtracks", "kappa")
        settings.positive(self, "max_grad_norm", "target_kl", "cg_damping")
        if not 0 < self.shrink < 1:
            raise ValueError(f"shrink is {self.shrink}, allowed: above 0 and below 1")
        if self.network.shared:
            raise ValueError("network.shared is True, allowed: False: the natural step moves the policy alone")
        networks.refuse_memory(self.network, "TRPO")


class Terms(NamedTuple):
    """The objective's parts per transition, before any reduction."""

    surrogate: Float[Tensor, " B"]
    entropy: Float[Tensor, " B"]


def objective(theta: Float[Tensor, " d"], net: Net, batch: rollout.Batch, config: TRPO) -> tuple[Tensor, Terms]:
    """Scalar to maximise: the surrogate, without reset rows; and its parts."""
    policy = net.only("policy", theta, batch.observation)
    logp, entropy = policy.log_prob_entropy(batch.action)
    psi = rollout.whitened(batch) if config.whiten_advantages else batch.psi
    part = Terms(surrogates.ratio(logp, batch.logp_old, psi), entropy)
    return reductions.token_mean(part.surrogate, batch.valid), part


def update(
    state: State, net: Net, batch: rollout.Batch, config: TRPO
) -> tuple[Float[Tensor, " d"], optimizers.State, dict[str, float]]:
    """The policy's steps within δ, then the critic's fit; θ and the optimiser's memory are updated in place."""
    rate, theta, delta = learner.learning_rate(state, config), state.theta, config.target_kl
    counted = slice(None) if batch.valid is None else batch.valid

    def policy(theta: Float[Tensor, " d"]) -> Distribution:
        return net.only("policy", theta, batch.observation)

    def distance(old: Distribution, new: Distribution) -> Tensor:
        return old.kl(new)[counted].mean()  # type: ignore[arg-type]  # both are of one kind

    @torch.no_grad()
    def evaluate(theta: Float[Tensor, " d"]) -> tuple[Tensor | float, Tensor]:
        kl = distributed.average_(distance(old, policy(theta)))
        inside = kl <= delta  # outside, the ratio may overflow
        return distributed.average_(objective(theta, net, batch, config)[0]) if inside else -math.inf, kl

    with torch.no_grad():
        old = policy(theta.clone())  # a copy: the distribution may hold views of θ
    found: list[trust_region.LineSearch] = []
    while len(found) < config.steps_per_batch and all(step.accepted for step in found):
        gradient, _, part = net.gradient(objective, theta, net, batch, config)
        distributed.average_(gradient)
        fisher = trust_region.fisher_operator(policy, distance, theta, config.cg_damping)
        product = lambda vector, fisher=fisher: distributed.average_(fisher(vector))  # noqa: E731
        step = trust_region.natural_step(product, gradient, delta, config.cg_iterations)
        found.append(trust_region.line_search(evaluate, theta, step, 0, delta, config.shrink, config.max_backtracks, 0))
        theta.copy_(found[-1].theta)
    taken = [step for step in found if step.accepted]
    numbers = learner.means(part, batch.valid) | {"kl": taken[-1].kl if taken else 0.0, "accepted": len(taken)}
    numbers["improvement"] = sum(step.improvement for step in taken)
    numbers |= {"backtracks": sum(step.backtracks for step in found), "learning_rate": rate}
    shuffle = generator(config.run.seed, "shuffle", state.iteration, distributed.rank())
    memory, fitted = critic.fit(theta, state.optimizer, net, batch, config, rate, shuffle)
    return theta, memory, numbers | fitted


def train(config: TRPO, session: Run | None = None, theta: Float[Tensor, " d"] | None = None) -> Agent:
    """Train and return the agent.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
        theta: parameters that a new run starts from; by default the network's own initialisation.
    """
    with session or Run("trpo", config, config.total_steps) as session:
        state, net = learner.start(config, session, theta)
        while state.step < config.total_steps:
            # 1. collect: T steps of every environment under the current policy
            data, world = learner.collect(net, state, config, config.rollout_length)

            # 2. estimate Ψ
            discounts, traces = returns.boundaries(data.terminated, data.truncated, config.gamma, config.gae_lambda)
            psi = advantages.gae(data.reward, data.value, data.next_value, discounts, traces)
            batch = rollout.flatten(data, psi, critic.target(data, psi, config.gamma, config.value_target))

            # 3. objective and 4. update: a natural step
            theta, optimizer, numbers = update(state, net, batch, config)

            state = learner.advance(state, theta, optimizer, world)
            fit = statistics.explained_variance(batch.value_old, batch.value_target, batch.valid)
            learner.report(session, state, net, config, numbers | {"explained_variance": fit})
        return learner.finish(session, state, net, config)
