"""Tasks for a memory and for masks; importing this file registers them."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from tests.control import worlds  # noqa: F401 - registers its own


class Recall(gym.Env):
    """A cue of 1 or -1 at the first step only; `delay` steps later the action must name it: reward 1, else -1.

    The observation is (cue or 0, is it time to answer?). Without a memory the best return is 0 on average.
    """

    def __init__(self, delay: int = 20, truncate: bool = False) -> None:
        self.delay, self.truncate = delay, truncate
        self.observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps, self.cue = 0, int(self.np_random.integers(2))
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        over = self.steps == self.delay
        reward = (1.0 if action == self.cue else -1.0) if over else 0.0
        self.steps += 1
        return self._observe(), reward, over and not self.truncate, over and self.truncate, {}

    def _observe(self) -> np.ndarray:
        return np.array([(2 * self.cue - 1) * (self.steps == 0), self.steps == self.delay], np.float32)


class Gates(gym.Env):
    """Only the actions that the mask allows may be taken; an illegal one is an error. Ends after 7 or more steps.

    The mask is where `where` says: in the observation, in `info`, or given by the method `action_masks`. It is all 0
    after `empty_at` steps, and with `last` after the end. With `camera` the observation has an image, with `truncate`
    the episode is cut.
    """

    def __init__(
        self,
        where: str = "observation",
        actions: spaces.Space | None = None,
        camera: bool = False,
        truncate: bool = False,
        empty_at: int = -1,
        last: bool = False,
    ) -> None:
        self.last = last
        self.where, self.camera, self.truncate, self.empty_at = where, camera, truncate, empty_at
        self.action_space = actions or spaces.Discrete(4, start=2)
        self.parts = [int(n) for n in getattr(self.action_space, "nvec", [getattr(self.action_space, "n", 0)])]
        seen: dict[str, spaces.Space] = {"joints": spaces.Box(-5.0, 5.0, (3,), np.float32)}
        if camera:
            seen["camera"] = spaces.Box(0, 255, (36, 36, 1), np.uint8)
        if where == "observation":
            seen["action_mask"] = spaces.MultiBinary(sum(self.parts))
        self.observation_space = spaces.Dict(seen) if len(seen) > 1 else seen["joints"]

    def action_masks(self) -> np.ndarray:
        return self.mask

    def _draw(self) -> tuple[Any, dict]:
        parts = [self.np_random.integers(2, size=n).astype(np.int8) for n in self.parts]
        if not isinstance(self.action_space, spaces.MultiBinary):
            for part in parts:
                part[self.np_random.integers(len(part))] = 1
        self.mask = np.concatenate(parts)
        if self.steps == self.empty_at or (self.last and self.steps >= self.end):
            self.mask[:] = 0
        seen: dict[str, Any] = {"joints": self.np_random.normal(size=3).clip(-5, 5).astype(np.float32)}
        if self.camera:
            seen["camera"] = self.np_random.integers(256, size=(36, 36, 1), dtype=np.uint8)
        if self.where == "observation":
            seen["action_mask"] = self.mask.copy()
        info = {"action_mask": self.mask.copy()} if self.where == "info" else {}
        return seen if len(seen) > 1 else seen["joints"], info

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps, self.end = 0, 7 + int(self.np_random.integers(5))
        return self._draw()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.legal(action) or not self.mask.any(), f"{action} is illegal, the mask is {self.mask}"
        self.steps += 1
        over = self.steps >= self.end
        observation, info = self._draw()
        return observation, float(np.sum(action)), over and not self.truncate, over and self.truncate, info

    def legal(self, action: Any) -> bool:
        if isinstance(self.action_space, spaces.MultiBinary):
            return bool((np.asarray(action) <= self.mask).all())
        start = np.ravel(getattr(self.action_space, "start", 0))
        chosen = np.ravel(action) - start + np.cumsum([0, *self.parts[:-1]])
        return bool(self.mask[chosen].all())


gym.register("Recall-v0", Recall, disable_env_checker=True)
gym.register("Gates-v0", Gates, disable_env_checker=True)
