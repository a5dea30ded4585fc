"""Vectors of Gymnasium environments behind one interface, whatever their autoreset mode.

`terminated` and `truncated` never merge, `next_observation` is the true successor even where an episode ended, and
reset rows of NEXT_STEP environments come with `valid = False`.
"""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import tyro
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from gymnasium.vector.async_vector_env import AsyncState
from jaxtyping import Int64

from upslope.control import episodes, masks, networks, tensor_environments
from upslope.control.atari import Atari
from upslope.control.envpool import EnvPool
from upslope.control.factory import Single, register
from upslope.control.sync_vector import SyncVector
from upslope.control.tensor_vector import TensorVector
from upslope.runs import settings
from upslope.runs.randomness import derive

log = logging.getLogger(__name__)

STEP_TIMEOUT = 60.0  # seconds a worker process may take for one step before it counts as hung
FEW = 64  # numbers

Observation = np.ndarray | dict[str, np.ndarray]
# Gymnasium's, seeded and replayed; the id's own vector; EnvPool's; tensors
Kind = Literal["episodes", "native", "pool", "tensor"]


@dataclass(frozen=True)
class Config:
    """Which environment, how many, and how they are run."""

    id: Annotated[str, tyro.conf.arg(aliases=("--env",))] = "CartPole-v1"
    num_envs: int = 8
    vectorization: Literal["auto", "native", "sync", "async", "envpool", "tensor"] = "auto"
    autoreset: Literal["disabled", "same-step", "next-step"] = "disabled"  # of sync and async
    atari: Atari | None = None  # its preprocessing
    kwargs: dict[str, Any] = field(default_factory=dict)  # for gymnasium.make
    group_size: int = 1  # environments in a row whose episodes have the same reset seeds
    action_mask: masks.Source = "none"  # where the environment gives its mask, if not in a Dict observation

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "num_envs", "group_size")
        if self.num_envs % self.group_size and self.group_size > 1:
            raise ValueError(f"num_envs is {self.num_envs}, allowed: multiples of group_size {self.group_size}")
        if self.group_size > 1 and self.vectorization in ("native", "envpool", "tensor"):
            raise ValueError(f"group_size {self.group_size} needs vectorization 'auto', 'sync' or 'async'")
        if self.atari is not None and self.vectorization == "tensor":
            raise ValueError("environment.atari needs vectorization 'auto', 'sync' or 'async', not 'tensor'")
        if self.action_mask != "none" and self.vectorization in ("native", "envpool", "tensor"):
            raise ValueError(f"action_mask {self.action_mask!r} needs vectorization 'auto', 'sync' or 'async'")


class Transition(NamedTuple):
    """One step of N environments."""

    next_observation: Observation  # the successor, also at an episode's end
    observation: Observation  # what to act on next: after a reset, the first of the new episode
    reward: np.ndarray  # [N] float64
    terminated: np.ndarray  # [N] bool, the value beyond is 0 (a lost life counts with Atari.episodic_life)
    truncated: np.ndarray  # [N] bool, a limit cut the episode
    ended: np.ndarray  # [N] bool, an episode is over: terminated or truncated, lost lives not counted
    valid: np.ndarray | None  # [N] bool, False for reset rows; None where there are none


def to_space(space: spaces.Space, action: np.ndarray) -> np.ndarray:
    """A batch of policy outputs as actions of the space: boxes clipped to their bounds, shapes and types as declared.

    >>> to_space(spaces.Box(-1.0, 1.0, (1,)), np.array([[3.0]])).tolist()
    [[1.0]]
    """
    if isinstance(space, spaces.Box):
        clipped = np.clip(action, space.low.reshape(-1), space.high.reshape(-1))
        return clipped.astype(space.dtype, copy=False).reshape(-1, *space.shape)
    if isinstance(space, spaces.Discrete):
        return action + space.start if space.start else action
    if isinstance(space, spaces.MultiDiscrete):
        return action + space.start
    return action.astype(np.int8).reshape(-1, *space.shape)


class Environments:
    """N environments that step together, made by `make`; `snapshot` and `make(..., start=...)` carry it over a kill."""

    def __init__(self, config: Config, envs: VectorEnv, seed: int, kind: Kind, first_index: int = 0) -> None:
        self.config, self.envs, self.seed, self.kind, self.first_index = config, envs, seed, kind, first_index
        self.num_envs = envs.num_envs
        self.observation_space, self.action_space = envs.single_observation_space, envs.single_action_space
        self.masked = masks.masked(self.observation_space, self.action_space)
        self.autoreset = AutoresetMode(envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self.episode = np.zeros(self.num_envs, dtype=np.int64)  # index of the running episode, per environment
        self._steps = 0  # of each environment, reset rows included
        self._begun = np.zeros(self.num_envs, dtype=np.int64)  # of these before the running episode
        self._owed = np.zeros(self.num_envs, dtype=bool)  # NEXT_STEP: the next row is a reset row
        self._lives = np.zeros(self.num_envs, dtype=np.int64)
        self._seen: Observation = np.zeros(0)  # what to act on next; a native environment cannot be asked for it again

    @property
    def length(self) -> Int64[np.ndarray, " N"]:
        """Steps of the running episodes so far."""
        return np.maximum(self._steps - self._begun, 0)

    @length.setter
    def length(self, length: Int64[np.ndarray, " N"]) -> None:
        self._begun = self._steps - length + self._owed

    def reset(self) -> Observation:
        native = self.kind == "native"
        observation, infos = self._reset(derive(self.seed, "native", self.first_index) % 2**31 if native else None)
        self._lives = np.array(infos.get("lives", self._lives))
        self._refuse_non_finite(observation, None)
        self._refuse_no_action(observation)
        self._seen = observation
        return observation

    def restart(self) -> Observation:
        """Begin a new episode in every environment, the same one counted from the start; running ones are left."""
        self.episode[:] = self.episode.max() + 1
        self._owed[:] = False
        self._begun[:] = self._steps
        options = {"episode": int(self.episode[0])} if self.kind == "episodes" else None
        observation, infos = self._reset(None, options)
        self._lives = np.array(infos.get("lives", self._lives))
        self._refuse_non_finite(observation, None)
        self._refuse_no_action(observation)
        self._seen = observation
        return observation

    def step(self, action: np.ndarray) -> Transition:
        """Act in every environment. Boxes are clipped to their bounds here; what was sampled stays with the caller.

        Raises:
            ValueError: a NaN or infinite observation or reward, naming environment, step and episode seed.
        """
        if action.dtype.kind == "f" and not np.isfinite(action).all():
            index = int(np.flatnonzero(~np.isfinite(action).reshape(self.num_envs, -1).all(1))[0])
            raise ValueError(f"the policy gave a NaN or infinite action for environment {index}: {action[index]}")
        observation, reward, terminated, truncated, infos = self._advance(to_space(self.action_space, action))
        ended = terminated | truncated
        any_ended = len(ended.nonzero()[0]) > 0  # a quarter of what any() takes with a few environments
        next_observation, valid = observation, None
        if self.autoreset == AutoresetMode.SAME_STEP and any_ended:
            next_observation = _place(observation, infos["final_obs"], ended)
        self._refuse_non_finite(next_observation, reward)
        if self.autoreset == AutoresetMode.NEXT_STEP:
            valid = ~self._owed
            self._owed = ended
        self._steps += 1
        if any_ended:
            self.episode = self.episode + ended
            self._begun[ended] = self._steps + (valid is not None)  # the reset row comes first
            if self.autoreset == AutoresetMode.DISABLED:
                observation, fresh = self._reset(None, {"reset_mask": ended.copy()})
                if "lives" in infos:
                    infos = {**infos, "lives": np.where(ended, fresh["lives"], infos["lives"])}
            if self.autoreset != AutoresetMode.NEXT_STEP:
                self._refuse_non_finite(observation, None)
        if self.config.atari is not None and self.config.atari.episodic_life and "lives" in infos:
            lives = np.array(infos["lives"])  # a native environment may write there again
            terminated = terminated | ((lives < self._lives) & ~ended & (True if valid is None else valid))
            self._lives = lives
        self._refuse_no_action(observation)
        self._seen = observation
        return Transition(next_observation, observation, reward, terminated, truncated, ended, valid)

    def advance(self, ended: np.ndarray, length: np.ndarray, observation: Observation) -> Observation:
        """Take note of steps that were taken inside a program; returns what to act on next.

        Args:
            ended: [N] how many episodes ended.
            length: [N] steps of the running ones.
            observation: what to act on next.

        Raises:
            ValueError: a NaN or infinite observation.
        """
        self.episode, self.length, self._seen = self.episode + ended, length, observation
        self._refuse_non_finite(observation, None)
        return observation

    def _reset(self, seed: int | None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if isinstance(self.envs, AsyncVectorEnv):
            self.envs.reset_async(seed, options)
            return self.envs.reset_wait(timeout=STEP_TIMEOUT)
        observation, infos = self.envs.reset(seed=seed, options=options)
        return self._own(observation), infos

    def _advance(self, action: Any) -> tuple[Any, ...]:
        if isinstance(self.envs, AsyncVectorEnv):
            self.envs.step_async(action)
            try:
                return self.envs.step_wait(timeout=STEP_TIMEOUT)
            except Exception as error:  # a worker's error arrives inside another of its kind, its notes within
                for note in getattr(error.args[0] if error.args else None, "__notes__", ()):
                    error.add_note(note)
                raise
        *arrays, infos = self.envs.step(action)
        return *map(self._own, arrays), infos

    def _own(self, given: Observation) -> Observation:
        """What stays as it is: an id's own vector may use the memory of what it gave again."""
        if self.kind != "native":
            return given
        return {key: part.copy() for key, part in given.items()} if isinstance(given, dict) else np.array(given)

    def _episode_seed(self, index: int) -> int:
        return episodes.episode_seed(
            self.seed, (self.first_index + index) // self.config.group_size, int(self.episode[index])
        )

    def _refuse_non_finite(self, observation: Observation, reward: np.ndarray | None) -> None:
        bad = _non_finite(observation) if reward is None else _non_finite(observation, reward)
        if bad is None:
            return
        what, index = bad
        begins = reward is None or self._owed[index]  # the first observation of an episode
        episode, step = int(self.episode[index]), int(self.length[index]) + 1
        at = f"its reset seed {self._episode_seed(index)}" if self.kind == "episodes" else f"run seed {self.seed}"
        raise ValueError(
            f"{self.config.id} gave a NaN or infinite {what} in environment {index} at "
            f"{'the reset' if begins else f'step {step}'} of its episode {episode} ({at}); "
            "nothing was trained on it, the checkpoints written so far are kept"
        )

    def _refuse_no_action(self, observation: Observation) -> None:
        if not self.masked:
            return
        stuck = masks.without_action(observation[masks.KEY], self.action_space) & ~self._owed
        if stuck.any():
            index = int(np.flatnonzero(stuck)[0])
            raise ValueError(
                f"{self.config.id} gave an action mask without a legal action in environment {index}, after "
                f"{int(self.length[index])} steps of its episode {int(self.episode[index])}"
            )

    def snapshot(self) -> dict[str, np.ndarray]:
        """All that is needed to stand here again, as arrays."""
        state = {"episode": self.episode, "length": self.length, "owed": self._owed, "lives": self._lives}
        if self.kind == "native":
            parts = self._seen if isinstance(self._seen, dict) else {"": self._seen}
            state |= {f"seen.{name}": np.array(part) for name, part in parts.items()}
            return state | {f"native.{name}": value for name, value in episodes.native_state(self.envs).items()}
        if isinstance(self.envs, TensorVector):
            return state | {f"tensor.{name}": value for name, value in self.envs.snapshot().items()}
        if self.kind == "pool":
            return state
        if isinstance(self.envs, AsyncVectorEnv):
            self.envs.call_async("snapshot")
            shots = self.envs.call_wait(timeout=STEP_TIMEOUT)
        else:
            shots = self.envs.call("snapshot")  # type: ignore[attr-defined]
        counts = np.array([len(shot.actions) for shot in shots], dtype=np.int64)
        flat = [action for shot in shots for action in shot.actions]
        actions = np.stack(flat) if flat else np.zeros((0,))
        begun = np.array([shot.episode for shot in shots], dtype=np.int64)
        ended = np.array([shot.ended for shot in shots])
        return state | {"actions": actions, "counts": counts, "begun": begun, "ended": ended}

    def _restore(self, state: dict[str, np.ndarray]) -> Observation:
        self.episode = state["episode"].copy()
        if self.kind == "pool":  # its episodes begin anew
            return self._seen
        if self.kind == "native":
            episodes.restore_native(self.envs, {k[7:]: v for k, v in state.items() if k.startswith("native.")})
            parts = {k[5:]: v.copy() for k, v in state.items() if k.startswith("seen.")}
            self._seen = parts.get("", parts)
        if isinstance(self.envs, TensorVector):
            self._seen = self.envs.restore({k[7:]: v for k, v in state.items() if k.startswith("tensor.")})
        self._owed, self._lives = state["owed"].astype(bool), state["lives"].copy()
        self.length = state["length"]
        return self._seen

    def close(self) -> None:
        """End the environments; a worker that does not answer is ended without being asked."""
        if isinstance(self.envs, AsyncVectorEnv):
            waiting = self.envs._state != AsyncState.DEFAULT
            self.envs.close(timeout=5, terminate=waiting)
        else:
            self.envs.close()


def make(
    config: Config, seed: int, first_index: int = 0, start: dict[str, np.ndarray] | None = None
) -> tuple[Environments, Observation]:
    """Build the environments and reset them, or bring them back to a snapshot. Returns them and what to act on.

    Args:
        config: which and how many.
        seed: the run's; every episode's reset seed is derived from it.
        first_index: of these environments among all ranks'.
        start: a snapshot to go on from.

    Raises:
        ValueError: unknown id (nearest named), missing package, unsupported space, a mode that the id does not have.
    """
    kind = _kind(config)
    if kind == "pool":
        begun = 0 if start is None else int(start["episode"].sum())  # a resumed pool plays other episodes
        stream = derive(seed, "pool", first_index, begun) % 2**31
        envs: VectorEnv = EnvPool(config.id, config.num_envs, stream, **config.kwargs)
        exact = False
    elif kind == "tensor":
        env = Single(config)()
        networks.refuse_unsupported(env.observation_space)
        tensor, spaces_of = tensor_environments.tensors(env), (env.observation_space, env.action_space)
        envs, exact = TensorVector(tensor, config.num_envs, seed, first_index, *spaces_of), True
        env.close()
    elif kind == "native":
        envs, exact = _native(config, config.num_envs)(), _native_exact(Single(config))
    else:
        factory = Single(config)
        observation_space, action_space, _ = describe(config)
        networks.refuse_unsupported(observation_space)
        masks.masked(observation_space, action_space)
        check = episodes.replay_check(factory)
        exact = check.exact
        shots = _snapshots(config.num_envs, start)
        starts = [
            episodes.EpisodeStarts(factory, seed, (first_index + i) // config.group_size, check.fresh, shot)
            for i, shot in enumerate(shots)
        ]
        mode = AutoresetMode[config.autoreset.replace("-", "_").upper()]
        vector: type = AsyncVectorEnv if config.vectorization == "async" else SyncVector
        envs = vector(starts, autoreset_mode=mode)
    if not exact:
        log.warning("%s: its state cannot be restored exactly, a resumed run will not be bitwise equal", config.id)
    environments = Environments(config, envs, seed, kind, first_index)
    observation = environments.reset()
    if start is not None:
        observation = environments._restore(start)
    return environments, observation


def describe(config: Config) -> tuple[spaces.Space, spaces.Space, float]:
    """Observation space, action space and frames a second of one environment, which is closed again."""
    if config.vectorization == "envpool":
        pool = EnvPool(config.id, 1, 0, **config.kwargs)
        pool.close()
        return pool.single_observation_space, pool.single_action_space, 30.0
    env = Single(config)()
    env.close()
    return env.observation_space, env.action_space, float(env.metadata.get("render_fps", 30))


def _kind(config: Config) -> Kind:
    if config.vectorization == "envpool":
        if config.atari is not None:
            raise ValueError(
                "environment.atari is for Gymnasium's games; EnvPool's own take theirs by environment.kwargs"
            )
        return "pool"
    if config.vectorization == "tensor":
        return "tensor"
    offered = register(config.id).vector_entry_point is not None
    if config.vectorization == "native":
        if not offered:
            raise ValueError(f"environment.vectorization 'native': {config.id} has no vector entry point")
        return "native"
    masked = config.action_mask != "none"
    usable = (
        config.vectorization == "auto" and offered and config.atari is None and config.group_size == 1 and not masked
    )
    return "native" if usable and _native_exact(Single(config)) else "episodes"


def _native(config: Config, num_envs: int) -> Callable[[], VectorEnv]:
    return lambda: gym.make_vec(config.id, num_envs, vectorization_mode="vector_entry_point", **config.kwargs)


@functools.lru_cache(maxsize=256)
def _native_exact(factory: Single) -> bool:
    return episodes.native_check(_native(factory.config, 4))


def _snapshots(num_envs: int, start: dict[str, np.ndarray] | None) -> list[episodes.Snapshot | None]:
    if start is None:
        return [None] * num_envs
    parts = np.split(start["actions"], np.cumsum(start["counts"])[:-1])
    begun, ended = start["begun"], start["ended"].astype(bool)
    return [episodes.Snapshot(int(b), list(a), bool(e)) for b, a, e in zip(begun, parts, ended, strict=True)]


def _place(observation: Observation, final: np.ndarray, ended: np.ndarray) -> Observation:
    """The batch of successors: the final observation where an episode ended, the observation elsewhere."""
    if isinstance(observation, dict):
        return {
            key: _place(value, np.array([None if f is None else f[key] for f in final], dtype=object), ended)
            for key, value in observation.items()
        }
    successor = observation.copy()
    for index in np.flatnonzero(ended):
        successor[index] = final[index]
    return successor


def _screened(value: np.ndarray) -> bool:
    """Is it finite for sure? A sum costs one pass and no memory, of a few numbers less in Python than in NumPy."""
    if value.dtype.kind != "f":
        return True
    return math.isfinite(sum(value.ravel().tolist()) if value.size <= FEW else np.add.reduce(value, axis=None))


def _non_finite(observation: Observation, reward: np.ndarray | None = None) -> tuple[str, int] | None:
    """The first environment with a non-finite number, or None."""
    if not isinstance(observation, dict) and _screened(observation) and (reward is None or _screened(reward)):
        return None
    parts = observation if isinstance(observation, dict) else {"observation": observation}
    for name, value in (*parts.items(), *((("reward", reward),) if reward is not None else ())):
        if not _screened(value):
            finite = np.isfinite(value).reshape(len(value), -1).all(1)
            if not finite.all():
                return name, int(np.flatnonzero(~finite)[0])
    return None
