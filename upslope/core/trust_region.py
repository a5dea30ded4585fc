"""Trust regions: how far a step may go (S0 2.4, S3 7.5.2, S4 2.4.2; Schulman et al. 2015, arXiv:1502.05477).

The constraint is on KL[pi_old, pi] (S3 7.5.2 prints the other direction; to second order they agree). theta is one
vector. A step is a gradient (to maximise) through the inverse Fisher matrix, scaled to the region, then shortened until
the true KL and the true improvement agree. What must remember is a NamedTuple with a pure update.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.core import _checks as check

Vector = Float[Tensor, " d"]
Product = Callable[[Vector], Vector]


def fisher_operator(
    outputs: Callable[[Vector], Any],
    kl: Callable[..., Float[Tensor, ""]],
    theta: Vector,
    damping: float = 0.0,
) -> Product:
    """v -> (F + damping I) v at theta, with F = J^T H J: no matrix, no second derivative through the network.

    `outputs(theta)` are the parameters of the policy's distributions (logits, or mean and log std) on the batch, one
    tensor or a tree of them, such as the distribution itself;
    `kl(old, new)` the mean KL[old, new] of two such outputs. H is its Hessian at new = old, J the outputs' Jacobian.
    F is exactly the Hessian of theta' -> kl(outputs(theta), outputs(theta')) at theta, as the KL's gradient is 0 there.

    Source: TRPO appendix C; S0 2.4.2; Pascanu & Bengio 2014. Units: nats per squared parameter.
    Raises: ValueError on negative damping or a vector that has not theta's shape.

    >>> def kl(old, new):  # of unit-variance normals
    ...     return (new - old).square().mean() / 2
    >>> product = fisher_operator(lambda theta: 3 * theta, kl, torch.zeros(1))
    >>> product(torch.ones(1))
    tensor([9.])
    """
    check.floats(theta=theta)
    check.within(0, math.inf, damping=damping)
    flatten, unflatten = torch.utils._pytree.tree_flatten, torch.utils._pytree.tree_unflatten
    with torch.enable_grad():  # the graphs are built once; a product only runs backwards through them
        leaf = theta.detach().requires_grad_()
        parts, form = flatten(outputs(leaf))
        old, new = [part.detach() for part in parts], [part.detach().requires_grad_() for part in parts]
        slope = torch.autograd.grad(
            kl(unflatten(old, form), unflatten(new, form)), new, create_graph=True, allow_unused=True
        )
        bent = [i for i, pull in enumerate(slope) if pull is not None and parts[i].requires_grad]
        parts, new, slope = [parts[i] for i in bent], [new[i] for i in bent], [slope[i] for i in bent]  # type: ignore
        dual = [torch.zeros_like(part, requires_grad=True) for part in parts]
        pulled = torch.autograd.grad(parts, leaf, dual, create_graph=True)  # J^T u, linear in u

    def product(vector: Vector) -> Vector:
        check.floats(vector=vector, theta=theta)
        pushed = torch.autograd.grad(pulled, dual, vector, retain_graph=True)  # J v: its derivative towards u
        curved = torch.autograd.grad(slope, new, pushed, retain_graph=True)
        (back,) = torch.autograd.grad(parts, leaf, curved, retain_graph=True)
        return back + damping * vector

    return product


def fisher_vector_product(
    outputs: Callable[[Vector], Tensor | tuple[Tensor, ...]],
    kl: Callable[..., Float[Tensor, ""]],
    theta: Vector,
    vector: Vector,
    damping: float = 0.0,
) -> Vector:
    """(F + damping I) v, once. For several products at one theta (conjugate gradient) use `fisher_operator`.

    Source, units, raises: as `fisher_operator`.

    >>> def kl(old, new):
    ...     return (new - old).square().mean() / 2
    >>> fisher_vector_product(lambda theta: 3 * theta, kl, torch.zeros(1), torch.ones(1))
    tensor([9.])
    """
    return fisher_operator(outputs, kl, theta, damping)(vector)


def conjugate_gradient(product: Product, b: Vector, iterations: int = 10, tolerance: float = 1e-10) -> Vector:
    """Solve A x = b for a positive definite A known by its products, from x = 0; at most d + round-off iterations.

    Stops when ||A x - b|| <= tolerance ||b||. Reads values: not for inside a compiled graph.

    Source: Hestenes & Stiefel 1952; TRPO appendix C. Units: b's over A's.
    Raises: ValueError if iterations < 1, negative tolerance, NaN or infinite b, or A not positive definite.

    >>> conjugate_gradient(lambda v: torch.tensor([2.0, 4.0]) * v, torch.tensor([2.0, 8.0]))
    tensor([1., 2.])
    """
    check.floats(b=b)
    check.count(iterations=iterations)
    check.within(0, math.inf, tolerance=tolerance)
    check.finite(b, b=b)
    x, residual, direction = torch.zeros_like(b), b, b
    squared = residual.dot(residual)
    goal = tolerance**2 * squared
    for _ in range(iterations):
        if squared <= goal:
            break
        ahead = product(direction)
        curvature = direction.dot(ahead)
        if not curvature > 0:
            raise ValueError(f"the matrix must be positive definite (add damping), got curvature {curvature.item():g}")
        step = squared / curvature
        x = x + step * direction
        residual = residual - step * ahead
        before, squared = squared, residual.dot(residual)
        direction = residual + squared / before * direction
    return x


def natural_gradient(product: Product, gradient: Vector, iterations: int = 10, tolerance: float = 1e-10) -> Vector:
    """F^-1 g: the steepest ascent in KL, the same whatever the parametrisation.

    Source: Kakade 2001; S3 7.5.2. Raises: as `conjugate_gradient`.

    >>> natural_gradient(lambda v: 4 * v, torch.tensor([2.0]))
    tensor([0.5000])
    """
    return conjugate_gradient(product, gradient, iterations, tolerance)


def natural_step(product: Product, gradient: Vector, delta: float, iterations: int = 10) -> Vector:
    """TRPO's full step: x sqrt(2 delta / x^T F x), x = F^-1 g: its KL is delta to second order. Zero for g = 0.

    Source: TRPO appendix C; S0 2.4.2. delta in nats. Raises: ValueError if delta <= 0, and as `conjugate_gradient`.

    >>> natural_step(lambda v: 4 * v, torch.tensor([2.0]), delta=0.02)  # 0.5 * 4 * 0.1^2 = 0.02
    tensor([0.1000])
    """
    check.positive(delta=delta)
    x = conjugate_gradient(product, gradient, iterations)
    squared = x.dot(product(x))
    return x * (2 * delta / squared.clamp(min=torch.finfo(x.dtype).tiny)).sqrt()


def linear_quadratic_step(product: Product, gradient: Vector, beta: float, iterations: int = 10) -> Vector:
    """F^-1 g / beta: maximises the surrogate to first order minus beta KL to second, g.x - (beta/2) x^T F x.

    Its limits: beta -> 0, no penalty, moves a tabular softmax to the greedy policy: policy iteration. With ||x||^2/2 in
    place of the KL (F = I) it is g / beta: the vanilla gradient.

    Source: S3 7.5.2 and algorithm 10. beta in reward per nat. Raises: ValueError if beta <= 0, and as
    `conjugate_gradient`.

    >>> linear_quadratic_step(lambda v: 4 * v, torch.tensor([2.0]), beta=0.5)
    tensor([1.])
    """
    check.positive(beta=beta)
    return conjugate_gradient(product, gradient, iterations) / beta


class LineSearch(NamedTuple):
    """Where a line search ended: at `theta` after `backtracks` halvings, or at the start if none was `accepted`."""

    theta: Vector
    accepted: bool
    improvement: float
    kl: float
    backtracks: int


def line_search(
    evaluate: Callable[[Vector], tuple[Tensor | float, Tensor | float]],
    theta: Vector,
    step: Vector,
    expected: float | int,
    delta: float,
    shrink: float = 0.5,
    max_backtracks: int = 10,
    accept_ratio: float | int = 0.1,
) -> LineSearch:
    """Backtracking: the first of theta + shrink^j step that keeps the KL and earns its improvement.

    That is, KL <= delta, and improvement > 0 and >= accept_ratio shrink^j expected. `evaluate(theta)` gives
    (surrogate, KL[old, new]) there; `expected` is the first-order improvement g . step. NaN fails both tests. If no j
    passes, theta itself is returned: a step is never accepted beyond delta or downhill.

    Source: TRPO appendix C; S0 2.4.2. delta in nats. Raises: ValueError if delta <= 0, shrink not in (0, 1),
    accept_ratio not in [0, 1], max_backtracks < 0, expected negative or NaN, or shapes that differ.

    >>> line_search(lambda x: (x.sum(), x.square().sum()), torch.zeros(1), torch.ones(1), expected=1.0, delta=0.3).theta
    tensor([0.5000])
    """
    check.floats(theta=theta, step=step)
    check.positive(delta=delta)
    check.within(0, 1, accept_ratio=accept_ratio)
    check.within(0, math.inf, max_backtracks=max_backtracks)
    check.within(0, math.inf, expected=expected)
    if not 0 < shrink < 1:
        raise ValueError(f"shrink must be in (0, 1), got {shrink}")
    start = float(evaluate(theta)[0])
    scale = 1.0
    for backtracks in range(max_backtracks + 1):
        candidate = theta + scale * step
        surrogate, kl = (float(x) for x in evaluate(candidate))
        improvement = surrogate - start
        if kl <= delta and improvement > 0 and improvement >= accept_ratio * scale * expected:
            return LineSearch(candidate, True, improvement, kl, backtracks)
        scale *= shrink
    return LineSearch(theta, False, 0.0, 0.0, max_backtracks)


class AdaptiveKL(NamedTuple):
    """A penalty coefficient that follows its KL target; thresholds are multiples of the target, both strict."""

    coef: float
    target: float
    high: float
    low: float
    factor_up: float
    factor_down: float


def modular_rl(target: float, coef: float = 1.0) -> AdaptiveKL:
    """joschu/modular_rl: above 1.3 targets coef x 1.5, below 0.7 coef / 1.5.

    >>> modular_rl(target=0.01).high
    1.3
    """
    return _adaptive(AdaptiveKL(coef, target, 1.3, 0.7, 1.5, 1.5))


def ppo_paper(target: float, coef: float = 1.0) -> AdaptiveKL:
    """PPO paper, section 4 (arXiv:1707.06347): above 1.5 targets coef x 2, below target / 1.5 coef / 2.

    >>> ppo_paper(target=0.01).factor_up
    2.0
    """
    return _adaptive(AdaptiveKL(coef, target, 1.5, 1 / 1.5, 2.0, 2.0))


def lecture(target: float, coef: float = 1.0) -> AdaptiveKL:
    """S3 algorithm 10, with the thresholds that it leaves out: above 1.5 targets x 1.5, below target / 1.5, / 1.5.

    >>> lecture(target=0.01).factor_down
    1.5
    """
    return _adaptive(AdaptiveKL(coef, target, 1.5, 1 / 1.5, 1.5, 1.5))


def adapt(state: AdaptiveKL, kl: float | Tensor) -> AdaptiveKL:
    """After an update: coef x factor_up if KL > high * target, / factor_down if KL < low * target, else as it was.

    `kl` is KL[pi_old, pi_new], measured after the update; at a threshold exactly nothing changes.

    Source: PPO paper eq 8 and below; S3 algorithm 10; S4 2.4.2. kl in nats.
    Raises: ValueError if kl is negative, NaN or infinite.

    >>> adapt(ppo_paper(target=0.01), kl=0.016).coef
    2.0
    """
    kl = float(kl)
    check.within(0, math.inf, kl=kl)
    coef = state.coef
    if kl > state.high * state.target:
        coef *= state.factor_up
    elif kl < state.low * state.target:
        coef /= state.factor_down
    return state._replace(coef=coef)


class ProportionalKL(NamedTuple):
    """Ziegler's controller: the coefficient moves in proportion to the relative error, over a horizon in samples."""

    coef: float
    target: float
    horizon: float
    limit: float = 0.2


def adapt_proportionally(state: ProportionalKL, kl: float | Tensor, samples: int) -> ProportionalKL:
    """coef x (1 + clip(KL / target - 1, -limit, limit) samples / horizon), on KL[pi_theta, pi_ref] of completions.

    Source: Ziegler et al. 2019 (arXiv:1909.08593) 2.2. kl in nats per completion (an estimate: may be negative),
    horizon and samples in completions. Raises: ValueError if coef, target, horizon or limit is not positive, samples
    negative, kl NaN or infinite.

    >>> adapt_proportionally(ProportionalKL(coef=1.0, target=6.0, horizon=100), kl=12.0, samples=50).coef
    1.1
    """
    check.positive(coef=state.coef, target=state.target, horizon=state.horizon, limit=state.limit)
    check.within(0, math.inf, samples=samples)
    kl = float(kl)
    if not math.isfinite(kl):
        raise ValueError(f"kl must be finite, got {kl}")
    error = min(max(kl / state.target - 1, -state.limit), state.limit)
    return state._replace(coef=state.coef * (1 + error * samples / state.horizon))


def _adaptive(state: AdaptiveKL) -> AdaptiveKL:
    check.positive(coef=state.coef, target=state.target)
    return state
