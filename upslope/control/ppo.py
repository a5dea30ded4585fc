"""Proximal Policy Optimization, clipped form (Schulman et al. 2017, arXiv:1707.06347; S3 alg 11, S4 alg 2).

Psi         GAE(γ, λ), whitened per minibatch                                        core/advantages.py
surrogate   min(ρ Ψ, clip(ρ, 1-ε_low, 1+ε_high) Ψ), ρ = π_θ/π_old          eq 7      core/surrogates.py
constraint  the clip itself; optionally the epochs stop at a KL target
data        rollouts of the current policy, each used for `num_epochs` epochs
maximised   surrogate - c1 (V - target)² + c2 entropy                     S4 eq 2.18 (S3 eq 26 has the wrong sign)

The "37 implementation details" that this file and its neighbours cover are listed with their switches in
docs/algorithms/ppo.md.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.control import environments, networks, normalization, optimizers, rollout
from upslope.control.agent import Agent
from upslope.control.parameters import Net
from upslope.core import advantages, divergences, reductions, returns, statistics, surrogates, values
from upslope.runs import distributed, settings
from upslope.runs import run as runs
from upslope.runs.randomness import derive, generator
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
    value_coef: float = 0.5  # c1, of the squared error without ½
    entropy_coef: float = 0.01  # c2, per nat
    whiten_advantages: bool = True  # per minibatch
    max_grad_norm: float | None = 0.5
    anneal_learning_rate: bool = True  # linearly to 0 over the run
    anneal_clip: bool = False  # likewise
    target_kl: float | None = None  # nats; the epochs stop above 1.5 times it
    noise_interval: int = 0  # steps an exploration matrix is kept with state-dependent noise; 0: a whole rollout

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "rollout_length", "num_epochs", "minibatch_size")
        settings.within(self, 0, 1, "gamma", "gae_lambda", "clip_low")
        settings.within(self, 0, None, "clip_high", "value_coef", "entropy_coef", "noise_interval")
        settings.positive(self, "clip_value", "max_grad_norm", "target_kl")
        rows = self.rollout_length * self.environment.num_envs
        if self.minibatch_size > rows:
            raise ValueError(
                f"minibatch_size is {self.minibatch_size}, but a rollout has only rollout_length "
                f"{self.rollout_length} × num_envs {self.environment.num_envs} = {rows} transitions"
            )


class State(NamedTuple):
    """Everything a resumed run needs to go on as if nothing had happened."""

    theta: Float[Tensor, " d"]
    optimizer: optimizers.State
    world: rollout.World
    iteration: int
    step: int  # environment steps so far


class Terms(NamedTuple):
    """The objective's parts per transition, before any reduction."""

    surrogate: Float[Tensor, " B"]
    value_error: Float[Tensor, " B"]
    entropy: Float[Tensor, " B"]
    logp: Float[Tensor, " B"]


def terms(theta: Float[Tensor, " d"], net: Net, batch: rollout.Batch, config: PPO, clip_scale: float = 1.0) -> Terms:
    """What π_θ and V_θ make of B transitions."""
    policy, value = net(theta, batch.observation)
    logp, entropy = policy.log_prob_entropy(batch.action)
    psi = rollout.whitened(batch) if config.whiten_advantages else batch.psi
    low, high = config.clip_low * clip_scale, config.clip_high * clip_scale
    surrogate = surrogates.clipped_ratio(logp, batch.logp_old, psi, low, high)
    if config.clip_value is None:
        value_error = values.squared_error(value, batch.value_target)
    else:
        value_error = values.clipped_squared_error(value, batch.value_old, batch.value_target, config.clip_value)
    return Terms(surrogate, value_error, entropy, logp)


def objective(
    theta: Float[Tensor, " d"], net: Net, batch: rollout.Batch, config: PPO, clip_scale: float = 1.0
) -> tuple[Tensor, Terms]:
    """Scalar to maximise on a minibatch: surrogate - c1 error + c2 entropy, without reset rows; and its parts."""
    part = terms(theta, net, batch, config, clip_scale)
    each = part.surrogate - config.value_coef * part.value_error + config.entropy_coef * part.entropy
    return reductions.token_mean(each, batch.valid), part


@torch.no_grad()
def diagnose(
    theta: Float[Tensor, " d"], net: Net, batch: rollout.Batch, config: PPO, clip_scale: float = 1.0
) -> dict[str, float]:
    """What the update did, over the whole rollout: its terms, KL[π_old || π_θ] by k3, the share of clipped ratios."""
    part = terms(theta, net, batch, config, clip_scale)
    numbers = {"surrogate": part.surrogate, "value_error": part.value_error, "entropy": part.entropy}
    numbers["kl"] = divergences.k3(batch.logp_old, part.logp)
    means = {name: float(reductions.token_mean(number, batch.valid)) for name, number in numbers.items()}
    low, high = config.clip_low * clip_scale, config.clip_high * clip_scale
    clipped = surrogates.clip_fraction(part.logp, batch.logp_old, low, high, batch.valid)
    return {**means, "clip_fraction": float(clipped)}


def update(
    state: State, net: Net, batch: rollout.Batch, config: PPO
) -> tuple[Float[Tensor, " d"], optimizers.State, dict[str, float]]:
    """Epochs of minibatch steps uphill; θ and the optimiser's memory are updated in place."""
    progress = state.step / config.total_steps
    learning_rate = optimizers.linear(config.optimizer.learning_rate, progress, config.anneal_learning_rate)
    clip_scale = optimizers.linear(1.0, progress, config.anneal_clip)
    theta, memory, norms = state.theta, state.optimizer, []
    shuffle = generator(config.run.seed, "shuffle", state.iteration, distributed.rank())
    for minibatch in rollout.minibatches(batch, config.num_epochs, config.minibatch_size, shuffle):
        gradient, _, part = net.gradient(objective, theta, net, minibatch, config, clip_scale)
        if config.target_kl is not None:
            kl = reductions.token_mean(divergences.k3(minibatch.logp_old, part.logp.detach()), minibatch.valid)
            if distributed.average_(kl) > 1.5 * config.target_kl:
                break
        distributed.average_(gradient)
        norm = optimizers.clip_norm(gradient, config.max_grad_norm)
        if not math.isfinite(norm):
            raise ValueError(f"the gradient is not finite at step {state.step}, its norm is {norm}; θ was not changed")
        theta, memory = config.optimizer.ascend(theta, memory, gradient, learning_rate)
        norms.append(norm)
    numbers = {
        "grad_norm": sum(norms) / max(len(norms), 1),
        "gradient_steps": len(norms),
        "learning_rate": learning_rate,
    }
    return theta, memory, diagnose(theta, net, batch, config, clip_scale) | numbers


def train(config: PPO, session: Run | None = None) -> Agent:
    """Train and return the agent. `session` is the run to write to or to go on with, by default `config.run`'s."""
    with session or Run("ppo", config, config.total_steps) as session:
        state, net = start(config, session)
        session.closes(state.world.envs)
        while state.step < config.total_steps:
            # 1. collect: T steps of every environment under the current policy
            noise = generator(config.run.seed, "noise", state.iteration, distributed.rank())
            data, world = rollout.collect(
                net, state.theta, state.world, config.rollout_length, noise, config.normalize, config.gamma,
                config.noise_interval,
            )  # fmt: skip

            # 2. estimate Ψ
            discounts, traces = returns.boundaries(data.terminated, data.truncated, config.gamma, config.gae_lambda)
            psi = advantages.gae(data.reward, data.value, data.next_value, discounts, traces)
            batch = rollout.flatten(data, psi, value_target=psi + data.value)

            # 3. objective and 4. update: epochs of shuffled minibatches
            theta, optimizer, numbers = update(state, net, batch, config)

            state = State(theta, optimizer, world, state.iteration + 1, state.step + rollout.count(data))
            numbers["explained_variance"] = statistics.explained_variance(
                batch.value_old, batch.value_target, batch.valid
            )
            session.record(state.step, {**rollout.summary(world), **numbers})
            if session.due():
                session.save(state.step, pack(state), {"layout": net.layout.table()})
        session.save(state.step, pack(state), {"layout": net.layout.table()})
        session.finish(state.step, rollout.summary(state.world))
    return Agent(
        net, state.theta, config.environment, config.normalize, state.world.normalizer, state.world.envs.action_space
    )


def start(config: PPO, session: Run) -> tuple[State, Net]:
    """The state a run begins with, or the one that its checkpoint holds."""
    seed, first = config.run.seed, distributed.rank() * config.environment.num_envs
    saved = None if session.restored is None else session.restored.tensors
    if saved is None:
        world = rollout.begin(config.environment, config.normalize, seed, first)
    else:
        mine = distributed.own("world", saved)
        world = rollout.unpack(mine, config.environment, config.normalize, seed, first)
    module = networks.actor_critic(
        world.envs.observation_space, world.envs.action_space, config.network, derive(seed, "network")
    )
    net = Net(module)
    theta = net.bind(net.initial() if saved is None else saved["theta"])
    if saved is None:
        return State(theta, config.optimizer.start(theta), world, 0, 0), net
    memory = optimizers.unpack(saved)
    return State(theta, memory, world, int(saved["iteration"]), int(saved["step"])), net


def pack(state: State) -> dict[str, Tensor]:
    """All resumable state as tensors."""
    return {
        "theta": state.theta,
        **optimizers.pack(state.optimizer),
        **distributed.collected("world", rollout.pack(state.world)),
        "iteration": torch.tensor(state.iteration),
        "step": torch.tensor(state.step),
    }
