"""The family's picture: the noise scale on known noise, drops by hand, and one tiny run from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from upslope import cli
from upslope.bench import family, variance
from upslope.control import learner, ppo
from upslope.control.ppo import PPO
from upslope.report.records import Series
from upslope.runs import run as runs
from upslope.runs.run import Run

TINY = ("--seeds", "2", "--total-steps", "6000", "--batches", "3", "--batch-steps", "300")
KEPT = ("reinforce", "ppo", "group-ppo")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of the methods, and critics that are not waited for."""
    monkeypatch.setattr(family, "METHODS", tuple(method for method in family.METHODS if method.name in KEPT))
    monkeypatch.setattr(variance, "ROUNDS", 1)


def test_the_noise_scale_of_known_noise() -> None:
    """g = μ + σ ε in d dimensions: scale steps · d σ² / |μ|², cosine of two |μ|² / (|μ|² + d σ²)."""
    random, d, sigma = np.random.default_rng(0), 400, 0.3
    mean = np.ones(d) / 10  # |μ|² = 4, d σ² = 36
    estimates = mean + sigma * random.standard_normal((64, d))
    found = variance.noise(estimates, 1000.0)
    assert found.low < 9000 < found.high
    assert found.scale == pytest.approx(9000, rel=0.15)
    assert found.cosine == pytest.approx(0.1, abs=0.02)
    assert variance.noise(estimates * 7, 1000.0).scale == pytest.approx(found.scale)  # no unit of Ψ
    assert variance.noise(estimates, 500.0).scale == pytest.approx(found.scale / 2)


def test_without_a_signal_the_scale_is_infinite() -> None:
    mirrored = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert variance.noise(mirrored, 10.0).scale == float("inf")


def test_drops_by_hand() -> None:
    number = Series(np.arange(7.0), np.array([1.0, 9.0, 4.0, 10.0, 8.0, 3.0, 6.0]))
    assert family.worst_drop(number, 9.0) == 7.0  # from 10 to 3
    assert family.worst_drop(number, 0.0) == 7.0
    assert family.worst_drop(number, 10.5) is None
    assert family.spread(np.array([])) is None
    assert family.spread(np.arange(101.0)) == (5.0, 50.0, 95.0)


def test_every_entry_is_an_algorithm_or_left_out() -> None:
    assert len({method.name for method in family.METHODS}) == len(family.METHODS)
    assert any(method.algorithm in cli.ALGORITHMS for method in family.METHODS)


def test_the_critic_is_fitted_and_the_policy_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PPO(run=runs.Config(quiet=True), total_steps=1)
    trained = ppo.train(config)
    before = trained.theta.clone()
    monkeypatch.setattr(variance, "ROUNDS", 2)
    variance.fit_critic(trained, config)
    policy, critic = trained.net.part("policy"), trained.net.part("critic")
    assert torch.equal(trained.theta[policy], before[policy])
    state, _ = learner.start(config, Run("ppo", config, 1))
    data, world = learner.collect(trained.net, state._replace(theta=trained.theta), config, 64)
    world.envs.close()
    assert not torch.equal(trained.theta[critic], before[critic])
    assert data.value.mean() > 5  # CartPole's values at a random policy are near 15, an untrained critic's near 0


@pytest.mark.slow
def test_a_tiny_family(tmp_path: Path, capsys: pytest.CaptureFixture[str], few: None) -> None:
    out = tmp_path / "family"
    assert cli.main(["bench", "family", "--out", str(out), *TINY]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "PPO, clip" in said
    assert str(out / "family.png") in said
    with Image.open(out / "family.png") as picture:
        assert picture.width > 1000
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    numbers = json.loads((out / "family.json").read_text())
    assert [method["label"] for method in numbers["methods"]] == ["REINFORCE", "PPO, clip", "Group PPO"]
    for method in numbers["methods"]:
        assert len(method["final"]) == 2
        assert len(method["worst_drop"]) == sum(step is not None for step in method["steps_to_threshold"])
    assert [method["kl"] is None for method in numbers["methods"]] == [True, False, False]

    # what is there is used again: nothing is trained, one that was cut short is gone on with
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    assert len(stamps) == 7
    (out / "ppo-2" / "summary.json").unlink()
    assert cli.main(["bench", "family", "--out", str(out), *TINY]) == 0
    changed = [path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp]
    assert changed == [out / "ppo-2" / "summary.json"]
    assert json.loads((out / "family.json").read_text()) == numbers
    capsys.readouterr()
    assert cli.main(["bench", "family", "--out", str(out), *TINY, "--total-steps", "7000"]) == 2
    assert "holds another run" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("famly",), "family"),
        (("family", "--seeds", "0"), "seeds is 0, allowed: 1 or more"),
        (("family", "--batches", "2"), "batches is 2, allowed: 3 or more"),
        (("family", "--seed", "3"), "Did you mean --seeds?"),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_gradients_of_two_methods_agree(tmp_path: Path, few: None) -> None:
    """Two methods' mean gradients at one policy point the same way: their Ψ differ, what they estimate hardly."""
    flags = ["--env", "CartPole-v1", "--quiet", "--total-steps"]
    for name, algorithm, steps in (("policy", "ppo", "3000"), ("a", "ppo", "64"), ("b", "reinforce", "64")):
        assert cli.main(["train", algorithm, *flags, steps, "--run-dir", str(tmp_path / name)]) == 0
    means = []
    for name in ("a", "b"):
        estimates, steps = variance.gradients(tmp_path / name, tmp_path / "policy", cli.ALGORITHMS, 3, 4000)
        assert steps >= 4000
        means.append(estimates.mean(0))
    assert means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1]) > 0.5
