"""The laboratory against closed forms and identities; its tables; its pictures."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from upslope.exact import lab_pictures, zoo
from upslope.exact.commands import lab, solve
from upslope.exact.laboratory import (
    baseline_study,
    bias_study,
    gae_study,
    importance_study,
    psi_table,
    variance_study,
)
from upslope.exact.measurement import setting, small_problem
from upslope.exact.policy_gradient import exact_policy_gradient, moments, trajectory_gradients
from upslope.exact.surrogate_studies import clip_study, kl_study


def column(table, name):
    return np.array([row[name] for row in table.rows], float)


def named(table, name):
    return next(row for row in table.rows if row["estimator"] == name)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_psi_of_table_2_2_is_unbiased(seed):
    study = variance_study(small_problem(seed, horizon=5), seed)
    assert np.abs(column(study.tables[0], "bias / |∇J|")).max() < 1e-10
    np.testing.assert_allclose(column(study.tables[0], "cosine"), 1.0, atol=1e-12)


def test_variances_are_those_of_a_sample():
    """The exact total variance against that of 200,000 sampled trajectories, within 5%."""
    case = setting(small_problem(horizon=4))
    index = torch.multinomial(case.weights, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    for psi in psi_table(case).values():
        draws = trajectory_gradients(case.data, case.policy, case.theta, psi)
        exact = float(moments(case.weights, draws).variance)
        assert float(draws[index].var(dim=0).sum()) == pytest.approx(exact, rel=0.05)


def test_conditioning_on_state_and_action_never_adds_variance():
    """Rao–Blackwell for the last step alone, where Ψ is one number per (s, a): Var[Q term] ≤ Var[return-to-go term]."""
    curves = variance_study(small_problem()).curves["by_step"]
    to_go, q = curves[1], curves[3]
    assert (q <= to_go + 1e-12).all()
    assert q[-1] == pytest.approx(to_go[-1])  # nothing random follows the last action


def test_the_advantage_is_not_always_least():
    """S4 2.3.1 says that Ψ = A has the least variance: with a better state-dependent baseline there is less.

    One state, two actions, π = (.9, .1), rewards 1 and 0. Score gradients of a softmax: E‖∇log π‖² is .02 for the first
    action and 1.62 for the second, so the best constant is b = E[‖g‖²R]/E[‖g‖²] = .1, not V = .9.
    """
    from upslope.exact import MDP

    mdp = MDP([[[0, 1], [0, 1]], [[0, 1], [0, 1]]], [[1.0, 0.0], [0.0, 0.0]], 1.0, initial=[1.0, 0.0], horizon=1)
    case = setting(mdp)
    theta = torch.tensor([np.log(9.0), 0.0, 0.0, 0.0], dtype=torch.float64)
    first = case.data.actions[:, 0] == 0
    weights = torch.where(first, 0.9, 0.1).double()

    def variance(b: float) -> float:
        psi = (case.data.rewards - b) * case.data.valid
        return float(moments(weights, trajectory_gradients(case.data, case.policy, theta, psi)).variance)

    assert variance(0.1) < variance(0.9)  # Ψ = A is b = V = .9
    assert variance(0.1) <= min(variance(b) for b in np.linspace(-1, 2, 61))


def test_biases():
    table = bias_study(small_problem()).tables[0]
    for name in (
        "γᵗ · return to go",
        "γᵗ · TD residual, true V",
        "γᵗ · GAE λ = 1, wrong V",
        "γᵗ · (return to go − wrong V)",
    ):
        assert named(table, name)["bias / |∇J|"] < 1e-10
    for name in ("return to go, γᵗ dropped", "return to go with 0.7 γ", "γᵗ · TD residual, wrong V", "γᵗ · wrong Q"):
        assert named(table, name)["bias / |∇J|"] > 0.01
    wrong = [
        named(table, f"γᵗ · {name}, wrong V")["bias / |∇J|"] for name in ("TD residual", "GAE λ = 0.9", "GAE λ = 1")
    ]
    assert wrong[0] > wrong[1] > wrong[2]


def test_gae_trades_bias_for_variance():
    """At γ = 1 bias falls to 0 with λ → 1 and variance rises; the heat map's best is inside."""
    curves = gae_study(small_problem()).curves
    bias, variance = curves["bias"][-1], curves["variance"][-1]
    assert bias[-1] < 1e-12
    assert bias[0] > 1e-3
    assert (np.diff(bias) <= 1e-12).all()
    assert variance[-1] > variance[0]
    assert 0 < curves["error"][-1].argmin() < len(curves["lambdas"]) - 1


def test_baselines():
    """Fixed ones unbiased and ordered; own-batch mean scales by 1 − 1/N, leave-one-out does not (95% interval × 2)."""
    exact, fitted = baseline_study(small_problem(horizon=4), batch=4, batches=20_000).tables
    assert np.abs(column(exact, "bias / |∇J|")).max() < 1e-10
    spread = {row["estimator"]: row["std / |∇J|"] for row in exact.rows}
    assert spread["minimum variance, per parameter"] <= spread["minimum variance, scalar"] <= spread["mean return E[R]"]
    assert spread["mean return E[R]"] < spread["none (total return)"]
    for name, expected in (("own batch's mean", 0.75), ("leave-one-out", 1.0), ("group relative, scale none", 0.75)):
        row = named(fitted, name)
        assert abs(row["projection on ∇J"] - expected) < 2.0 * row["± 95%"]


def test_importance_forms():
    """On-policy all agree; off-policy 2.9 and 2.10 stay unbiased, the others do not; ESS falls from 1."""
    table = importance_study(small_problem(horizon=4), distances=(0.0, 1.0)).tables[0]
    here, there = table.rows[:5], table.rows[5:]
    assert all(row["bias / |∇J|"] < 1e-10 for row in here)
    biased = [row["estimator"] for row in there if row["bias / |∇J|"] > 1e-10]
    assert biased == ["simplified causal (2.11)", "first order (2.13), Q of μ", "no weights"]
    assert here[0]["ESS / N"] == pytest.approx(1.0)
    assert there[0]["ESS / N"] < 1.0
    assert there[0]["std / |∇J|"] > there[1]["std / |∇J|"]  # causal weights cost less than whole-trajectory ones


def test_kl_moments_are_the_closed_forms():
    """x ~ N(0,1), log r = sx − s²/2: Var k1 = s²; E k2 = s²/2 + s⁴/8; E k3 = s²/2,
    Var k2 = s⁴/2 + s⁶/4, Var k3 = e^{s²} − 1 − s² (from E[r²] = e^{s²} and Cov[r, log r] = s²)."""
    for row in kl_study().tables[0].rows:
        s = float(str(row["p"])[2:].split(",")[0])
        kl, name = 0.5 * s**2, str(row["estimator"])[:2]
        bias = {"k1": 0.0, "k2": s**4 / 8 / kl, "k3": 0.0}[name]
        variance = {"k1": s**2, "k2": s**4 / 2 + s**6 / 4, "k3": np.expm1(s**2) - s**2}[name]
        assert row["KL"] == pytest.approx(kl)
        assert row["bias / KL"] == pytest.approx(bias, abs=1e-11)
        assert row["std / KL"] == pytest.approx(variance**0.5 / kl, rel=1e-9)
        assert abs(float(row["sampled bias / KL"]) - bias) < 2.5 * float(row["± 95%"])
    known = {("N(0.1, 1)", "k1"): 20.0, ("N(0.1, 1)", "k2"): 1.4177, ("N(0.1, 1)", "k3"): 1.4166}
    known |= {("N(1, 1)", "k1"): 2.0, ("N(1, 1)", "k2"): 1.7321, ("N(1, 1)", "k3"): 1.6950}
    for row in kl_study().tables[0].rows:
        assert round(float(row["std / KL"]), 4) == known[str(row["p"]), str(row["estimator"])[:2]]


def test_kl_gradients_are_what_each_place_descends():
    for row in kl_study(seed=3).tables[1].rows:
        found = {
            ("k1", "loss"): row["|g|"],
            ("k1", "reward"): row["|g − ∇KL(π‖ref)|"],
            ("k2", "loss"): row["|g − ∇KL(π‖ref)|"],
            ("k3", "loss"): row["|g − ∇KL(ref‖π)|"],
            ("k3", "reward"): row["|g − difference|"],
        }.get((row["estimator"], row["in the"]), 0.0)
        assert float(found) < 1e-12


def test_clip_table_and_path():
    study = clip_study(small_problem(horizon=4))
    by_ratio = {row["ratio"]: row for row in study.tables[0].rows}
    assert by_ratio[1.19]["clip, Ψ = +1"] == pytest.approx(1.19)
    assert by_ratio[1.21]["clip, Ψ = +1"] == 0.0
    assert by_ratio[0.79]["clip, Ψ = -1"] == 0.0
    assert by_ratio[1.21]["clip, Ψ = -1"] == pytest.approx(-1.21)
    assert by_ratio[4.0]["dual clip, Ψ = -1"] == 0.0
    curves = study.curves
    assert (curves["clipped +1"] <= curves["plain +1"] + 1e-15).all()
    path = {
        name: curves[f"path {name}"] for name in ("step", "J", "ratio surrogate", "clipped surrogate", "KL(old‖new)")
    }
    starts = [path[name][0] for name in ("J", "ratio surrogate", "clipped surrogate")]
    np.testing.assert_allclose(starts, starts[0], rtol=1e-12)
    case = setting(small_problem(horizon=4))  # all three leave with the slope |∇J|
    slope = float(exact_policy_gradient(case.mdp, case.policy, case.theta).norm())
    for name in ("J", "ratio surrogate", "clipped surrogate"):
        early = (path[name][1] - path[name][0]) / (path["step"][1] - path["step"][0])
        assert early == pytest.approx(slope, rel=0.06)


@pytest.mark.parametrize("study", ["variance", "bias", "kl", "clip", "gae", "baselines", "importance"])
def test_a_study_is_one_command_with_a_table_and_a_picture_in_under_a_minute(study, tmp_path, capsys):
    started = time.perf_counter()
    out = tmp_path / f"{study}.png"
    assert lab([study, "--out", str(out), "--horizon", "4"]) == 0
    assert time.perf_counter() - started < 60.0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size > 20_000
    assert "picture:" in capsys.readouterr().out
    assert lab([study, "--horizon", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["study"] == study
    assert found["tables"][0]["rows"]


def test_the_laboratory_takes_zoo_problems_and_says_what_it_cannot(tmp_path, capsys):
    assert lab(["variance", "--env", "zoo:short-corridor", "--horizon", "5", "--json"]) == 0
    with pytest.raises(ValueError, match="horizon: the laboratory compares whole trajectories"):
        setting(zoo.short_corridor())
    with pytest.raises(ValueError, match="∇J is 0"):
        lab(["variance", "--env", "FrozenLake-v1", "--horizon", "5", "--json"])
    with pytest.raises(ValueError, match="samples: at least 100"):
        lab(["variance", "--samples", "10", "--json"])
    with pytest.raises(ValueError, match="--samples: clip"):
        lab(["clip", "--samples", "1000", "--json"])
    with pytest.raises(SystemExit) as stopped:
        lab(["varience"])
    assert stopped.value.code == 2
    with pytest.raises(ValueError, match=r"--out: \.png"):
        lab(["kl", "--out", str(tmp_path / "kl.txt"), "--json"])
    assert capsys.readouterr()


# ---- solve
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["value-iteration", "--env", "FrozenLake-v1"], 0.8235),
        (["value-iteration", "--env", "FrozenLake-v1", "--gamma", "0.99"], 0.5420),
        (["value-iteration", "--env", "FrozenLake-v1", "--horizon", "100"], 0.7442),
        (["policy-iteration", "--env", "Taxi-v4"], 7.93),
        (["modified-policy-iteration", "--env", "CliffWalking-v1"], -13.0),
        (["policy-iteration", "--env", "Blackjack-v1"], -0.0431),
        (["value-iteration", "--env", "zoo:jacks-cars", "--tol", "1e-3"], None),
        (["policy-iteration", "--env", "Blackjack-v1", "--env-option", "sab=False", "natural=True"], -0.0257),
        (["evaluate", "--env", "zoo:random-walk"], 0.5),
        (["evaluate", "--env", "zoo:chain", "--policy", "optimal"], 10.0),
        (["soft-policy-iteration", "--env", "FrozenLake-v1", "--gamma", "0.99", "--alpha", "1e-6"], 0.5420),
    ],
)
def test_solve_prints_json_for_machines(arguments, value, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert solve([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert value is None or found["value_of_start"] == pytest.approx(value, abs=5.1e-5)
    assert found["method"] == arguments[0]
    assert len(found["values"]) == len(found["policy"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["value-iteration", "--env", "FrozenLake-v1"],
        ["policy-iteration", "--env", "Taxi-v4"],
        ["policy-iteration", "--env", "Blackjack-v1"],
        ["policy-iteration", "--env", "zoo:jacks-cars"],
        ["policy-iteration", "--env", "zoo:gambler"],
        ["policy-iteration", "--env", "zoo:maximization-bias"],
        ["soft-value-iteration", "--env", "CliffWalking-v1", "--gamma", "0.9"],
        ["q-learning", "--env", "zoo:cliff", "--episodes", "50", "--runs", "2"],
        ["td", "--env", "zoo:random-walk", "--episodes", "20", "--lam", "0.5"],
        ["monte-carlo", "--env", "zoo:random-walk", "--episodes", "20"],
    ],
)
def test_solve_draws_on_the_terminal_and_as_png(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert solve(arguments) == 0
    shown = capsys.readouterr().out
    assert "V(start)" in shown
    (picture,) = tmp_path.iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_terminal_shows_the_values_and_the_arrows(capsys, tmp_path):
    solve(["policy-iteration", "--env", "zoo:short-corridor", "--out", str(tmp_path / "x.svg")])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("→", "←", "-3.000", "-2.000", "-1.000"))
    assert Path(tmp_path / "x.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["value-iteration", "--env", "zoo:gamblr"], "did you mean 'gambler'"),
        (["value-iteration", "--env", "FrozenLak-v1"], "Did you mean: `FrozenLake`"),
        (["value-iteration", "--env", "CartPole-v1"], "no table of transitions"),
        (["value-iteration", "--env", "zoo:cliff", "--alpha", "1"], "--alpha: value-iteration has no such option"),
        (["value-iteration", "--env", "zoo:cliff", "--gamma", "2"], "gamma: must lie in"),
        (["policy-iteration", "--env", "zoo:chain"], "horizon: policy_iteration looks for one policy"),
        (["value-iteration", "--env", "FrozenLake-v1", "--env-option", "map_name"], "name=value is needed"),
        (["value-iteration", "--env", "zoo:cliff", "--env-option", "a=1"], "zoo problems have none"),
        (["td", "--env", "zoo:chain", "--policy", "optimal"], "evaluates one policy for all time"),
    ],
)
def test_what_solve_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        solve([*arguments, "--json"])


def test_an_unknown_flag_is_refused_with_a_suggestion(capsys):
    with pytest.raises(SystemExit) as stopped:
        solve(["value-iteration", "--env", "zoo:cliff", "--gama", "0.9"])
    assert stopped.value.code == 2
    assert "--gamma" in capsys.readouterr().err


def test_every_study_has_a_figure():
    assert set(lab_pictures.FIGURES) == {"variance", "bias", "kl", "clip", "gae", "baselines", "importance"}
