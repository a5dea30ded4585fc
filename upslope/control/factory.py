"""One Gymnasium environment from its settings: found by its id, preprocessed, masked."""

import difflib
import importlib
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from upslope.control import atari, masks

if TYPE_CHECKING:
    from upslope.control.environments import Config


class Single:
    """A picklable, hashable factory of one environment, wrappers included, seeds and records excluded."""

    def __init__(self, config: "Config", render_mode: str | None = None) -> None:
        self.config, self.render_mode = config, render_mode

    def _key(self) -> tuple[Any, ...]:
        kwargs = repr(sorted(self.config.kwargs.items()))
        return self.config.id, self.config.atari, kwargs, self.config.action_mask, self.render_mode

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Single) and self._key() == other._key()

    def __call__(self) -> gym.Env:
        register(self.config.id)
        kwargs = dict(self.config.kwargs)
        if self.render_mode is not None:  # not every environment has the argument
            kwargs["render_mode"] = self.render_mode
        if self.config.atari is not None:
            kwargs.setdefault("frameskip", 1)
        try:
            env = gym.make(self.config.id, disable_env_checker=True, **kwargs)
        except gym.error.DependencyNotInstalled as error:
            raise ValueError(
                f"environment.id {self.config.id!r} needs a package that is not installed: {error}"
            ) from error
        env = atari.preprocess(env, self.config.atari) if self.config.atari else env
        return env if self.config.action_mask == "none" else masks.Masked(env, self.config.action_mask)


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
    module, colon, name = environment_id.rpartition(":")  # "module:Id-v0": the module registers the id
    if colon:
        try:
            importlib.import_module(module)
        except (ModuleNotFoundError, TypeError, ValueError) as error:
            raise ValueError(f"environment.id {environment_id!r}: {error}") from error
    try:
        return gym.spec(name)
    except gym.error.Error as error:
        near = difflib.get_close_matches(name, list(gym.registry), n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(
            f"environment.id {environment_id!r} is not a registered Gymnasium environment{hint}"
        ) from error
