"""Action masks: the entry "action_mask" of a Dict observation says which actions are legal, 1, and which are not, 0.

Part of the observation, a mask is recorded with it: the update sees the policy that acted. It is no feature. It has one
entry per action of a Discrete space, per value of every component of a MultiDiscrete one, in their order, and per bit
of a MultiBinary one, where 0 means that the bit stays 0.
"""

import math
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float
from torch import Tensor

KEY = "action_mask"
ILLEGAL = -1e8  # a logit: its probability is exactly 0, and p log p is 0 as well, not NaN as it is for -inf

Source = Literal["none", "info", "method"]


def entries(space: spaces.Space) -> int:
    """How many entries a mask for this action space has.

    >>> entries(spaces.MultiDiscrete([2, 3]))
    5
    """
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(space.nvec.sum())
    if isinstance(space, spaces.MultiBinary):
        return math.prod(space.shape)
    raise ValueError(f"an action mask needs actions of type Discrete, MultiDiscrete or MultiBinary, got {space}")


def masked(observation_space: spaces.Space, action_space: spaces.Space) -> bool:
    """Do these observations have a mask?

    Raises:
        ValueError: they have one that does not fit the actions.
    """
    if not isinstance(observation_space, spaces.Dict) or KEY not in observation_space.spaces:
        return False
    space, count = observation_space[KEY], entries(action_space)
    binary = isinstance(space, spaces.MultiBinary) or (
        isinstance(space, spaces.Box) and space.dtype.kind in "biu" and space.low.min() >= 0 and space.high.max() <= 1
    )
    if not binary or space.shape != (count,):
        raise ValueError(
            f"the observation's {KEY!r} is {space}, but for actions of {action_space} it is MultiBinary({count}) or a "
            f"Box of integers 0 to 1 of shape ({count},)"
        )
    return True


def apply(logits: Float[Tensor, "batch n"], mask: Bool[Tensor, "batch n"] | Tensor | None) -> Float[Tensor, "batch n"]:
    """Logits with those of illegal actions at `ILLEGAL`, without a gradient.

    >>> apply(torch.zeros(1, 2), torch.tensor([[1, 0]])).softmax(-1).tolist()
    [[1.0, 0.0]]
    """
    return logits if mask is None else torch.where(mask != 0, logits, ILLEGAL)


def without_action(mask: np.ndarray, space: spaces.Space) -> np.ndarray:
    """Which environments have no legal action; a MultiBinary space always has one, all zeros."""
    if isinstance(space, spaces.MultiBinary):
        return np.zeros(len(mask), dtype=bool)
    ends: Any = np.cumsum(space.nvec)[:-1] if isinstance(space, spaces.MultiDiscrete) else []
    return np.any([~part.any(1) for part in np.split(mask, ends, axis=1)], axis=0)


def sample(space: spaces.Space, observation: Any) -> Any:
    """An action at random, a legal one where the observation has a mask."""
    if not isinstance(observation, dict) or KEY not in observation:
        return space.sample()
    mask = np.asarray(observation[KEY], dtype=np.int8)
    if isinstance(space, spaces.MultiBinary):
        return space.sample() * mask.reshape(space.shape)
    if isinstance(space, spaces.MultiDiscrete):
        return space.sample(mask=tuple(np.split(mask, np.cumsum(space.nvec)[:-1])))
    return space.sample(mask=mask)


class Masked(gym.Wrapper):
    """Puts the mask that an environment gives elsewhere into its observation, which becomes a Dict where it was none.

    Args:
        env: with a mask in `info["action_mask"]` of `reset` and `step`, or by a method `action_masks()`.
        source: which of both.
    """

    def __init__(self, env: gym.Env, source: Source) -> None:
        super().__init__(env)
        self.source, self.count = source, entries(env.action_space)
        inner = env.observation_space.spaces if isinstance(env.observation_space, spaces.Dict) else None
        parts = {"observation": env.observation_space} if inner is None else dict(inner)
        self.nested = inner is None
        self.observation_space = spaces.Dict({**parts, KEY: spaces.MultiBinary(self.count)})
        if source == "method" and not env.has_wrapper_attr("action_masks"):
            raise ValueError(f"action_mask 'method': {env.unwrapped} has no method action_masks()")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self._with_mask(observation, info, False), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        over = bool(terminated or truncated)
        return self._with_mask(observation, info, over), reward, terminated, truncated, info

    def _with_mask(self, observation: Any, info: dict[str, Any], over: bool) -> dict[str, Any]:
        mask = self.get_wrapper_attr("action_masks")() if self.source == "method" else info.get(KEY)
        if mask is None and over:
            mask = np.ones(self.count, np.int8)  # nothing is done after the end
        if mask is None:
            raise ValueError(f"action_mask 'info': {self.env.unwrapped} gave no info[{KEY!r}], only {sorted(info)}")
        flat = np.concatenate([np.ravel(part) for part in mask]) if isinstance(mask, tuple | list) else np.asarray(mask)
        if flat.shape != (self.count,):
            raise ValueError(
                f"{self.env.unwrapped} gave an action mask of shape {flat.shape}, expected ({self.count},) for "
                f"{self.action_space}"
            )
        parts = {"observation": observation} if self.nested else observation
        return {**parts, KEY: (flat != 0).astype(np.int8)}
