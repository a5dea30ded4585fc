"""Gymnasium's `SyncVectorEnv`, with a leaner step where observations are arrays and nothing is reset by itself.

Gymnasium's stacks observations in NumPy's Python, copies what is returned deeply, and asks each space how it is
iterated over: with one small environment that takes as long as the environment.
"""

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv


class SyncVector(SyncVectorEnv):
    """N environments in turn; one that has ended is to be reset before the next step, which is not checked.

    Raises, at a step:
        ValueError: observations of another shape than the space's, another number of actions.
        TypeError: observations of another kind of number.
    """

    def step(self, actions: Any) -> tuple[Any, ...]:
        space = self.single_observation_space
        if not isinstance(space, spaces.Box) or self.autoreset_mode != AutoresetMode.DISABLED:
            return super().step(actions)
        rewards, flags = np.empty(self.num_envs), np.empty((2, self.num_envs), dtype=np.bool_)
        infos: dict[str, Any] = {}
        for i, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            self._env_obs[i], rewards[i], flags[0, i], flags[1, i], info = env.step(action)
            if info:
                infos = self._add_info(infos, info, i)
        observations = np.array(self._env_obs).astype(space.dtype, casting="same_kind", copy=False)
        if observations.shape[1:] != space.shape:
            raise ValueError(f"an observation has shape {observations.shape[1:]}, its space says {space.shape}")
        return observations, rewards, flags[0], flags[1], infos
