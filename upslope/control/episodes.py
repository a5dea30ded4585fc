"""Episodes that can be repeated: each is reset with a seed of its own; its state is that seed and the actions since.

This is how a killed run resumes exactly without pickling a simulator: reset with the seed, replay the actions.
"""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv

from upslope.control import masks
from upslope.runs.randomness import derive


class Snapshot(NamedTuple):
    """One environment between two steps."""

    episode: int  # episodes begun before this one
    actions: list[Any]  # since the reset
    ended: bool  # terminated or truncated, reset still owed


def episode_seed(seed: int, index: int, episode: int) -> int:
    """The reset seed (31 bits) of one episode of one environment of a run.

    >>> episode_seed(1, 0, 0) != episode_seed(1, 0, 1) != episode_seed(1, 1, 0)
    True
    """
    return derive(seed, "episode", index, episode) % 2**31


class Episodes(gym.Wrapper):
    """Seeds every episode by (run seed, environment index, episode index), records its actions, can start inside one.

    Args:
        make: builds the environment.
        seed: the run's.
        index: of this environment's stream of episodes among the run's.
        fresh: a new instance for every episode, for environments whose reset keeps something of the past.
        start: where to go on from; the first `reset` then replays that episode.
    """

    def __init__(
        self, make: Callable[[], gym.Env], seed: int, index: int, fresh: bool = False, start: Snapshot | None = None
    ) -> None:
        super().__init__(make())
        self._make, self._seed, self._index, self._fresh = make, seed, index, fresh
        self._start = start
        self._episode, self._actions, self._ended, self._used = -1, [], False, False  # type: ignore[var-annotated]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin the next episode, or the one that `options["episode"]` counts.

        The seed is the wrapper's own; a seed given by the caller is not used.
        """
        start, self._start = self._start, None
        options = dict(options or {})
        self._episode = options.pop("episode", self._episode + 1) if start is None else start.episode
        if self._fresh and self._used:
            self.env.close()
            self.env = self._make()
        self._used = True
        self._actions, self._ended = [], False
        observation, info = self.env.reset(seed=self.episode_seed, options=options or None)
        for action in start.actions if start else ():
            observation, _, _, _, info = self._advance(action)
        self._ended = bool(start and start.ended)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if self._ended:  # a resumed NEXT_STEP environment: its vector environment forgot that a reset is owed
            observation, info = self.reset()
            return observation, 0.0, False, False, info
        return self._advance(action)

    def _advance(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self._actions.append(np.array(action))
        try:
            observation, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:
            error.add_note(
                f"in environment {self._index} ({self.spec.id if self.spec else self.env}), "
                f"episode {self._episode} (reset seed {self.episode_seed}), step {len(self._actions)}, "
                f"action {action!r}"
            )
            raise
        self._ended = bool(terminated or truncated)
        return observation, reward, bool(terminated), bool(truncated), info

    @property
    def episode_seed(self) -> int:
        return episode_seed(self._seed, self._index, self._episode)

    def snapshot(self) -> Snapshot:
        return Snapshot(self._episode, list(self._actions), self._ended)


class EpisodeStarts:
    """A picklable factory of `Episodes` for one environment, so that worker processes can build it."""

    def __init__(self, make: Callable[[], gym.Env], seed: int, index: int, fresh: bool, start: Snapshot | None) -> None:
        self.arguments = (make, seed, index, fresh, start)

    def __call__(self) -> Episodes:
        return Episodes(*self.arguments)


class Replay(NamedTuple):
    """What a self-check found out about an environment."""

    fresh: bool  # it needs a new instance per episode
    exact: bool  # seed and actions determine it


@functools.lru_cache(maxsize=256)
def replay_check(make: Callable[[], gym.Env], chain: int = 6) -> Replay:
    """Is this environment a function of its reset seed and actions, and does a used instance forget its past?

    Plays a chain of short episodes in one instance and each of them in a new one, the first in two new ones, and
    compares observations, rewards and ends bit for bit. The chain is needed: BipedalWalker's episodes differ in about
    half of all cases.
    """
    used = make()
    image = any(part.dtype == np.uint8 for part in _parts(used.observation_space))
    steps = 25 if image else 100  # images are slow to draw
    try:
        exact = _play(used, 1, steps) == _play_new(make, 1, steps) == _play_new(make, 1, steps)
        fresh = exact and any(_play(used, s, steps) != _play_new(make, s, steps) for s in range(2, chain + 1))
    finally:
        used.close()
    return Replay(fresh=fresh, exact=exact)


def _play_new(make: Callable[[], gym.Env], seed: int, steps: int) -> list[bytes]:
    env = make()
    try:
        return _play(env, seed, steps)
    finally:
        env.close()


def _play(env: gym.Env, seed: int, steps: int) -> list[bytes]:
    env.action_space.seed(seed)
    observation, _ = env.reset(seed=seed)
    trace = [_bytes(observation)]
    for _ in range(steps):
        action = masks.sample(env.action_space, observation)
        observation, reward, terminated, truncated, _ = env.step(action)
        trace.append(_bytes(observation) + np.float64(reward).tobytes() + bytes([terminated, truncated]))
        if terminated or truncated:
            break
    return trace


def _parts(space: gym.Space) -> list[gym.Space]:
    return [part for key in space for part in _parts(space[key])] if isinstance(space, gym.spaces.Dict) else [space]


def _bytes(observation: Any) -> bytes:
    if isinstance(observation, dict):
        return b"".join(_bytes(observation[key]) for key in sorted(observation))
    return np.asarray(observation).tobytes()


# A native vector environment keeps its own state and generator: they are read and written as plain arrays.


def native_state(envs: VectorEnv) -> dict[str, np.ndarray]:
    """Every array, number and generator among a native vector environment's attributes."""
    state: dict[str, np.ndarray] = {}
    for name, value in vars(envs.unwrapped).items():
        if isinstance(value, np.random.Generator):
            state[name] = np.frombuffer(json.dumps(value.bit_generator.state).encode(), dtype=np.uint8)
        elif isinstance(value, np.ndarray | bool | int | float | np.generic) and np.asarray(value).dtype != object:
            state[name] = np.array(value)
    return state


def restore_native(envs: VectorEnv, state: dict[str, np.ndarray]) -> None:
    """Write back what `native_state` read. The environment must have been reset once, so that its attributes exist."""
    target = envs.unwrapped
    for name, value in state.items():
        present = getattr(target, name, None)
        if isinstance(present, np.random.Generator):
            present.bit_generator.state = json.loads(value.tobytes().decode())
        elif isinstance(present, np.ndarray):
            setattr(target, name, value.copy())
        else:
            setattr(target, name, value.item())


def native_check(make: Callable[[], VectorEnv], steps: int = 64) -> bool:
    """Does a second instance with the first's state go on as the first does, bit for bit?"""
    one, other = make(), make()
    try:
        one.reset(seed=1)
        other.reset(seed=2)
        one.action_space.seed(3)
        actions = [one.action_space.sample() for _ in range(steps)]
        for action in actions[: steps // 2]:
            one.step(action)
        restore_native(other, native_state(one))
        traces = [[_row(envs.step(action)) for action in actions[steps // 2 :]] for envs in (one, other)]
        return traces[0] == traces[1]
    except Exception:  # whatever a foreign environment raises here, the answer is that its state cannot be copied
        return False
    finally:
        one.close()
        other.close()


def _row(step: tuple[Any, ...]) -> bytes:
    return _bytes(step[0]) + b"".join(np.asarray(part).tobytes() for part in step[1:4])
