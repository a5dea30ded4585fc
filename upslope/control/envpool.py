"""EnvPool's C++ environments as a Gymnasium vector environment (Weng et al. 2022, arXiv:2206.10558)."""

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space


class EnvPool(VectorEnv):
    """A pool of environments that steps in C++. Episodes restart on the next step; their state cannot be read.

    Raises:
        ValueError: EnvPool is not installed, or does not know the id.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 - Gymnasium declares it so

    def __init__(self, environment_id: str, num_envs: int, seed: int, **kwargs: Any) -> None:
        try:
            import envpool
        except ImportError as error:
            raise ValueError("vectorization 'envpool' needs the extra: pip install 'upslope[envpool]'") from error
        if environment_id not in envpool.list_all_envs():
            raise ValueError(f"environment.id {environment_id!r} is not one of EnvPool's environments")
        self.pool = envpool.make(environment_id, env_type="gymnasium", num_envs=num_envs, seed=seed, **kwargs)
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = self.pool.observation_space, self.pool.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """All environments anew; the seed is the one the pool was made with."""
        return self.pool.reset()

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        return self.pool.step(np.ascontiguousarray(actions, dtype=self.single_action_space.dtype))

    def close_extras(self, **kwargs: Any) -> None:
        self.pool.close()
