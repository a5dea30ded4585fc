"""The Atari details of PPO: no-op starts, max-pooled frame skip, FIRE, grey 84 × 84 frames, stacked."""

from dataclasses import dataclass
from typing import Any

import gymnasium as gym


@dataclass(frozen=True)
class Atari:
    """The Atari details of the "37 details" list that belong to the environment (Mnih et al. 2015)."""

    noop_max: int = 30  # random no-ops at reset, drawn by the episode's seed
    frame_skip: int = 4  # frames an action is repeated, the last two max-pooled
    episodic_life: bool = True  # a lost life has no value beyond, though the game goes on
    fire_reset: bool = True  # press FIRE where the game waits for it
    screen_size: int = 84  # pixels, grey
    frame_stack: int = 4  # frames an observation holds


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
        before, self._lives = self._lives, info.get("lives", 0)
        if self._lives < before and not (terminated or truncated):
            observation, extra, terminated, truncated, info = self.env.step(1)
            reward = float(reward) + float(extra)
        return observation, reward, terminated, truncated, info


def preprocess(env: gym.Env, config: Atari) -> gym.Env:
    """No-op starts, max-pooled frame skip, FIRE, grey 84 × 84 frames, stacked. Life loss is handled in `step`."""
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    env = AtariPreprocessing(
        env, noop_max=config.noop_max, frame_skip=config.frame_skip, screen_size=config.screen_size
    )
    if config.fire_reset and "FIRE" in env.unwrapped.get_action_meanings():  # type: ignore[attr-defined]
        env = FireReset(env)
    return FrameStackObservation(env, config.frame_stack)
