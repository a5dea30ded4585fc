"""Monte Carlo in the laboratory: do its intervals hold the exact answer as often as they say?"""

import json

import numpy as np
import pytest
import torch

from upslope.core import returns
from upslope.exact import laboratory, zoo
from upslope.exact.commands import lab, problem
from upslope.exact.laboratory import importance_study, psi_table, variance_study
from upslope.exact.measurement import (
    another,
    can_enumerate,
    estimate,
    following,
    sample,
    setting,
    small_problem,
)
from upslope.exact.policy_gradient import (
    all_action_gradient,
    enumerate_trajectories,
    evaluate,
    probabilities,
    score_products,
    score_table,
    trajectory_gradients,
)


def lake():
    """FrozenLake 4x4 with 100 steps: nobody lists these trajectories."""
    return problem("FrozenLake-v1", gamma=0.95, horizon=100)


def draws_of(case, name):
    """Every trajectory's estimate, by an unbiased Ψ of the table, or by one that is not."""
    psis = psi_table(case)
    zero = torch.zeros_like(case.data.rewards)
    psis["γᵗ dropped"] = returns.return_to_go(case.data.rewards, zero, case.discounts, case.continues)
    return trajectory_gradients(case.data, case.policy, case.theta, psis[name])


@pytest.mark.parametrize("name", ["return to go", "advantage A(s, a)", "γᵗ dropped"])
def test_the_intervals_hold_the_exact_answer_as_often_as_they_say(name):
    """100 independent 95% intervals from 1,000 trajectories each: at least 90 hold it."""
    mdp = small_problem(horizon=5)
    exact, first = setting(mdp), setting(mdp, samples=1_000)
    truth = estimate(exact, draws_of(exact, name))
    assert (truth.bias > 0.1 * float(exact.gradient.norm())) == (name == "γᵗ dropped")
    found = []
    for seed in range(100):
        case = another(first, 100 + seed)
        found.append(estimate(case, draws_of(case, name)))
    bias = sum(one.bias_low <= truth.bias + 1e-12 and truth.bias <= one.bias_high for one in found)
    variance = sum(one.variance_low <= truth.variance <= one.variance_high for one in found)
    assert bias >= 90
    assert variance >= 90
    if name != "γᵗ dropped":
        assert bias <= 99  # where there is no bias, the interval is not wider than it says either
        noise = truth.variance / first.samples  # what |ḡ − ∇J|² would be on average
        assert np.mean([one.bias**2 for one in found]) < 0.7 * noise
    assert np.mean([one.variance for one in found]) == pytest.approx(truth.variance, rel=0.02)
    assert all(one.bias_low <= one.bias <= one.bias_high for one in found)


def test_no_bias_where_nothing_can_be_listed():
    """Six unbiased Ψ on FrozenLake with 100 steps, 5 independent samples: at least 27 of 30 intervals begin at 0."""
    first = setting(lake(), samples=1_000)
    assert not can_enumerate(first.mdp, 100)
    found = []
    for seed in range(5):
        case = another(first, 200 + seed)
        found += [estimate(case, draws_of(case, name)) for name in psi_table(case)]
    assert sum(one.bias_low == 0.0 for one in found) >= 27


def test_bias_is_detected_where_nothing_can_be_listed():
    """γ = .8 over 100 steps: dropping γᵗ is seen in every sample, and its size is that of Σ_s P(s_t = s) Q_t ∇π."""
    first = setting(problem("FrozenLake-v1", gamma=0.8, horizon=100), samples=3_000)
    visits = evaluate(first.mdp.replace(gamma=1.0), first.policy(first.theta).exp()).visits
    mean = all_action_gradient(first.policy, first.theta, visits, first.known.q)
    truth = float((mean - first.gradient).norm())
    for seed in range(5):
        case = another(first, 300 + seed)
        found = estimate(case, draws_of(case, "γᵗ dropped"))
        assert 0.0 < found.bias_low <= truth <= found.bias_high


def test_a_study_says_the_same_with_and_without_enumeration():
    """The studies themselves, with and without `samples`: exact figures lie in (1.5 times) the sample's intervals."""
    for study in ("variance", "bias", "baselines", "importance"):
        run = getattr(laboratory, f"{study}_study" if study != "baselines" else "baseline_study")
        exact, drawn = (run(small_problem(horizon=4), samples=n) for n in (None, 5_000))
        assert (exact.samples, drawn.samples) == (None, 5_000)
        assert exact.method == "exact"
        assert drawn.method == "Monte Carlo, n = 5,000, 95% intervals"
        for truth, row in zip(exact.tables[0].rows, drawn.tables[0].rows, strict=True):
            assert row["estimator"] == truth["estimator"]
            for key in ("bias", "std"):
                value, low, high = truth[f"{key} / |∇J|"], row[f"{key} from"], row[f"{key} to"]
                slack = 0.25 * (high - low)
                assert low - slack <= value + 1e-9 <= high + slack, (study, row)


def test_sampled_trajectories_are_those_that_enumeration_lists():
    """Frequencies of 100,000 draws against the probabilities of the list: within 5 standard deviations, each."""
    mdp = zoo.short_corridor().replace(horizon=5, gamma=0.9)
    case = setting(mdp)
    log_policy = case.policy(case.theta)
    listed = enumerate_trajectories(mdp)
    drawn = sample(mdp, log_policy, 100_000, seed=0)
    padded = torch.where(drawn.valid, drawn.actions, 0)
    keys = torch.cat([drawn.states, padded], dim=1)
    assert len(keys.unique(dim=0)) <= len(listed.states)
    for i, chance in enumerate(probabilities(listed, log_policy)):
        same = (keys == torch.cat([listed.states[i], torch.where(listed.valid[i], listed.actions[i], 0)])).all(dim=1)
        assert float(same.double().mean()) == pytest.approx(float(chance), abs=5 * float(chance / 100_000) ** 0.5)
        one = int(same.nonzero()[0])
        for name in ("rewards", "terminated", "truncated", "valid"):
            assert (getattr(drawn, name)[one] == getattr(listed, name)[i]).all(), name


def test_noisy_rewards_are_drawn_not_listed():
    """Their variance is no finite sum: enumeration would forget it. Two states, one step, r = N(0, 1)."""
    mdp = zoo.maximization_bias().replace(horizon=3)
    assert not can_enumerate(mdp, 3)
    noisy, silent = setting(mdp, samples=5_000), setting(mdp.replace(reward_std=None))
    for name in ("return to go", "return to go − V(s)"):
        assert estimate(noisy, draws_of(noisy, name)).variance > 2.0 * estimate(silent, draws_of(silent, name)).variance


def test_scores_without_their_table():
    """Σ_t Ψ_t ∇log π by products with the transposed Jacobian against the table of all scores."""
    case = setting(small_problem(horizon=4))
    table = score_table(case.policy, case.theta)[case.data.states[:, :-1], case.data.actions]
    psi = torch.randn(case.data.rewards.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.einsum("nt,ntd->nd", psi * case.data.valid, table)
    torch.testing.assert_close(trajectory_gradients(case.data, case.policy, case.theta, psi), expected)


def test_variance_by_step_is_that_of_the_step_alone():
    case = setting(small_problem(horizon=4))
    shares = variance_study(case.mdp).curves["by_step"]
    psis = list(psi_table(case).values())
    for step in range(4):
        alone = psis[1] * torch.eye(4, dtype=torch.float64)[step]
        found = estimate(case, trajectory_gradients(case.data, case.policy, case.theta, alone))
        assert shares[1, step] == pytest.approx(found.variance / float(case.gradient.square().sum()), rel=1e-9)


def test_the_behaviour_is_sampled_where_it_cannot_be_listed():
    """100 steps: whole and causal weights stay unbiased; the bias of none is Σ γᵗ P_μ(s_t, a_t) Q^μ ∇log π − ∇J."""
    rows = importance_study(lake(), distances=(0.0, 1.0), samples=3_000).tables[0].rows
    there = {row["estimator"]: row for row in rows[5:]}
    assert rows[0]["ESS / N"] == pytest.approx(1.0)
    assert there["causal (2.10)"]["ESS / N"] < 0.95
    assert there["causal (2.10)"]["bias from"] == 0.0
    assert there["trajectory (2.9)"]["bias from"] == 0.0
    case = setting(lake(), samples=3_000)
    other = following(case, case.theta + 3.0 * torch.eye(64).double()[2::4].sum(0), seed=1)  # action 2, far more often
    weights = other.known.visits[..., None] * other.policy(other.theta).exp() * other.known.q
    mean = score_products(case.policy, case.theta, weights.sum(0, keepdim=True))[0]
    seen = other._replace(theta=case.theta, gradient=case.gradient)
    found = estimate(seen, draws_of(seen, "return to go"))
    assert 0.0 < found.bias_low <= float((mean - case.gradient).norm()) <= found.bias_high


@pytest.mark.parametrize("study", ["variance", "bias", "gae", "baselines", "importance"])
def test_a_large_problem_is_one_command(study, tmp_path, capsys):
    """Automatically where enumeration is impossible, on request elsewhere; table, picture and JSON say which."""
    large = [study, "--env", "FrozenLake-v1", "--horizon", "100", "--samples", "200"]
    assert lab([*large, "--out", str(tmp_path / "lab.svg")]) == 0
    assert "Monte Carlo, n = 200, 95% intervals" in capsys.readouterr().out
    assert (tmp_path / "lab.svg").stat().st_size > 20_000
    methods = []
    for arguments in (["--horizon", "4"], ["--horizon", "4", "--samples", "1000"]):
        assert lab([study, *arguments, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        methods.append((found["method"], found["samples"], any("from" in key for key in found["tables"][0]["rows"][0])))
    assert methods == [("exact", None, False), ("Monte Carlo", 1000, True)]


def test_what_cannot_be_listed_is_drawn_unasked(capsys):
    assert not can_enumerate(zoo.gambler(), 9)
    assert lab(["variance", "--env", "zoo:taxi", "--horizon", "9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["method"], found["samples"]) == ("Monte Carlo", 10_000)
    assert all(row["bias from"] < 0.01 for row in found["tables"][0]["rows"])
