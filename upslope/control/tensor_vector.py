"""A tensor environment as a Gymnasium vector environment, for whoever steps it from outside a compiled program."""

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Float
from torch import Tensor

from upslope.control import tensor_environments
from upslope.control.tensor_environments import TensorEnvironment
from upslope.runs.randomness import generator


class TensorVector(VectorEnv):
    """N environments in one state. The numbers of a draw are a function of (seed, first index, draws before).

    Args:
        environment: what is stepped.
        num_envs: N.
        seed: the run's.
        first_index: of these environments among all ranks'.
        observation_space, action_space: of one environment.
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012 - Gymnasium declares it so

    def __init__(
        self,
        environment: TensorEnvironment,
        num_envs: int,
        seed: int,
        first_index: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
    ) -> None:
        self.environment, self.num_envs, self.run_seed, self.first_index = environment, num_envs, seed, first_index
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.draws = 0
        self.state: Any = environment.reset(self.noise(environment.reset_noise))

    def noise(self, size: int, *length: int) -> Float[Tensor, "*length N size"]:
        """The next uniform numbers, for one step or a block of them."""
        if not size:
            return torch.zeros(*length, self.num_envs, 0)
        source = generator(self.run_seed, "tensor", self.first_index, self.draws)
        self.draws += 1
        return torch.rand((*length, self.num_envs, size), generator=source)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """New episodes in all environments or where `options["reset_mask"]`; the randomness is the run's."""
        mask = (options or {}).get("reset_mask")
        ended = torch.ones(self.num_envs, dtype=torch.bool) if mask is None else torch.from_numpy(mask)
        noise = self.noise(self.environment.reset_noise)
        self.state = tensor_environments.restart(self.environment, self.state, ended, noise)
        return self.observe(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        noise = self.noise(self.environment.step_noise)
        self.state, reward, *ends = self.environment.step(self.state, torch.from_numpy(actions), noise)
        terminated, truncated = (end.numpy() for end in ends)
        return self.observe(), reward.numpy().astype(np.float64), terminated, truncated, {}

    def observe(self) -> np.ndarray:
        return self.environment.observe(self.state).numpy()

    def snapshot(self) -> dict[str, np.ndarray]:
        """All that is needed to stand here again."""
        return {"draws": np.array(self.draws), **{k: part.numpy().copy() for k, part in self.state._asdict().items()}}

    def restore(self, saved: dict[str, np.ndarray]) -> np.ndarray:
        """Stand where the snapshot was taken; what to act on next."""
        parts = {k: torch.from_numpy(part.copy()) for k, part in saved.items() if k != "draws"}
        self.draws, self.state = int(saved["draws"]), self.state._replace(**parts)
        return self.observe()
