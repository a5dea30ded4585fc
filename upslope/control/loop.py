"""A loop that runs as it stands, and is one operation of a compiled program: its body is compiled once."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Carry = TypeVar("Carry")
Rows = TypeVar("Rows")
PART = 512  # rows


def loop(
    step: Callable[[Carry, Any], tuple[Carry, tuple[Any, ...]] | None], carry: Carry, inputs: Any
) -> tuple[Carry, tuple[Tensor, ...]]:
    """`carry, outs = step(carry, input)` for each input; the last carry, and each out of all steps stacked.

    Inside a compiled program the step sees copies, so that it may write in place as it may outside; not into what it
    gave as an out. Outside it may return None: the loop is over, and what this step did does not count. Without outs it
    is a `fold`.

    >>> loop(lambda total, x: (total + x, (total * x,)), torch.tensor(0), torch.tensor([1, 2, 3]))
    (tensor(6), (tensor([0, 2, 9]),))

    Args:
        step: of the loop.
        carry: what it begins with; its shapes and types stay.
        inputs: tensors, or a tuple of them and None, that are gone through along the first axis; outside also a list
            of any.
    """
    if torch.compiler.is_compiling():
        return _scan(step, carry, inputs)
    rows = []
    for given in inputs if isinstance(inputs, list) else _each(*_flat(inputs)):
        done = step(carry, given)
        if done is None:
            break
        carry, outs = done
        rows.append([torch.as_tensor(out) for out in outs])
    return carry, tuple(torch.stack(column) for column in zip(*rows, strict=True))


def fold(step: Callable[[Carry, Any], Carry], carry: Carry, inputs: Any) -> Carry:
    """A loop without outs: `carry = step(carry, input)` for each input; the last carry.

    Inductor computes a scan without outs wrongly within another, and not at all alone: so it has a 0 for an out.

    >>> fold(lambda total, x: total + x, torch.tensor(0), torch.tensor([1, 2, 3]))
    tensor(6)
    """
    return loop(lambda now, given: (step(now, given), (torch.zeros(()),)), carry, inputs)[0]


def in_parts(rows: Rows) -> Rows | None:
    """[B, ...] as [parts, 512, ...]: a network's layers of so many rows stay in the second-level cache.

    None where B is less than 1,024 or not a multiple of 512.

    Args:
        rows: tensors [B, ...], or None in the place of one, in tuples and dicts.
    """
    tensors, whole = _flat(rows)
    count = len(tensors[0])
    if count < 2 * PART or count % PART:
        return None
    return whole([part.unflatten(0, (-1, PART)) for part in tensors])


def by_parts(function: Callable[[Rows], tuple[Tensor, ...]], rows: Rows) -> tuple[Tensor, ...]:
    """function(rows), each row by itself: of one part after the other, where there are any.

    >>> by_parts(lambda pair: (pair[0] + pair[1],), (torch.ones(3), torch.arange(3)))
    (tensor([1., 2., 3.]),)
    """
    parts = in_parts(rows)
    if parts is None:
        return function(rows)
    outs = loop(lambda nothing, part: (nothing, tuple(function(part))), torch.zeros(()), parts)[1]
    return tuple(out.flatten(0, 1) for out in outs)


def _flat(value: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Its tensors, and what puts others in their places; None stays where it is."""
    leaves, tree = pytree.tree_flatten(value)
    present = [leaf is not None for leaf in leaves]

    def whole(tensors: Sequence[Tensor]) -> Any:
        left = iter(tensors)
        return pytree.tree_unflatten([next(left) if here else None for here in present], tree)

    return [leaf for leaf in leaves if leaf is not None], whole


def _each(tensors: list[Tensor], whole: Callable[[Sequence[Tensor]], Any]) -> Iterator[Any]:
    return (whole(parts) for parts in zip(*tensors, strict=True))


def _scan(step: Callable[[Carry, Any], Any], carry: Carry, inputs: Any) -> tuple[Carry, tuple[Tensor, ...]]:
    from torch._higher_order_ops.scan import scan

    begun, form = pytree.tree_flatten(carry)
    given, whole = _flat(inputs)

    def body(now: list[Tensor], parts: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        copies = [part.clone() for part in now]
        after, outs = step(pytree.tree_unflatten(copies, form), whole(parts))
        return pytree.tree_leaves(after), [out.clone() for out in outs]

    last, rows = scan(body, begun, given)
    return pytree.tree_unflatten(list(last), form), tuple(rows)
