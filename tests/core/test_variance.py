"""Exact variances of every Psi and baseline, by enumeration: where the documents' order holds, and where it reverses.

S4 2.2.4, A.1 and 2.3.1 and S3 7.4.2 order the estimators: causality lowers the variance, then a baseline, then Q in
place of a sampled return; the advantage is said to be least. None of these steps is a theorem. `orderly` is an MDP on
which all hold; each step has a small MDP below on which it reverses, most of them to be checked on paper.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.core.problems import Problem, bandit, problem
from upslope.core import advantages, baselines, returns
from upslope.exact import policy_gradient as exact
from upslope.exact.mdp import MDP


def two_states(to_second: list, reward: list, theta: list, gamma: float = 1.0, horizon: int = 2) -> Problem:
    """Start in state 0; `to_second[s][a]` is the chance of state 1 next."""
    there = np.array(to_second)
    mdp = MDP(np.stack([1 - there, there], -1), np.array(reward), gamma, initial=[1.0, 0.0], horizon=horizon)
    return problem(mdp, theta=torch.tensor(theta, dtype=torch.float64))


def variances(p: Problem) -> dict[str, float]:
    """Total variance of sum_t gamma^t Psi_t grad log pi for one trajectory; their means are one and the same."""
    rewards, beyond = p.data.rewards, (p.next_values, p.discounts, p.continues)
    to_go = returns.return_to_go(rewards, *beyond)
    psis = {
        "total": returns.total_return(rewards, *beyond) / p.elapsed,
        "to-go": to_go,
        "to-go minus V": advantages.baselined_return(rewards, p.values, *beyond),
        "Q": p.q,
        "advantage": advantages.advantage(p.q, p.values),
        "TD residual": advantages.td_residual(rewards, p.values, p.next_values, p.discounts),
        "GAE 0.5": advantages.gae(rewards, p.values, p.next_values, p.discounts, 0.5 * p.continues),
    }
    result = {}
    for name, psi in psis.items():
        drawn = exact.trajectory_gradients(p.data, p.policy, p.theta, p.elapsed * psi)
        mean, variance = exact.moments(p.probabilities, drawn)
        torch.testing.assert_close(mean, p.gradient, rtol=0, atol=1e-10)
        result[name] = variance.item()
    return result


ORDER = [
    ("to-go", "total"),  # causality, S4 A.1 ("almost half the variance")
    ("to-go minus V", "to-go"),  # a state's value as baseline, S3 7.4.2, S0 2.3
    ("Q", "to-go"),  # the mean of what follows in place of a sample, S4 2.2.4
    ("advantage", "Q"),  # S4 2.3.1: "the advantage has the least variance"
    ("advantage", "to-go minus V"),
    ("advantage", "TD residual"),
    ("TD residual", "to-go minus V"),  # lam = 0 below lam = 1, S4 eqs 2.16, 2.17
    ("GAE 0.5", "to-go minus V"),
    ("TD residual", "GAE 0.5"),
]


def orderly() -> Problem:
    return two_states([[0.5, 1], [0, 0.5]], [[2, 1], [0, 0]], [1, 2, 0, -1])


def refund() -> Problem:
    """Everybody gets 2 and pays 2 back: the total is 0 whatever happens, the second to-go is not."""
    return two_states([[1, 1], [0, 0]], [[2, 2], [-2, -2]], [0, 0, 0, 0])


def lopsided() -> Problem:
    """A bandit that nearly always takes arm 0, worth 1; the baseline that counts is that of the rare arm."""
    return problem(bandit([1.0, 0.0]), theta=torch.tensor([np.log(9.0), 0.0, 0.0, 0.0]))


def hedged() -> Problem:
    """A sampled return that makes up for the first action's score; its mean does not."""
    return two_states([[1, 0], [1, 0.5]], [[-2, 2], [1, 0]], [-1, 0, -1, 2])


def offset() -> Problem:
    """The chance in the second reward offsets that of the first."""
    return two_states([[1, 0], [0, 1]], [[-1, 1], [2, 2]], [-1, 0, 2, 2])


def informative_residual() -> Problem:
    """The sampled successor's value anticipates the next step's term with the other sign."""
    return two_states([[0.5, 0], [0, 0.5]], [[-2, 2], [-2, -2]], [1, 1, 2, -1])


REVERSED = {
    ("to-go", "total"): refund,
    ("to-go minus V", "to-go"): lopsided,
    ("Q", "to-go"): hedged,
    ("advantage", "Q"): lopsided,
    ("advantage", "to-go minus V"): offset,
    ("advantage", "TD residual"): informative_residual,
    ("TD residual", "to-go minus V"): offset,
    ("GAE 0.5", "to-go minus V"): offset,
    ("TD residual", "GAE 0.5"): offset,
}


@pytest.mark.parametrize(("less", "more"), ORDER)
def test_the_documents_order_holds_somewhere(less, more):
    found = variances(orderly())
    assert found[less] < 0.99 * found[more]


@pytest.mark.parametrize(("less", "more"), REVERSED)
def test_and_every_step_of_it_reverses_somewhere(less, more):
    assert set(ORDER) == set(REVERSED)
    found = variances(REVERSED[less, more]())
    assert found[less] > 1.01 * found[more] + 1e-12


def test_variances_by_hand():
    """refund: g is (+-1/2, -+1/2) at each step; to-go is 0, then -2: (-2)^2 * 1/2 = 2. Mean 0.

    lopsided, p = 0.9: ||g||^2 is 2 * 0.01 for arm 0 and 2 * 0.81 for arm 1, ||mean||^2 = 2 (0.9 * 0.1)^2 = 0.0162.
    Q: 0.9 * 0.02 * 1 - 0.0162 = 0.0018. Advantage (0.1, -0.9): 0.9 * 0.02 * 0.01 + 0.1 * 1.62 * 0.81 - 0.0162 = 0.1152.
    """
    found = variances(refund())
    assert found["total"] == pytest.approx(0, abs=1e-12)
    assert found["to-go"] == pytest.approx(2)
    found = variances(lopsided())
    assert found["Q"] == pytest.approx(0.0018)
    assert found["advantage"] == pytest.approx(0.1152)


# ---- baselines of the whole return ---------------------------------------------------------------------------------


class Score(NamedTuple):
    g: torch.Tensor  # [N, d]
    total: torch.Tensor  # [N]
    chance: torch.Tensor  # [N]

    def variance(self, b, per_parameter=False):
        drawn = self.g * (self.total.unsqueeze(-1) - b)
        mean = self.chance @ drawn
        spread = self.chance @ (drawn - mean).square()
        return spread if per_parameter else spread.sum()


def score(p: Problem) -> Score:
    ones = torch.ones_like(p.data.rewards)
    g = exact.trajectory_gradients(p.data, p.policy, p.theta, ones)
    return Score(g, exact.total_rewards(p.data, p.mdp.gamma), p.probabilities)


ALL = {f.__name__: f for f in (orderly, lopsided, hedged, offset, informative_residual)}


def minimum(s: Score, per_parameter: bool = False):
    """The library's baseline of an exact expectation: weigh each trajectory by the root of its probability."""
    root = s.chance.sqrt().unsqueeze(-1)
    return baselines.minimum_variance(s.g * root, s.total, per_parameter)


@pytest.mark.parametrize("name", ALL)
def test_minimum_variance_is_minimal_within_its_form(name):
    """No other constant is better: the variance is a parabola in b with its vertex here; per parameter likewise."""
    s = score(ALL[name]())
    b = minimum(s)
    curvature = s.chance @ s.g.square().sum(-1)
    for shift in (-1.0, -1e-3, 1e-3, 0.5):
        gained = s.variance(b + shift) - s.variance(b)
        assert gained.item() == pytest.approx((shift**2 * curvature).item(), rel=1e-6, abs=1e-12)
    each = minimum(s, per_parameter=True)
    for shift in (-0.5, 1e-3):
        rest = s.variance(each + shift, True) - s.variance(each, True)
        assert (rest >= -1e-12).all()
        assert rest.sum() > 0
    assert s.variance(each, True).sum() <= s.variance(b) + 1e-12
    mean = s.chance @ s.total
    assert s.variance(b) <= min(s.variance(mean), s.variance(0.0)) + 1e-12


def test_the_mean_baseline_can_be_worse_than_none():
    s = score(lopsided())
    assert s.variance(s.chance @ s.total) > 60 * s.variance(0.0)


def test_minimum_variance_is_not_minimal_over_all_baselines():
    """A state's value beats the best constant on one MDP and loses to it on another."""
    p = orderly()
    assert variances(p)["to-go minus V"] < score(p).variance(minimum(score(p)))
    p = lopsided()
    assert variances(p)["to-go minus V"] > score(p).variance(minimum(score(p)))


def test_minimum_variance_by_hand_and_zero_over_zero():
    scores = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    rewards = torch.tensor([10.0, 20.0])
    assert baselines.minimum_variance(scores, rewards).item() == 18.0  # (1 * 10 + 4 * 20) / 5
    torch.testing.assert_close(baselines.minimum_variance(scores, rewards, True), torch.tensor([18.0, 0.0]))
    assert baselines.minimum_variance(torch.zeros(2, 3), rewards).item() == 0.0
    assert baselines.minimum_variance(scores, rewards).shape == ()
    assert baselines.minimum_variance(scores[:, :1], rewards, True).shape == (1,)


def batches(s: Score, size: int):
    index = torch.cartesian_prod(*[torch.arange(len(s.chance))] * size)
    return index, s.chance[index].prod(-1)


def batch_gradient(s: Score, size: int, baseline) -> torch.Tensor:
    """E over batches of the mean of g_i (R_i - b(batch)), every batch enumerated."""
    index, chance = batches(s, size)
    total = torch.zeros_like(s.g[0])
    for rows, p in zip(index, chance, strict=True):
        psi = s.total[rows] - baseline(rows)
        total += p * (s.g[rows] * (psi.unsqueeze(-1) if psi.ndim == 1 else psi)).mean(0)
    return total


@pytest.mark.parametrize("size", [2, 3])
def test_own_batch_mean_scales_and_own_batch_minimum_variance_biases(size):
    p = problem(bandit([1.0, 0.0, 3.0]))
    s = score(p)
    own = batch_gradient(s, size, lambda rows: baselines.constant(s.total[rows]))
    torch.testing.assert_close(own, (1 - 1 / size) * p.gradient, rtol=0, atol=1e-12)

    fitted = batch_gradient(s, size, lambda rows: baselines.minimum_variance(s.g[rows], s.total[rows]))
    cosine = torch.nn.functional.cosine_similarity(fitted, p.gradient, dim=0)
    assert cosine < 0.9999  # no mere factor

    def past(_):  # of another, earlier batch: any number
        return baselines.moving_average(baselines.MovingAverage(), torch.tensor([5.0, -2.0]), 0.9).mean

    torch.testing.assert_close(batch_gradient(s, size, past), p.gradient, rtol=0, atol=1e-12)
    loo = batch_gradient(s, size, lambda rows: s.total[rows] - advantages.leave_one_out(s.total[rows]))
    torch.testing.assert_close(loo, p.gradient, rtol=0, atol=1e-12)


def test_own_batch_time_dependent_mean_scales_by_one_minus_one_over_n():
    p = two_states([[0.5, 1], [0, 0.5]], [[2, 1], [0, 1]], [1, 2, 0, -1], gamma=0.9)
    to_go = returns.return_to_go(p.data.rewards, p.next_values, p.discounts, p.continues)
    table = exact.score_table(p.policy, p.theta)[p.data.states[:, :-1], p.data.actions]
    count = len(p.probabilities)
    index = torch.cartesian_prod(torch.arange(count), torch.arange(count))
    total = torch.zeros_like(p.gradient)
    for rows in index:
        b = baselines.time_dependent(to_go[rows])
        psi = p.elapsed[rows] * (to_go[rows] - b)
        total += p.probabilities[rows].prod() * torch.einsum("nt,ntd->d", psi, table[rows]) / 2
    torch.testing.assert_close(total, p.gradient / 2, rtol=0, atol=1e-12)


def test_scores_are_the_per_sample_gradients():
    p = problem(bandit([1.0, 0.0, 3.0]))

    def log_prob(theta, states, actions):
        return p.policy(theta)[states, actions].sum()

    found = baselines.scores(log_prob, p.theta, p.data.states[:, :-1], p.data.actions)
    torch.testing.assert_close(found, score(p).g)


def test_moving_average_is_the_exponential_mean_without_the_start():
    state, decay, rewards = baselines.MovingAverage(), 0.8, [3.0, -1.0, 4.0]
    for r in rewards:
        state = baselines.moving_average(state, torch.tensor([r, r + 2]), decay)
    powers = np.array([decay**2, decay, 1.0])
    assert state.mean.item() == pytest.approx((powers @ (np.array(rewards) + 1)) / powers.sum(), rel=1e-6)
    assert state.weight == pytest.approx(1 - decay**3)


def test_time_dependent_counts_each_step_by_the_trajectories_that_reach_it():
    to_go = torch.tensor([[3.0, 1.0, torch.nan], [5.0, torch.nan, torch.nan]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    torch.testing.assert_close(baselines.time_dependent(to_go, mask), torch.tensor([4.0, 1.0, 0.0]))
    assert baselines.constant(torch.tensor([1.0, 4.0])).item() == 2.5
