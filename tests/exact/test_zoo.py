"""Known answers, from the books and papers that state the problems, or computed here in another way."""

import math

import numpy as np
import pytest
from scipy.stats import poisson

from upslope.exact import evaluate_policy, modified_policy_iteration, policy_iteration, value_iteration, zoo
from upslope.exact.policy_gradient import partially_observed


def test_gridworld_4_1():
    """S&B figure 4.1, k = ∞."""
    values = evaluate_policy(zoo.gridworld(), np.full((16, 4), 0.25)).values
    by_book = [[0, -14, -20, -22], [-14, -18, -20, -20], [-20, -20, -18, -14], [-22, -20, -14, 0]]
    np.testing.assert_allclose(values.reshape(4, 4), by_book, atol=1e-10)


@pytest.mark.parametrize("heads", [0.4, 0.25])
def test_gambler(heads):
    """Bold play is optimal for p < ½ (Dubins & Savage 1965): V(s) = pV(2s), or p + (1 − p)V(2s − 100) from 50 on."""
    values = policy_iteration(zoo.gambler(heads)).values
    bold, bias = np.zeros((101, 101)), np.zeros(101)
    for s in range(1, 100):
        bold[s, 2 * s if s < 50 else 2 * s - 100] = heads if s < 50 else 1.0 - heads
        bias[s] = 0.0 if s < 50 else heads
    truth = np.linalg.solve(np.eye(101) - bold, bias)
    np.testing.assert_allclose(values, truth, atol=1e-12)
    known = {0.4: {25: 0.16, 50: 0.4, 75: 0.64, 1: 0.0021, 99: 0.9643}, 0.25: {50: 0.25}}[heads]
    for state, value in known.items():
        assert values[state] == pytest.approx(value, abs=5e-5)


def test_jacks_cars():
    """Values at the corners, 270 of 441 states at rest, moves −4…+5; and the optimality equation by brute force."""
    mdp = zoo.jacks_cars()
    solution = policy_iteration(mdp)
    assert round(solution.values[0], 1) == 421.4
    assert round(solution.values[440], 1) == 637.0
    assert solution.values[220] == pytest.approx(574.948, abs=5e-4)  # printed as 575.0 elsewhere: a rounding of 574.95
    moves = np.array([int(name) for name in mdp.action_names])[solution.policy]
    assert (moves == 0).sum() == 270
    assert (moves.min(), moves.max()) == (-4, 5)
    for first, second in ((10, 10), (20, 0), (3, 17)):
        best = max(_jack(solution.values, first, second, move) for move in range(-min(5, second), min(5, first) + 1))
        assert solution.values[first * 21 + second] == pytest.approx(best, abs=1e-6)


def _jack(values: np.ndarray, first: int, second: int, move: int, most: int = 40) -> float:
    """r + γE[V] of moving cars, by summing over requests and returns up to `most` (beyond: less than 1e-20)."""
    count = np.arange(most)
    outcomes = []
    for cars, requests, returned in ((min(first - move, 20), 3, 3), (min(second + move, 20), 4, 2)):
        rented = np.minimum(count, cars)
        evening = np.zeros(21)
        for r, p in zip(rented, poisson.pmf(count, requests), strict=True):
            np.add.at(evening, np.minimum(cars - r + count, 20), p * poisson.pmf(count, returned))
        outcomes.append((evening, 10.0 * rented @ poisson.pmf(count, requests)))
    (one, gain), (other, more) = outcomes
    return gain + more - 2.0 * abs(move) + 0.9 * one @ values.reshape(21, 21) @ other


def test_frozen_lake_4x4_and_both_readings_of_its_horizon():
    lake = zoo.frozen_lake()
    assert round(policy_iteration(lake).values[0], 4) == 0.8235  # no limit
    aware = value_iteration(lake, horizon=100)
    assert round(aware.values[100][0], 4) == 0.7442  # knows how many of 100 steps are left
    stationary = policy_iteration(lake.replace(gamma=0.99)).policy
    assert round(evaluate_policy(lake, stationary, horizon=100).values[100][0], 4) == 0.7402
    uniform = np.full((16, 4), 0.25)
    assert round(evaluate_policy(lake, uniform).values[0], 4) == 0.0139
    assert round(policy_iteration(lake.replace(gamma=0.99)).values[0], 4) == 0.5420


def test_frozen_lake_8x8():
    lake = zoo.frozen_lake("8x8")
    assert round(value_iteration(lake, horizon=200).values[200][0], 4) == 0.9132
    for gamma, value in ((0.999, 0.8857), (0.99, 0.8630), (0.95, 0.7386)):
        greedy = policy_iteration(lake.replace(gamma=gamma)).policy
        assert round(evaluate_policy(lake, greedy, horizon=200).values[200][0], 4) == value
    assert round(evaluate_policy(lake, np.full((64, 4), 0.25), horizon=200).values[200][0], 4) == 0.0019
    assert policy_iteration(lake).values[0] == pytest.approx(1.0, abs=1e-9)  # without a limit it can always be reached


def test_taxi():
    taxi = zoo.taxi()
    values = policy_iteration(taxi).values
    starts = values[taxi.initial > 0.0]
    assert len(starts) == 300
    assert starts.mean() == pytest.approx(7.93, abs=1e-10)
    assert (starts.min(), starts.max()) == (pytest.approx(3.0), pytest.approx(15.0))


def test_cliff():
    solution = value_iteration(zoo.cliff())
    assert solution.values[36] == pytest.approx(-13.0, abs=1e-10)


@pytest.mark.parametrize(
    ("options", "value"), [({}, -0.0431), ({"sab": False}, -0.0466), ({"sab": False, "natural": True}, -0.0257)]
)
def test_blackjack_optimum(options, value):
    game = zoo.blackjack(**options)
    assert round(float(policy_iteration(game).values @ game.initial), 4) == value


def test_blackjack_strategy():
    """S&B figure 5.2: hard 17 (A, 7–10), 13 (2–3), 12 (4–6); soft 18 (2–8), 19 (A, 9, 10)."""
    game = zoo.blackjack()
    stick = policy_iteration(game).policy[:280].reshape(28, 10) == 0
    hard = [4 + int(stick[:18, card].argmax()) for card in range(10)]
    soft = [12 + int(stick[18:, card].argmax()) for card in range(10)]
    assert hard == [17, 13, 13, 12, 12, 12, 17, 17, 17, 17]
    assert soft == [19, 18, 18, 18, 18, 18, 18, 18, 19, 19]
    assert all(stick[h - 4 : 18, c].all() for c, h in enumerate(hard))  # a threshold: above it one sticks too
    stubborn = np.ones(game.num_states, int)
    for state, name in enumerate(game.state_names):
        if name.startswith("natural") or (name != "end" and int(name.split()[1]) >= 20):
            stubborn[state] = 0
    assert round(float(evaluate_policy(game, stubborn).values @ game.initial), 3) == -0.350


def test_random_walk():
    values = evaluate_policy(zoo.random_walk(), np.zeros(7, int)).values
    np.testing.assert_allclose(values[1:-1], np.arange(1, 6) / 6, atol=1e-14)
    assert np.sqrt(((0.5 - values[1:-1]) ** 2).mean()) == pytest.approx(0.236, abs=5e-4)


def test_short_corridor():
    """v(p) = 2(p − 2) / (p(1 − p)), best at p* = 2 − √2 with v* = −(6 + 4√2): blind policies."""
    corridor = zoo.short_corridor()

    def value(p: float) -> float:
        return float(evaluate_policy(corridor, np.tile([1.0 - p, p], (4, 1))).values[0])

    for p, known in ((0.05, -82.1), (0.95, -44.2), (0.5, -12.0)):
        assert round(value(p), 1) == known
        assert value(p) == pytest.approx(2.0 * (p - 2.0) / (p * (1.0 - p)), rel=1e-12)
    best = 2.0 - math.sqrt(2.0)
    assert value(best) == pytest.approx(-(6.0 + 4.0 * math.sqrt(2.0)), rel=1e-12)
    assert all(value(best) > value(best + d) for d in (-1e-3, 1e-3))
    blind, seen = partially_observed(corridor, np.ones((4, 1)))  # the same through an observation that says nothing
    assert set(seen.tolist()) == {0}
    assert evaluate_policy(blind, np.tile([1.0 - best, best], (4, 1))).values[0] == pytest.approx(
        value(best), rel=1e-12
    )
    assert policy_iteration(corridor).values[0] == pytest.approx(-3.0)  # who sees the states needs three steps


def test_maximization_bias_optimum():
    assert policy_iteration(zoo.maximization_bias()).values.tolist() == [0.0, pytest.approx(-0.1), 0.0]


@pytest.mark.parametrize("states", [2, 7, 16])
def test_blind_cliffwalk(states):
    """A random policy is rewarded with probability 2^−n, the best gets γ^{n−1}; all plays: 2^{n+1} − 2 steps."""
    walk = zoo.blind_cliffwalk(states)
    assert policy_iteration(walk).values[0] == pytest.approx((1.0 - 1.0 / states) ** (states - 1), rel=1e-12)
    uniform = np.full((states + 1, 2), 0.5)
    chance = evaluate_policy(walk.replace(gamma=1.0), uniform).values[0]
    assert chance == pytest.approx(2.0**-states, rel=1e-12)
    if states <= 7:
        lengths = 0
        for plays in range(2**states):
            for step in range(states):
                lengths += 1
                if (plays >> step) & 1 != step % 2:
                    break
        assert lengths == 2 ** (states + 1) - 2


def test_chain_and_deep_sea():
    for states in (5, 20):
        assert value_iteration(zoo.chain(states)).values[-1][1] == pytest.approx(10.0, abs=1e-12)
        lazy = evaluate_policy(zoo.chain(states), np.zeros(states, int)).values[-1][1]
        assert lazy == pytest.approx(0.001 * (states + 7), rel=1e-12)
    for size in (5, 12):
        sea = zoo.deep_sea(size)
        assert modified_policy_iteration(sea).values[0] == pytest.approx(0.99, abs=1e-12)
        uniform = np.full((sea.num_states, 2), 0.5)
        # reward 1 with probability 2^-N, and half of N moves right at .01/N each
        assert evaluate_policy(sea, uniform).values[0] == pytest.approx(2.0**-size - 0.005, rel=1e-9)
        mixed = zoo.deep_sea(size, mapping_seed=1)
        assert modified_policy_iteration(mixed).values[0] == pytest.approx(0.99, abs=1e-12)
        assert evaluate_policy(mixed, uniform).values[0] == pytest.approx(2.0**-size - 0.005, rel=1e-9)
        for action in (0, 1):  # no one action everywhere finds the way
            assert evaluate_policy(mixed, np.full(mixed.num_states, action)).values[0] <= 0


def test_an_unknown_problem_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="no problem 'gamblr'; did you mean 'gambler'"):
        zoo.problem("gamblr")
    assert all(zoo.problem(name).num_states > 1 for name in zoo.PROBLEMS)
