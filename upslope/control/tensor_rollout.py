"""Rollouts of tensor environments: a pure function of θ, the environments' state and noise, alone or inside a program.

What it gives is what `rollout.collect` gives; the world's arithmetic is the same.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from upslope.control import memory, normalization, rollout, tensor_environments
from upslope.control.loop import by_parts, loop
from upslope.control.parameters import Net
from upslope.control.rollout import Rollout, World
from upslope.control.tensor_environments import TensorEnvironment
from upslope.control.tensor_vector import TensorVector


class Playing(NamedTuple):
    """N environments between two steps."""

    state: Any  # the tensor environment's
    episode_return: Float[Tensor, " N"]  # float64, of the running episodes


class Noise(NamedTuple):
    """All the randomness of T steps."""

    action: Float[Tensor, "T N *shape"]  # as the policy's distribution takes it
    step: Float[Tensor, "T N s"]  # uniform
    reset: Float[Tensor, "T N r"]  # uniform; of each the environments use what they need


class Log(NamedTuple):
    """What a rollout's accounts need besides its transitions."""

    raw: Tensor  # [N, T, ...] observations before normalisation
    finite: Bool[Tensor, "N T"]  # what was seen before a step and after it
    ended: Bool[Tensor, "N T"]
    episode_return: Float[Tensor, "N T"]  # float64, after each step
    episode_length: Int64[Tensor, "N T"]


class _Row(NamedTuple):
    raw: Tensor
    successor: Tensor
    action: Tensor
    reward: Float[Tensor, " N"]
    terminated: Bool[Tensor, " N"]
    truncated: Bool[Tensor, " N"]
    episode_return: Float[Tensor, " N"]
    episode_length: Int64[Tensor, " N"]


def play(
    net: Net,
    theta: Float[Tensor, " d"],
    environment: TensorEnvironment,
    begun: Playing,
    noise: Noise,
    space: spaces.Space,
    normalizer: normalization.Normalizer,
    normalize: normalization.Config,
) -> tuple[Rollout, Playing, Log]:
    """T steps of every environment under π_θ, observation statistics frozen, rewards as they come.

    Args:
        net: (θ, observation) -> (policy, value), without a memory.
        theta: parameters.
        environment: what is played.
        begun: where to go on.
        noise: of T steps.
        space: of actions; boxes are clipped to their bounds before a step.
        normalizer: statistics.
        normalize: what is normalised.
    """

    def see(raw: Tensor) -> Any:
        return normalization.observation(normalizer, raw, normalize)

    def step(now: Playing, given: Noise) -> tuple[Playing, _Row]:
        raw = tensor_environments.observe(environment, now.state)
        action = net.only("policy", theta, see(raw)).sample(given.action)
        after, reward, terminated, truncated = environment.step(now.state, to_space(space, action), given.step)
        total, ended = now.episode_return + reward, terminated | truncated
        row = _Row(
            raw, tensor_environments.observe(environment, after), action, reward, terminated, truncated, total,
            after.time,
        )  # fmt: skip
        fresh = tensor_environments.restart(environment, after, ended, given.reset)
        return Playing(fresh, torch.where(ended, 0.0, total)), row

    after, rows = loop(step, begun, noise)
    row = _Row(*(part.transpose(0, 1) for part in rows))
    seen = see(row.raw)

    def judge(rows: tuple[Any, Tensor, Any]) -> tuple[Tensor, Tensor, Tensor]:
        here, action, following = rows
        policy, value = net(theta, here)
        next_value = net(theta, following)[1] if net.module.shared else net.only("critic", theta, following)
        return policy.log_prob(action), value, next_value

    flat = memory.merge(seen), row.action.flatten(0, 1), memory.merge(see(row.successor))
    logp, value, next_value = (part.view(row.reward.shape) for part in by_parts(judge, flat))
    data = Rollout(
        seen, row.action, logp, value, next_value, row.reward.to(value.dtype), row.terminated, row.truncated, None
    )  # fmt: skip
    ended, fine = row.terminated | row.truncated, finite(row.raw, 2) & finite(row.successor, 2)
    return data, after, Log(row.raw, fine, ended, row.episode_return, row.episode_length)


def copied(playing: Playing) -> Playing:
    """In memory of its own."""
    return Playing(type(playing.state)(*(part.clone() for part in playing.state)), playing.episode_return.clone())


def draw(net: Net, world: World, length: int, generator: torch.Generator) -> Noise:
    """The noise of T steps: the policy's from this iteration's generator, the environments' from their own stream."""
    envs = vector(world)
    head: Any = net.module.policy.head  # type: ignore[union-attr]
    if head.state_dependent:  # gSDE: a matrix lasts for several steps
        at = rollout.noise(net, envs.num_envs, length, generator)
        action = torch.stack([at(t) for t in range(length)])
    else:
        action = head.noise((length, envs.num_envs, *head.noise_shape), generator)
    return Noise(action, *envs.noise(length))


def begun(world: World) -> Playing:
    """Where the world stands."""
    return Playing(vector(world).state, torch.from_numpy(world.episode_return))


def finite(seen: Tensor, axes: int) -> Bool[Tensor, "..."]:
    """Of each observation, after so many axes: is it finite?"""
    return seen.isfinite().reshape(*seen.shape[:axes], -1).all(-1)


def advance(world: World, after: Playing, log: Log) -> World:
    """The world after a rollout, its accounts and observation statistics brought up to date.

    Raises:
        ValueError: a NaN or infinite reward or observation, naming environment, episode and step.
    """
    _refuse_non_finite(world, log)
    envs, over = vector(world), log.ended.T
    finished = torch.stack((log.episode_return.T[over], log.episode_length.T[over].double()), -1)  # as they ended
    envs.state = after.state
    length = after.state.time.numpy()
    return world._replace(
        observation=world.envs.advance(log.ended.sum(1).numpy(), length, envs.observe()),
        episode_return=after.episode_return.numpy(),
        episode_length=length,
        recent=np.concatenate([world.recent, finished.numpy()])[-rollout.RECENT :],
        episodes=world.episodes + len(finished),
        steps=world.steps + log.ended.numel(),
        normalizer=normalization.observe(world.normalizer, log.raw, None),
    )


@torch.no_grad()
def collect(
    net: Net, theta: Float[Tensor, " d"], world: World, noise: Noise, normalize: normalization.Config, gamma: float
) -> tuple[Rollout, World]:
    """As `rollout.collect`: T steps, and the world after them."""
    envs, statistics = vector(world), world.normalizer
    data, after, log = play(
        net, theta, envs.environment, begun(world), noise, world.envs.action_space, statistics, normalize
    )  # fmt: skip
    reward, statistics = normalization.rewards(statistics, data.reward.double(), log.ended, None, gamma, normalize)
    after_world = advance(world._replace(normalizer=statistics), after, log)
    return data._replace(reward=reward.to(data.value.dtype)), after_world


def _refuse_non_finite(world: World, log: Log) -> None:
    """The first; a return that is not finite tells of a reward that is not."""
    if log.finite.all() and math.isfinite(log.episode_return.sum()):  # less than the following
        return
    fine = log.finite & log.episode_return.isfinite()
    if fine.all():
        return
    t, i = (~fine.T).nonzero()[0].tolist()
    what, length = "reward" if log.finite[i, t] else "observation", int(log.episode_length[i, t])
    begins = what == "observation" and length == 1  # before this step or after it
    raise ValueError(
        f"{world.envs.config.id} gave a NaN or infinite {what} in environment {i} at {'the reset or ' * begins}step "
        f"{length} of its episode {int(world.envs.episode[i] + log.ended[i, :t].sum())} (run seed {world.envs.seed}); "
        "nothing that was trained on it is kept, the checkpoints written so far are"
    )


def to_space(space: spaces.Space, action: Tensor) -> Tensor:
    """As `environments.to_space`, on tensors."""
    if isinstance(space, spaces.Box):
        low, high = (torch.from_numpy(bound.reshape(-1)) for bound in (space.low, space.high))
        return action.clamp(low, high).to(low.dtype).reshape(-1, *space.shape)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return action + torch.as_tensor(space.start)
    return action.to(torch.int8).reshape(-1, *space.shape)


def environment(world: World) -> TensorEnvironment:
    """What is played."""
    return vector(world).environment


def vector(world: World) -> TensorVector:
    """What is stepped."""
    assert isinstance(world.envs.envs, TensorVector)
    return world.envs.envs
