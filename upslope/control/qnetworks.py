"""Q-networks: values of all actions at once, as one stream or as dueling ones, with or without noisy layers."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from gymnasium import spaces
from jaxtyping import Float, Int64
from torch import Tensor, nn

from upslope.control import masks, networks
from upslope.control.networks import Observation, Torso
from upslope.core import distributions, exploration, values
from upslope.runs import settings


@dataclass(frozen=True)
class Config:
    """The network's shape: the last hidden layer belongs to each stream, those before it to all."""

    hidden: tuple[int, ...] = (256, 256)
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = "relu"
    orthogonal: bool = False  # of the shared layers, gain √2, biases 0; else PyTorch's
    cnn_features: int = 512
    dueling: bool = False  # a stream for V and one for A (Wang et al. 2016)
    noisy: Literal["none", "independent", "factorised"] = "none"  # the streams' layers (Fortunato et al. 2018)

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"network.hidden is {self.hidden}, allowed: positive widths")
        settings.within(self, 1, None, "cnn_features")

    def build(self, observation_space: spaces.Space, action_space: spaces.Space, seed: int) -> nn.Module:
        return networks.seeded(lambda: QNetwork(observation_space, action_space, self), seed)


@dataclass(frozen=True)
class Boltzmann(Config):
    """As `Config`; its policy is π(a|s) ∝ exp(Q(s, a)/α)."""

    alpha: float = 0.1  # temperature, reward per nat

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.positive(self, "alpha")


class Noisy(nn.Module):
    """A linear layer whose weights have learned scales of noise; the noise comes in, none is the mean."""

    def __init__(self, inputs: int, outputs: int, factorised: bool) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs) if factorised else math.sqrt(3 / inputs)
        scale = 0.5 / math.sqrt(inputs) if factorised else 0.017
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))
        self.weight_scale = nn.Parameter(torch.full((outputs, inputs), scale))
        self.bias_scale = nn.Parameter(torch.full((outputs,), scale))
        self.inputs, self.outputs, self.factorised = inputs, outputs, factorised
        self.noise_size = inputs + outputs if factorised else inputs * outputs + outputs

    def forward(self, x: Float[Tensor, "batch inputs"], noise: Float[Tensor, " noise"] | None) -> Tensor:
        if noise is None:
            return nn.functional.linear(x, self.weight, self.bias)
        if self.factorised:
            weight_noise, bias_noise = exploration.factorised_noise(noise[: self.inputs], noise[self.inputs :])
        else:
            weight_noise, bias_noise = noise[: -self.outputs].view_as(self.weight), noise[-self.outputs :]
        return exploration.noisy_linear(
            x, self.weight, self.weight_scale, self.bias, self.bias_scale, weight_noise, bias_noise
        )


class Stream(nn.Module):
    """Features -> a hidden layer -> numbers."""

    def __init__(self, sizes: tuple[int, ...], config: Config) -> None:
        super().__init__()
        self.noisy = config.noisy != "none"
        pairs = itertools.pairwise(sizes)
        if self.noisy:
            self.layers = nn.ModuleList(Noisy(i, o, config.noisy == "factorised") for i, o in pairs)
        else:
            self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairs)
        self.activation = networks.ACTIVATIONS[config.activation]
        self.noise_sizes: list[int] = [layer.noise_size for layer in self.layers] if self.noisy else []

    def forward(self, x: Tensor, noise: Float[Tensor, " noise"] | None) -> Tensor:
        parts = [None] * len(self.layers) if noise is None else noise.split(self.noise_sizes)
        for k, layer in enumerate(self.layers):
            x = self.activation(x) if k else x
            x = layer(x, parts[k]) if self.noisy else layer(x)
        return x


class Head(nn.Module):
    """Features -> Q(s, ·) = A, or V + A - mean A with dueling streams."""

    def __init__(self, actions: int, sizes: tuple[int, ...], config: Config) -> None:
        super().__init__()
        self.advantage = Stream((*sizes, actions), config)
        self.value = Stream((*sizes, 1), config) if config.dueling else None
        self.noise_size = sum(self.advantage.noise_sizes) + sum(self.value.noise_sizes if self.value else [])
        self.alpha = config.alpha if isinstance(config, Boltzmann) else None
        self.noise_shape = (actions,) if self.alpha else ()  # of acting: greedily, nothing is drawn

    def forward(self, x: Tensor, noise: Float[Tensor, " noise"] | None = None) -> Float[Tensor, "batch actions"]:
        first = sum(self.advantage.noise_sizes)
        advantage = self.advantage(x, None if noise is None else noise[:first])
        if self.value is None:
            return advantage
        return values.dueling(self.value(x, None if noise is None else noise[first:]).squeeze(-1), advantage)

    @property
    def noise(self) -> Callable[..., Tensor]:
        """What an agent that samples its actions would draw."""
        return distributions.gumbel


class Greedy(NamedTuple):
    """The policy of a Q-function: argmax Q. It has no randomness to sample with."""

    q: Float[Tensor, "batch actions"]

    def mode(self) -> Int64[Tensor, " batch"]:
        return self.q.argmax(-1)

    def sample(self, noise: Tensor) -> Int64[Tensor, " batch"]:
        return self.mode()


class Policy(nn.Module):
    """π(·|s): greedy for Q, or ∝ exp(Q/α)."""

    def __init__(self, torso: Torso, head: Head, masked: bool) -> None:
        super().__init__()
        self.torso, self.head, self.masked = torso, head, masked

    def q(self, observation: Observation, noise: Tensor | None = None) -> Float[Tensor, "batch actions"]:
        """Q(s, ·); of illegal actions `masks.ILLEGAL`, which no maximum takes."""
        q = self.head(self.torso(observation), noise)
        return masks.apply(q, observation[masks.KEY]) if self.masked else q  # type: ignore[index]

    def forward(self, observation: Observation) -> Greedy | distributions.Categorical:
        q = self.q(observation)
        return distributions.Categorical(q / self.head.alpha) if self.head.alpha else Greedy(q)


class QNetwork(nn.Module):
    """Q(s, ·) of a Discrete action space; `policy` is the policy it implies."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, config: Config) -> None:
        super().__init__()
        if not isinstance(action_space, spaces.Discrete):
            raise ValueError(f"action space {action_space} is not supported by Q-learning; allowed: Discrete")
        shared = networks.Config(
            config.hidden[:-1], config.activation, orthogonal=config.orthogonal, cnn_features=config.cnn_features
        )
        torso = Torso(observation_space, shared)
        head = Head(int(action_space.n), (torso.size, *config.hidden[-1:]), config)
        self.policy = Policy(torso, head, masks.masked(observation_space, action_space))
        self.noise_size = head.noise_size  # numbers of noise that one noisy network takes; 0 without noisy layers

    def forward(
        self, observation: Observation, noise: Float[Tensor, " noise"] | None = None
    ) -> Float[Tensor, "batch actions"]:
        """Q of every action; with noisy layers the mean network, or one with this noise."""
        return self.policy.q(observation, noise)
