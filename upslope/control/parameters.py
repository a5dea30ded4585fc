"""θ is one vector: an `nn.Module` as a pure function of one contiguous tensor.

The papers write θ ∈ R^d, and so do the algorithm files: `net(theta, observation)`. Clipping is then one norm, Adam a
handful of vector operations, a natural gradient vector algebra, a checkpoint one tensor and a table of names.
"""

import copy
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
        self._frozen: list[tuple[Tensor, nn.Module]] = []

    def pure(self) -> "Net":
        """The same function of θ with nothing bound to it: what a compiled program calls."""
        net = copy.copy(self)
        net._bound, net._gradient, net._frozen = None, None, []
        return net

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

    def freeze(self, theta: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """As `bind`, for another θ of the same network beside the bound one, without gradients: a target's."""
        module = copy.deepcopy(self.module).requires_grad_(False)
        places = zip(self.layout.segments, self.views(theta.detach()).values(), strict=True)
        for (owner, attribute), view in ((_slot(module, segment.name), view) for segment, view in places):
            owner._parameters[attribute] = view  # type: ignore[assignment]
        self._frozen.append((theta, module))
        return theta

    def __call__(self, theta: Float[Tensor, " d"], *inputs: Any) -> Any:
        if theta is self._bound:
            return self.module(*inputs)
        for frozen, module in self._frozen:
            if theta is frozen:
                return module(*inputs)
        return torch.func.functional_call(self.module, self.views(theta), inputs)

    def part(self, child: str) -> slice:
        """Where the parameters of one of the module's children lie in θ; they lie together."""
        inside = [segment for segment in self.layout.segments if segment.name.startswith(f"{child}.")]
        after = [segment.start for segment in self.layout.segments if segment.start > inside[-1].start]
        return slice(inside[0].start, after[0] if after else self.layout.dimension)

    def only(self, child: str, theta: Float[Tensor, " d"], *inputs: Any) -> Any:
        """What one of the module's children makes of its inputs, nothing else computed."""
        module: nn.Module = getattr(self.module, child)
        if theta is self._bound:
            return module(*inputs)
        views = {n.removeprefix(f"{child}."): v for n, v in self.views(theta).items() if n.startswith(f"{child}.")}
        return torch.func.functional_call(module, views, inputs)

    def gradient(
        self, objective: Callable[..., tuple[Tensor, Extra]], theta: Float[Tensor, " d"], *inputs: Any
    ) -> tuple[Float[Tensor, " d"], Tensor, Extra]:
        """∇_θ objective(θ, *inputs), with the objective's value and whatever it returns beside it.

        For a bound θ the gradient lies in a buffer that the next call overwrites; inside a compiled program it is new.
        """
        if torch.compiler.is_compiling():
            gradient, (value, extra) = torch.func.grad_and_value(objective, has_aux=True)(theta, *inputs)
            return gradient, value, extra
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
