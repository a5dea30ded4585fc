"""Observation and reward normalisation; the statistics are data in the checkpoint, frozen while a rollout is collected.

Observations are scaled by statistics of the rollouts before this one, so the policy that is updated sees exactly what
the policy that acted saw (the ratio is 1 on the first minibatch). Rewards are scaled after collection, by statistics
that include the rollout itself.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float
from torch import Tensor

from upslope.control.networks import Observation
from upslope.core import statistics
from upslope.core.statistics import Moments
from upslope.runs import distributed, settings


@dataclass(frozen=True)
class Config:
    """What is normalised, and where it is clipped."""

    observation: bool = False  # (o - mean) / std of every number; images are left alone
    observation_clip: float = 10.0  # standard deviations
    reward: bool = False  # r / std of the discounted return
    reward_clip: float = 10.0  # after scaling
    reward_sign: bool = False  # Atari: the sign of the reward is all that is learned from

    def __post_init__(self) -> None:
        settings.positive(self, "observation_clip", "reward_clip")


_RETURN = "<return>"  # no key of a Dict observation


class Normalizer(NamedTuple):
    """One `Moments` per normalised part of the observation, one for returns, each environment's running return."""

    observation: dict[str, Moments]  # "" for an observation that is not a Dict
    discounted: Moments
    running: Float[Tensor, " N"]  # Σ γ^k r of each environment's episode so far


def start(space: spaces.Space, num_envs: int, config: Config) -> Normalizer:
    parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
    normalised = {
        name: statistics.moments(part.shape)
        for name, part in parts.items()
        if config.observation and isinstance(part, spaces.Box) and np.issubdtype(part.dtype, np.floating)
    }
    return Normalizer(normalised, statistics.moments(()), torch.zeros(num_envs, dtype=torch.float64))


def observation(normalizer: Normalizer, raw: Observation, config: Config) -> Observation:
    """Scale and clip; parts without statistics pass."""
    if not normalizer.observation:
        return raw
    if isinstance(raw, dict):
        return {
            name: normalizer.observation[name].normalize(part, config.observation_clip)
            if name in normalizer.observation
            else part
            for name, part in raw.items()
        }
    return normalizer.observation[""].normalize(raw, config.observation_clip)


def observe(normalizer: Normalizer, raw: Observation, valid: Bool[Tensor, "N T"] | None) -> Normalizer:
    """Add a rollout of raw observations [N, T, ...], of all ranks, to the statistics."""
    if not normalizer.observation:
        return normalizer
    parts = raw if isinstance(raw, dict) else {"": raw}
    rows = None if valid is None else valid.flatten()
    seen = {
        name: _observe(moments, parts[name].flatten(0, 1), rows) for name, moments in normalizer.observation.items()
    }
    return normalizer._replace(observation=seen)


def rewards(
    normalizer: Normalizer,
    raw: Float[Tensor, "N T"],
    ended: Bool[Tensor, "N T"],
    valid: Bool[Tensor, "N T"] | None,
    gamma: float,
    config: Config,
) -> tuple[Float[Tensor, "N T"], Normalizer]:
    """Scale a rollout's rewards by the standard deviation of the discounted return (VecNormalize of Baselines).

    The running return R ← γR + r restarts after an episode ends. Only the scale is normalised: a shift would change
    which policy is best.
    """
    if config.reward_sign:
        raw = raw.sign()
    if not config.reward:
        return raw, normalizer
    running, history = normalizer.running, []
    for t in range(raw.shape[1]):
        running = gamma * running + raw[:, t]
        history.append(running)
        running = torch.where(ended[:, t], 0.0, running)
    rows = None if valid is None else valid.flatten()
    discounted = _observe(normalizer.discounted, torch.stack(history, 1).flatten(), rows)
    scaled = raw / (discounted.variance() + 1e-8).sqrt()
    clipped = scaled.clamp(-config.reward_clip, config.reward_clip)
    return clipped, normalizer._replace(discounted=discounted, running=running)


def _observe(seen: Moments, samples: Tensor, valid: Tensor | None) -> Moments:
    """Merge the samples of every rank, in the order of ranks: all end with the same statistics."""
    new = statistics.observe(statistics.moments(tuple(seen.mean.shape)), samples, valid)
    for parts in zip(*(distributed.everyones(part) for part in new), strict=True):
        seen = statistics.merge(seen, Moments(*parts))
    return seen


def pack(normalizer: Normalizer) -> dict[str, Tensor]:
    """The statistics as tensors, for a checkpoint."""
    tensors = {"normalizer.running": normalizer.running}
    for name, moments in (*normalizer.observation.items(), (_RETURN, normalizer.discounted)):
        tensors |= {f"normalizer.{name}.{field}": value for field, value in moments._asdict().items()}
    return tensors


def unpack(tensors: dict[str, Tensor], space: spaces.Space, config: Config) -> Normalizer:
    """The statistics that `pack` put away."""
    moments = lambda name: Moments(*(tensors[f"normalizer.{name}.{field}"] for field in Moments._fields))  # noqa: E731
    names = start(space, 1, config).observation
    return Normalizer({name: moments(name) for name in names}, moments(_RETURN), tensors["normalizer.running"])
