"""How noisy each method's gradient is, at one fixed policy and per environment step.

Every method collects its own kind of data and weighs actions by its own Ψ, with a critic fitted to that policy at its
own discount. At π = π_old every surrogate's gradient is E[Ψ ∇log π], so Ψ and the data are all that is compared: not
the natural gradient's metric, the clip, the entropy bonus.
"""

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from upslope.control import (
    agent,
    critic,
    environments,
    group_ppo,
    learner,
    normalization,
    optimizers,
    reinforce,
    rollout,
)
from upslope.control.actor_critic import A2C
from upslope.control.agent import Agent
from upslope.control.group_ppo import GroupPPO
from upslope.control.parameters import Net
from upslope.control.reinforce import REINFORCE
from upslope.core import advantages, reductions, returns, surrogates
from upslope.runs import settings
from upslope.runs.randomness import derive, generator
from upslope.runs.run import read_config

ROUNDS = 10  # of 32 episodes, ten passes each, for the critic

Algorithms = Mapping[str, tuple[str, str]]  # name -> module and configuration, as on the command line


class Noise(NamedTuple):
    """Of a gradient estimator at one policy."""

    scale: float  # environment steps whose mean gradient has noise as large as the signal; inf: no signal was seen
    low: float  # about 95%, by the jackknife
    high: float
    cosine: float  # mean, of two independent batches


def gradients(
    directory: Path, fixed: Path, algorithms: Algorithms, batches: int, batch_steps: int
) -> tuple[Float[np.ndarray, "batches d"], float]:
    """Independent estimates of the gradient at the fixed policy by another run's settings, and their mean steps."""
    policy = agent.load(_config(fixed, algorithms), fixed)
    config = _config(directory, algorithms)
    plain = replace(policy.normalize, reward=False)
    config = replace(config, network=_config(fixed, algorithms).network, normalize=plain)
    net, theta = policy.net, policy.theta
    fit_critic(policy, config)
    world = _begin(policy, config.environment, plain, "gradient")
    episodes, part, estimates, sizes = getattr(config, "episodes_per_env", 0), net.part("policy"), [], []
    random = generator(0, "family", "gradient")
    for _ in range(batches):
        total, count, before = torch.zeros_like(theta[part], dtype=torch.float64), 0, world.steps
        while world.steps - before < batch_steps:
            length = reinforce.BLOCK if episodes else config.rollout_length
            data, after = rollout.collect(net, theta, world, length, random, plain, config.gamma, episodes)
            world = after._replace(normalizer=world.normalizer)
            batch = rollout.packed(rollout.flatten(data, psi(data, theta, net, world, config), data.value))
            if getattr(config, "whiten_advantages", False):
                batch = batch._replace(psi=rollout.whitened(batch))
            gradient, _, rows = net.gradient(_surrogate, theta, net, batch)
            total, count = total + rows * gradient[part].double(), count + rows
        estimates.append((total / count).numpy())
        sizes.append(world.steps - before)
    world.envs.close()
    return np.stack(estimates), float(np.mean(sizes))


def psi(
    data: rollout.Rollout, theta: Float[Tensor, " d"], net: Net, world: rollout.World, config: Any
) -> Float[Tensor, "K T"]:
    """What the method of these settings weighs actions by."""
    if isinstance(config, REINFORCE):
        state = learner.State(theta, config.optimizer.start(theta), world, 0, 0, {})
        return reinforce.estimate(data, state, net, config)[0].psi.view_as(data.reward)
    if isinstance(config, GroupPPO):
        return group_ppo.estimate(data, config)
    discounts, traces = returns.boundaries(data.terminated, data.truncated, config.gamma, config.gae_lambda)
    return advantages.gae(data.reward, data.value, data.next_value, discounts, traces)


def fit_critic(policy: Agent, config: Any) -> None:
    """Let the policy's critic learn its own values at the method's discount, so that none has a worse one."""
    chosen = A2C(
        environment=replace(config.environment, num_envs=8, group_size=1),
        optimizer=optimizers.Adam(learning_rate=1e-3),
        gamma=config.gamma, value_target="monte-carlo", critic_epochs=10, max_grad_norm=None,
    )  # fmt: skip
    world = _begin(policy, chosen.environment, config.normalize, "critic")
    random = generator(0, "family", "critic")
    memory = chosen.optimizer.start(policy.theta)
    for _ in range(ROUNDS):
        data, after = rollout.collect(
            policy.net, policy.theta, world, 64, random, config.normalize, config.gamma, episodes=4
        )
        world = after._replace(normalizer=world.normalizer)
        batch = rollout.packed(
            rollout.flatten(data, data.reward, critic.target(data, data.reward, config.gamma, "monte-carlo"))
        )
        memory, _ = critic.fit(policy.theta, memory, policy.net, batch, chosen, 1e-3, random)
    world.envs.close()


def noise(estimates: Float[np.ndarray, "batches d"], steps: float) -> Noise:
    """The gradient noise scale, steps · tr Cov / |E g|² (McCandlish et al. 2018, arXiv:1812.06162), and the cosine.

    >>> noise(np.array([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, -1.0]]), 100.0).cosine
    0.333...
    """
    count = len(estimates)
    keep = ~np.eye(count, dtype=bool)
    logs = np.log([_scale(estimates[rows], steps) for rows in keep])  # leaving one batch out at a time
    centre = np.log(_scale(estimates, steps))
    error = 0.0
    if np.isfinite(logs).all():
        error = 2 * float(np.sqrt((count - 1) * np.mean((logs - logs.mean()) ** 2)))
    unit = estimates / np.maximum(np.linalg.norm(estimates, axis=1, keepdims=True), 1e-300)
    cosine = float((unit @ unit.T)[keep].mean())
    return Noise(float(np.exp(centre)), float(np.exp(centre - error)), float(np.exp(centre + error)), cosine)


def _scale(estimates: Float[np.ndarray, "batches d"], steps: float) -> float:
    variance = float(estimates.var(0, ddof=1).sum())
    signal = float((estimates.mean(0) ** 2).sum()) - variance / len(estimates)  # the mean's own noise taken off
    return steps * variance / signal if signal > 0 else float("inf")


def _surrogate(theta: Float[Tensor, " d"], net: Net, batch: rollout.Batch) -> tuple[Tensor, int]:
    logp = net.only("policy", theta, batch.observation).log_prob(batch.action)
    return reductions.token_mean(surrogates.log_prob(logp, batch.psi)), len(batch.psi)


def _begin(policy: Agent, config: environments.Config, normalize: normalization.Config, name: str) -> rollout.World:
    world = rollout.begin(config, normalize, derive(0, "family", name))
    return world._replace(normalizer=policy.normalizer._replace(running=world.normalizer.running))


def _config(directory: Path, algorithms: Algorithms) -> Any:
    described = read_config(directory)
    path, kind = algorithms[described["algorithm"]]
    return settings.from_json(getattr(importlib.import_module(path), kind), described["config"])
