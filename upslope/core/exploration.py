"""Exploration schedules and noise (S3 5.1, 5.2, 6.2.3, 6.2.4.4). Random numbers come in as drawn noise."""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from upslope.core import _checks as check
from upslope.core._checks import Scalar

Step = int | float | Int64[Tensor, ""] | Float[Tensor, ""]


def linear_schedule(step: Step, start: float, end: float, duration: int) -> float | Tensor:
    """Linear annealing: start + (end - start) min(1, step / duration). Also anneals learning rates and clips.

    Source: S3 6.2.3 (epsilon from 1 to 0.05 over 10^6 frames). Units: those of start; step and duration in steps.
    Raises: ValueError if duration < 1, a negative step, start or end not finite.

    >>> linear_schedule(250_000, start=1.0, end=0.05, duration=1_000_000)
    0.7625
    """
    check.count(duration=duration)
    check.within(-math.inf, math.inf, start=start, end=end)
    return start + (end - start) * _progress(step, duration)


def exponential_schedule(step: Step, start: float, end: float, duration: int) -> float | Tensor:
    """Exponential annealing: start (end / start)^min(1, step / duration).

    Source: S3 5.1 (epsilon "close to 1 initially and decreasing"). Raises: ValueError if start or end is not positive,
    and as `linear_schedule`.

    >>> exponential_schedule(1, start=1.0, end=0.25, duration=2)
    0.5
    """
    check.count(duration=duration)
    check.positive(start=start, end=end)
    return start * (end / start) ** _progress(step, duration)


def robbins_monro(step: Step, scale: float = 1.0, offset: float = 1.0, power: float = 1.0) -> float | Tensor:
    """Step size scale / (offset + step)^power: its sum diverges, that of its square converges for 1/2 < power <= 1.

    Source: S3 5.2; Robbins & Monro 1951. step counts from 0.
    Raises: ValueError if scale or offset is not positive, power not in (1/2, 1], a negative step.

    >>> robbins_monro(3)
    0.25
    """
    check.positive(scale=scale, offset=offset)
    if not 0.5 < power <= 1:
        raise ValueError(f"power must be in (0.5, 1] for sums to diverge and squares to converge, got {power}")
    _not_negative(step)
    return scale / (offset + step) ** power


def epsilon_greedy(
    q: Float[Tensor, "*batch actions"],
    epsilon: Scalar,
    uniform: Float[Tensor, "*batch"],
    random_actions: Int64[Tensor, "*batch"],
) -> Int64[Tensor, "*batch"]:
    """argmax_a Q(s, a), or with probability epsilon the random action. `uniform` in [0, 1) decides; noise is passed in.

    Source: S3 algorithm 5. Raises: ValueError if epsilon is not in [0, 1], on shapes that do not fit, NaN in q.

    >>> q = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    >>> epsilon_greedy(q, 0.1, torch.tensor([0.05, 0.5]), torch.tensor([0, 0]))
    tensor([0, 1])
    """
    check.beneath(q=q, uniform=uniform)
    check.within(0, 1, epsilon=epsilon)
    if random_actions.shape != uniform.shape or random_actions.dtype != torch.int64:
        raise ValueError(
            f"random_actions must be int64 of shape {list(uniform.shape)}, got {check.describe(random_actions)}"
        )
    check.finite(q, q=q)
    return torch.where(uniform < epsilon, random_actions, q.argmax(-1))


def noisy_linear(
    x: Float[Tensor, "*batch inputs"],
    weight: Float[Tensor, "outputs inputs"],
    weight_scale: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"],
    bias_scale: Float[Tensor, " outputs"],
    weight_noise: Float[Tensor, "outputs inputs"],
    bias_noise: Float[Tensor, " outputs"],
) -> Float[Tensor, "*batch outputs"]:
    """NoisyNet layer: (mu_w + sigma_w * eps_w) x + mu_b + sigma_b * eps_b; the scales are learned.

    `weight_noise` and `bias_noise` are standard normal and independent (S3), or from `factorised_noise`. Initial
    scales: 0.017 independent; 0.5 / sqrt(inputs) factorised. Zero noise is the greedy network.

    Source: S3 6.2.4.4; Fortunato et al. 2018 (arXiv:1706.10295) eq 9. Raises: ValueError on shapes that do not fit,
    NaN or infinite input.

    >>> one = torch.ones(1, 1)
    >>> noisy_linear(one, 2 * one, 0.5 * one, one[0], 0 * one[0], one, one[0])
    tensor([[3.5000]])
    """
    check.floats(weight=weight, weight_scale=weight_scale, weight_noise=weight_noise)
    check.beneath(weight=weight, bias=bias, bias_scale=bias_scale, bias_noise=bias_noise)
    check.floats(x=x)
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x must have {weight.shape[-1]} inputs, got {check.describe(x)}")
    y = torch.nn.functional.linear(x, weight + weight_scale * weight_noise, bias + bias_scale * bias_noise)
    given = {"weight": weight, "weight_scale": weight_scale, "weight_noise": weight_noise}
    check.finite(y, x=x, **given, bias=bias, bias_scale=bias_scale, bias_noise=bias_noise)
    return y


def factorised_noise(
    input_noise: Float[Tensor, " inputs"], output_noise: Float[Tensor, " outputs"]
) -> tuple[Float[Tensor, "outputs inputs"], Float[Tensor, " outputs"]]:
    """Factorised noise: eps_w = f(eps_out) f(eps_in)^T, eps_b = f(eps_out), f(x) = sgn(x) sqrt|x|.

    inputs + outputs draws instead of inputs * outputs; the weights' noises are uncorrelated but not independent.

    Source: Fortunato et al. 2018 (arXiv:1706.10295) eqs 10, 11. Raises: ValueError on NaN or infinite noise.

    >>> factorised_noise(torch.tensor([4.0]), torch.tensor([-9.0]))
    (tensor([[-6.]]), tensor([-3.]))
    """
    check.floats(input_noise=input_noise)
    check.floats(output_noise=output_noise)
    inputs, outputs = (x.sign() * x.abs().sqrt() for x in (input_noise, output_noise))
    weights = torch.outer(outputs, inputs)
    check.finite(weights, input_noise=input_noise, output_noise=output_noise)
    return weights, outputs


def ornstein_uhlenbeck(
    state: Float[Tensor, "*batch k"], noise: Float[Tensor, "*batch k"], pull: Scalar, std: Scalar, dt: Scalar
) -> Float[Tensor, "*batch k"]:
    """The next state of noise that wanders about 0: x - pull x dt + std sqrt(dt) noise, `noise` standard normal.

    Source: Uhlenbeck & Ornstein 1930, for actions Lillicrap et al. 2016 (arXiv:1509.02971) 3. Units: std in those of x
    per sqrt(time), pull per time. Raises: ValueError on shapes that differ, negative pull or std, dt not positive, NaN
    or infinite input.

    >>> ornstein_uhlenbeck(torch.tensor([2.0]), torch.tensor([1.0]), pull=0.5, std=3.0, dt=0.25)
    tensor([3.2500])
    """
    check.floats(0, state=state, noise=noise)
    check.within(0, math.inf, pull=pull, std=std)
    check.positive(dt=dt)
    after = state - pull * dt * state + std * dt**0.5 * noise
    check.finite(after, state=state, noise=noise)
    return after


def _progress(step: Step, duration: int) -> float | Tensor:
    _not_negative(step)
    return (step / duration).clamp(max=1.0) if isinstance(step, Tensor) else min(1.0, step / duration)


def _not_negative(step: Step) -> None:
    if isinstance(step, (int, float)) and not 0 <= step < math.inf:
        raise ValueError(f"step must not be negative, got {step}")
