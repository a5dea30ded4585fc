"""Collecting rollouts: T steps of N environments under the current policy, and the world between rollouts."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upslope.control import environments, normalization
from upslope.control.networks import Head, Observation, to_tensors
from upslope.control.parameters import Net
from upslope.core import advantages
from upslope.runs import distributed

RECENT = 100  # finished episodes that the reported mean return covers


class World(NamedTuple):
    """The environments between two rollouts, and what is remembered about them."""

    envs: environments.Environments
    observation: Any  # what to act on next, as the environments gave it
    episode_return: np.ndarray  # [N] float64, undiscounted, of the running episodes
    episode_length: np.ndarray  # [N] int64, steps
    recent: np.ndarray  # [≤100, 2] returns and lengths of the last finished episodes
    episodes: int  # finished since the run began
    normalizer: normalization.Normalizer


class Rollout(NamedTuple):
    """N environments × T steps; time is the last axis of every number, the second of observations and actions."""

    observation: Observation  # as the policy saw it
    action: Tensor
    logp: Float[Tensor, "N T"]  # of the policy that acted
    value: Float[Tensor, "N T"]
    next_value: Float[Tensor, "N T"]  # of the true successor, the final observation where an episode ended
    reward: Float[Tensor, "N T"]
    terminated: Bool[Tensor, "N T"]
    truncated: Bool[Tensor, "N T"]
    valid: Bool[Tensor, "N T"] | None  # False for reset rows; None where there are none


class Batch(NamedTuple):
    """Transitions for a gradient step, in any order."""

    observation: Observation
    action: Tensor
    logp_old: Float[Tensor, " B"]
    value_old: Float[Tensor, " B"]
    psi: Float[Tensor, " B"]
    value_target: Float[Tensor, " B"]
    valid: Bool[Tensor, " B"] | None


def begin(config: environments.Config, normalize: normalization.Config, seed: int, first_index: int = 0) -> World:
    """A new world: every environment at the start of its first episode."""
    envs, observation = environments.make(config, seed, first_index)
    n = envs.num_envs
    return World(
        envs, observation, np.zeros(n), np.zeros(n, dtype=np.int64), np.zeros((0, 2)), 0,
        normalization.start(envs.observation_space, n, normalize),
    )  # fmt: skip


@torch.no_grad()
def collect(
    net: Net,
    theta: Float[Tensor, " d"],
    world: World,
    length: int,
    generator: torch.Generator,
    normalize: normalization.Config,
    gamma: float,
    noise_interval: int = 0,
) -> tuple[Rollout, World]:
    """T steps of every environment under π_θ, observation statistics frozen, rewards scaled afterwards.

    Args:
        net: (θ, observation) -> (policy, value).
        theta: parameters.
        world: where to go on.
        length: T, steps per environment.
        generator: for the action noise, drawn as one block.
        normalize: what is normalised.
        gamma: discount of the return whose spread scales the rewards.
        noise_interval: steps between new exploration matrices of state-dependent noise; 0: one per rollout.
    """
    envs, raw, statistics = world.envs, to_tensors(world.observation), world.normalizer
    noise = _noise(net, envs.num_envs, length, generator, noise_interval)
    rows: list[tuple[Any, ...]] = []
    raws: list[Observation] = []
    finals: list[tuple[int, np.ndarray, Any]] = []
    returns, lengths = world.episode_return.copy(), world.episode_length.copy()
    finished: list[tuple[float, int]] = []
    for t in range(length):
        seen = normalization.observation(statistics, raw, normalize)
        policy, value = net(theta, seen)
        action = policy.sample(noise(t))
        raws.append(raw)
        step = envs.step(action.numpy())
        rows.append((seen, action, policy.log_prob(action), value, step))
        returns += step.reward
        lengths += 1 if step.valid is None else step.valid
        if step.ended.any():
            over = np.flatnonzero(step.ended)
            finished += [(float(returns[i]), int(lengths[i])) for i in over]
            returns[over], lengths[over] = 0.0, 0
            if step.valid is None and step.truncated.any():
                finals.append((t, step.truncated & ~step.terminated, step.next_observation))
        raw = to_tensors(step.observation)
    seen, action, logp, value = (_stack([row[i] for row in rows]) for i in range(4))
    steps = [row[4] for row in rows]
    reward = torch.from_numpy(np.stack([step.reward for step in steps], 1).astype(np.float64))
    terminated, truncated, ended = (
        torch.from_numpy(np.stack([getattr(step, name) for step in steps], 1))
        for name in ("terminated", "truncated", "ended")
    )
    valid = None if steps[0].valid is None else torch.from_numpy(np.stack([step.valid for step in steps], 1))
    last = net(theta, normalization.observation(statistics, raw, normalize))[1]
    next_value = torch.cat([value[:, 1:], last.unsqueeze(1)], 1)
    for t, cut, successor in finals:  # the row after these belongs to another episode
        final = normalization.observation(statistics, to_tensors(successor), normalize)
        next_value[:, t] = torch.where(torch.from_numpy(cut), net(theta, final)[1], next_value[:, t])
    scaled, statistics = normalization.rewards(statistics, reward, ended, valid, gamma, normalize)
    if statistics.observation:
        statistics = normalization.observe(statistics, _stack(raws), valid)
    recent = np.concatenate([world.recent, np.array(finished).reshape(-1, 2)])[-RECENT:]
    world = World(envs, step.observation, returns, lengths, recent, world.episodes + len(finished), statistics)
    return Rollout(seen, action, logp, value, next_value, scaled.to(value.dtype), terminated, truncated, valid), world


def flatten(rollout: Rollout, psi: Float[Tensor, "N T"], value_target: Float[Tensor, "N T"]) -> Batch:
    """The rollout's transitions as one batch of N·T rows."""
    valid = None if rollout.valid is None else rollout.valid.flatten()
    return Batch(
        _merge(rollout.observation), rollout.action.flatten(0, 1), rollout.logp.flatten(), rollout.value.flatten(),
        psi.flatten(), value_target.flatten(), valid,
    )  # fmt: skip


def count(rollout: Rollout) -> int:
    """Environment steps in a rollout, of all ranks; reset rows are none."""
    own = torch.tensor(rollout.reward.numel()) if rollout.valid is None else rollout.valid.sum()
    return int(distributed.total_(own))


def minibatches(batch: Batch, num_epochs: int, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Every transition once an epoch, in a new random order each; the last minibatch of an epoch may be smaller.

    One of reset rows alone is left out.
    """
    total = batch.psi.shape[0]
    for _ in range(num_epochs):
        if size >= total:  # the whole batch is a sum over all rows, whatever their order
            yield batch
            continue
        order = torch.randperm(total, generator=generator)
        shuffled = _rows(batch, order)
        for first in range(0, total, size):
            minibatch = _rows(shuffled, slice(first, first + size))
            if minibatch.valid is None or bool(minibatch.valid.any()):
                yield minibatch


def whitened(batch: Batch) -> Float[Tensor, " B"]:
    """Ψ with mean 0 and standard deviation 1; a single transition is its own mean, and gets 0."""
    count = batch.psi.shape[0] if batch.valid is None else int(batch.valid.sum())
    return advantages.whiten(batch.psi, batch.valid) if count > 1 else torch.zeros_like(batch.psi)


def summary(world: World) -> dict[str, float | int | None]:
    """What is reported of the last finished episodes; None before the first has finished."""
    mean = world.recent.mean(0) if len(world.recent) else (None, None)
    return {
        "episodes": world.episodes,
        "episode_return": None if mean[0] is None else float(mean[0]),
        "episode_length": None if mean[1] is None else float(mean[1]),
    }


def pack(world: World) -> dict[str, Tensor]:
    """The world as tensors, for a checkpoint."""
    tensors = {f"environments.{name}": torch.from_numpy(np.array(v)) for name, v in world.envs.snapshot().items()}
    tensors["episode_return"] = torch.from_numpy(world.episode_return.copy())
    tensors["episode_length"] = torch.from_numpy(world.episode_length.copy())
    tensors["recent"] = torch.from_numpy(world.recent.copy())
    tensors["episodes"] = torch.tensor(world.episodes)
    return tensors | normalization.pack(world.normalizer)


def unpack(
    tensors: dict[str, Tensor],
    config: environments.Config,
    normalize: normalization.Config,
    seed: int,
    first_index: int = 0,
) -> World:
    """The world that `pack` put away: environments rebuilt, their episodes replayed."""
    start = {k.removeprefix("environments."): v.numpy() for k, v in tensors.items() if k.startswith("environments.")}
    envs, observation = environments.make(config, seed, first_index, start)
    normalizer = normalization.unpack(tensors, envs.observation_space, normalize)
    if envs.kind == "pool":  # its running episodes are lost
        tensors = {**tensors, "episode_return": torch.zeros(envs.num_envs, dtype=torch.float64)}
        tensors["episode_length"] = torch.zeros(envs.num_envs, dtype=torch.int64)
    return World(
        envs, observation, tensors["episode_return"].numpy(), tensors["episode_length"].numpy(),
        tensors["recent"].numpy(), int(tensors["episodes"]), normalizer,
    )  # fmt: skip


def _noise(net: Net, n: int, length: int, generator: torch.Generator, interval: int) -> Any:
    head: Head = net.module.policy  # type: ignore[assignment]
    if not head.state_dependent:
        block = head.noise((length, n, *head.noise_shape), generator)
        return lambda t: block[t]
    interval = interval if interval > 0 else length
    matrices = [head.noise((n, *head.noise_shape), generator) for _ in range(0, length, interval)]
    return lambda t: matrices[t // interval]


def _merge(observation: Observation) -> Observation:
    if isinstance(observation, dict):
        return {key: part.flatten(0, 1) for key, part in observation.items()}
    return observation.flatten(0, 1)


def _stack(parts: list[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {key: torch.stack([part[key] for part in parts], 1) for key in parts[0]}
    return torch.stack(parts, 1)


def _rows(batch: Batch, index: Tensor | slice) -> Batch:
    observation = batch.observation
    picked = {k: v[index] for k, v in observation.items()} if isinstance(observation, dict) else observation[index]
    return Batch(picked, *(None if part is None else part[index] for part in batch[1:]))  # type: ignore[arg-type]
