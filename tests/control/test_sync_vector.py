"""The leaner vector of environments beside Gymnasium's."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from upslope.control.sync_vector import SyncVector


class Noted(gym.Wrapper):
    """Says in its infos how far it is, every other step."""

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, _ = self.env.step(action)
        self.count = getattr(self, "count", 0) + 1
        return observation, reward, terminated, truncated, {"count": self.count} if self.count % 2 else {}


@pytest.mark.parametrize("environment", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1"])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_it_is_gymnasiums(environment: str, mode: AutoresetMode) -> None:
    """Every mode, boxes and numbers, infos, resets of some: the same arrays, which no later step changes."""
    make = [lambda: Noted(gym.make(environment, max_episode_steps=12)) for _ in range(3)]
    ours, theirs = (kind(make, autoreset_mode=mode) for kind in (SyncVector, SyncVectorEnv))
    assert np.array_equal(ours.reset(seed=1)[0], theirs.reset(seed=1)[0])
    ours.action_space.seed(2)
    given: list[tuple[Any, ...]] = []
    kept: list[tuple[Any, ...]] = []
    ended = 0
    for _ in range(60):
        action = ours.action_space.sample()
        one, two = ours.step(action), theirs.step(action)
        for mine, other in zip(one[:4], two[:4], strict=True):
            assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
            assert np.array_equal(mine, other)
        assert one[4].keys() == two[4].keys()
        assert all(np.array_equal(one[4][key], two[4][key]) for key in one[4] if "count" in key)
        given.append(one[:4])
        kept.append(tuple(part.copy() for part in one[:4]))
        over = one[2] | one[3]
        ended += int(over.sum())
        if mode == AutoresetMode.DISABLED and over.any():
            fresh = [envs.reset(options={"reset_mask": over.copy()})[0] for envs in (ours, theirs)]
            assert np.array_equal(*fresh)
    assert ended > 3
    assert all(np.array_equal(a, b) for x, y in zip(given, kept, strict=True) for a, b in zip(x, y, strict=True))


class Wrong(gym.Env):
    """Its steps give what its space does not say."""

    observation_space, action_space = spaces.Box(0, 255, (3,), np.uint8), spaces.Discrete(2)

    def __init__(self, given: np.ndarray) -> None:
        self.given = given

    def reset(self, **_: Any) -> Any:
        return np.zeros(3, np.uint8), {}

    def step(self, action: Any) -> Any:
        return self.given, 0.0, False, False, {}


@pytest.mark.parametrize(
    ("given", "actions", "error", "said"),
    [
        (np.zeros(1, np.uint8), 2, ValueError, r"shape \(1,\), its space says \(3,\)"),
        (np.full(3, 1.5), 2, TypeError, "float64.*uint8"),
        (np.full(3, -1), 2, TypeError, "int64.*uint8"),
        (np.zeros(3, np.uint8), 3, ValueError, "longer"),
        (np.zeros(3, np.uint8), 1, ValueError, "shorter"),
    ],
)
def test_what_the_spaces_do_not_say_is_refused(
    given: np.ndarray, actions: int, error: type[Exception], said: str
) -> None:
    envs = SyncVector([lambda: Wrong(given)] * 2, autoreset_mode=AutoresetMode.DISABLED)
    envs.reset()
    with pytest.raises(error, match=said):
        envs.step(np.zeros(actions, int))
