"""Checks of what comes in: a microsecond or two each, and silent inside compiled or transformed code.

Shapes, dtypes and coefficients are Python values, so they are always checked. Values (NaN, infinity, an empty mask)
cost a read of the tensor: they are checked whenever it has one, that is not under `torch.compile` and not under
`torch.func` transforms, where the trainer's own check of the loss stands in.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

Scalar = float | int | Float[Tensor, ""]
"""A coefficient: a number, or a tensor of no axes where it is annealed inside a compiled program."""

_is_transformed = torch._C._functorch.is_functorch_wrapped_tensor


def readable(*tensors: Tensor) -> bool:
    """Whether these tensors have values that Python may look at."""
    return not (torch.compiler.is_compiling() or any(map(_is_transformed, tensors)))


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def floats(axes: int = 1, **tensors: Tensor) -> None:
    """Floating point, all of one shape, of at least `axes` axes."""
    shape = None
    for tensor in tensors.values():
        if not tensor.is_floating_point():
            raise ValueError(f"{_name(tensors, tensor)} must be floating point, got {describe(tensor)}")
        if shape is None:
            shape = tensor.shape
        elif tensor.shape != shape:
            given = ", ".join(f"{name} {describe(tensor)}" for name, tensor in tensors.items())
            raise ValueError(f"{', '.join(tensors)} must have one shape, got {given}")
    if shape is not None and len(shape) < axes:
        raise ValueError(f"{', '.join(tensors)} must have at least {axes} axes, got shape {list(shape)}")


def boolean(shape: torch.Size, **masks: Tensor) -> None:
    """Boolean, of the given shape."""
    for name, tensor in masks.items():
        if tensor.dtype != torch.bool:
            raise ValueError(f"{name} must be boolean, got {describe(tensor)}")
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {describe(tensor)}")


def within(low: float | int, high: float | int, **coefficients: Scalar | Tensor) -> None:
    """low <= value <= high and finite for plain numbers (NaN fails); tensors are the caller's to keep in range."""
    for name, value in coefficients.items():
        if isinstance(value, (int, float)) and not (low <= value <= high and value < math.inf):
            allowed = f"in [{low:g}, {high:g}]" if high < math.inf else f"at least {low:g} and finite"
            raise ValueError(f"{name} must be {allowed}, got {value}")


def positive(**coefficients: Scalar) -> None:
    """0 < value < inf for plain numbers."""
    for name, value in coefficients.items():
        if isinstance(value, (int, float)) and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def one_of(allowed: Iterable[str], **choices: str) -> None:
    for name, value in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def finite(result: Tensor, **inputs: Tensor) -> None:
    """The result is finite; if not, name the input that was not.

    One sum is the whole cost when all is well: it is NaN or infinite as soon as one element is.
    """
    if not readable(result) or math.isfinite(result.detach().sum().item()) or bool(result.isfinite().all()):
        return
    for name, tensor in inputs.items():
        bad = ~tensor.isfinite()
        if bad.any():
            index = tuple(bad.nonzero()[0].tolist())
            raise ValueError(f"{name} must be finite, got {tensor[index].item()} at index {index}")
    raise ValueError(f"the result is not finite although {', '.join(inputs)} are: it overflows {result.dtype}")


def some(mask: Tensor, name: str = "mask") -> None:
    """At least one element is selected."""
    if readable(mask) and not bool(mask.any()):
        raise ValueError(f"{name} must select at least one element, got none of {mask.numel()}")


def _name(tensors: dict[str, Tensor], wanted: Tensor) -> str:
    return next(name for name, tensor in tensors.items() if tensor is wanted)


def clip(x: Tensor, low: Scalar, high: Scalar) -> Tensor:
    """clamp for bounds that are numbers or tensors, mixed as they come."""
    if isinstance(low, (int, float)) and isinstance(high, (int, float)):
        return x.clamp(low, high)
    lowest, highest = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (low, high))
    return torch.minimum(torch.maximum(x, lowest), highest)
