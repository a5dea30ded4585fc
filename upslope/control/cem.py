"""The cross-entropy method, CEM (Rubinstein 1999; with noise: Szita & Lőrincz 2006; S3 4.2's DFO/Evolution).

Psi         1 for the elite, the best of the candidates by return, else 0                    population.py
surrogate   Ψ log N(θ'; μ, s²), θ' a candidate, s a vector: one deviation per element of θ   max in closed form
constraint  none
data        whole episodes of candidates θ' = μ + s ε, used once
maximised   the elite's likelihood: of F, a quantile, where ES maximises the mean            over μ and s

Differs from es.py in that the deviations are learned with the mean, and in how far a step goes: all the way to the
maximum, the elite's mean and deviation. Noise that fades is added to s², without which the search may end too early.
θ is μ. The population is `environment.num_envs`.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
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
class CEM:
    """What is CEM's own; what every algorithm shares (environment, network, …, run) is nested."""

    environment: environments.Config = field(default_factory=lambda: environments.Config(num_envs=64))
    network: networks.Config = field(default_factory=networks.Config)
    normalize: normalization.Config = field(default_factory=normalization.Config)
    run: runs.Options = field(default_factory=runs.Config)
    total_steps: int = 2_000_000  # environment steps, all environments together
    episodes_per_candidate: int = 1  # whole episodes that a candidate's fitness is the mean of
    stochastic: bool = False  # candidates sample their actions; else they act by the policy's mode
    std: float = 0.5  # s at the start, of each element of θ
    elite_fraction: float = 0.2  # of the population
    extra_std: float = 0.25  # its square is added to s² at the start
    extra_fraction: float = 0.5  # of the run, until what is added has fallen linearly to 0

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "episodes_per_candidate")
        settings.within(self, 0, None, "extra_std")
        settings.within(self, 0, 1, "elite_fraction", "extra_fraction")
        settings.positive(self, "std")
        population.refuse("cem", self.environment, self.network, self.normalize)
        if elite_size(self) < 2:
            raise ValueError(
                f"elite_fraction is {self.elite_fraction}, of environment.num_envs {self.environment.num_envs}, "
                "allowed: two candidates or more, which have a deviation"
            )


def elite_size(config: CEM) -> int:
    """How many candidates are the elite."""
    return round(config.elite_fraction * config.environment.num_envs)


def perturb(state: State, config: CEM) -> Float[Tensor, "n d"]:
    """n candidates μ + s ε."""
    random = generator(config.run.seed, "perturbation", state.iteration)
    noise = torch.randn(config.environment.num_envs, len(state.theta), generator=random)
    return state.theta + state.optimizer.memory[0] * noise


def estimate(fitness: Float[Tensor, " n"], config: CEM) -> Bool[Tensor, " n"]:
    """Ψ of every candidate: is it of the elite? Of equal ones the first are."""
    psi = torch.zeros(len(fitness), dtype=torch.bool)
    psi[fitness.argsort(descending=True, stable=True)[: elite_size(config)]] = True
    return psi


def extra_variance(progress: float, config: CEM) -> float:
    """What is added to s² at a share of the run."""
    left = max(0.0, 1.0 - progress / config.extra_fraction) if config.extra_fraction else 0.0
    return config.extra_std**2 * left


def maximum(
    candidates: Float[Tensor, "n d"], psi: Bool[Tensor, " n"], extra: float | Float[Tensor, " d"]
) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """μ and s with the largest Σ Ψ_i log N(θ_i; μ, s²), the elite's mean and deviation; s² larger by `extra`."""
    elite = candidates[psi]
    return elite.mean(0), (elite.var(0, correction=0) + extra).sqrt()


def update(
    state: State, net: Net, candidates: Float[Tensor, "n d"], psi: Bool[Tensor, " n"], config: CEM
) -> tuple[Float[Tensor, " d"], optimizers.State, dict[str, float]]:
    """To the maximum; θ and s are updated in place."""
    where, (std,) = population.searched(net, config.stochastic), state.optimizer.memory
    mean, deviation = maximum(candidates, psi, extra_variance(state.step / config.total_steps, config))
    state.theta[where], std[where] = mean[where], deviation[where]
    memory = optimizers.State(state.optimizer.step + 1, (std,))
    return state.theta, memory, {"std": float(std[where].mean())}


def train(config: CEM, session: Run | None = None, theta: Float[Tensor, " d"] | None = None) -> Agent:
    """Train and return the agent.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
        theta: parameters that a new run starts from; by default the network's own initialisation.
    """
    population.refuse_ranks("cem")
    with session or Run("cem", config, config.total_steps) as session:
        deviations = lambda net, _: optimizers.State(  # noqa: E731
            0, (config.std * population.searched(net, config.stochastic),)
        )
        state, net = learner.begin(config, session, deviations, theta)
        while state.step < config.total_steps:
            # 1. collect: whole episodes of every candidate
            candidates = perturb(state, config)
            fitness, world = population.play(net, candidates, state, config)

            # 2. estimate Ψ
            psi = estimate(fitness, config)

            # 3. objective, its maximum in closed form, and 4. update: to the maximum
            theta, optimizer, numbers = update(state, net, candidates, psi, config)

            state = learner.advance(state, theta, optimizer, world)
            learner.report(session, state, net, config, numbers | population.summary(fitness))
        return learner.finish(session, state, net, config)
