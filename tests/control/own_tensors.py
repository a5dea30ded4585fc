"""A tensor environment of a user's own, registered as `tests.control.own_tensors:Walk-v0`."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor


class Place(NamedTuple):
    """On a line."""

    at: Tensor  # float64, unlike what networks compute with
    time: Tensor


@dataclass(frozen=True)
class Walk:
    """Actions 2, 3, 4 go -1, 0, 1 and a chance below 0.1; reward |at|; ends at ±3.

    `wrong` is where something is NaN or infinite: "reward" or "observation", from the fourth step of an episode on, or
    the "final observation", which is never acted on; or the "state", and with it both.
    """

    time_limit: int
    wrong: str = ""
    value: float = math.nan
    reset_noise: int = 1
    step_noise: int = 1

    def reset(self, noise: Tensor) -> Place:
        return Place(noise[..., 0].double(), torch.zeros(len(noise), dtype=torch.int64))

    def step(self, state: Place, action: Tensor, noise: Tensor) -> tuple[Place, Tensor, Tensor, Tensor]:
        after = Place(state.at + (action - 3) + 0.1 * noise[..., 0], state.time + 1)
        after = after._replace(at=torch.where(self._bad(after, "state"), self.value, after.at))
        reward = torch.where(self._bad(after, "reward"), self.value, after.at.abs())
        return after, reward, after.at.abs() >= 3, after.time >= self.time_limit

    def observe(self, state: Place) -> Tensor:
        seen = torch.stack((state.at, state.time.double()), -1)
        bad = self._bad(state, "observation") | ((self.wrong == "final observation") & (state.at.abs() >= 3))
        return torch.where(bad.unsqueeze(-1), self.value, seen)

    def _bad(self, state: Place, what: str) -> Tensor:
        return (state.time >= 4) & (self.wrong == what)


class WalkEnv(gym.Env):
    """The same for one at a time."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Discrete(3, start=2)

    def __init__(self, form: type = Walk, **given: Any) -> None:
        self.form, self.given = form, given

    def tensors(self, time_limit: int) -> Any:
        return self.form(time_limit, **self.given)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.walk = self.tensors(2**62)
        self.state = self.walk.reset(self._noise())
        return self.walk.observe(self.state)[0].numpy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.state, reward, terminated, _ = self.walk.step(self.state, torch.tensor([int(action)]), self._noise())
        return self.walk.observe(self.state)[0].numpy(), float(reward), bool(terminated), False, {}

    def _noise(self) -> Tensor:
        return torch.from_numpy(self.np_random.random((1, 1), np.float32))


gym.register("Walk-v0", WalkEnv, max_episode_steps=20, disable_env_checker=True, order_enforce=False)
