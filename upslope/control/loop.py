"""A loop that runs as it stands, and is one operation of a compiled program: its body is compiled once."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Carry = TypeVar("Carry")


def loop(
    step: Callable[[Carry, Any], tuple[Carry, tuple[Any, ...]] | None], carry: Carry, inputs: Any
) -> tuple[Carry, tuple[Tensor, ...]]:
    """`carry, outs = step(carry, input)` for each input; the last carry, and each out of all steps stacked.

    Inside a compiled program the step sees copies, so that it may write in place as it may outside. Outside it may
    return None: the loop is over, and what this step did does not count.

    >>> loop(lambda total, x: (total + x, (total * x,)), torch.tensor(0), torch.tensor([1, 2, 3]))
    (tensor(6), (tensor([0, 2, 9]),))

    Args:
        step: of the loop.
        carry: what it begins with; its shapes and types stay.
        inputs: tensors, or a tuple of them, that are gone through along the first axis; outside also a list of any.
    """
    if torch.compiler.is_compiling():
        return _scan(step, carry, inputs)
    rows = []
    for given in inputs if isinstance(inputs, list) else _each(inputs):
        done = step(carry, given)
        if done is None:
            break
        carry, outs = done
        rows.append([torch.as_tensor(out) for out in outs])
    return carry, tuple(torch.stack(column) for column in zip(*rows, strict=True))


def _each(inputs: Any) -> Iterator[Any]:
    leaves, tree = pytree.tree_flatten(inputs)
    return (pytree.tree_unflatten(list(parts), tree) for parts in zip(*leaves, strict=True))


def _scan(step: Callable[[Carry, Any], Any], carry: Carry, inputs: Any) -> tuple[Carry, tuple[Tensor, ...]]:
    from torch._higher_order_ops.scan import scan

    begun, form = pytree.tree_flatten(carry)
    given, shape = pytree.tree_flatten(inputs)

    def body(now: list[Tensor], parts: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        copies = [part.clone() for part in now]
        after, outs = step(pytree.tree_unflatten(copies, form), pytree.tree_unflatten(list(parts), shape))
        # One more, for Inductor computes a scan without any wrongly within another, and not at all alone.
        return pytree.tree_leaves(after), [*(out.clone() for out in outs), torch.zeros(())]

    last, rows = scan(body, begun, given)
    return pytree.tree_unflatten(list(last), form), tuple(rows[:-1])
