"""Policies and values as modules: encoders for flat, image, discrete and Dict observations, heads for all actions."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float
from torch import Tensor, nn

from upslope.core import distributions
from upslope.core.distributions import Distribution
from upslope.runs import settings

Observation = Tensor | dict[str, Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "elu": nn.functional.elu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}


@dataclass(frozen=True)
class Config:
    """The network's shape. Actor and critic are separate unless `shared`: then they share the encoder and torso."""

    hidden: tuple[int, ...] = (64, 64)
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = "tanh"
    shared: bool = False
    orthogonal: bool = True  # gain √2, policy head 0.01, value head 1, biases 0
    log_std: float = 0.0  # initial log standard deviation of continuous actions
    state_dependent_noise: bool = False  # gSDE instead of independent noise
    cnn_features: int = 512

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"network.hidden is {self.hidden}, allowed: positive widths")
        settings.within(self, 1, None, "cnn_features")
        settings.within(self, -20, 5, "log_std")


class NatureCNN(nn.Module):
    """The convolutions of Mnih et al. 2015: 32 8×8/4, 64 4×4/2, 64 3×3/1, a linear layer; pixels are divided by 255."""

    def __init__(self, space: spaces.Box, features: int) -> None:
        super().__init__()
        self.channels_last = space.shape[2] < space.shape[0]  # an image has fewer channels than rows
        height, width = (space.shape[0], space.shape[1]) if self.channels_last else (space.shape[1], space.shape[2])
        channels = space.shape[2] if self.channels_last else space.shape[0]
        if min(height, width) < 36:
            raise ValueError(f"observation space {space}: images smaller than 36 × 36 pixels do not fit the Nature CNN")
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(),
            nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        with torch.no_grad():
            size = self.convolutions(torch.zeros(1, channels, height, width)).shape[1]
        self.linear = nn.Linear(size, features)
        self.size = features

    def forward(self, image: Tensor) -> Float[Tensor, "batch features"]:
        if self.channels_last:
            image = image.permute(0, 3, 1, 2)
        image = image.to(self.linear.weight.dtype) * (1 / 255)
        return torch.relu(self.linear(self.convolutions(image)))


class Flat(nn.Module):
    """A Box of numbers as a vector."""

    def __init__(self, space: spaces.Box) -> None:
        super().__init__()
        self.size = math.prod(space.shape)

    def forward(self, observation: Tensor) -> Float[Tensor, "batch features"]:
        if observation.ndim != 2:
            observation = observation.reshape(len(observation), -1)
        return observation if observation.is_floating_point() else observation.to(torch.get_default_dtype())


class OneHot(nn.Module):
    """Discrete and multi-discrete observations as one-hot vectors, multi-binary ones as they are."""

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary) -> None:
        super().__init__()
        self.binary = isinstance(space, spaces.MultiBinary)
        if isinstance(space, spaces.Discrete):
            sizes, start = [int(space.n)], [int(space.start)]
        elif isinstance(space, spaces.MultiDiscrete):
            sizes, start = [int(n) for n in space.nvec.reshape(-1)], [int(n) for n in space.start.reshape(-1)]
        else:
            sizes, start = [1] * math.prod(space.shape), [0] * math.prod(space.shape)
        self.sizes, self.start, self.size = sizes, start, sum(sizes)

    def forward(self, observation: Tensor) -> Float[Tensor, "batch features"]:
        columns = observation.reshape(len(observation), -1)
        if self.binary:
            return columns.to(torch.get_default_dtype())
        parts = [
            nn.functional.one_hot(columns[:, i].long() - first, size)
            for i, (size, first) in enumerate(zip(self.sizes, self.start, strict=True))
        ]
        return torch.cat(parts, -1).to(torch.get_default_dtype())


class Dictionary(nn.Module):
    """Each entry through its own encoder, features side by side in the order of the keys."""

    def __init__(self, space: spaces.Dict, features: int) -> None:
        super().__init__()
        self.keys = sorted(space.spaces)  # any strings: a ModuleDict would refuse some
        self.encoders = nn.ModuleList(encoder(space.spaces[key], features) for key in self.keys)
        self.size = sum(part.size for part in self.encoders)

    def forward(self, observation: dict[str, Tensor]) -> Float[Tensor, "batch features"]:
        parts = zip(self.keys, self.encoders, strict=True)
        return torch.cat([encode(observation[key]) for key, encode in parts], -1)


def encoder(space: spaces.Space, features: int) -> nn.Module:
    """The module that turns observations of `space` into a vector; its `size` says how long.

    Raises:
        ValueError: a space without an encoder, naming it and those that have one.
    """
    if isinstance(space, spaces.Dict):
        return Dictionary(space, features)
    if isinstance(space, spaces.Box) and len(space.shape) == 3 and space.dtype == np.uint8:
        return NatureCNN(space, features)
    if isinstance(space, spaces.Box):
        return Flat(space)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return OneHot(space)
    raise unsupported(space)


def refuse_unsupported(space: spaces.Space) -> None:
    """Raise a `ValueError` for an observation space without an encoder, before anything is read from it."""
    if isinstance(space, spaces.Dict):
        for part in space.spaces.values():
            if isinstance(part, spaces.Dict):
                raise unsupported(space)
            refuse_unsupported(part)
    elif not isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        raise unsupported(space)


def unsupported(space: spaces.Space) -> ValueError:
    """The error that names an observation space and those that are supported."""
    return ValueError(
        f"observation space {space} is not supported; allowed: Box, Discrete, MultiDiscrete, MultiBinary and Dict of "
        "these, not nested (gymnasium.wrappers.FlattenObservation turns a Tuple into a Box)"
    )


class MLP(nn.Module):
    """Linear layers, each followed by the activation."""

    def __init__(self, size: int, hidden: tuple[int, ...], activation: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip((size, *hidden), hidden, strict=False))
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Float[Tensor, "batch size"]) -> Float[Tensor, "batch width"]:
        for layer in self.layers:
            x = self.activation(layer(x))
        return x


def initialize(module: nn.Module, gain: float) -> nn.Module:
    """Orthogonal weights (Saxe et al. 2014) of a gain, biases 0, in every linear and convolutional layer."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return module


class Head(nn.Module):
    """Features -> the distribution of an action space: categorical, multi-discrete, multi-binary or Gaussian."""

    def __init__(self, space: spaces.Space, features: int, config: Config) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.state_dependent = config.state_dependent_noise and isinstance(space, spaces.Box)
        if isinstance(space, spaces.Discrete):
            outputs, self.kind = int(space.n), "categorical"
        elif isinstance(space, spaces.MultiDiscrete) and len(space.shape) == 1:
            self.sizes = [int(n) for n in space.nvec]
            outputs, self.kind = sum(self.sizes), "multi-categorical"
        elif isinstance(space, spaces.MultiBinary):
            outputs, self.kind = math.prod(space.shape), "bernoulli"
        elif isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
            outputs, self.kind = math.prod(space.shape), "gaussian"
        else:
            raise ValueError(
                f"action space {space} is not supported; allowed: Discrete, MultiDiscrete (one axis), MultiBinary, "
                "Box of floats"
            )
        self.linear = nn.Linear(features, outputs)
        if config.orthogonal:
            initialize(self.linear, 0.01)
        if self.kind == "gaussian":
            shape = (features, outputs) if self.state_dependent else (outputs,)
            self.log_std = nn.Parameter(torch.full(shape, config.log_std))
        self.noise_shape = (features, outputs) if self.state_dependent else (outputs,)

    def forward(self, features: Float[Tensor, "batch features"]) -> Distribution:
        output = self.linear(features)
        if self.kind == "categorical":
            return distributions.Categorical(output)
        if self.kind == "multi-categorical":
            return distributions.MultiCategorical(output.split(self.sizes, dim=-1))
        if self.kind == "bernoulli":
            return distributions.Bernoulli(output)
        if self.state_dependent:
            return distributions.StateDependentGaussian(output, features, self.log_std)
        return distributions.DiagonalGaussian(output, self.log_std)

    @property
    def noise(self) -> Callable[..., Tensor]:
        """The noise that this head's distribution samples with."""
        by_kind = {"bernoulli": distributions.logistic, "gaussian": distributions.normal}
        return by_kind.get(self.kind, distributions.gumbel)


class ActorCritic(nn.Module):
    """π(·|s) and V(s), with separate networks or one torso for both."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, config: Config) -> None:
        super().__init__()
        width = config.hidden[-1] if config.hidden else 0
        self.actor_encoder, self.actor = _torso(observation_space, config)
        self.shared = config.shared
        if not config.shared:
            self.critic_encoder, self.critic = _torso(observation_space, config)
        width = width or self.actor_encoder.size  # type: ignore[assignment]
        self.policy = Head(action_space, width, config)
        self.value = nn.Linear(width, 1)
        if config.orthogonal:
            initialize(self.value, 1.0)

    def forward(self, observation: Observation) -> tuple[Distribution, Float[Tensor, " batch"]]:
        actor = self.actor(self.actor_encoder(observation))
        critic = actor if self.shared else self.critic(self.critic_encoder(observation))
        return self.policy(actor), self.value(critic).squeeze(-1)


def _torso(space: spaces.Space, config: Config) -> tuple[nn.Module, MLP]:
    encode = encoder(space, config.cnn_features)
    torso = MLP(encode.size, config.hidden, config.activation)  # type: ignore[arg-type]
    if config.orthogonal:
        initialize(encode, math.sqrt(2))
        initialize(torso, math.sqrt(2))
    return encode, torso


def actor_critic(observation_space: spaces.Space, action_space: spaces.Space, config: Config, seed: int) -> ActorCritic:
    """An `ActorCritic` whose initial weights are a function of the seed alone; no global random state is touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ActorCritic(observation_space, action_space, config)


def to_tensors(observation: Any) -> Observation:
    """NumPy observations as tensors: float64 becomes the default float dtype, the rest keeps its type."""
    if isinstance(observation, dict):
        return {key: to_tensors(value) for key, value in observation.items()}
    tensor = torch.from_numpy(np.ascontiguousarray(observation))
    return tensor.to(torch.get_default_dtype()) if tensor.dtype.is_floating_point else tensor
