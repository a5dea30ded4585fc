"""Vectors of Gymnasium environments behind one interface, whatever their autoreset mode.

`terminated` and `truncated` never merge, `next_observation` is the true successor even where an episode ended, and
reset rows of NEXT_STEP environments come with `valid = False`.
"""

import difflib
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
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from upslope.control import episodes
from upslope.runs.randomness import derive

log = logging.getLogger(__name__)

STEP_TIMEOUT = 60.0  # seconds a worker process may take for one step before it counts as hung

Observation = np.ndarray | dict[str, np.ndarray]


@dataclass(frozen=True)
class Atari:
    """The Atari details of the "37 details" list that belong to the environment (Mnih et al. 2015)."""

    noop_max: int = 30  # random no-ops at reset, drawn by the episode's seed
    frame_skip: int = 4  # frames an action is repeated, the last two max-pooled
    episodic_life: bool = True  # a lost life has no value beyond, though the game goes on
    fire_reset: bool = True  # press FIRE where the game waits for it
    screen_size: int = 84  # pixels, grey
    frame_stack: int = 4  # frames an observation holds


@dataclass(frozen=True)
class Config:
    """Which environment, how many, and how they are run."""

    id: Annotated[str, tyro.conf.arg(aliases=("--env",))] = "CartPole-v1"
    num_envs: int = 8
    vectorization: Literal["auto", "native", "sync", "async", "envpool"] = "auto"
    autoreset: Literal["disabled", "same-step", "next-step"] = "disabled"  # of sync and async
    atari: Atari | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)  # for gymnasium.make

    def __post_init__(self) -> None:
        if self.num_envs < 1:
            raise ValueError(f"environment.num_envs is {self.num_envs}, allowed: 1 or more")


class Transition(NamedTuple):
    """One step of N environments."""

    next_observation: Observation  # the successor, also at an episode's end
    observation: Observation  # what to act on next: after a reset, the first of the new episode
    reward: np.ndarray  # [N] float64
    terminated: np.ndarray  # [N] bool, the value beyond is 0 (a lost life counts with Atari.episodic_life)
    truncated: np.ndarray  # [N] bool, a limit cut the episode
    ended: np.ndarray  # [N] bool, an episode is over: terminated or truncated, lost lives not counted
    valid: np.ndarray | None  # [N] bool, False for reset rows; None where there are none


class Single:
    """A picklable, hashable factory of one environment, wrappers included, seeds and records excluded."""

    def __init__(self, config: Config, render_mode: str | None = None) -> None:
        self.config, self.render_mode = config, render_mode

    def _key(self) -> tuple[Any, ...]:
        kwargs = repr(sorted(self.config.kwargs.items()))
        return self.config.id, self.config.atari, kwargs, self.render_mode

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Single) and self._key() == other._key()

    def __call__(self) -> gym.Env:
        register(self.config.id)
        kwargs = dict(self.config.kwargs)
        if self.config.atari is not None:
            kwargs.setdefault("frameskip", 1)
        try:
            env = gym.make(self.config.id, render_mode=self.render_mode, disable_env_checker=True, **kwargs)
        except gym.error.DependencyNotInstalled as error:
            raise ValueError(
                f"environment.id {self.config.id!r} needs a package that is not installed: {error}"
            ) from error
        return preprocess_atari(env, self.config.atari) if self.config.atari else env


def register(environment_id: str) -> gym.envs.registration.EnvSpec:
    """The registered spec of an id, or a `ValueError` that names the nearest ids."""
    if environment_id.startswith("ALE/") or "NoFrameskip" in environment_id:
        try:
            import ale_py
        except ImportError as error:
            raise ValueError(
                f"environment.id {environment_id!r} needs the extra: pip install 'upslope[atari]'"
            ) from error
        gym.register_envs(ale_py)
    try:
        return gym.spec(environment_id)
    except (gym.error.Error, ModuleNotFoundError) as error:
        near = difflib.get_close_matches(environment_id, list(gym.registry), n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(
            f"environment.id {environment_id!r} is not a registered Gymnasium environment{hint}"
        ) from error


class FireReset(gym.Wrapper):
    """Press FIRE after a reset and after each lost life, in games that do not start without it."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._lives = 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**kwargs)
        observation, _, terminated, truncated, info = self.env.step(1)
        if terminated or truncated:
            observation, info = self.env.reset(**kwargs)
        self._lives = info.get("lives", 0)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if info.get("lives", 0) < self._lives and not (terminated or truncated):
            self._lives = info["lives"]
            observation, extra, terminated, truncated, info = self.env.step(1)
            reward = float(reward) + float(extra)
        return observation, reward, terminated, truncated, info


def preprocess_atari(env: gym.Env, config: Atari) -> gym.Env:
    """No-op starts, max-pooled frame skip, FIRE, grey 84 × 84 frames, stacked. Life loss is handled in `step`."""
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    env = AtariPreprocessing(
        env, noop_max=config.noop_max, frame_skip=config.frame_skip, screen_size=config.screen_size
    )
    if config.fire_reset and "FIRE" in env.unwrapped.get_action_meanings():  # type: ignore[attr-defined]
        env = FireReset(env)
    return FrameStackObservation(env, config.frame_stack)


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

    def __init__(self, config: Config, envs: VectorEnv, seed: int, native: bool, exact: bool) -> None:
        self.config, self.envs, self.seed, self.native, self.exact = config, envs, seed, native, exact
        self.num_envs = envs.num_envs
        self.observation_space, self.action_space = envs.single_observation_space, envs.single_action_space
        self.autoreset = AutoresetMode(envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self.episode = np.zeros(self.num_envs, dtype=np.int64)  # index of the running episode, per environment
        self.length = np.zeros(self.num_envs, dtype=np.int64)  # its steps so far
        self._owed = np.zeros(self.num_envs, dtype=bool)  # NEXT_STEP: the next row is a reset row
        self._lives = np.zeros(self.num_envs, dtype=np.int64)

    def reset(self) -> Observation:
        observation, infos = self.envs.reset(seed=derive(self.seed, "native") % 2**31 if self.native else None)
        self._lives = np.array(infos.get("lives", self._lives))
        self._refuse_non_finite(observation, None)
        return observation

    def step(self, action: np.ndarray) -> Transition:
        """Act in every environment. Boxes are clipped to their bounds here; what was sampled stays with the caller.

        Raises:
            ValueError: a NaN or infinite observation or reward, naming environment, step and episode seed.
        """
        observation, reward, terminated, truncated, infos = self._advance(to_space(self.action_space, action))
        self._refuse_non_finite(observation, reward)
        ended = terminated | truncated
        next_observation, valid = observation, None
        if self.autoreset == AutoresetMode.NEXT_STEP:
            valid = ~self._owed
            self._owed = ended
        self.length += 1 if valid is None else valid
        if ended.any():
            if self.autoreset == AutoresetMode.SAME_STEP:
                next_observation = _place(observation, infos["final_obs"], ended)
                self._refuse_non_finite(next_observation, None)
            elif self.autoreset == AutoresetMode.DISABLED:
                observation, fresh = self.envs.reset(options={"reset_mask": ended.copy()})
                infos = (
                    {**infos, "lives": np.where(ended, fresh["lives"], infos["lives"])} if "lives" in infos else infos
                )
                self._refuse_non_finite(observation, None)
            self.episode = self.episode + ended
            self.length[ended] = 0
        if self.config.atari is not None and self.config.atari.episodic_life and "lives" in infos:
            lives = np.asarray(infos["lives"])
            terminated = terminated | ((lives < self._lives) & ~ended & (True if valid is None else valid))
            self._lives = lives
        return Transition(next_observation, observation, reward, terminated, truncated, ended, valid)

    def _advance(self, action: Any) -> tuple[Any, ...]:
        if isinstance(self.envs, AsyncVectorEnv):
            self.envs.step_async(action)
            return self.envs.step_wait(timeout=STEP_TIMEOUT)
        return self.envs.step(action)

    def _refuse_non_finite(self, observation: Observation, reward: np.ndarray | None) -> None:
        bad = _non_finite(observation) if reward is None else _non_finite(observation, reward)
        if bad is None:
            return
        what, index = bad
        at = f"its reset seed {episodes.episode_seed(self.seed, index, int(self.episode[index]))}"
        raise ValueError(
            f"{self.config.id} gave a NaN or infinite {what} in environment {index} at step "
            f"{int(self.length[index]) + 1} of its episode {int(self.episode[index])} "
            f"({'run seed ' + str(self.seed) if self.native else at}); "
            "nothing was trained on it, the last checkpoint is kept"
        )

    def snapshot(self) -> dict[str, np.ndarray]:
        """All that is needed to stand here again, as arrays."""
        state = {"episode": self.episode, "length": self.length, "owed": self._owed, "lives": self._lives}
        if self.native:
            return state | {f"native.{name}": value for name, value in episodes.native_state(self.envs).items()}
        shots = self.envs.call("snapshot")  # type: ignore[attr-defined]
        counts = np.array([len(shot.actions) for shot in shots], dtype=np.int64)
        flat = [action for shot in shots for action in shot.actions]
        actions = np.stack(flat) if flat else np.zeros((0,))
        begun = np.array([shot.episode for shot in shots], dtype=np.int64)
        ended = np.array([shot.ended for shot in shots])
        return state | {"actions": actions, "counts": counts, "begun": begun, "ended": ended}

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        self.episode, self.length = state["episode"].copy(), state["length"].copy()
        self._owed, self._lives = state["owed"].astype(bool), state["lives"].copy()

    def close(self) -> None:
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
    register(config.id)
    native = _choose_native(config)
    if native:
        envs: VectorEnv = _native(config, config.num_envs)()
        exact = _native_exact(Single(config))
    else:
        factory = Single(config)
        check = episodes.replay_check(factory)
        exact = check.exact
        if not exact:
            log.warning(
                "%s is not a function of its seed and actions: a resumed run will not be bitwise equal", config.id
            )
        shots = _snapshots(config.num_envs, start)
        starts = [episodes.EpisodeStarts(factory, seed, first_index + i, check.fresh, s) for i, s in enumerate(shots)]
        mode = AutoresetMode[config.autoreset.replace("-", "_").upper()]
        vector: type = AsyncVectorEnv if config.vectorization == "async" else SyncVectorEnv
        envs = vector(starts, autoreset_mode=mode)
    environments = Environments(config, envs, seed, native, exact)
    observation = environments.reset()
    if start is not None:
        environments._restore(start)
        if native:
            episodes.restore_native(envs, {k[7:]: v for k, v in start.items() if k.startswith("native.")})
    return environments, observation


def _choose_native(config: Config) -> bool:
    if config.vectorization == "envpool":
        raise ValueError("environment.vectorization 'envpool' is not supported for this environment")
    offered = gym.spec(config.id).vector_entry_point is not None
    if config.vectorization == "native" and not offered:
        raise ValueError(f"environment.vectorization 'native': {config.id} has no vector entry point")
    if config.vectorization == "auto":
        usable = offered and config.atari is None
        return usable and _native_exact(Single(config))
    return config.vectorization == "native"


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


def _non_finite(observation: Observation, reward: np.ndarray | None = None) -> tuple[str, int] | None:
    """The first environment with a non-finite number, or None. A sum screens first: it costs one pass and no memory."""
    parts = observation if isinstance(observation, dict) else {"observation": observation}
    for name, value in (*parts.items(), *((("reward", reward),) if reward is not None else ())):
        if value.dtype.kind == "f" and not math.isfinite(value.sum()):
            finite = np.isfinite(value).reshape(len(value), -1).all(1)
            if not finite.all():
                return name, int(np.flatnonzero(~finite)[0])
    return None
