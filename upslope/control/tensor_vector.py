"""A tensor environment as a Gymnasium vector environment, for whoever steps it from outside a compiled program."""

import math
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
from upslope.runs.randomness import Blocks


class TensorVector(VectorEnv):
    """N environments in one state. Chance is a function of (seed, first index, steps and whole resets before).

    A step takes the numbers of one draw, and so do the new episodes where it ended some.

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
        self._sizes = [environment.step_noise, environment.reset_noise]
        each = num_envs, sum(self._sizes)
        uniform: Any = lambda random, count: torch.rand((count, *each), generator=random)  # noqa: E731
        self._numbers: Blocks[Tensor] = Blocks(uniform, math.prod(each), seed, "tensor", first_index)
        self.draws = 1
        step, reset = self._now()
        self.state: Any = environment.reset(reset)
        self.action_space.seed(0)
        action = self.action_space.sample()
        if isinstance(action, np.ndarray):  # else no network takes it
            tried = torch.from_numpy(action)
            tensor_environments.refuse_unsteady(environment, self.state, tried, step, observation_space)

    def noise(self, length: int) -> tuple[Float[Tensor, "length N step"], Float[Tensor, "length N reset"]]:
        """The uniform numbers of the next steps, and of the new episodes after each."""
        parts: Any = self._numbers.several(self.draws, length)
        self.draws += length
        return torch.cat(parts).split(self._sizes, -1)

    def _now(self) -> tuple[Float[Tensor, "N step"], Float[Tensor, "N reset"]]:
        """The numbers of the last draw."""
        return self._numbers.at(self.draws - 1).split(self._sizes, -1)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """New episodes in all environments or where `options["reset_mask"]`; the randomness is the run's."""
        mask = (options or {}).get("reset_mask")
        ended = torch.ones(self.num_envs, dtype=torch.bool) if mask is None else torch.from_numpy(mask)
        if mask is None:  # else the episodes that the last step ended
            self.draws += 1
        self.state = tensor_environments.restart(self.environment, self.state, ended, self._now()[1])
        return self.observe(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        self.draws += 1
        self.state, reward, *ends = self.environment.step(self.state, torch.from_numpy(actions), self._now()[0])
        terminated, truncated = (end.numpy() for end in ends)
        return self.observe(), reward.numpy().astype(np.float64), terminated, truncated, {}

    def observe(self) -> np.ndarray:
        return tensor_environments.observe(self.environment, self.state).numpy()

    def snapshot(self) -> dict[str, np.ndarray]:
        """All that is needed to stand here again."""
        return {"draws": np.array(self.draws), **{k: part.numpy().copy() for k, part in self.state._asdict().items()}}

    def restore(self, saved: dict[str, np.ndarray]) -> np.ndarray:
        """Stand where the snapshot was taken; what to act on next."""
        parts = {k: torch.from_numpy(part.copy()) for k, part in saved.items() if k != "draws"}
        self.draws, self.state = int(saved["draws"]), self.state._replace(**parts)
        return self.observe()
