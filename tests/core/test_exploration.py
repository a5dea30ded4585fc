"""Schedules and noise, by hand and in distribution."""

import math

import numpy as np
import pytest
import torch

from upslope.core import exploration


def test_schedules():
    assert [exploration.linear_schedule(t, 1.0, 0.2, 4) for t in (0, 1, 4, 9)] == pytest.approx([1.0, 0.8, 0.2, 0.2])
    found = [exploration.exponential_schedule(t, 1.0, 0.01, 2) for t in (0, 1, 2, 5)]
    assert found == pytest.approx([1.0, 0.1, 0.01, 0.01])
    assert exploration.exponential_schedule(1, 4.0, 0.25, 2) == pytest.approx(1.0)
    assert exploration.exponential_schedule(1, 4.0, 0.25, 1) == exploration.linear_schedule(1, 4.0, 0.25, 1) == 0.25
    step = torch.tensor(1)
    assert exploration.linear_schedule(step, 1.0, 0.2, 4).item() == pytest.approx(0.8)
    assert exploration.exponential_schedule(torch.tensor(7.0), 1.0, 0.01, 2).item() == pytest.approx(0.01)
    assert exploration.linear_schedule(0.5, 3e-4, 0.0, 1) == pytest.approx(1.5e-4)


def test_robbins_monro():
    assert [exploration.robbins_monro(t) for t in range(3)] == pytest.approx([1.0, 1 / 2, 1 / 3])
    assert exploration.robbins_monro(6, scale=2.0, offset=10.0, power=0.75) == pytest.approx(2 / 16**0.75)
    assert exploration.robbins_monro(torch.tensor(3.0)).item() == 0.25
    # Partial sums: of the steps beyond any bound, of the squares below one.
    t = np.arange(1_000_000)
    steps = exploration.robbins_monro(0, power=1.0) / (1 + t)
    assert steps.sum() > 14
    assert (steps**2).sum() < math.pi**2 / 6


def test_epsilon_greedy():
    q = torch.tensor([[0.0, 2.0, 1.0]] * 3 + [[0.0, -1.0, 5.0]])
    uniform = torch.tensor([0.0, 0.299, 0.3, 0.9])
    drawn = torch.tensor([2, 0, 2, 0])
    assert exploration.epsilon_greedy(q, 0.3, uniform, drawn).tolist() == [2, 0, 1, 2]
    assert exploration.epsilon_greedy(q, 0, uniform, drawn).tolist() == [1, 1, 1, 2]
    assert exploration.epsilon_greedy(q, 1, uniform, drawn).tolist() == drawn.tolist()
    assert exploration.epsilon_greedy(q, torch.tensor(0.3), uniform, drawn).tolist() == [2, 0, 1, 2]


def test_noisy_linear():
    x = torch.tensor([[1.0, 2.0]])
    w, sw, ew = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 0.1]]), torch.tensor([[2.0, -10.0]])
    b, sb, eb = torch.tensor([1.0]), torch.tensor([0.2]), torch.tensor([5.0])
    # (1 + 0.5 * 2) * 1 + (3 - 1) * 2 + 1 + 1
    assert exploration.noisy_linear(x, w, sw, b, sb, ew, eb).item() == pytest.approx(8.0)
    quiet = exploration.noisy_linear(x, w, sw, b, sb, 0 * ew, 0 * eb)
    assert quiet.item() == 8.0  # w x + b


def test_noisy_linear_learns_its_scales():
    """d/d sigma_w = eps_w x: the scale's gradient is the noise times the input."""
    scale = torch.zeros(1, 2, requires_grad=True)
    noise, one = torch.tensor([[0.3, -0.7]]), torch.ones(1)
    y = exploration.noisy_linear(torch.tensor([2.0, 5.0]), torch.zeros(1, 2), scale, one, one, noise, one)
    y.sum().backward()
    assert scale.grad.tolist() == [pytest.approx([0.6, -3.5])]


def test_factorised_noise():
    inputs, outputs = torch.tensor([4.0, -1.0]), torch.tensor([9.0, -0.25, 0.0])
    weights, bias = exploration.factorised_noise(inputs, outputs)
    assert bias.tolist() == [3.0, -0.5, 0.0]
    assert weights.tolist() == [[6.0, -3.0], [-1.0, 0.5], [0.0, 0.0]]
    # E f(x)^2 = E|x|, so a weight's noise has variance E|x|^2 = 2/pi, and zero mean.
    generator = torch.manual_seed(0)
    weights, _ = exploration.factorised_noise(
        torch.randn(700, generator=generator), torch.randn(700, generator=generator)
    )
    assert weights.mean().abs() < 0.05
    assert weights.square().mean().item() == pytest.approx(2 / math.pi, rel=0.1)


def test_ornstein_uhlenbeck():
    """From 0, x_k has mean 0 and variance s² Σ_{j<k} c^2j with c = 1 - pull dt; neighbours correlate by c."""
    pull, std, dt, k = 0.5, 0.3, 0.1, 120
    noise = torch.randn(k, 20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, path = torch.zeros(20_000, 1, dtype=torch.float64), []
    for step in noise:
        x = exploration.ornstein_uhlenbeck(x, step, pull, std, dt)
        path.append(x)
    c = 1 - pull * dt
    variance = std**2 * dt * sum(c ** (2 * j) for j in range(k))
    assert x.var().item() == pytest.approx(variance, rel=0.05)
    assert x.mean().item() == pytest.approx(0.0, abs=5 * math.sqrt(variance / 20_000))
    assert (path[-1] * path[-2]).mean().item() / variance == pytest.approx(c, abs=0.05)
