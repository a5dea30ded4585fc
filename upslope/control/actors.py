"""Actors and critics of the continuous off-policy algorithms: squashed Gaussian or deterministic π, Q(s, a), V(s).

Critics see actions as fractions of their range, [-1, 1], whatever the units of the environment.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float
from torch import Tensor, nn

from upslope.control import networks
from upslope.control.networks import Observation, Torso
from upslope.core import distributions
from upslope.runs import settings


@dataclass(frozen=True)
class Config:
    """The shape of the actor and of every critic; PyTorch's initialisation. This one's actor is deterministic."""

    hidden: tuple[int, ...] = (400, 300)
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = "relu"
    cnn_features: int = 512
    precision: networks.Precision = "float32"  # of products between hidden layers; θ and all else stay float32

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"network.hidden is {self.hidden}, allowed: positive widths")
        settings.within(self, 1, None, "cnn_features")

    def build(self, observation_space: spaces.Space, action_space: spaces.Space, seed: int) -> nn.Module:
        return networks.seeded(lambda: Actor(observation_space, action_space, self), seed)

    def torso(self, observation_space: spaces.Space) -> Torso:
        return Torso(
            observation_space,
            networks.Config(self.hidden, self.activation, orthogonal=False, cnn_features=self.cnn_features),
            precision=self.precision,
        )


@dataclass(frozen=True)
class Stochastic(Config):
    """As `Config`; its actor is a squashed Gaussian whose log standard deviation depends on the state.

    With gSDE it is a function of the last features, and behaviour draws one matrix for all steps of an iteration.
    """

    hidden: tuple[int, ...] = (256, 256)
    state_dependent_noise: bool = False  # gSDE instead of independent noise
    log_std: float = -3.0  # of gSDE's matrix at the start
    log_std_low: float = -20.0  # bounds of the log standard deviation before the squashing
    log_std_high: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.log_std_low < self.log_std_high:
            raise ValueError(f"network.log_std_low is {self.log_std_low}, allowed: below {self.log_std_high}")


class Deterministic(NamedTuple):
    """A policy without randomness: an action as a fraction of its range."""

    unit: Float[Tensor, "*batch k"]
    low: Float[Tensor, " k"]
    high: Float[Tensor, " k"]

    def mode(self) -> Float[Tensor, "*batch k"]:
        return distributions.rescale(self.unit, self.low, self.high)

    def sample(self, noise: Tensor) -> Float[Tensor, "*batch k"]:
        return self.mode()


Policies = distributions.SquashedGaussian | distributions.SquashedStateDependentGaussian | Deterministic


class Head(nn.Module):
    """Features -> π(·|s) over a bounded Box."""

    low: Tensor
    high: Tensor

    def __init__(self, action_space: spaces.Space, features: int, config: Config) -> None:
        super().__init__()
        low, high = bounds(action_space)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.size = len(low)
        self.log_std = (config.log_std_low, config.log_std_high) if isinstance(config, Stochastic) else None
        self.state_dependent = isinstance(config, Stochastic) and config.state_dependent_noise
        self.linear = nn.Linear(features, 2 * self.size if self.log_std and not self.state_dependent else self.size)
        self.noise_shape: tuple[int, ...] = (self.size,) if self.log_std else ()
        if self.state_dependent:
            self.noise_shape = (features, self.size)
            self.matrix = nn.Parameter(torch.full(self.noise_shape, config.log_std))  # type: ignore[attr-defined]

    def forward(self, features: Float[Tensor, "batch features"]) -> Policies:
        output = self.linear(features)
        if self.log_std is None:
            return Deterministic(output.tanh(), self.low, self.high)
        if self.state_dependent:  # the mean is kept where tanh is not yet flat
            noise = distributions.StateDependentGaussian(
                output.clamp(-2, 2), features, self.matrix.clamp(*self.log_std)
            )
            return distributions.SquashedStateDependentGaussian(noise, self.low, self.high)
        mean, log_std = output.chunk(2, -1)
        return distributions.SquashedGaussian(mean, log_std.clamp(*self.log_std), self.low, self.high)

    @property
    def noise(self) -> Callable[..., Tensor]:
        """What an agent that samples its actions draws."""
        return distributions.normal


class Policy(nn.Module):
    """π(·|s)."""

    def __init__(self, torso: Torso, head: Head) -> None:
        super().__init__()
        self.torso, self.head = torso, head

    def forward(self, observation: Observation) -> Policies:
        return self.head(self.torso(observation))


class Actor(nn.Module):
    """π of a bounded Box, as its settings say deterministic or squashed Gaussian."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, config: Config) -> None:
        super().__init__()
        torso = config.torso(observation_space)
        self.policy = Policy(torso, Head(action_space, torso.size, config))

    def forward(self, observation: Observation) -> Policies:
        return self.policy(observation)


class Critics(nn.Module):
    """Q_1 … Q_n of (s, a), one matrix product a layer for all of them; an encoder of images is shared."""

    low: Tensor
    high: Tensor

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, config: Config, n: int) -> None:
        super().__init__()
        low, high = bounds(action_space)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.encoder = networks.encoder(observation_space, config.cnn_features)
        self.activation = networks.ACTIVATIONS[config.activation]
        self.between = networks.PRECISIONS[config.precision]
        sizes = (self.encoder.size + len(low), *config.hidden, 1)  # type: ignore[operator]
        pairs = list(itertools.pairwise(sizes))
        uniform = lambda i, *shape: nn.Parameter(torch.empty(n, *shape).uniform_(-1, 1) / math.sqrt(i))  # noqa: E731
        self.weights = nn.ParameterList(uniform(i, i, o) for i, o in pairs)
        self.biases = nn.ParameterList(uniform(i, 1, o) for i, o in pairs)

    def forward(
        self, observation: Observation, action: Float[Tensor, "batch k"], count: int | None = None
    ) -> Float[Tensor, "n batch"]:
        """Of all of them, or of the first few."""
        unit = distributions.unit(action, self.low, self.high)
        x = torch.cat([self.encoder(observation), unit], -1).expand(count or len(self.weights[0]), -1, -1)
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            middle = self.between is not None and 0 < k < len(self.biases) - 1
            parts = (self.activation(x) if k else x, weight[:count], bias[:count])
            x, weight, bias = (part.to(self.between if middle else bias.dtype) for part in parts)
            x = torch.bmm(x, weight) + bias  # not baddbmm: a program adds it with the activation
        return x.squeeze(-1)


class Value(nn.Module):
    """V(s)."""

    def __init__(self, observation_space: spaces.Space, config: Config) -> None:
        super().__init__()
        self.torso = config.torso(observation_space)
        self.value = nn.Linear(self.torso.size, 1)

    def forward(self, observation: Observation) -> Float[Tensor, " batch"]:
        return self.value(self.torso(observation)).squeeze(-1)


def bounds(space: spaces.Space) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """low and high of a bounded Box of floats, flat.

    Raises:
        ValueError: any other action space.
    """
    box = isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)
    if not box or not space.is_bounded() or not (space.low < space.high).all():  # type: ignore[attr-defined]
        raise ValueError(f"action space {space} is not supported by this algorithm; allowed: a bounded Box of floats")
    low, high = (torch.from_numpy(bound.reshape(-1)) for bound in (space.low, space.high))  # type: ignore[attr-defined]
    return low.to(torch.get_default_dtype()), high.to(torch.get_default_dtype())
