"""Noise on the actions of a deterministic policy: Gaussian, or Ornstein-Uhlenbeck, which wanders."""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.control import offpolicy
from upslope.control.networks import Observation
from upslope.control.offpolicy import State
from upslope.control.parameters import Net
from upslope.core import distributions, exploration
from upslope.runs import settings


@dataclass(frozen=True)
class Config:
    """The noise, in fractions of the action range [-1, 1]."""

    kind: Literal["gaussian", "ornstein-uhlenbeck"] = "gaussian"
    std: float = 0.1  # σ, of Ornstein-Uhlenbeck per √(unit of time)
    pull: float = 0.15  # Ornstein-Uhlenbeck's θ, back to 0, per unit of time
    dt: float = 0.01  # Ornstein-Uhlenbeck's time from step to step

    def __post_init__(self) -> None:
        settings.within(self, 0, None, "std", "pull")
        settings.positive(self, "dt")


def act(net: Net, theta: Float[Tensor, " d"], observation: Observation, noise: Tensor) -> Float[Tensor, "N k"]:
    """π's action and noise, within its range."""
    policy = net(theta, observation)
    return distributions.rescale((policy.unit + noise).clamp(-1, 1), policy.low, policy.high)


def behaviour(state: State, net: Net, config: Any, acts: offpolicy.Act | None = None) -> offpolicy.Choose:
    """π's action with this iteration's noise, within its range; before `learning_starts` uniform ones.

    Ornstein-Uhlenbeck's state is one of the run's tensors, changed in place; it begins at 0 where an episode does, as
    far as that can be seen between iterations.
    """
    acts = acts or functools.partial(act, net)
    random, n = offpolicy.noise(state, config, "behaviour"), state.world.envs.num_envs
    head, wandering = net.module.policy.head, state.others.get("noise")  # type: ignore[union-attr]
    normal = torch.randn(config.train_interval, n, head.size, generator=random)  # type: ignore[arg-type]
    if wandering is not None:
        wandering[torch.from_numpy(state.world.episode_length == 0)] = 0.0

    def choose(observation: Observation, t: int) -> Tensor:
        noise = config.noise.std * normal[t]
        if wandering is not None:
            kept, step = wandering, config.noise
            noise = kept.copy_(exploration.ornstein_uhlenbeck(kept, normal[t], step.pull, step.std, step.dt))
        if state.step + t * n < config.learning_starts:
            return offpolicy.random_actions(state.world.envs.action_space, n, random)
        return acts(state.theta, observation, noise)

    return choose


def start(config: Any, size: int) -> dict[str, Float[Tensor, "N k"]]:
    """What the noise of a new run remembers, by name."""
    wanders = config.noise.kind == "ornstein-uhlenbeck"
    return {"noise": torch.zeros(config.environment.num_envs, size)} if wanders else {}
