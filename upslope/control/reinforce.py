"""REINFORCE, the Monte-Carlo policy gradient (Williams 1992; S1, S3 alg 7, S4 alg 1 and 2.2).

Psi         return-to-go (or the whole return) - a baseline, with or without γ^t   S4 table 2.2   core/baselines.py
surrogate   Ψ log π_θ, summed over an episode                                      S2 eq 12       core/surrogates.py
constraint  none: one small step, then new data
data        whole episodes of the current policy, used once
maximised   surrogate - c1 (V - return)² + c2 entropy                              V only with the value baseline

∇J = E[Σ_t Ψ_t ∇log π(a_t|s_t)]: everything after this file changes Ψ, the surrogate, the constraint or the data.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from upslope.control import critic, environments, learner, monte_carlo, networks, normalization, optimizers, rollout
from upslope.control.agent import Agent
from upslope.control.learner import State
from upslope.control.parameters import Net
from upslope.core import reductions, returns, statistics, surrogates
from upslope.runs import run as runs
from upslope.runs import settings
from upslope.runs.run import Run

BLOCK = 64  # steps that action noise is drawn for at once


@dataclass(frozen=True)
class REINFORCE:
    """What is REINFORCE's own; what every algorithm shares (environment, network, …, run) is nested."""

    environment: environments.Config = field(default_factory=environments.Config)
    network: networks.Config = field(default_factory=networks.Config)
    normalize: normalization.Config = field(default_factory=normalization.Config)
    optimizer: optimizers.Optimizer = field(default_factory=lambda: optimizers.Adam(learning_rate=1e-3))
    run: runs.Options = field(default_factory=runs.Config)
    total_steps: int = 500_000  # environment steps, all environments together
    episodes_per_env: int = 1  # whole episodes of each environment per iteration
    gamma: float = 0.99  # discount per step
    discount_gradient: bool = False  # keep γ^t, which the discounted objective has and nearly everyone drops
    reward_to_go: bool = True  # else every action of an episode is weighed by the whole return
    baseline: monte_carlo.Baseline = "value"
    baseline_decay: float = 0.9  # of the moving average, per iteration
    value_coef: float = 0.5  # c1, of the squared error without ½
    entropy_coef: float = 0.0  # c2, per nat
    whiten_advantages: bool = False
    max_grad_norm: float | None = None
    anneal_learning_rate: bool = False  # linearly to 0 over the run

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "episodes_per_env")
        settings.within(self, 0, 1, "gamma")
        settings.below_one(self, "baseline_decay")
        settings.within(self, 0, None, "value_coef", "entropy_coef")
        settings.positive(self, "max_grad_norm")
        monte_carlo.refuse_too_few(self.baseline, self.episodes_per_env, self.environment)
        if self.baseline.startswith("minimum-variance") and self.network.memory != "none":
            raise ValueError(
                f"baseline {self.baseline!r} is not offered with network.memory {self.network.memory!r}: the scores of "
                "single episodes are taken of policies without a memory"
            )


class Terms(NamedTuple):
    """The objective's parts per transition, before any reduction."""

    surrogate: Float[Tensor, " B"]
    value_error: Float[Tensor, " B"]
    entropy: Float[Tensor, " B"]


def objective(theta: Float[Tensor, " d"], net: Net, batch: rollout.Batch, config: REINFORCE) -> tuple[Tensor, Terms]:
    """Scalar to maximise: surrogate - c1 error + c2 entropy, summed over an episode; and its parts."""
    policy, value = net(theta, batch.observation)
    logp, entropy = policy.log_prob_entropy(batch.action)
    psi = rollout.whitened(batch) if config.whiten_advantages else batch.psi
    part = Terms(surrogates.log_prob(logp, psi), critic.error(value, batch, None), entropy)
    value_coef = config.value_coef if config.baseline == "value" else 0.0
    each = part.surrogate - value_coef * part.value_error
    if config.entropy_coef:  # 0 times a gradient costs as much as another one
        each = each + config.entropy_coef * part.entropy
    episodes = config.episodes_per_env * config.environment.num_envs
    return reductions.token_mean(each, batch.valid, total=episodes), part


def estimate(
    data: rollout.Rollout, state: State, net: Net, config: REINFORCE
) -> tuple[rollout.Batch, Tensor | None, dict[str, float]]:
    """Ψ_t = γ^t (G_t - b), or R - b; the offset of a baseline per parameter; what a moving average remembers."""
    discounts, continues = returns.boundaries(data.terminated, data.truncated, config.gamma, 1.0)
    beyond = monte_carlo.beyond(data, config.baseline)
    to_go = returns.return_to_go(data.reward, beyond, discounts, continues)
    baseline, offset, remembered = monte_carlo.estimate(
        config.baseline, to_go, data, state, net, config.environment.group_size, config.baseline_decay
    )
    psi = (to_go if config.reward_to_go else to_go[:, :1].expand_as(to_go)) - baseline
    if config.discount_gradient and config.reward_to_go:  # the whole return is discounted from the start already
        psi = psi * returns.elapsed_discount(discounts, continues)
    return rollout.flatten(data, psi, value_target=to_go), offset, remembered


def update(
    state: State, net: Net, batch: rollout.Batch, config: REINFORCE, offset: Tensor | None = None
) -> tuple[Float[Tensor, " d"], optimizers.State, dict[str, float]]:
    """One step uphill; θ and the optimiser's memory are updated in place."""
    rate = learner.learning_rate(state, config)
    gradient, _, part = net.gradient(objective, state.theta, net, batch, config)
    if offset is not None:
        gradient -= offset
    theta, memory, norm = learner.ascend(state.theta, state.optimizer, gradient, config, rate)
    numbers = learner.means(part, batch.valid) | {"grad_norm": norm, "learning_rate": rate}
    return theta, memory, numbers


def train(config: REINFORCE, session: Run | None = None, theta: Float[Tensor, " d"] | None = None) -> Agent:
    """Train and return the agent.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
        theta: parameters that a new run starts from; by default the network's own initialisation.
    """
    with session or Run("reinforce", config, config.total_steps) as session:
        state, net = learner.start(config, session, theta)
        while state.step < config.total_steps:
            # 1. collect: whole episodes of every environment under the current policy
            data, world = learner.collect(net, state, config, BLOCK, config.episodes_per_env)

            # 2. estimate Ψ
            batch, offset, remembered = estimate(data, state, net, config)

            # 3. objective and 4. update: one step
            theta, optimizer, numbers = update(state, net, batch, config, offset)

            state = learner.advance(state, theta, optimizer, world, remembered)
            fit = statistics.explained_variance(batch.value_old, batch.value_target, batch.valid)
            learner.report(session, state, net, config, numbers | {"explained_variance": fit})
        return learner.finish(session, state, net, config)
