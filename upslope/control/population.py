"""A population of θ: what is searched of θ, whole episodes of n policies at once, and what is made of their returns.

Environment i plays candidate i. A forward pass of all candidates is one call, `torch.func.vmap` over θ [n, d]. With
`environment.group_size` candidates in a row meet the same reset seeds (common random numbers); with `group_size` equal
to `num_envs` all do.
"""

from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upslope.control import environments, learner, networks, normalization, rollout
from upslope.control.networks import Observation, to_tensors
from upslope.control.parameters import Net
from upslope.core import advantages
from upslope.runs import distributed
from upslope.runs.randomness import generator

BLOCK = 64  # steps that action noise is drawn for at once

Shaping = Literal["ranks", "standardised", "none"]


class Config(learner.Basic, Protocol):
    """What every search of θ has."""

    @property
    def episodes_per_candidate(self) -> int: ...
    @property
    def stochastic(self) -> bool: ...


class Played(NamedTuple):
    """The episodes of a population."""

    fitness: Float[Tensor, " n"]  # float64, the mean undiscounted return of a candidate's episodes
    world: rollout.World  # after them


def refuse(
    algorithm: str, environment: environments.Config, network: networks.Config, normalize: normalization.Config
) -> None:
    """Raise a `ValueError` for settings that a search of θ has no use for."""
    if environment.num_envs < 2:
        raise ValueError(f"environment.num_envs is {environment.num_envs}, allowed: 2 or more, one for each candidate")
    if normalize.reward or normalize.reward_sign:
        name = "reward" if normalize.reward else "reward_sign"
        raise ValueError(f"normalize.{name} is True, allowed with {algorithm}: False (fitness is the raw return)")
    networks.refuse_memory(network, algorithm)


def refuse_ranks(algorithm: str) -> None:
    """Raise a `ValueError` under `torchrun`."""
    if distributed.world_size() > 1:
        raise ValueError(f"{algorithm} runs in one process, got {distributed.world_size()} ranks")


def searched(net: Net, stochastic: bool) -> Bool[Tensor, " d"]:
    """Which elements of θ are: the policy's, without padding, and without its noise where it acts by its mode."""
    mask = torch.zeros(net.layout.dimension, dtype=torch.bool)
    for segment in net.layout.segments:
        if segment.name.startswith("policy.") and (stochastic or segment.name != "policy.head.log_std"):
            mask[segment.start : segment.start + segment.size] = True
    return mask


def act(net: Net, thetas: Float[Tensor, "n d"], observation: Observation, noise: Tensor | None = None) -> Tensor:
    """The action of every candidate on its own observation: the policy's mode, or a sample where noise is given."""

    def one(theta: Float[Tensor, " d"], seen: Any, drawn: Tensor | None) -> Tensor:
        policy = net.only("policy", theta, seen)
        return policy.mode() if drawn is None else policy.sample(drawn)

    alone = (
        {k: v.unsqueeze(1) for k, v in observation.items()} if isinstance(observation, dict) else observation[:, None]
    )
    if noise is None:
        return torch.func.vmap(lambda theta, seen: one(theta, seen, None))(thetas, alone).squeeze(1)
    return torch.func.vmap(one)(thetas, alone, noise.unsqueeze(1)).squeeze(1)


@torch.no_grad()
def play(net: Net, thetas: Float[Tensor, "n d"], state: learner.State, config: Config) -> Played:
    """`episodes_per_candidate` whole episodes of every candidate, observation statistics frozen.

    Who is done early goes on until the last is done; these steps are counted as steps, their returns are not used.
    """
    world, episodes = state.world, config.episodes_per_candidate
    envs, raw, statistics = world.envs, to_tensors(world.observation), world.normalizer
    random = generator(config.run.seed, "noise", state.iteration)
    noise = rollout.noise(net, envs.num_envs, BLOCK, random) if config.stochastic else None
    total, length = np.zeros(envs.num_envs), np.zeros(envs.num_envs, dtype=np.int64)
    fitness, played = np.zeros(envs.num_envs), np.zeros(envs.num_envs, dtype=np.int64)
    finished: list[tuple[float, int]] = []
    raws, valids, t = [], [], 0
    while (played < episodes).any():
        seen = normalization.observation(statistics, raw, config.normalize)
        step = envs.step(act(net, thetas, seen, None if noise is None else noise(t)).numpy())
        valids.append(np.ones(envs.num_envs, dtype=bool) if step.valid is None else step.valid)
        if statistics.observation:
            raws.append(raw)
        total, length = total + step.reward, length + valids[-1]
        for i in np.flatnonzero(step.ended & (played < episodes)):
            finished.append((float(total[i]), int(length[i])))
            fitness[i] += total[i] / episodes
        total[step.ended], length[step.ended] = 0.0, 0
        played += step.ended
        raw, t = to_tensors(step.observation), t + 1
    valid = np.stack(valids, 1)
    if statistics.observation:
        statistics = normalization.observe(statistics, rollout.stack(raws), torch.from_numpy(valid))
    recent = np.concatenate([world.recent, np.array(finished)])[-rollout.RECENT :]
    return Played(
        torch.from_numpy(fitness),
        world._replace(
            observation=envs.restart(), recent=recent, episodes=world.episodes + len(finished),
            steps=world.steps + int(valid.sum()), normalizer=statistics,
        ),
    )  # fmt: skip


def centred_ranks(fitness: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Ranks from -½ for the worst to ½ for the best; equal fitness has the mean of its ranks. They sum to 0.

    >>> centred_ranks(torch.tensor([3.0, -7.0, 900.0])).tolist(), centred_ranks(torch.tensor([1.0, 1.0])).tolist()
    ([0.0, -0.5, 0.5], [0.0, 0.0])
    """
    below = (fitness[:, None] > fitness).sum(1) - (fitness[:, None] < fitness).sum(1)
    return below.to(fitness.dtype) / (2 * (len(fitness) - 1))


def shaped(fitness: Float[Tensor, " n"], shaping: Shaping) -> Float[Tensor, " n"]:
    """Ψ of every candidate: its centred rank, or its fitness with mean 0 and standard deviation 1, or as it is."""
    if shaping == "ranks":
        return centred_ranks(fitness)
    return advantages.whiten(fitness) if shaping == "standardised" else fitness


def mirrored(half: Float[Tensor, "k d"]) -> Float[Tensor, "2k d"]:
    """Every direction followed by its opposite.

    >>> mirrored(torch.tensor([[1.0], [2.0]])).flatten().tolist()
    [1.0, -1.0, 2.0, -2.0]
    """
    return torch.stack([half, -half], 1).flatten(0, 1)


def summary(fitness: Float[Tensor, " n"]) -> dict[str, float]:
    """What is reported of a population."""
    return {
        "fitness_mean": float(fitness.mean()),
        "fitness_max": float(fitness.max()),
        "fitness_std": float(fitness.std(correction=0)),
    }
