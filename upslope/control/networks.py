"""Policies and values as modules: encoders for flat, image, discrete and Dict observations, heads for all actions."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float
from torch import Tensor, nn

from upslope.control import masks, memory
from upslope.control.memory import Remembered
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

Precision = Literal["float32", "bfloat16"]
PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}  # None: as θ is


@dataclass(frozen=True)
class Config:
    """The network's shape. Actor and critic are separate unless `shared`: then they share the encoder and torso."""

    hidden: tuple[int, ...] = (64, 64)
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = "tanh"
    shared: bool = False
    orthogonal: bool = True  # gain √2, policy head 0.01, value head 1, biases 0
    log_std: float = 0.0  # initial log standard deviation of continuous actions
    state_dependent_noise: bool = False  # gSDE instead of independent noise
    noise_interval: int = 0  # steps that gSDE keeps an exploration matrix; 0: a whole rollout
    cnn_features: int = 512
    min_probability: float = 0.0  # floor of a discrete action's probability
    memory: Literal["none", "lstm", "gru"] = "none"  # a recurrent cell after the linear layers
    memory_size: int = 64  # its hidden units
    memory_bias: float = 0.0  # first bias of the gate that keeps (f, z); 1 and more remember longer from the start

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"network.hidden is {self.hidden}, allowed: positive widths")
        settings.within(self, 1, None, "cnn_features", "memory_size")
        settings.within(self, -20, 5, "log_std")
        settings.within(self, 0, None, "noise_interval")
        settings.below_one(self, "min_probability")

    def build(self, observation_space: spaces.Space, action_space: spaces.Space, seed: int) -> nn.Module:
        return actor_critic(observation_space, action_space, self, seed)


class Buildable(Protocol):
    """A network's settings. What they build has a child `policy`: observation -> what has `mode` and `sample`."""

    def build(self, observation_space: spaces.Space, action_space: spaces.Space, seed: int) -> nn.Module: ...


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
        parts = [  # not one_hot: vmap refuses it
            columns[:, i, None] == torch.arange(first, first + size, device=columns.device)
            for i, (size, first) in enumerate(zip(self.sizes, self.start, strict=True))
        ]
        return torch.cat(parts, -1).to(torch.get_default_dtype())


class Dictionary(nn.Module):
    """Each entry but the mask through its own encoder, features side by side in the order of the keys."""

    def __init__(self, space: spaces.Dict, features: int) -> None:
        super().__init__()
        self.keys = sorted(set(space.spaces) - {masks.KEY})  # any strings: a ModuleDict would refuse some
        if not self.keys:
            raise ValueError(f"observation space {space}: there is nothing to see besides {masks.KEY!r}")
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
    """Linear layers, each followed by the activation; `precision` is of the products between hidden layers."""

    def __init__(self, size: int, hidden: tuple[int, ...], activation: str, precision: Precision = "float32") -> None:
        super().__init__()
        self.between = PRECISIONS[precision]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip((size, *hidden), hidden, strict=False))
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Float[Tensor, "batch size"]) -> Float[Tensor, "batch width"]:
        for k, layer in enumerate(self.layers):
            if k and self.between is not None:
                weight, bias = (parameter.to(self.between) for parameter in layer.parameters())
                x = nn.functional.linear(x.to(self.between), weight, bias)
            else:
                x = layer(x)
            x = self.activation(x)
        return x if self.between is None else x.to(next(self.parameters()).dtype)


def initialize(module: nn.Module, gain: float) -> nn.Module:
    """Orthogonal weights (Saxe et al. 2014) of a gain, biases 0, in every linear and convolutional layer."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.orthogonal_(layer.weight, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
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
        self.noise_interval = config.noise_interval
        self.floor = config.min_probability if self.kind == "categorical" else 0.0
        if self.floor * outputs > 1:
            raise ValueError(
                f"network.min_probability is {self.floor}, allowed: at most 1/{outputs}, one part an action"
            )

    def forward(self, features: Float[Tensor, "batch features"], mask: Tensor | None = None) -> Distribution:
        output = masks.apply(self.linear(features), mask)
        if self.floor:
            floor = torch.full_like(output, self.floor) if mask is None else (mask != 0) * self.floor
            output = masks.apply(floored(output, floor), mask)
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


def refuse_memory(config: Config, algorithm: str) -> None:
    """Raise a `ValueError` for a policy with a memory, where the algorithm has no use for sequences."""
    if config.memory != "none":
        raise ValueError(f"network.memory is {config.memory!r}, allowed with {algorithm}: 'none'")


def floored(logits: Float[Tensor, "*batch n"], floor: float | Tensor) -> Float[Tensor, "*batch n"]:
    """Logits of the same policy with no probability below `floor`; the others share what is left in proportion.

    The gradient is the softmax's at the new probabilities, e_a - p, not that of the clip, which is 0 at the floor: an
    action that reached the floor can come back (as in Sutton & Barto's example 13.1).

    >>> floored(torch.tensor([0.0, 9.0]), 0.05).softmax(-1)
    tensor([0.0500, 0.9500])
    """
    p = logits.softmax(-1)
    low = p < floor
    kept = torch.where(low, 0.0, p)
    left = 1 - (low * floor).sum(-1, keepdim=True)
    clipped = torch.where(low, floor, kept * left / kept.sum(-1, keepdim=True))
    return logits + (clipped.log() - logits).detach()


class Torso(nn.Module):
    """Observation -> features: an encoder, linear layers and, with a memory, a recurrent cell.

    `place` is where the states of this cell lie in a memory.
    """

    def __init__(self, space: spaces.Space, config: Config, first: int = 0, precision: Precision = "float32") -> None:
        super().__init__()
        self.encoder = encoder(space, config.cnn_features)
        self.layers = MLP(self.encoder.size, config.hidden, config.activation, precision)  # type: ignore[arg-type]
        size: int = config.hidden[-1] if config.hidden else self.encoder.size  # type: ignore[assignment]
        self.cell = memory.cell(config.memory, size, config.memory_size)
        self.size = size if self.cell is None else self.cell.size
        self.place = slice(first, first + (0 if self.cell is None else self.cell.states * self.size))
        if config.orthogonal:
            initialize(self.encoder, math.sqrt(2))
            initialize(self.layers, math.sqrt(2))
            if self.cell is not None:
                initialize(self.cell, 1.0)
        if self.cell is not None and config.memory_bias:
            self.cell.keep_longer(config.memory_bias)

    def forward(self, observation: Observation | Remembered) -> Float[Tensor, "batch features"]:
        return self.remember(observation)[0]

    def remember(self, observation: Observation | Remembered) -> tuple[Float[Tensor, "batch features"], Tensor | None]:
        """Features, and this cell's states after the last step; None without a memory."""
        if self.cell is None:
            return self.layers(self.encoder(observation)), None
        if not isinstance(observation, Remembered):
            raise ValueError("observation: a policy with a memory sees memory.Remembered, an observation and a memory")
        features = self.layers(self.encoder(observation.rows()))
        return memory.run(self.cell, features, observation.memory[:, self.place], observation.begins)


class Policy(nn.Module):
    """π(·|s), or π(·|s, memory); of illegal actions 0."""

    def __init__(self, torso: Torso, head: Head, masked: bool) -> None:
        super().__init__()
        self.torso, self.head, self.masked = torso, head, masked

    def forward(self, observation: Observation | Remembered) -> Distribution:
        return self.act(self.torso(observation), observation)

    def act(self, features: Float[Tensor, "batch features"], observation: Any) -> Distribution:
        """The distribution that these features give, over the actions that the observation says are legal."""
        if not self.masked:
            return self.head(features)
        rows = observation.rows() if isinstance(observation, Remembered) else observation
        return self.head(features, rows[masks.KEY])


class Critic(nn.Module):
    """V(s); without a torso of its own, V of the policy's features."""

    def __init__(self, torso: Torso | None, value: nn.Linear) -> None:
        super().__init__()
        self.torso, self.value = torso, value

    def forward(self, observation: Any) -> Float[Tensor, " batch"]:
        features = observation if self.torso is None else self.torso(observation)
        return self.value(features).squeeze(-1)


class ActorCritic(nn.Module):
    """π(·|s) and V(s), with separate networks or one torso for both. The policy's parameters come first in θ."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, config: Config) -> None:
        super().__init__()
        self.shared = config.shared
        actor = Torso(observation_space, config)
        critic = None if config.shared else Torso(observation_space, config, first=actor.place.stop)
        self.memory_size = (critic or actor).place.stop  # numbers per environment; 0 without a memory
        masked = masks.masked(observation_space, action_space)
        self.policy = Policy(actor, Head(action_space, actor.size, config), masked)
        self.critic = Critic(critic, nn.Linear(actor.size, 1))
        if config.orthogonal:
            initialize(self.critic.value, 1.0)

    def forward(self, observation: Observation | Remembered, remember: bool = False) -> tuple[Any, ...]:
        """π and V; and, where asked for, the memory after the last step."""
        features, after = self.policy.torso.remember(observation)
        policy = self.policy.act(features, observation)
        if self.critic.torso is None:
            value = self.critic(features)
        else:
            own, later = self.critic.torso.remember(observation)
            value = self.critic.value(own).squeeze(-1)
            after = None if after is None or later is None else torch.cat([after, later], -1)
        return (policy, value, after) if remember else (policy, value)


def actor_critic(observation_space: spaces.Space, action_space: spaces.Space, config: Config, seed: int) -> nn.Module:
    """An `ActorCritic` whose initial weights are a function of the seed alone."""
    return seeded(lambda: ActorCritic(observation_space, action_space, config), seed)


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module whose initial weights are a function of the seed alone; no global random state is touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def to_tensors(observation: Any) -> Observation:
    """NumPy observations as tensors: float64 becomes the default float dtype, the rest keeps its type."""
    if isinstance(observation, dict):
        return {key: to_tensors(value) for key, value in observation.items()}
    tensor, real = torch.from_numpy(np.ascontiguousarray(observation)), torch.get_default_dtype()
    return tensor.to(real) if tensor.dtype is not real and tensor.dtype.is_floating_point else tensor
