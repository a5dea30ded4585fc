"""An environment of pictures, registered as `tests.control.pixels:Pixels-v0`: catch the falling dot."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

SIZE = 36  # pixels, the least that the convolutions take


class Pixels(gym.Env):
    """A dot falls, a paddle moves; the reward is 1 where they meet. Episodes have random lengths."""

    observation_space = spaces.Box(0, 255, (SIZE, SIZE, 1), np.uint8)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.column, self.paddle = (int(x) for x in self.np_random.integers(0, SIZE - 4, 2))
        self.row = 0
        return self._picture(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.paddle = int(np.clip(self.paddle + 4 * (int(action) - 1), 0, SIZE - 4))
        self.row += int(self.np_random.integers(1, 6))  # the generator is part of the state
        over = self.row >= SIZE - 4
        return self._picture(), float(over and abs(self.column - self.paddle) < 4), over, False, {}

    def _picture(self) -> np.ndarray:
        picture = np.zeros((SIZE, SIZE, 1), np.uint8)
        row = min(self.row, SIZE - 4)
        picture[row : row + 4, self.column : self.column + 4] = 255
        picture[SIZE - 2 :, self.paddle : self.paddle + 4] = 128
        return picture


gym.register("Pixels-v0", entry_point=Pixels)
