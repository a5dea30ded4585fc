"""Optimisers on θ as vector formulas, step for step equal to `torch.optim`'s.

A configuration is a frozen dataclass with two methods: `start(theta)` gives the empty memory and `ascend` takes one
step *uphill* along a gradient. θ and the memory are updated in place and returned, as donated buffers would be.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.runs import settings


class State(NamedTuple):
    """An optimiser's memory: steps taken, and its running averages."""

    step: int  # inside a compiled program a float64 tensor, as learning rates are
    memory: tuple[Float[Tensor, " d"], ...]


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1), ε outside the root.

    m ← β1 m + (1-β1) g;  v ← β2 v + (1-β2) g²;  θ ← θ + lr · (m/(1-β1^t)) / (√(v/(1-β2^t)) + ε)
    """

    learning_rate: float = 3e-4
    epsilon: float = 1e-5  # PPO's 1e-5, not PyTorch's 1e-8
    beta1: float = 0.9
    beta2: float = 0.999

    def __post_init__(self) -> None:
        settings.positive(self, "learning_rate", "epsilon")
        settings.below_one(self, "beta1", "beta2")

    def start(self, theta: Float[Tensor, " d"]) -> State:
        return State(0, (torch.zeros_like(theta), torch.zeros_like(theta)))

    def ascend(
        self, theta: Float[Tensor, " d"], state: State, gradient: Float[Tensor, " d"], learning_rate: float
    ) -> tuple[Float[Tensor, " d"], State]:
        step, (mean, square) = state.step + 1, state.memory
        mean.lerp_(gradient, 1 - self.beta1)
        square.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        # √v̂ + ε = (√v + ε√c2)/√c2 with c2 = 1-β2^t: two vector operations less
        root = (1 - self.beta2**step) ** 0.5
        small, rate = self.epsilon * root, learning_rate * root / (1 - self.beta1**step)
        if isinstance(step, Tensor):  # stacked they are computed once, else a program takes powers for every 16 numbers
            small, rate = torch.stack([small, rate]).to(theta.dtype).unbind()
            theta.addcdiv_(mean * rate, square.sqrt().add_(small))
        else:
            theta.addcdiv_(mean, square.sqrt().add_(small), value=rate)
        return theta, State(step, (mean, square))


@dataclass(frozen=True)
class RMSProp:
    """RMSProp (Tieleman & Hinton 2012). v ← α v + (1-α) g²;  θ ← θ + lr · g / (√v + ε), or g / √(v + ε).

    ε stands outside the root in PyTorch and inside it in TensorFlow, where v also starts at 1: A2C is sensitive to it.
    """

    learning_rate: float = 7e-4
    epsilon: float = 1e-5
    alpha: float = 0.99
    epsilon_inside: bool = False  # TensorFlow's placement, v starting at 1

    def __post_init__(self) -> None:
        settings.positive(self, "learning_rate", "epsilon")
        settings.below_one(self, "alpha")

    def start(self, theta: Float[Tensor, " d"]) -> State:
        return State(0, (torch.ones_like(theta) if self.epsilon_inside else torch.zeros_like(theta),))

    def ascend(
        self, theta: Float[Tensor, " d"], state: State, gradient: Float[Tensor, " d"], learning_rate: float
    ) -> tuple[Float[Tensor, " d"], State]:
        (square,) = state.memory
        square.mul_(self.alpha).addcmul_(gradient, gradient, value=1 - self.alpha)
        inside, outside = (self.epsilon, 0.0) if self.epsilon_inside else (0.0, self.epsilon)
        denominator = (square + inside).sqrt_().add_(outside)
        theta.addcdiv_(gradient, denominator.div_(learning_rate))
        return theta, State(state.step + 1, state.memory)


@dataclass(frozen=True)
class SGD:
    """Gradient ascent with heavy-ball momentum: b ← μ b + g;  θ ← θ + lr · b."""

    learning_rate: float = 1e-2
    momentum: float = 0.0

    def __post_init__(self) -> None:
        settings.positive(self, "learning_rate")
        settings.below_one(self, "momentum")

    def start(self, theta: Float[Tensor, " d"]) -> State:
        return State(0, (torch.zeros_like(theta),))

    def ascend(
        self, theta: Float[Tensor, " d"], state: State, gradient: Float[Tensor, " d"], learning_rate: float
    ) -> tuple[Float[Tensor, " d"], State]:
        (velocity,) = state.memory
        velocity.mul_(self.momentum).add_(gradient)
        theta.add_(velocity * learning_rate)
        return theta, State(state.step + 1, state.memory)


Optimizer = Adam | RMSProp | SGD


def clip_norm(gradient: Float[Tensor, " d"], max_norm: float | None) -> Float[Tensor, ""]:
    """Scale the gradient in place to a norm of at most `max_norm`; returns the norm before, NaN if any entry is.

    As `torch.nn.utils.clip_grad_norm_`: scale = min(1, max_norm / (norm + 1e-6)). All of θ is one vector: one norm.

    >>> g = torch.tensor([3.0, 4.0])
    >>> clip_norm(g, 1.0), round(float(g.norm()), 4)
    (tensor(5.), 1.0)
    """
    norm = torch.linalg.vector_norm(gradient)
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if torch.compiler.is_compiling():  # stacked it is computed once, else a program divides for every 16 numbers
            scale, _ = torch.stack([scale, norm]).unbind()
        gradient.mul_(scale)
    return norm


def linear(initial: float, progress: float, anneal: bool) -> float:
    """A schedule: `initial`, or falling linearly to 0 as progress goes from 0 to 1.

    >>> linear(1.0, 0.25, True), linear(1.0, 0.25, False)
    (0.75, 1.0)
    """
    if not anneal:
        return initial
    left = 1.0 - progress
    return initial * (left.clamp(min=0.0) if isinstance(left, Tensor) else max(0.0, left))


def pack(state: State) -> dict[str, Tensor]:
    """The memory as tensors, for a checkpoint."""
    averages = {f"optimizer.memory.{i}": average for i, average in enumerate(state.memory)}
    return {"optimizer.step": torch.tensor(state.step), **averages}


def unpack(tensors: dict[str, Tensor]) -> State:
    """The memory that `pack` put away."""
    count = sum(name.startswith("optimizer.memory.") for name in tensors)
    return State(int(tensors["optimizer.step"]), tuple(tensors[f"optimizer.memory.{i}"] for i in range(count)))
