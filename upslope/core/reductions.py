"""Reductions: from per-element quantities to one number. The only place where elements are averaged.

Elements outside the mask are ignored and may be NaN. `total` makes a reduction invariant to how a batch is split: give
every micro-batch and rank the count of the *whole* batch, and the parts' results and gradients add up to the whole's
(sum over micro-batches; over ranks sum, or multiply by the number of ranks where the framework averages gradients).
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from upslope.core import _checks as check

Count = float | int | Int64[Tensor, ""] | Float[Tensor, ""]


def token_mean(
    x: Float[Tensor, "*batch"], mask: Bool[Tensor, "*batch"] | None = None, total: Count | None = None
) -> Float[Tensor, ""]:
    """Mean over all elements that count: sum(x mask) / sum(mask), or / `total`. Every token weighs the same (DAPO).

    Source: Yu et al. 2025 (arXiv:2503.14476) eq 12; without a mask the plain mean of S2 eq 12. Units: those of x.
    Raises: ValueError on a mask of another shape or not boolean, an empty mask without `total`, total <= 0, NaN.

    >>> token_mean(torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[True, True], [True, False]]))
    tensor(3.)
    """
    check.floats(0, x=x)
    if total is None:
        count = _count(x, mask)
        # One operation where one will do: this ends every gradient step.
        reduced = x.mean() if mask is None else _kept(x, mask).sum() / count
    else:
        check.positive(total=total)
        reduced = _kept(x, mask).sum() / total
    check.finite(reduced, x=x)
    return reduced


def sequence_mean(
    x: Float[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"] | None = None, total: Count | None = None
) -> Float[Tensor, ""]:
    """Mean over sequences of each sequence's token mean: (1/G) sum_i (1/|o_i|) sum_t x_it.

    `total` is the number of sequences of the whole batch. A sequence without tokens contributes nothing, and without
    `total` is not counted.

    Source: S4 eqs 3.9, A.10; Shao et al. 2024 (arXiv:2402.03300) eq 3. Units: those of x. Raises: as `token_mean`.

    >>> sequence_mean(torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[True, True], [True, False]]))
    tensor(3.7500)
    """
    check.floats(x=x)
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    kept = _kept(x, mask)
    lengths = mask.sum(-1)
    if total is None:
        check.some(mask)
        total = (lengths > 0).sum()
    else:
        check.positive(total=total)
    reduced = (kept.sum(-1) / lengths.clamp(min=1)).sum() / total
    check.finite(reduced, x=x)
    return reduced


def fixed_length_mean(
    x: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"] | None,
    length: int,
    total: Count | None = None,
) -> Float[Tensor, ""]:
    """Sum over tokens / (number of sequences * length), length a constant: no length bias (Dr. GRPO).

    `length` is the generation limit, the same for every batch; `total` the number of sequences of the whole batch.

    Source: Liu et al. 2025 (arXiv:2503.20783) 3.2. Units: those of x.
    Raises: ValueError if length < 1, on a mask of another shape or empty without `total`, total <= 0, NaN.

    >>> fixed_length_mean(torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[True, True], [True, False]]), 3)
    tensor(1.5000)
    """
    check.floats(x=x)
    check.count(length=length)
    if total is None:
        _count(x, mask)
        total = x[..., 0].numel()
    else:
        check.positive(total=total)
    reduced = _kept(x, mask).sum() / (total * length)
    check.finite(reduced, x=x)
    return reduced


def _kept(x: Float[Tensor, "*batch"], mask: Bool[Tensor, "*batch"] | None) -> Float[Tensor, "*batch"]:
    if mask is None:
        return x
    check.boolean(x.shape, mask=mask)
    return x.masked_fill(~mask, 0.0)


def _count(x: Float[Tensor, "*batch"], mask: Bool[Tensor, "*batch"] | None) -> Count:
    if mask is None:
        if x.numel() == 0:
            raise ValueError(f"x must have at least one element, got shape {list(x.shape)}")
        return x.numel()
    check.some(mask)
    return mask.sum()
