"""Environments that go wrong on command, registered as `tests.control.faulty:Faulty-v0` and `…:Odd-v0`."""

import os
import signal
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

LENGTH = 5  # steps of an episode
OBSERVATION, REWARD, RESET, RAISE, KILL = (
    1,
    2,
    3,
    4,
    5,
)  # actions: what goes wrong at this step (RESET: at the next reset)


class Harmless(spaces.Discrete):
    """Its samples do no harm: a self-check that plays at random passes."""

    def sample(self, mask: Any = None, probability: Any = None) -> np.int64:
        return np.int64(0)


class Faulty(gym.Env):
    """Action 0 is harmless. With `after`, the fault comes by itself, in the `after`-th step of the process."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Harmless(5)
    count = 0

    def __init__(self, value: float = np.nan, after: int | None = None, fault: int = REWARD, **_: Any) -> None:
        self.value, self.after, self.fault = value, after, fault
        self.seeds: list[int | None] = []  # that `reset` was called with
        self.broken = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.time = 0
        observation = self.np_random.random(2, np.float32)
        return (observation * self.value if self.broken else observation), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self.after is not None:
            Faulty.count += 1
            action = self.fault if Faulty.count == self.after else 0
        self.time += 1
        self.broken = action == RESET
        if action == RAISE:
            raise RuntimeError("the simulator fell over")
        if action == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        observation = self.np_random.random(2, np.float32)
        if action == OBSERVATION:
            observation[1] = self.value
        reward = self.value if action == REWARD else 1.0
        return observation, reward, self.time >= LENGTH, False, {}


class FaultyVector(gym.vector.VectorEnv):
    """As many that step together, their state in one array. The fault comes in environment 1, on action OBSERVATION."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs: int = 1, **_: Any) -> None:
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = Faulty.observation_space, Faulty.action_space
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.position = np.zeros((num_envs, 2), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        self.position = np.zeros((self.num_envs, 2), np.float32)
        return self.position.copy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.position += 1
        observation, reward = self.position.copy(), np.ones(self.num_envs)
        observation[actions == OBSERVATION, 0] = np.nan
        reward[actions == REWARD] = -np.inf
        nowhere = np.zeros(self.num_envs, bool)
        return observation, reward, nowhere, nowhere.copy(), {}


SPACES: dict[str, spaces.Space] = {
    "tuple": spaces.Tuple((spaces.Discrete(2), spaces.Discrete(2))),
    "text": spaces.Text(5),
    "graph": spaces.Graph(spaces.Discrete(2), None),
    "sequence": spaces.Sequence(spaces.Discrete(2)),
    "dict of tuple": spaces.Dict({"a": spaces.Tuple((spaces.Discrete(2),))}),
    "integers": spaces.Box(0, 9, (2,), np.int64),
    "matrix of choices": spaces.MultiDiscrete([[2, 3], [4, 5]]),
    "dict": spaces.Dict({"a": spaces.Discrete(2)}),
    "small picture": spaces.Box(0, 255, (16, 16, 3), np.uint8),
    "choice": spaces.Discrete(2),
}


class Odd(gym.Env):
    """Any spaces; every observation and action is a sample."""

    def __init__(self, observation: str = "choice", action: str = "choice", **_: Any) -> None:
        self.observation_space, self.action_space = SPACES[observation], SPACES[action]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        return self.observation_space.sample(), 0.0, False, False, {}


gym.register("Faulty-v0", entry_point=Faulty)
gym.register("FaultyVector-v0", entry_point=Faulty, vector_entry_point=FaultyVector)
gym.register("Odd-v0", entry_point=Odd)
