"""K-FAC: the Fisher matrix of a layer as a Kronecker product, A x G (ACKTR; S3 7.5.2 names it, Martens & Grosse 2015).

For a layer y = W x with the bias as a last input of 1: A = E[x x^T], G = E[g g^T], g the gradient of the log-likelihood
of an action *sampled from the model* with respect to y. F^-1 grad W is then G^-1 (grad W) A^-1: two small inverses.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.core import _checks as check


class Factors(NamedTuple):
    """The two factors of one layer; the bias is the last input."""

    inputs: Float[Tensor, "inputs inputs"]
    outputs: Float[Tensor, "outputs outputs"]


def factors(x: Float[Tensor, "samples inputs"], g: Float[Tensor, "samples outputs"], bias: bool = True) -> Factors:
    """A = mean x x^T (x with a 1 appended for the bias), G = mean g g^T, g per sample (not divided by the batch size).

    Source: Martens & Grosse 2015 (arXiv:1503.05671) eq 1. Raises: ValueError if the samples differ in number, are none,
    or hold NaN or infinity.

    >>> factors(torch.tensor([[2.0]]), torch.tensor([[3.0]])).inputs
    tensor([[4., 2.],
            [2., 1.]])
    """
    check.floats(2, x=x)
    check.floats(2, g=g)
    samples = x.shape[0]
    if samples == 0 or g.shape[0] != samples:
        raise ValueError(f"x and g must have the same samples, at least one, got {len(x)} and {len(g)}")
    if bias:
        x = torch.cat([x, torch.ones_like(x[:, :1])], -1)
    a, s = x.T @ x / samples, g.T @ g / samples
    check.finite(a, x=x)
    check.finite(s, g=g)
    return Factors(a, s)


def average(old: Factors, new: Factors, decay: float) -> Factors:
    """Running average of the factors: decay old + (1 - decay) new.

    Source: Martens & Grosse 2015, section 5; ACKTR's decay is 0.99. Raises: ValueError if decay is not in [0, 1].

    >>> one = torch.ones(1, 1)
    >>> average(Factors(one, one), Factors(3 * one, 5 * one), decay=0.5).outputs
    tensor([[3.]])
    """
    check.within(0, 1, decay=decay)
    return Factors(*(torch.lerp(b, a, decay) for a, b in zip(old, new, strict=True)))


def inverses(layer: Factors, damping: float) -> Factors:
    """(A + pi sqrt(damping) I)^-1 and (G + sqrt(damping)/pi I)^-1, pi^2 = (tr A / dim A) / (tr G / dim G).

    Source: Martens & Grosse 2015, section 6.3 (factored Tikhonov). Raises: ValueError if damping <= 0.

    >>> inverses(Factors(torch.eye(1), torch.eye(1)), damping=1.0).inputs
    tensor([[0.5000]])
    """
    check.positive(damping=damping)
    a, g = layer
    tiny = torch.finfo(a.dtype).tiny
    pi = ((a.diagonal().mean() + tiny) / (g.diagonal().mean() + tiny)).sqrt()
    return Factors(*(_inverse(m, level) for m, level in ((a, pi * math.sqrt(damping)), (g, math.sqrt(damping) / pi))))


def precondition(gradient: Float[Tensor, "outputs inputs"], inverse: Factors) -> Float[Tensor, "outputs inputs"]:
    """Natural gradient of one layer: G^-1 (grad W) A^-1, the bias' gradient as the last column.

    Source: Martens & Grosse 2015 eq 3; Wu et al. 2017 (ACKTR, arXiv:1708.05144) eq 5. Raises: ValueError if the shapes
    do not fit.

    >>> precondition(torch.ones(1, 1), Factors(2 * torch.eye(1), 3 * torch.eye(1)))
    tensor([[6.]])
    """
    expected = (inverse.outputs.shape[0], inverse.inputs.shape[0])
    if gradient.shape != expected:
        raise ValueError(f"gradient must have shape {list(expected)}, got {check.describe(gradient)}")
    return inverse.outputs @ gradient @ inverse.inputs


def step_scale(squared_norm: float | Tensor, learning_rate: float, kl_clip: float) -> float:
    """ACKTR's step: min(learning_rate, sqrt(2 kl_clip / x^T F x)), x the natural gradient; its KL stays near kl_clip.

    `squared_norm` is x^T F x, which is x . gradient summed over the layers.

    Source: Wu et al. 2017 (arXiv:1708.05144) section 3.2. Raises: ValueError if learning_rate or kl_clip is not
    positive, squared_norm negative, NaN or infinite.

    >>> step_scale(8.0, learning_rate=0.25, kl_clip=0.01)
    0.05
    """
    check.positive(learning_rate=learning_rate, kl_clip=kl_clip)
    squared = float(squared_norm)
    check.within(0, math.inf, squared_norm=squared)
    return min(learning_rate, math.sqrt(2 * kl_clip / squared)) if squared > 0 else learning_rate


def _inverse(matrix: Tensor, level: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix + level * torch.eye(len(matrix)).to(matrix)))
