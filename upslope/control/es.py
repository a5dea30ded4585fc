"""Evolution strategies, ES (Salimans et al. 2017, arXiv:1703.03864; S3 4.2's DFO/Evolution).

Psi         the rank of a candidate's return among all, or its return standardised           population.py
surrogate   Ψ log N(θ'; θ, σ²), θ' a candidate: REINFORCE with θ' for the action             ∇ in closed form: Ψ ε/σ
constraint  none: one small step, then new data
data        whole episodes of candidates θ' = θ ± σ ε, in opposite pairs, used once
maximised   E_ε[F(θ + σ ε)], F the mean return; - ½ weight_decay ‖θ‖²                        with ranks: of Ψ for F

No derivative of π is taken: the noise is in θ, not in the actions, and the policy acts by its mode. Only the policy's
part of θ is moved; the network's critic stays as it was initialised. The population is `environment.num_envs`.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.control import environments, learner, networks, normalization, optimizers, population
from upslope.control.agent import Agent
from upslope.control.learner import State
from upslope.control.parameters import Net
from upslope.runs import run as runs
from upslope.runs import settings
from upslope.runs.randomness import generator
from upslope.runs.run import Run


@dataclass(frozen=True)
class ES:
    """What is ES's own; what every algorithm shares (environment, network, …, run) is nested."""

    environment: environments.Config = field(default_factory=lambda: environments.Config(num_envs=64))
    network: networks.Config = field(default_factory=networks.Config)
    normalize: normalization.Config = field(default_factory=normalization.Config)
    optimizer: optimizers.Optimizer = field(default_factory=lambda: optimizers.Adam(learning_rate=1e-2))
    run: runs.Options = field(default_factory=runs.Config)
    total_steps: int = 2_000_000  # environment steps, all environments together
    episodes_per_candidate: int = 1  # whole episodes that a candidate's fitness is the mean of
    stochastic: bool = False  # candidates sample their actions; else they act by the policy's mode
    sigma: float = 0.1  # σ, standard deviation of the perturbation of each element of θ
    shaping: population.Shaping = "ranks"  # Ψ: centred ranks; returns of mean 0 and deviation 1; plain returns
    weight_decay: float = 0.0  # of the policy's part of θ, per unit of gradient
    max_grad_norm: float | None = None
    anneal_learning_rate: bool = False  # linearly to 0 over the run

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "episodes_per_candidate")
        settings.within(self, 0, None, "weight_decay")
        settings.positive(self, "sigma", "max_grad_norm")
        population.refuse("es", self.environment, self.network, self.normalize)
        if self.environment.num_envs % 2:
            raise ValueError(f"environment.num_envs is {self.environment.num_envs}, allowed: even, in opposite pairs")


def perturb(state: State, net: Net, config: ES) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """n candidates θ + σ ε, and ε: every direction and its opposite, 0 where θ is not searched."""
    random = generator(config.run.seed, "perturbation", state.iteration)
    half = torch.randn(config.environment.num_envs // 2, len(state.theta), generator=random)
    noise = population.mirrored(half * population.searched(net, config.stochastic))
    return state.theta + config.sigma * noise, noise


def estimate(fitness: Float[Tensor, " n"], config: ES) -> Float[Tensor, " n"]:
    """Ψ of every candidate."""
    return population.shaped(fitness, config.shaping)


def gradient(
    theta: Float[Tensor, " d"], noise: Float[Tensor, "n d"], psi: Float[Tensor, " n"], config: ES
) -> Float[Tensor, " d"]:
    """∇_θ of the objective, 1/(n σ) Σ Ψ_i ε_i: that of the mean of Ψ_i log N(θ_i; θ, σ²), θ_i held."""
    uphill = psi.to(noise.dtype) @ noise / (len(psi) * config.sigma)
    return uphill - config.weight_decay * theta


def update(
    state: State, net: Net, noise: Float[Tensor, "n d"], psi: Float[Tensor, " n"], config: ES
) -> tuple[Float[Tensor, " d"], optimizers.State, dict[str, float]]:
    """One step uphill; θ and the optimiser's memory are updated in place."""
    rate = learner.learning_rate(state, config)
    slope = gradient(state.theta, noise, psi, config) * population.searched(net, config.stochastic)
    theta, memory, norm = learner.ascend(state.theta, state.optimizer, slope, config, rate)
    return theta, memory, {"grad_norm": norm, "learning_rate": rate}


def train(config: ES, session: Run | None = None, theta: Float[Tensor, " d"] | None = None) -> Agent:
    """Train and return the agent.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
        theta: parameters that a new run starts from; by default the network's own initialisation.
    """
    population.refuse_ranks("es")
    with session or Run("es", config, config.total_steps) as session:
        state, net = learner.start(config, session, theta)
        while state.step < config.total_steps:
            # 1. collect: whole episodes of every candidate
            candidates, noise = perturb(state, net, config)
            fitness, world = population.play(net, candidates, state, config)

            # 2. estimate Ψ
            psi = estimate(fitness, config)

            # 3. objective, its gradient in closed form, and 4. update: one step
            theta, optimizer, numbers = update(state, net, noise, psi, config)

            state = learner.advance(state, theta, optimizer, world)
            learner.report(session, state, net, config, numbers | population.summary(fitness))
        return learner.finish(session, state, net, config)
