"""Group PPO, PPO without a critic: GRPO for control (arXiv:2402.03300, 2503.20783; S0 2.6, S3 alg 12, S4 3.9-3.14).

Psi         (R - mean of its group) / the group's spread, one for a whole episode    S4 eq 3.12  core/advantages.py
surrogate   min(ρ Ψ, clip(ρ, 1-ε_low, 1+ε_high) Ψ), ρ = π_θ/π_old            S4 eq 3.14  core/surrogates.py
constraint  the clip; optionally the epochs stop at a KL target
data        groups of whole episodes from one reset seed each, used for `num_epochs` epochs
maximised   surrogate + c2 entropy                                                   no V: nothing is fitted

Differs from ppo.py in where Ψ comes from: other episodes from the same start stand in for the critic. Their mean is a
baseline for that start alone, not a value of the states that follow (S4 A.3.1 says otherwise; only the start is
sampled again), so every step of an episode has the same Ψ. The network's critic is left as it was initialised: it is
not part of the objective. Of an episode cut by a limit, R is what it had collected.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.control import environments, learner, networks, normalization, optimizers, rollout
from upslope.control.agent import Agent
from upslope.control.learner import State
from upslope.control.parameters import Net
from upslope.core import advantages, reductions, returns, surrogates
from upslope.runs import distributed, settings
from upslope.runs import run as runs
from upslope.runs.randomness import generator
from upslope.runs.run import Run

BLOCK = 64  # steps that action noise is drawn for at once


@dataclass(frozen=True)
class GroupPPO:
    """What is group PPO's own; what every algorithm shares (environment, network, …, run) is nested."""

    environment: environments.Config = field(default_factory=lambda: environments.Config(group_size=8))
    network: networks.Config = field(default_factory=networks.Config)
    normalize: normalization.Config = field(default_factory=normalization.Config)
    optimizer: optimizers.Optimizer = field(default_factory=lambda: optimizers.Adam(learning_rate=2.5e-4))
    run: runs.Options = field(default_factory=runs.Config)
    total_steps: int = 500_000  # environment steps, all environments together
    episodes_per_env: int = 1  # whole episodes of each environment per iteration
    num_epochs: int = 4  # passes over a rollout
    minibatch_size: int = 256  # transitions per gradient step
    gamma: float = 0.99  # discount per step
    scale: Literal["group", "batch", "none"] = "group"  # what Ψ is divided by: GRPO; all returns; Dr. GRPO
    clip_low: float = 0.2  # ε below 1, of the ratio
    clip_high: float = 0.2  # ε above 1
    entropy_coef: float = 0.01  # c2, per nat
    max_grad_norm: float | None = 0.5
    anneal_learning_rate: bool = True  # linearly to 0 over the run
    anneal_clip: bool = False  # likewise
    target_kl: float | None = None  # nats; the epochs stop above 1.5 times it

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "episodes_per_env", "num_epochs", "minibatch_size")
        settings.within(self, 0, 1, "gamma", "clip_low")
        settings.within(self, 0, None, "clip_high", "entropy_coef")
        settings.positive(self, "max_grad_norm", "target_kl")
        if self.environment.group_size < 2:
            raise ValueError(
                f"environment.group_size is {self.environment.group_size}, allowed: 2 or more, episodes from one "
                "reset seed to compare"
            )
        networks.refuse_memory(self.network, "group PPO")


class Terms(NamedTuple):
    """The objective's parts per transition, before any reduction."""

    surrogate: Float[Tensor, " B"]
    entropy: Float[Tensor, " B"]
    logp: Float[Tensor, " B"]


def objective(
    theta: Float[Tensor, " d"], net: Net, batch: rollout.Batch, config: GroupPPO, clip_scale: float = 1.0
) -> tuple[Tensor, Terms]:
    """Scalar to maximise: surrogate + c2 entropy; and its parts."""
    policy = net.only("policy", theta, batch.observation)
    logp, entropy = policy.log_prob_entropy(batch.action)
    low, high = config.clip_low * clip_scale, config.clip_high * clip_scale
    surrogate = surrogates.clipped_ratio(logp, batch.logp_old, batch.psi, low, high)
    part = Terms(surrogate, entropy, logp)
    each = part.surrogate + config.entropy_coef * part.entropy
    return reductions.token_mean(each, batch.valid, rollout.counted(batch)), part


@torch.no_grad()
def diagnose(
    theta: Float[Tensor, " d"], net: Net, batch: rollout.Batch, config: GroupPPO, clip_scale: float = 1.0
) -> dict[str, float]:
    """What the update did, over all episodes: its terms, KL[π_old || π_θ] by k3, the share of clipped ratios."""
    part = objective(theta, net, batch, config, clip_scale)[1]
    low, high = config.clip_low * clip_scale, config.clip_high * clip_scale
    clipped = surrogates.clip_fraction(part.logp, batch.logp_old, low, high, batch.valid)
    return learner.means(part, batch.valid) | {"kl": learner.kl(part.logp, batch), "clip_fraction": float(clipped)}


def estimate(data: rollout.Rollout, config: GroupPPO) -> Float[Tensor, "K T"]:
    """Ψ of K episodes: what each collected, relative to its group, the same at every step."""
    discounts, continues = returns.boundaries(data.terminated, data.truncated, config.gamma, 1.0)
    whole = returns.total_return(data.reward, torch.zeros_like(data.reward), discounts, continues)[:, 0]
    # K is environments × episodes: the members of a group are episodes_per_env apart
    grouped = whole.view(-1, config.environment.group_size, config.episodes_per_env).transpose(1, 2)
    psi = advantages.group_relative(grouped, config.scale).transpose(1, 2)
    return psi.reshape(-1, 1).expand_as(data.reward)


def update(
    state: State, net: Net, batch: rollout.Batch, config: GroupPPO
) -> tuple[Float[Tensor, " d"], optimizers.State, dict[str, float]]:
    """Epochs of minibatch steps uphill; θ and the optimiser's memory are updated in place."""
    rate = learner.learning_rate(state, config)
    clip_scale = optimizers.linear(1.0, state.step / config.total_steps, config.anneal_clip)
    theta, memory, norms = state.theta, state.optimizer, []
    shuffle = generator(config.run.seed, "shuffle", state.iteration, distributed.rank())
    for minibatch in rollout.minibatches(batch, config.num_epochs, config.minibatch_size, shuffle):
        gradient, _, part = net.gradient(objective, theta, net, minibatch, config, clip_scale)
        if config.target_kl is not None and learner.kl(part.logp, minibatch) > 1.5 * config.target_kl:
            break
        theta, memory, norm = learner.ascend(theta, memory, gradient, config, rate)
        norms.append(norm)
    numbers = {"grad_norm": sum(norms) / max(len(norms), 1), "gradient_steps": len(norms), "learning_rate": rate}
    numbers |= diagnose(theta, net, batch, config, clip_scale)
    return theta, memory, numbers


def train(config: GroupPPO, session: Run | None = None, theta: Float[Tensor, " d"] | None = None) -> Agent:
    """Train and return the agent.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
        theta: parameters that a new run starts from; by default the network's own initialisation.
    """
    if distributed.world_size() > 1:
        raise ValueError("group-ppo runs in one process: ranks whose episodes differ in length take unequal steps")
    with session or Run("group-ppo", config, config.total_steps) as session:
        state, net = learner.start(config, session, theta)
        while state.step < config.total_steps:
            # 1. collect: whole episodes of every environment under the current policy
            data, world = learner.collect(net, state, config, BLOCK, config.episodes_per_env)

            # 2. estimate Ψ
            psi = estimate(data, config)
            batch = rollout.packed(rollout.flatten(data, psi, value_target=data.value))

            # 3. objective and 4. update: epochs of shuffled minibatches
            theta, optimizer, numbers = update(state, net, batch, config)

            state = learner.advance(state, theta, optimizer, world)
            learner.report(session, state, net, config, numbers)
        return learner.finish(session, state, net, config)
