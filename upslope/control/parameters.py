"""θ is one vector: an `nn.Module` as a pure function of one contiguous tensor.

The papers write θ ∈ R^d, and so do the algorithm files: `net(theta, observation)`. Clipping is then one norm, Adam a
handful of vector operations, a natural gradient vector algebra, a checkpoint one tensor and a table of names.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

Extra = TypeVar("Extra")
ALIGNMENT = 16  # elements: float32 segments start on 64-byte boundaries, where vector loads are fastest


class Segment(NamedTuple):
    """One named parameter inside θ."""

    name: str
    shape: tuple[int, ...]
    start: int  # elements
    size: int  # elements, padding not counted


class Layout(NamedTuple):
    """Where every parameter lies in θ."""

    segments: tuple[Segment, ...]
    dimension: int  # d, elements of θ, padding counted

    def table(self) -> list[list[Any]]:
        """Names, shapes and places as JSON, for a checkpoint."""
        return [[s.name, list(s.shape), s.start] for s in self.segments]


class Net:
    """A pure function of θ and its inputs, made from a module.

    The module is a skeleton: its own parameters give θ's first value and its layout and are then never read. For a θ
    that was `bind`-ed, parameters and gradients are views of two flat buffers, the fastest way to run eagerly; any
    other tensor (also one under `torch.func` or `torch.compile`) goes through `torch.func.functional_call`.
    """

    def __init__(self, module: nn.Module) -> None:
        norms = [name for name, child in module.named_modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
        if norms:
            raise ValueError(f"module: batch normalisation keeps state outside θ and is refused, found {norms}")
        self.module = module
        self.layout, self._sizes = _lay_out(module)
        self._slots = [_slot(module, segment.name) for segment in self.layout.segments]
        self._bound: Tensor | None = None
        self._gradient: Tensor | None = None

    def initial(self) -> Float[Tensor, " d"]:
        """θ as the module was initialised; padding is 0."""
        first = next(self.module.parameters())
        theta = first.new_zeros(self.layout.dimension)
        parameters = dict(self.module.named_parameters())
        for name, view in self.views(theta).items():
            view.copy_(parameters[name].detach())
        return theta.detach()

    def views(self, theta: Float[Tensor, " d"]) -> dict[str, Tensor]:
        """Name -> view of θ. One `split`: slicing would cost a backward pass over all of θ for every parameter."""
        if theta.shape != (self.layout.dimension,):
            raise ValueError(f"theta has shape {tuple(theta.shape)}, expected ({self.layout.dimension},)")
        pieces = theta.split(self._sizes)[::2]  # every other piece is padding
        return {s.name: piece.view(s.shape) for s, piece in zip(self.layout.segments, pieces, strict=True)}

    def bind(self, theta: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Let the module's parameters be views of this θ, and their gradients views of one buffer. Returns θ.

        θ is then updated in place by the optimiser, as a donated buffer would be.
        """
        if theta.requires_grad:
            raise ValueError("theta: bind a detached tensor; gradients live in their own buffer")
        gradient = torch.zeros_like(theta)
        gradients = self.views(gradient)
        for (owner, attribute), (name, view) in zip(self._slots, self.views(theta).items(), strict=True):
            leaf = view.detach().requires_grad_()
            leaf.grad = gradients[name]
            owner._parameters[attribute] = leaf  # type: ignore[assignment]  # any tensor serves as a parameter here
        self._bound, self._gradient = theta, gradient
        return theta

    def __call__(self, theta: Float[Tensor, " d"], *inputs: Any) -> Any:
        if theta is self._bound:
            return self.module(*inputs)
        return torch.func.functional_call(self.module, self.views(theta), inputs)

    def gradient(
        self, objective: Callable[..., tuple[Tensor, Extra]], theta: Float[Tensor, " d"], *inputs: Any
    ) -> tuple[Float[Tensor, " d"], Tensor, Extra]:
        """∇_θ objective(θ, *inputs) for a bound θ, with the objective's value and whatever it returns beside it.

        The gradient lies in a buffer that the next call overwrites.
        """
        if theta is not self._bound or self._gradient is None:
            raise ValueError("theta: gradients are taken at the tensor given to bind()")
        self._gradient.zero_()
        value, extra = objective(theta, *inputs)
        value.backward()
        return self._gradient, value.detach(), extra


def _lay_out(module: nn.Module) -> tuple[Layout, list[int]]:
    segments, sizes, start = [], [], 0
    for name, parameter in module.named_parameters():
        size = parameter.numel()
        padding = -size % ALIGNMENT
        segments.append(Segment(name, tuple(parameter.shape), start, size))
        sizes += [size, padding]
        start += size + padding
    if not segments:
        raise ValueError("module: it has no parameters")
    return Layout(tuple(segments), start), sizes


def _slot(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    *path, attribute = name.split(".")
    return module.get_submodule(".".join(path)), attribute
