"""Small environments whose answers are known by hand; importing this file registers them."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Clock(gym.Env):
    """Reward 1 a step. The observation is (steps so far, seed-drawn offset, end); ends or is cut after `end` steps.

    Truncated, it would have gone on for ever: V = 1/(1-γ). Terminated: V(k) = (1-γ^{end-k})/(1-γ).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, end: int = 5, truncate: bool = False, render_mode: str | None = None) -> None:
        self.end, self.truncate, self.render_mode = end, truncate, render_mode
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps, self.offset = 0, self.np_random.random()
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        self.offset += float(action) + self.np_random.random()
        over = self.steps >= self.end
        return self._observe(), 1.0, over and not self.truncate, over and self.truncate, {}

    def _observe(self) -> np.ndarray:
        return np.array([self.steps, self.offset, self.end], np.float32)

    def render(self) -> np.ndarray:
        return np.full((16, 16, 3), self.steps, np.uint8)


class Spaces(gym.Env):
    """Any spaces: random observations, reward 0.1, ends after 20 steps."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, render_mode: str | None = None):
        self.observation_space, self.action_space, self.render_mode = observation_space, action_space, render_mode

    def _observe(self) -> Any:
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation_space.sample()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.steps += 1
        return self._observe(), 0.1, self.steps >= 20, False, {}


class Forgetful(Clock):
    """Its reset does not forget: the first observation depends on the steps of the episode before it."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        before = getattr(self, "steps", 0)
        super().reset(seed=seed)
        self.offset += before
        return self._observe(), {}


BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)
OBSERVATIONS: dict[str, spaces.Space] = {
    "box": BOX,
    "matrix": spaces.Box(-1.0, 1.0, (2, 3), np.float64),
    "image": spaces.Box(0, 255, (40, 40, 3), np.uint8),
    "discrete": spaces.Discrete(4, start=-1),
    "multidiscrete": spaces.MultiDiscrete([2, 3]),
    "multibinary": spaces.MultiBinary(4),
    "dict": spaces.Dict(
        {"camera": spaces.Box(0, 255, (2, 40, 40), np.uint8), "joints": BOX, "mode": spaces.Discrete(3)}
    ),
}
ACTIONS: dict[str, spaces.Space] = {
    "discrete": spaces.Discrete(3),
    "discrete-from-2": spaces.Discrete(3, start=2),
    "multidiscrete": spaces.MultiDiscrete([2, 3, 4]),
    "multibinary": spaces.MultiBinary(5),
    "box": spaces.Box(-2.0, 0.5, (2,), np.float32),
}

gym.register("Clock-v0", Clock, disable_env_checker=True, order_enforce=False)
gym.register("Forgetful-v0", Forgetful, disable_env_checker=True, order_enforce=False)
for _observation in OBSERVATIONS:
    for _action in ACTIONS:
        gym.register(
            f"{_observation}-{_action}-v0",
            Spaces,
            kwargs={"observation_space": OBSERVATIONS[_observation], "action_space": ACTIONS[_action]},
            disable_env_checker=True,
        )
