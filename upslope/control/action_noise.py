"""Noise on the actions of a deterministic policy: Gaussian, or Ornstein-Uhlenbeck, which wanders."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.control import environments, offpolicy
from upslope.control.networks import Observation
from upslope.control.offpolicy import State
from upslope.control.parameters import Net
from upslope.core import distributions, exploration
from upslope.runs import settings
from upslope.runs.randomness import Blocks, generator


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


def behaviour(net: Net, envs: environments.Environments, config: Any) -> offpolicy.Behaviour:
    """π's action with noise, the step's own, within its range; before `learning_starts` uniform ones.

    Ornstein-Uhlenbeck's state is one of the run's tensors, changed in place; it begins at 0 where an episode does, as
    far as that can be seen between iterations.
    """
    n, head = envs.num_envs, net.module.policy.head  # type: ignore[union-attr]

    def draw(random: torch.Generator, count: int) -> list[Tensor]:
        return list(torch.randn(count, n, head.size, generator=random))  # type: ignore[arg-type]

    steps = Blocks(draw, n * head.size, config.run.seed, "behaviour")  # type: ignore[operator, arg-type]

    def given(state: State, observation: Observation, t: int) -> Tensor | tuple[Any, ...]:
        place, wandering, step = state.iteration * config.train_interval + t, state.others.get("noise"), config.noise
        normal = steps.at(place)
        if wandering is None:
            noise = step.std * normal
        else:
            if t == 0:
                wandering[torch.from_numpy(state.world.episode_length == 0)] = 0.0
            noise = exploration.ornstein_uhlenbeck(wandering, normal, step.pull, step.std, step.dt)
            wandering.copy_(noise)
        if state.step + t * n < config.learning_starts:
            return offpolicy.random_actions(envs.action_space, n, generator(config.run.seed, "uniform", place))
        return observation, noise

    return given


def start(config: Any, size: int) -> dict[str, Float[Tensor, "N k"]]:
    """What the noise of a new run remembers, by name."""
    wanders = config.noise.kind == "ornstein-uhlenbeck"
    return {"noise": torch.zeros(config.environment.num_envs, size)} if wanders else {}
