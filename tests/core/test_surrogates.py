"""Surrogates: value and gradient by hand, case by case of the sign of psi and the side of the clip."""

import math

import numpy as np
import pytest
import torch

from upslope.core import surrogates


def value_and_slope(f, rho, *given):
    """Value, and slope in log pi, at ratio rho with pi_old = 1."""
    logp = torch.tensor(rho, dtype=torch.float64).log().requires_grad_()
    value = f(logp, torch.zeros_like(logp), *given)
    (slope,) = torch.autograd.grad(value.sum(), logp)
    return value.detach(), slope


# rho, psi -> value and slope d/dlog pi, for clip_low 0.2 and clip_high 0.3
CLIP = [
    (1.5, 2.0, 2.6, 0.0),  # good action, already above: no further gain
    (1.5, -2.0, -3.0, -3.0),  # bad action, gone the wrong way: the full pull back
    (0.5, 2.0, 1.0, 1.0),  # good action, gone the wrong way: the full pull back
    (0.5, -2.0, -1.6, 0.0),  # bad action, already below: no further gain
    (1.1, 2.0, 2.2, 2.2),
    (0.9, -2.0, -1.8, -1.8),
    (1.0, 2.0, 2.0, 2.0),
    (1.25, 1.0, 1.25, 1.25),  # inside high, outside low: the two are separate
    (0.75, -1.0, -0.8, 0.0),
]


@pytest.mark.parametrize(("rho", "psi", "value", "slope"), CLIP)
def test_clipped_ratio(rho, psi, value, slope):
    weight = torch.tensor([psi], dtype=torch.float64)
    found = value_and_slope(surrogates.clipped_ratio, [rho], weight, 0.2, 0.3)
    assert (found[0].item(), found[1].item()) == pytest.approx((value, slope))
    assert surrogates.clipped(torch.tensor([rho]), weight.float(), 0.2, 0.3).item() == pytest.approx(value)
    # Bounds that are tensors, or mixed: annealed inside a compiled program.
    high = torch.tensor(0.3, dtype=torch.float64)
    for bounds in ((0.2, high), (high - 0.1, 0.3), (high - 0.1, high)):
        again = value_and_slope(surrogates.clipped_ratio, [rho], weight, *bounds)
        assert (again[0].item(), again[1].item()) == pytest.approx((value, slope))


def test_clips_keep_float64():
    rho, psi = torch.tensor([3.0, 0.1], dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert surrogates.clipped(rho, psi, 0.2, 0.28).tolist() == [1.28, -0.8]
    assert surrogates.clipped(torch.ones(1), torch.zeros(1)).tolist() == [0.0]


def test_default_clips_are_the_papers():
    rho, psi = torch.tensor([1.5, 0.5]), torch.tensor([1.0, -1.0])
    for f in (surrogates.clipped_ratio, surrogates.dual_clip):
        assert f(rho.log(), torch.zeros(2), psi).tolist() == pytest.approx([1.2, -0.8])
    assert surrogates.clipped(rho, psi).tolist() == pytest.approx([1.2, -0.8])
    assert surrogates.decoupled(rho.log(), torch.zeros(2), torch.zeros(2), psi).tolist() == pytest.approx([1.2, -0.8])


def test_log_prob_and_ratio():
    psi = torch.tensor([2.0, -3.0], dtype=torch.float64)
    value, slope = value_and_slope(surrogates.ratio, [0.5, 4.0], psi)
    assert value.tolist() == slope.tolist() == [1.0, -12.0]
    logp = torch.tensor([-1.0, -0.5], dtype=torch.float64, requires_grad=True)
    surrogate = surrogates.log_prob(logp, psi)
    surrogate.sum().backward()
    assert surrogate.tolist() == [-2.0, 1.5]
    assert logp.grad.tolist() == [2.0, -3.0]


@pytest.mark.parametrize(
    ("rho", "psi", "value", "slope"),
    [
        (8.0, -1.0, -3.0, 0.0),
        (2.0, -1.0, -2.0, -2.0),
        (8.0, 1.0, 1.3, 0.0),
        (0.5, -1.0, -0.8, 0.0),
        (2.0, 0.0, 0.0, 0.0),
    ],
)
def test_dual_clip(rho, psi, value, slope):
    found = value_and_slope(surrogates.dual_clip, [rho], torch.tensor([psi], dtype=torch.float64), 0.2, 0.3, 3.0)
    assert (found[0].item(), found[1].item()) == pytest.approx((value, slope))


@pytest.mark.parametrize(("rho", "weight"), [(5.0, 1.3), (0.1, 0.8), (1.1, 1.1)])
def test_cispo_keeps_every_gradient_and_clips_its_weight(rho, weight):
    for psi in (2.0, -2.0):
        value, slope = value_and_slope(surrogates.cispo, [rho], torch.tensor([psi], dtype=torch.float64), 0.2, 0.3)
        assert slope.item() == pytest.approx(weight * psi)
        assert value.item() == pytest.approx(weight * psi * math.log(rho))


def test_cispo_has_no_lower_bound_by_default():
    _, slope = value_and_slope(surrogates.cispo, [1e-3, 9.0], torch.ones(2, dtype=torch.float64))
    assert slope.tolist() == pytest.approx([1e-3, 1.2])


def test_decoupled():
    """pi_old / pi_behavior is a weight, capped, without gradient; the clip is around pi_old."""
    logp = torch.tensor([1.5, 1.5, 1.1], dtype=torch.float64).log().requires_grad_()
    old = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    behavior = torch.tensor([0.8, 0.1, 1.6], dtype=torch.float64).log()
    psi = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    found = surrogates.decoupled(logp, old, behavior, psi, 0.2, 0.2, cap=4.0)
    assert found.tolist() == pytest.approx([1.2 / 0.8, -1.5 * 4.0, 1.1 / 1.6])
    (slope,) = torch.autograd.grad(found.sum(), logp)
    assert slope.tolist() == pytest.approx([0.0, -6.0, 1.1 / 1.6])
    old = torch.zeros(3, dtype=torch.float64)
    uneven = surrogates.decoupled(torch.tensor([9.0, 0.1, 1.0]).log().double(), old, old, psi, 0.1, 0.3)
    assert uneven.tolist() == pytest.approx([1.3, -0.9, 1.0])
    same = surrogates.decoupled(logp, old, old, psi)
    torch.testing.assert_close(same, surrogates.clipped_ratio(logp, old, psi))
    assert surrogates.decoupled(old, old, old - 5, psi).tolist() == pytest.approx([2.0, -2.0, 2.0])  # the cap's default


def test_sequence_ratio():
    logp = torch.tensor([[0.2, 0.3, 9.0], [-0.5, 0.1, 0.1]], dtype=torch.float64)
    old = torch.zeros_like(logp)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    np.testing.assert_allclose(surrogates.sequence_ratio(logp, old, mask), np.exp([0.5, -0.3]))
    np.testing.assert_allclose(surrogates.sequence_ratio(logp, old, mask, True), np.exp([0.25, -0.1]))
    np.testing.assert_allclose(surrogates.sequence_ratio(logp[1:], old[1:], None, True), np.exp([-0.1]))
    nothing = torch.zeros_like(mask)
    assert surrogates.sequence_ratio(logp, old, nothing, True).tolist() == [1.0, 1.0]
    one = torch.tensor([[True, False, False], [False, True, False]])
    np.testing.assert_allclose(surrogates.sequence_ratio(logp, old, one, True), np.exp([0.2, 0.1]))
    swapped = surrogates.sequence_ratio(old, logp, mask)
    np.testing.assert_allclose(swapped, np.exp([-0.5, 0.3]))


def test_sequence_ratio_does_not_overflow_and_stops_its_gradient_at_the_clamp():
    logp = torch.tensor([[300.0, 300.0], [-300.0, -300.0], [0.1, 0.1]], requires_grad=True)
    found = surrogates.sequence_ratio(logp, torch.zeros(3, 2))
    np.testing.assert_allclose(found.detach(), np.exp([20.0, -20.0, 0.2]), rtol=1e-5)
    found.sum().backward()
    assert logp.grad[:2].abs().max() == 0
    assert logp.grad[2].tolist() == pytest.approx([math.exp(0.2)] * 2)
    tight = surrogates.sequence_ratio(logp, torch.zeros(3, 2), log_clamp=0.05)
    np.testing.assert_allclose(tight.detach(), np.exp([0.05, -0.05, 0.05]), rtol=1e-5)


def test_penalty_and_bonus():
    surrogate, x = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0])
    assert surrogates.kl_penalised(surrogate, x, 0.2).tolist() == pytest.approx([0.9, 2.2])
    assert surrogates.entropy_bonus(surrogate, x, 0.2).tolist() == pytest.approx([1.1, 1.8])
    assert surrogates.kl_penalised(surrogate, x, 0).tolist() == surrogate.tolist()


def test_clip_fraction():
    rho = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.29, 1.31])
    logp = rho.log().requires_grad_()
    found = surrogates.clip_fraction(logp, torch.zeros(6), 0.2, 0.3)
    assert found.item() == pytest.approx(3 / 6)
    assert not found.requires_grad
    mask = torch.tensor([True, False, True, True, False, False])
    assert surrogates.clip_fraction(logp, torch.zeros(6), 0.2, 0.3, mask).item() == pytest.approx(1 / 3)
    assert surrogates.clip_fraction(torch.zeros(6), logp, 0.2, 0.3).item() == pytest.approx(3 / 6)  # 1/rho
    assert surrogates.clip_fraction(logp, logp.detach() + 0.01, 0.2, 0.3).item() == 0.0
    assert surrogates.clip_fraction(torch.zeros(2), torch.zeros(2), 0.0, 0.0).item() == 0.0  # the bound is inside
