"""Learning from samples: figures of the books within stated intervals, and exact identities where there are some.

An interval is 4 standard errors around the mean of many runs (a false alarm in 16,000), widened by half a unit of the
last digit that is known of the reference and by the reference's own standard error where it is itself an average of
runs.
"""

from functools import partial

import numpy as np
import pytest
import torch

from upslope.core.exploration import linear_schedule, robbins_monro
from upslope.exact import MDP, evaluate_policy, policy_iteration, zoo
from upslope.exact.sampled import double_q_learning, expected_sarsa, monte_carlo, q_learning, sarsa, td

TRUE_WALK = np.arange(1, 6) / 6


def walk_errors(values: np.ndarray) -> np.ndarray:
    """RMS error over the five states, for each run and episode (S&B example 6.2)."""
    return np.sqrt(((values[:, :, 1:-1] - TRUE_WALK) ** 2).mean(axis=2))


@pytest.mark.parametrize(
    ("learn", "step_size", "known"),
    [
        (td, 0.05, (0.175, 0.055, 0.038)),
        (td, 0.1, (0.128, 0.050, 0.056)),
        (td, 0.15, (0.097, 0.068, 0.071)),
        (monte_carlo, 0.01, (0.212, 0.140, 0.097)),
        (monte_carlo, 0.02, (0.197, 0.114, 0.083)),
        (monte_carlo, 0.04, (0.177, 0.101, 0.110)),
    ],
)
def test_random_walk_errors(learn, step_size, known):
    """S&B figure 6.2 (right): the references are means of 100 runs, so their own noise is that of 100 runs."""
    runs = 1000
    values = learn(
        zoo.random_walk(), np.zeros(7, int), 100, np.random.default_rng(0), step_size=step_size, runs=runs, initial=0.5
    ).values
    errors = walk_errors(values)
    assert errors[:, 0].mean() == pytest.approx(0.236, abs=5e-4)
    for episode, reference in zip((10, 50, 100), known, strict=True):
        spread = errors[:, episode].std()
        allowed = 4.0 * spread * (1 / runs + 1 / 100) ** 0.5 + 5e-4
        assert abs(errors[:, episode].mean() - reference) < allowed


def test_sarsa_and_q_learning_on_the_cliff():
    """Online return of the last 100 of 500 episodes, ε = .1, α = .5, 50 runs: −27.1 and −50.4 (also of 50 runs)."""
    for learn, reference in ((sarsa, -27.1), (q_learning, -50.4)):
        found = learn(zoo.cliff(), 500, np.random.default_rng(1), step_size=0.5, epsilon=0.1, runs=50)
        last = found.episode_returns[:, -100:].mean(axis=1)
        assert abs(last.mean() - reference) < 4.0 * last.std() * (2 / 50) ** 0.5
    safe = sarsa(zoo.cliff(), 500, np.random.default_rng(2), step_size=0.5, epsilon=0.1, runs=20)
    risky = q_learning(zoo.cliff(), 500, np.random.default_rng(2), step_size=0.5, epsilon=0.1, runs=20)
    assert (safe.q_values[:, 36].max(axis=1) < -13.5).all()  # SARSA's own policy explores, so it keeps away
    np.testing.assert_allclose(risky.q_values[:, 36].max(axis=1), -13.0, atol=0.05)  # Q-learning learns the optimum


def test_maximisation_bias_and_double_q_learning():
    """S&B figure 6.5: share of episodes that go left; the references are shares of 10,000 runs."""
    known = {
        q_learning: (0.55, 0.94, 0.82, 0.46, 0.15, 0.12),
        double_q_learning: (0.50, 0.28, 0.14, 0.095, 0.074, 0.069),
    }
    runs, peak = 4000, {}
    for learn, shares in known.items():
        found = learn(
            zoo.maximization_bias(), 300, np.random.default_rng(3), runs=runs, available=zoo.MAXIMIZATION_BIAS_ACTIONS
        )
        left = (found.lengths == 2).mean(axis=0)  # right ends at once, left takes two steps
        np.testing.assert_allclose(left[:2], 0.5, atol=4.0 * 0.5 / runs**0.5)  # nothing to go by before the third one
        for episode, share in zip((3, 20, 50, 100, 200, 297), shares, strict=True):
            sigma = (share * (1 - share) * (1 / runs + 1 / 10_000)) ** 0.5
            assert abs(left[episode - 1] - share) < 4.0 * sigma + 0.005
        peak[learn] = left.max(), int(left.argmax()) + 1
    assert peak[q_learning][0] > 0.9
    assert 12 <= peak[q_learning][1] <= 25
    assert peak[double_q_learning][0] < 0.53  # never above ½ but for noise


def test_learners_find_the_optimum_with_robbins_monro_steps():
    """Q → Q* with steps n^−0.8 under a uniform behaviour (S3 5.2): within .05 on a small problem with noise."""
    mdp = zoo.random_mdp(np.random.default_rng(4), 5, 2, 3, gamma=0.6).replace(horizon=None)
    truth = policy_iteration(mdp).q_values
    step = partial(robbins_monro, power=0.8)
    for learn in (q_learning, double_q_learning):
        found = learn(mdp, 1, np.random.default_rng(5), step, epsilon=1.0, runs=20, max_steps=20_000)
        assert np.abs(found.q_values.mean(axis=0) - truth).max() < 0.05
    uniform = np.full((5, 2), 0.5)
    own = evaluate_policy(mdp, uniform).q_values  # on-policy methods learn the behaviour's values instead
    for learn in (sarsa, expected_sarsa):
        found = learn(mdp, 1, np.random.default_rng(6), step, epsilon=1.0, runs=20, max_steps=20_000)
        assert np.abs(found.q_values.mean(axis=0) - own).max() < 0.05


def test_schedules_are_followed():
    """ε from 1 to 0 over 50 episodes: afterwards every episode of a learned deterministic problem is greedy."""
    found = q_learning(
        zoo.short_corridor(),
        100,
        np.random.default_rng(7),
        step_size=0.5,
        epsilon=lambda episode: linear_schedule(episode, 1.0, 0.0, 50),
        runs=10,
    )
    assert (found.lengths[:, 60:] == 3).all()
    asked: list[float] = []
    td(zoo.random_walk(), np.zeros(7, int), 2, np.random.default_rng(8), lambda n: asked.extend(n.tolist()) or 0.1)
    assert asked[0] == 0.0  # a step size is asked for the number of visits so far
    assert max(asked) >= 1.0


def test_monte_carlo_by_hand():
    """One path 0 → 1 → 0 → end with rewards 1, 2, 4, γ = ½: returns 3, 4, 4; every visit against first visit."""
    transition = np.zeros((4, 1, 4))
    for s, after in enumerate((1, 2, 3, 3)):
        transition[s, 0, after] = 1.0
    path = MDP(transition, [[1.0], [2.0], [4.0], [0.0]], 0.5, initial=[1.0, 0.0, 0.0, 0.0])
    values = monte_carlo(path, np.zeros(4, int), 1, np.random.default_rng(0)).values[0, 1]
    np.testing.assert_allclose(values, [1 + 1 + 1, 2 + 2, 4, 0])
    loop = zoo.random_walk(1)  # one state between the ends: every visit is the first
    every, first = (
        monte_carlo(loop, np.zeros(3, int), 50, np.random.default_rng(1), first_visit=f).values for f in (0, 1)
    )
    np.testing.assert_array_equal(every, first)


def test_first_and_every_visit_differ_as_they_should():
    """A state left with probability ½ a step, reward 1 each: first visit is unbiased (2), every visit is biased for few
    episodes.

    With one episode of length L: first visit gives L, mean 2; every visit gives (L + 1)/2, mean 3/2.
    """
    mdp = MDP([[[0.5, 0.5]], [[0.0, 1.0]]], [[1.0], [0.0]], 1.0, initial=[1.0, 0.0])
    runs = 20_000
    first = monte_carlo(mdp, np.zeros(2, int), 1, np.random.default_rng(2), runs=runs, first_visit=True).values[:, 1, 0]
    every = monte_carlo(mdp, np.zeros(2, int), 1, np.random.default_rng(3), runs=runs).values[:, 1, 0]
    for sample, mean in ((first, 2.0), (every, 1.5)):
        assert abs(sample.mean() - mean) < 4.0 * sample.std() / runs**0.5


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_td_lambda_is_the_forward_view_to_first_order(lam):
    """For α → 0 the sum of one episode's online updates is α (G_t^λ − V(s_t)), the λ-return written out by hand."""
    transition = np.zeros((5, 1, 5))
    for s, after in enumerate((1, 2, 1 + 2, 4, 4)):
        transition[s, 0, after] = 1.0
    rewards, gamma, step = np.array([1.0, -2.0, 3.0, 0.5]), 0.9, 1e-7
    path = MDP(transition, [*rewards[:, None].tolist(), [0.0]], gamma, initial=np.eye(5)[0])
    values = td(path, np.zeros(5, int), 1, np.random.default_rng(0), step, lam, initial=0.7).values[0]
    start = np.array([0.7, 0.7, 0.7, 0.7, 0.0])
    for t in range(4):
        n_step = []
        for n in range(1, 5 - t):
            inside = sum(gamma**k * rewards[t + k] for k in range(n))
            n_step.append(inside + gamma**n * start[t + n])
        weights = [(1 - lam) * lam ** (n - 1) for n in range(1, 4 - t)] + [lam ** (3 - t)]
        target = float(np.dot(weights, n_step))
        assert (values[1, t] - start[t]) / step == pytest.approx(target - start[t], abs=1e-5)


def test_replacing_traces_never_exceed_one():
    """In a loop the accumulating trace grows, the replacing one does not: the first update differs by that factor."""
    mdp = MDP([[[0.5, 0.5]], [[0.0, 1.0]]], [[1.0], [0.0]], 1.0, initial=[1.0, 0.0])
    big, small = (
        td(mdp, np.zeros(2, int), 200, np.random.default_rng(4), 0.05, 1.0, runs=50, traces=kind)
        .values[:, -1, 0]
        .mean()
        for kind in ("accumulating", "replacing")
    )
    assert abs(big - 2.0) < 0.3
    assert abs(small - 2.0) < 0.3


def test_runs_are_independent_and_seeds_repeat():
    one, two = (q_learning(zoo.cliff(), 20, np.random.default_rng(9), runs=3) for _ in range(2))
    np.testing.assert_array_equal(one.q_values, two.q_values)
    assert not np.array_equal(one.lengths[0], one.lengths[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 1.5}, r"step_size: must lie in \[0, 1\], got 1.5"),
        ({"step_size": lambda n: torch.full_like(n, 2.0)}, "step_size: must lie"),
        ({"epsilon": -0.1}, r"epsilon: must lie in \[0, 1\], got -0.1 in episode 0"),
        ({"available": np.zeros((48, 4), bool)}, "available: "),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        q_learning(zoo.cliff(), 1, np.random.default_rng(0), **options)


def test_an_endless_episode_is_refused_by_monte_carlo_and_cut_by_td():
    loop = MDP(np.ones((1, 1, 1)), [[1.0]], 0.9)
    with pytest.raises(ValueError, match="did not end within 10 steps"):
        monte_carlo(loop, np.zeros(1, int), 1, np.random.default_rng(0), max_steps=10)
    values = td(loop, np.zeros(1, int), 500, np.random.default_rng(0), 0.5, max_steps=10).values
    assert values[0, -1, 0] == pytest.approx(10.0, rel=1e-6)  # bootstrapped: 1/(1 − γ), not the sum of 10 rewards
    with pytest.raises(ValueError, match=r"lam: must lie in \[0, 1\]"):
        td(loop, np.zeros(1, int), 1, np.random.default_rng(0), lam=1.1)
