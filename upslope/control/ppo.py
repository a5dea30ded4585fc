"""Proximal Policy Optimization, clipped or KL-penalised (Schulman et al. 2017, arXiv:1707.06347; S3 algs 10, 11).

Psi         GAE(γ, λ), whitened per minibatch                                        core/advantages.py
surrogate   min(ρ Ψ, clip(ρ, 1-ε_low, 1+ε_high) Ψ), ρ = π_θ/π_old    eq 7, S4 alg 2  core/surrogates.py
            or ρ Ψ - β KL[π_old || π_θ], β fixed or adaptive         eq 8, S2 eq 18
constraint  the clip or the penalty; optionally the epochs stop at a KL target
data        rollouts of the current policy, each used for `num_epochs` epochs
maximised   surrogate - c1 (V - target)² + c2 entropy                S4 eq 2.18 (S3 eq 26 has the wrong sign)

The "37 implementation details" that this file and its neighbours cover are listed with their switches in
docs/algorithms/ppo.md. `fast_ppo.py` is the same iteration as one compiled program, held to this one by its tests.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.control import critic, environments, learner, networks, normalization, optimizers, penalty, rollout
from upslope.control.agent import Agent
from upslope.control.learner import State
from upslope.control.parameters import Net
from upslope.core import advantages, reductions, returns, statistics, surrogates
from upslope.runs import distributed, settings
from upslope.runs import run as runs
from upslope.runs.randomness import generator
from upslope.runs.run import Run


@dataclass(frozen=True)
class PPO:
    """What is PPO's own; what every algorithm shares (environment, network, …, run) is nested."""

    environment: environments.Config = field(default_factory=environments.Config)
    network: networks.Config = field(default_factory=networks.Config)
    normalize: normalization.Config = field(default_factory=normalization.Config)
    optimizer: optimizers.Optimizer = field(default_factory=lambda: optimizers.Adam(learning_rate=2.5e-4))
    run: runs.Options = field(default_factory=runs.Config)
    total_steps: int = 500_000  # environment steps, all environments together
    rollout_length: int = 128  # T, steps of each environment per iteration
    num_epochs: int = 4  # passes over a rollout
    minibatch_size: int = 256  # transitions per gradient step
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95
    clip_low: float = 0.2  # ε below 1, of the ratio
    clip_high: float = 0.2  # ε above 1
    clip_value: float | None = None  # of the value's move from value_old, in reward units; None: not clipped
    kl_penalty: penalty.Config = field(default_factory=penalty.Config)  # β KL[π_old || π_θ] in place of the clip
    value_coef: float = 0.5  # c1, of the squared error without ½
    entropy_coef: float = 0.01  # c2, per nat
    whiten_advantages: bool = True  # per minibatch
    max_grad_norm: float | None = 0.5
    anneal_learning_rate: bool = True  # linearly to 0 over the run
    anneal_clip: bool = False  # likewise
    target_kl: float | None = None  # nats; the epochs stop above 1.5 times it

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "rollout_length", "num_epochs", "minibatch_size")
        settings.within(self, 0, 1, "gamma", "gae_lambda", "clip_low")
        settings.within(self, 0, None, "clip_high", "value_coef", "entropy_coef")
        settings.positive(self, "clip_value", "max_grad_norm", "target_kl")
        rollout.refuse_minibatches(self.minibatch_size, self.rollout_length, self.environment.num_envs)
        rollout.refuse_cut_sequences(self, "minibatch_size")


class Terms(NamedTuple):
    """The objective's parts per transition, before any reduction."""

    surrogate: Float[Tensor, " B"]
    value_error: Float[Tensor, " B"]
    entropy: Float[Tensor, " B"]
    logp: Float[Tensor, " B"]


def objective(
    theta: Float[Tensor, " d"], net: Net, batch: rollout.Batch, config: PPO, clip_scale: float = 1.0, beta: float = 0.0
) -> tuple[Tensor, Terms]:
    """Scalar to maximise: surrogate (- β KL) - c1 error + c2 entropy, without reset rows; and its parts."""
    policy, value = net(theta, batch.observation)
    logp, entropy = policy.log_prob_entropy(batch.action)
    psi = rollout.whitened(batch) if config.whiten_advantages else batch.psi
    low, high = config.clip_low * clip_scale, config.clip_high * clip_scale
    if config.kl_penalty.coef:
        surrogate = penalty.surrogate(logp, batch.logp_old, psi, beta)
    else:
        surrogate = surrogates.clipped_ratio(logp, batch.logp_old, psi, low, high)
    part = Terms(surrogate, critic.error(value, batch, config.clip_value), entropy, logp)
    each = part.surrogate - config.value_coef * part.value_error
    if config.entropy_coef:  # 0 times a gradient costs as much as another one
        each = each + config.entropy_coef * part.entropy
    return reductions.token_mean(each, batch.valid, rollout.counted(batch)), part


def diagnose(part: Terms, batch: rollout.Batch, config: PPO, clip_scale: float = 1.0) -> dict[str, float]:
    """What the update did, over the whole rollout: its terms, KL[π_old || π_θ] by k3, the share of clipped ratios."""
    low, high = config.clip_low * clip_scale, config.clip_high * clip_scale
    clipped = learner.number(surrogates.clip_fraction(part.logp, batch.logp_old, low, high, batch.valid))
    return learner.means(part, batch.valid) | {"kl": learner.kl(part.logp, batch), "clip_fraction": clipped}


def update(
    state: State, net: Net, batch: rollout.Batch, config: PPO
) -> tuple[Float[Tensor, " d"], optimizers.State, dict[str, float]]:
    """Epochs of minibatch steps uphill; θ and the optimiser's memory are updated in place."""
    rate = learner.learning_rate(state, config)
    clip_scale = optimizers.linear(1.0, state.step / config.total_steps, config.anneal_clip)
    beta = state.remembered.get("kl_coef", config.kl_penalty.coef)
    theta, memory, norms = state.theta, state.optimizer, []
    shuffle = generator(config.run.seed, "shuffle", state.iteration, distributed.rank())
    for minibatch in rollout.minibatches(batch, config.num_epochs, config.minibatch_size, shuffle):
        gradient, _, part = net.gradient(objective, theta, net, minibatch, config, clip_scale, beta)
        if config.target_kl is not None and learner.kl(part.logp, minibatch) > 1.5 * config.target_kl:
            break
        theta, memory, norm = learner.ascend(theta, memory, gradient, config, rate)
        norms.append(norm)
    numbers = {"grad_norm": sum(norms) / max(len(norms), 1), "gradient_steps": len(norms), "learning_rate": rate}
    with torch.no_grad():
        numbers |= diagnose(objective(theta, net, batch, config, clip_scale)[1], batch, config, clip_scale)
    return theta, memory, numbers | penalty.adapted(config.kl_penalty, beta, numbers["kl"])


def train(config: PPO, session: Run | None = None, theta: Float[Tensor, " d"] | None = None) -> Agent:
    """Train and return the agent.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
        theta: parameters that a new run starts from; by default the network's own initialisation.
    """
    with session or Run("ppo", config, config.total_steps) as session:
        state, net = learner.start(config, session, theta)
        while state.step < config.total_steps:
            # 1. collect: T steps of every environment under the current policy
            data, world = learner.collect(net, state, config, config.rollout_length)

            # 2. estimate Ψ
            discounts, traces = returns.boundaries(data.terminated, data.truncated, config.gamma, config.gae_lambda)
            psi = advantages.gae(data.reward, data.value, data.next_value, discounts, traces)
            batch = rollout.flatten(data, psi, value_target=psi + data.value)

            # 3. objective and 4. update: epochs of shuffled minibatches
            theta, optimizer, numbers = update(state, net, batch, config)

            state = learner.advance(state, theta, optimizer, world, penalty.remembered(numbers))
            fit = statistics.explained_variance(batch.value_old, batch.value_target, batch.valid)
            learner.report(session, state, net, config, numbers | {"explained_variance": fit})
        return learner.finish(session, state, net, config)
