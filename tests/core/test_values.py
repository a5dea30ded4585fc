"""Critic errors and targets: by hand, and the fits of S3 eqs 21 and 22 solved exactly."""

import numpy as np
import pytest
import torch

from tests.core.problems import problem, stochastic_episode
from upslope.core import returns, values
from upslope.exact import policy_gradient as exact

NAN = float("nan")


def doubles(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def slope(f, x):
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(leaf).sum(), leaf)
    return gradient.tolist()


def test_squared_error_has_no_half():
    v, target = doubles(1.0, 5.0), doubles(3.0, 2.0)
    assert values.squared_error(v, target).tolist() == [4.0, 9.0]
    assert slope(lambda x: values.squared_error(x, target), v) == [-4.0, 6.0]


@pytest.mark.parametrize("threshold", [1.0, 2.5])
def test_huber(threshold):
    e = doubles(-4.0, -threshold, -0.5, 0.0, 0.3, threshold, 7.0)
    wanted = np.where(np.abs(e) <= threshold, e**2 / 2, threshold * (np.abs(e) - threshold / 2))
    np.testing.assert_allclose(values.huber(e, 0 * e, threshold), wanted)
    np.testing.assert_allclose(values.huber(0 * e, e, threshold), wanted)
    assert slope(lambda x: values.huber(x, 0 * e, threshold), e) == pytest.approx(
        e.clamp(-threshold, threshold).tolist()
    )
    assert values.huber(doubles(3.0), doubles(0.0)).item() == 2.5
    assert values.huber(doubles(3.0), doubles(2.5)).item() == 0.125


@pytest.mark.parametrize(
    ("v", "target", "error", "gradient"),
    [
        (0.3, 5.0, 4.7**2, -9.4),  # within the clip
        (2.0, 5.0, 4.5**2, 0.0),  # gone towards the target by more than the clip: no further gain
        (-2.0, 5.0, 7.0**2, -14.0),  # gone away: the full pull back
        (2.0, -5.0, 7.0**2, 14.0),
        (-2.0, -5.0, 4.5**2, 0.0),
    ],
)
def test_clipped_squared_error(v, target, error, gradient):
    v, old, target = doubles(v), doubles(0.0), doubles(target)
    assert values.clipped_squared_error(v, old, target, 0.5).item() == pytest.approx(error)
    assert slope(lambda x: values.clipped_squared_error(x, old, target, 0.5), v) == pytest.approx([gradient])
    shifted = values.clipped_squared_error(v + 3, old + 3, target + 3, torch.tensor(0.5, dtype=torch.float64))
    assert shifted.item() == pytest.approx(error)


def test_proximal():
    phi, anchor = doubles(1.0, -2.0), doubles(0.0, 1.0)
    assert values.proximal(phi, anchor, 0.5).item() == 5.0
    assert slope(lambda x: values.proximal(x, anchor, 0.5), phi) == [1.0, -3.0]
    assert not values.proximal(phi, anchor.requires_grad_(), 0.5).requires_grad


def test_targets_by_hand():
    r, d = doubles(1.0, 2.0), doubles(0.5, 0.0)
    beyond = doubles(8.0, NAN)
    q = torch.tensor([[2.0, 4.0, 3.0], [NAN, NAN, NAN]], dtype=torch.float64)
    judge = torch.tensor([[9.0, 6.0, 7.0], [NAN, NAN, NAN]], dtype=torch.float64)
    probs = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], dtype=torch.float64)
    assert values.td_target(r, beyond, d).tolist() == [5.0, 2.0]
    assert values.q_target(r, q, d).tolist() == [3.0, 2.0]
    assert values.double_q_target(r, q, judge, d).tolist() == [4.0, 2.0]
    assert values.expected_target(r, q, probs, d).tolist() == [1 + 0.5 * 2.75, 2.0]
    logp = doubles(-1.5, NAN)
    assert values.soft_target(r, q[:, 0], judge[:, 0], logp, 0.2, d).tolist() == pytest.approx([1 + 0.5 * 2.3, 2.0])
    assert values.soft_target(r, judge[:, 0], q[:, 0], logp, 0.2, d).tolist() == pytest.approx([1 + 0.5 * 2.3, 2.0])
    soft = 0.7 * np.log(np.exp(np.array([2.0, 4.0, 3.0]) / 0.7).sum())
    assert values.soft_q_target(r, q, 0.7, d).tolist() == pytest.approx([1 + 0.5 * soft, 2.0])


def test_targets_are_frozen():
    r, d = doubles(1.0), doubles(0.5)
    live = torch.tensor([[2.0, 4.0]], dtype=torch.float64, requires_grad=True)
    one, p = live[:, 0], torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    frozen = (
        values.td_target(r, one, d),
        values.q_target(r, live, d),
        values.double_q_target(r, live, live, d),
        values.expected_target(r, live, p, d),
        values.soft_target(r, one, one, one, 0.1, d),
        values.soft_q_target(r, live, 0.1, d),
        values.polyak(doubles(0.0), one, 0.5),
    )
    assert not any(x.requires_grad for x in frozen)


def test_soft_values():
    q1, q2, logp = doubles(3.0), doubles(2.0), doubles(-1.0)
    assert values.soft_value(q1, q2, logp, 0.5).item() == values.soft_value(q2, q1, logp, 0.5).item() == 2.5
    assert slope(lambda x: values.soft_value(x, q1 + 1, logp, 0.5), q1) == [1.0]  # SAC's actor loss needs it live
    q = torch.tensor([[1.0, 3.0, -2.0]], dtype=torch.float64)
    assert values.softmax_value(q, 0).item() == 3.0
    assert values.softmax_value(torch.cat([q, q - 1]), 0).tolist() == [3.0, 2.0]
    assert values.softmax_value(q, 1e-3).item() == pytest.approx(3.0, abs=1e-9)
    probs = (q / 0.8).softmax(-1)
    by_definition = (probs * (q - 0.8 * probs.log())).sum()  # E[Q] + alpha H of the policy exp(Q/alpha)/Z
    assert values.softmax_value(q, 0.8).item() == pytest.approx(by_definition.item())
    assert values.softmax_value(q, torch.tensor(0.8, dtype=torch.float64)).item() == pytest.approx(by_definition.item())


def test_action_value_dueling_polyak():
    q = torch.arange(6.0).view(2, 3)
    assert values.action_value(q, torch.tensor([2, 0])).tolist() == [2.0, 3.0]
    dueled = values.dueling(torch.tensor([10.0, 20.0]), q)
    assert dueled.tolist() == [[9.0, 10.0, 11.0], [19.0, 20.0, 21.0]]
    old, new = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    assert values.polyak(old, new, 0.25).tolist() == [1.5, 3.0]
    assert values.polyak(old, new, 0).tolist() == old.tolist()
    assert values.polyak(old, new, 1).tolist() == new.tolist()


def critic_problem():
    """Stationary: the endless version of the stochastic episode, so that V is one number per state."""
    return problem(stochastic_episode().replace(horizon=None), steps=4)


def test_monte_carlo_fit_is_the_value():
    """S3 eq 22 in expectation: the least-squares table is E[G | s] = V(s); here returns are bootstrapped with V."""
    p = critic_problem()
    target = returns.return_to_go(p.data.rewards, p.next_values, p.discounts, p.continues)
    table = torch.zeros(4, dtype=torch.float64)

    def loss(phi):
        error = values.squared_error(phi[p.data.states[:, :-1]], target).masked_fill(~p.data.valid, 0.0)
        return p.probabilities @ error.sum(-1)

    true = exact.evaluate(p.mdp, p.policy(p.theta).exp()).values
    assert torch.func.grad(loss)(true).abs().max() < 1e-10
    assert torch.func.grad(loss)(table).abs().max() > 0.1


def test_td_fit_iterates_to_the_value_and_kappa_slows_it():
    """S3 eq 21 with its target frozen at phi_i, solved exactly each time; kappa keeps each fit near the last."""
    p = critic_problem()
    true = exact.evaluate(p.mdp, p.policy(p.theta).exp()).values
    here, there = p.data.states[:, :-1], p.data.states[:, 1:]
    distance = {}
    for kappa in (0.0, 0.5):
        phi = torch.zeros(4, dtype=torch.float64)
        for _ in range(60):
            frozen = phi.clone()

            def loss(x, frozen=frozen, kappa=kappa):
                target = values.td_target(p.data.rewards, frozen[there], p.discounts)
                error = values.squared_error(x[here], target).masked_fill(~p.data.valid, 0.0)
                return p.probabilities @ error.sum(-1) + values.proximal(x, frozen, kappa)

            # A quadratic: one Newton step is the argmin (states that are never left keep their zero).
            hessian = torch.func.hessian(loss)(phi) + 1e-12 * torch.eye(4, dtype=torch.float64)
            phi = phi - torch.linalg.solve(hessian, torch.func.grad(loss)(phi))
            distance.setdefault(kappa, []).append((phi - true)[:3].abs().max().item())
    assert distance[0.0][-1] < 1e-4
    assert all(a > b for a, b in zip(distance[0.5][:20], distance[0.0][:20], strict=True))


def test_the_maximum_of_errors_is_too_high_and_two_tables_are_not():
    """Q* = 0, estimates with independent errors +-1: max has mean 1/2 for two arms, the double estimator 0."""
    noise = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)
    zero, one = torch.zeros(16), torch.ones(16)
    single = values.q_target(zero, noise[:, :2], one).mean()
    double = values.double_q_target(zero, noise[:, :2], noise[:, 2:], one).mean()
    assert single.item() == 0.5
    assert double.item() == 0.0
