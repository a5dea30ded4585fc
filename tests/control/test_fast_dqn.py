"""DQN with tensor environments as one program: held to dqn.py and the replay's arithmetic, resumed to the bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from upslope.control import (
    ahead,
    compilation,
    dqn,
    environments,
    fast_dqn,
    normalization,
    offpolicy,
    qnetworks,
    replay,
    tensor_replay,
)
from upslope.control.environments import Transition
from upslope.control.parameters import Net
from upslope.runs import run as runs
from upslope.runs.run import Run

OPTIONS = runs.Config(seed=3, log_interval=50, compile=True, quiet=True)
CONFIG = dqn.DQN(
    environments.Config("MountainCar-v0", 2, "tensor"), qnetworks.Config((16,), dueling=True), run=OPTIONS,
    total_steps=260, learning_starts=41, replay_capacity=120, train_interval=1, batch_size=16, n_step=2, double=True,
    target_interval=30, target_tau=0.7, epsilon_fraction=0.8, anneal_learning_rate=True,
)  # fmt: skip
CART = replace(CONFIG, environment=environments.Config("CartPole-v1", 2, "tensor"))
WALK = replace(CONFIG, environment=environments.Config("tests.control.own_tensors:Walk-v0", 2, "tensor"))


@pytest.fixture
def as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are not compiled."""

    def plain(function: Any, **options: Any) -> Any:
        return function

    monkeypatch.setattr(ahead, "compiled", plain)
    monkeypatch.setattr(Net, "pure", lambda net: net)


def ended(module: Any, config: dqn.DQN, session: Run | None = None) -> tuple[dict[str, torch.Tensor], offpolicy.State]:
    """Everything that a run ends with."""
    ends: list[offpolicy.State] = []

    def finish(session: Run, state: offpolicy.State, net: Any, config: Any) -> None:
        ends.append(state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offpolicy, "finish", finish)
        module.train(config, session)
    return offpolicy.pack(ends[0]), ends[0]


def agrees_with_dqn(config: dqn.DQN, tmp_path: Path) -> None:
    """The same chance, whoever steps the environments: the same run."""
    expected, _ = ended(dqn, replace(config, run=replace(OPTIONS, compile=False, run_dir=tmp_path / "plain")))
    found, state = ended(fast_dqn, replace(config, run=replace(OPTIONS, run_dir=tmp_path / "fast")))
    assert (state.updates, state.iteration) == (110, 130)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4, msg=lambda text: f"{name}: {text}")


@pytest.mark.usefixtures("as_it_stands")
@pytest.mark.parametrize("config", [CONFIG, CART, WALK])
def test_it_takes_the_steps_of_dqn(config: dqn.DQN, tmp_path: Path) -> None:
    agrees_with_dqn(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CART, WALK])
def test_its_program_takes_the_steps_of_dqn(config: dqn.DQN, tmp_path: Path) -> None:
    agrees_with_dqn(config, tmp_path)


@pytest.mark.usefixtures("as_it_stands")
def test_how_often_it_logs_changes_nothing(tmp_path: Path) -> None:
    often = replace(CART, run=replace(OPTIONS, log_interval=7, run_dir=tmp_path / "often"))
    seldom = replace(CART, run=replace(OPTIONS, run_dir=tmp_path / "seldom"))
    found, expected = ended(fast_dqn, often)[0], ended(fast_dqn, seldom)[0]
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.usefixtures("as_it_stands")
@pytest.mark.parametrize("wrong", ["reward", "observation", "final observation"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("sign", [False, True])  # an infinite reward's is 1
def test_what_is_not_finite_ends_the_run(wrong: str, value: float, sign: bool, tmp_path: Path) -> None:
    environment = environments.Config(WALK.environment.id, 2, "tensor", kwargs={"wrong": wrong, "value": value})
    config = replace(WALK, environment=environment, normalize=normalization.Config(reward_sign=sign))
    step = "\\d+" if wrong.startswith("final") else "4"
    at = f"NaN or infinite {wrong.split()[-1]} in environment [01] at step {step} of its episode \\d+ \\(run seed 3\\)"
    with pytest.raises(ValueError, match=at):
        fast_dqn.train(replace(config, run=replace(OPTIONS, run_dir=tmp_path / "run")))
    assert not [*(tmp_path / "run").glob("checkpoints/*")]


def test_whether_it_pays_is_decided_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 environment steps of 64 environments are 1,563 gradient steps, a second's gain."""
    monkeypatch.setattr(compilation, "remember", lambda config: None)
    monkeypatch.setattr(offpolicy, "finish", lambda *given: None)
    begin, many = dqn.begin, replace(CART, environment=replace(CART.environment, num_envs=64), total_steps=100_000)

    def at_its_end(*given: Any) -> Any:
        state, net = begin(*given)
        return state._replace(step=many.total_steps), net

    monkeypatch.setattr(dqn, "begin", at_its_end)
    with caplog.at_level("INFO"):
        fast_dqn.train(replace(many, replay_capacity=1_000, run=runs.Config(quiet=True, run_dir=None)))
    found = [record.getMessage() for record in caplog.records if "compiled: " in record.getMessage()]
    assert len(found) == 1
    assert found[0].startswith("not compiled: it would save about 1 s")


@pytest.mark.usefixtures("as_it_stands")
def test_its_accounts_are_those_of_what_it_saw(tmp_path: Path) -> None:
    config = replace(CART, replay_capacity=2_000, total_steps=600, run=replace(OPTIONS, run_dir=tmp_path / "run"))
    _, state = ended(fast_dqn, config)
    memory, world = state.replay, state.world
    finals = int((memory.ahead[: memory.written] == 0).sum()) - 2  # two rows are open
    assert world.episodes == finals > 10
    assert memory.transitions == world.steps == state.step == 600
    assert memory.written == 600 + 2 + finals
    # CartPole pays 1 a step: what finished episodes and the running ones got are all steps
    assert len(world.recent) == world.episodes
    assert world.recent[:, 0].sum() + world.episode_return.sum() == 600
    assert (world.recent[:, 0] == world.recent[:, 1]).all()
    assert (world.episode_return == world.episode_length).all()
    np.testing.assert_array_equal(memory.observation[""][memory.open], world.observation)
    successor = (np.arange(memory.written) + memory.ahead[: memory.written])[memory.terminated[: memory.written]]
    final = np.abs(memory.observation[""][successor])  # where a pole fell it had left the track or its angle
    assert ((final[:, 0] > 2.4) | (final[:, 2] > 12 * 2 * np.pi / 360)).all()


@pytest.mark.slow
def test_it_is_resumed_to_the_bit_and_stops_at_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = ended(fast_dqn, replace(CART, run=replace(OPTIONS, run_dir=tmp_path / "whole")))

    report = offpolicy.report

    def killed(session: Run, state: offpolicy.State, net: Any, *given: Any) -> None:
        report(session, state, net, *given)
        if state.step >= 150:
            offpolicy._save(session, state, net)
            raise InterruptedError

    config = replace(CART, run=replace(OPTIONS, run_dir=tmp_path / "cut"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offpolicy, "report", killed)
        with pytest.raises(InterruptedError):
            fast_dqn.train(config)
    found, _ = ended(fast_dqn, config, Run.resume(tmp_path / "cut", "dqn", config, config.total_steps))
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(found[name], value), name
    foresee = fast_dqn.foresee

    def poisoned(state: offpolicy.State, *given: Any) -> Any:
        state.replay.reward[:] = np.nan
        return foresee(state, *given)

    monkeypatch.setattr(fast_dqn, "foresee", poisoned)
    with pytest.raises(ValueError, match="the gradient is not finite, grad_norm is nan at gradient step 1"):
        fast_dqn.train(replace(CART, run=replace(OPTIONS, run_dir=tmp_path / "nan")))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("size", [12, 20])
def test_a_program_writes_and_draws_as_the_replay_does(n: int, size: int) -> None:
    space, actions = gym.spaces.Box(-1, 1, (2,), np.float32), gym.spaces.Discrete(4)
    expected, found = (replay.Replay(space, actions, n, 23) for _ in range(2))
    random = np.random.default_rng(n)
    first = random.random((n, 2), dtype=np.float32)
    expected.begin(first)
    found.begin(first)
    ring, short = found.ring(), []
    for _ in range(60):
        terminated, truncated = random.random(n) < 0.2, random.random(n) < 0.1
        over = terminated | truncated
        seen = random.random((n, 2), dtype=np.float32)
        successor = np.where(over[:, None], random.random((n, 2), dtype=np.float32), seen)
        action, reward = random.integers(4, size=n), random.random(n)
        expected.append(action, Transition(successor, seen, reward, terminated, truncated, over, None))
        step = tensor_replay.Stepped(*map(torch.from_numpy, (action, reward, terminated, over, successor, seen)))
        newest = tensor_replay.store(found.rows, ring, step)
        assert expected.usable(newest.numpy()).all()
        found.advance(ring, n)
        assert (found.written, found.transitions, found.open.tolist()) == (
            expected.written, expected.transitions, expected.open.tolist(),
        )  # fmt: skip
        for name, column in expected._columns().items():
            np.testing.assert_array_equal(found._columns()[name], column, err_msg=name)
        places = torch.from_numpy(random.integers(2**62, size=20))
        rows, filled = tensor_replay.uniform(found.rows, ring, places, size, newest).numpy(), min(expected.written, 23)
        assert len(rows) == size
        assert expected.usable(rows).all()
        digits = places.numpy() % filled, places.numpy() // filled % filled
        kept = min(size, sum(int(expected.usable(digit).sum()) for digit in digits))
        short.append(kept < size)
        np.testing.assert_array_equal(rows[:kept], expected.uniform(size, places.numpy())[:kept])
        if kept == 0:
            np.testing.assert_array_equal(rows, newest[:1])
    assert any(short) == (size == 20)
    assert not all(short)


@pytest.mark.parametrize(
    "other",
    [
        {"environment": environments.Config("CartPole-v1", 2, "sync")},
        {"train_interval": 2},
        {"gradient_steps": 2},
        {"gradient_steps": None},
        {"replay_capacity": 0},
        {"priority_exponent": 0.5},
        {"normalize": normalization.Config(observation=True)},
        {"network": qnetworks.Config((16,), noisy="factorised")},
    ],
)
def test_what_it_does_not_fit_is_dqns(other: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert fast_dqn.fits(CART)
    given: list[dqn.DQN] = []
    monkeypatch.setattr(dqn, "train", lambda config, session, theta: given.append(config))
    config = replace(CART, run=replace(OPTIONS, run_dir=None), **other)
    monkeypatch.setattr(fast_dqn, "Run", lambda *arguments: type("Session", (), {"restored": None})())
    fast_dqn.train(config)
    assert given == [config]


def test_a_stretch_ends_where_something_is_due() -> None:
    """With two environments chance ends after 64 iterations, a copy is due every 15, a row of metrics every 50."""
    nothing: Any = None
    at = lambda k: offpolicy.State(nothing, {}, {}, nothing, nothing, k, 2 * k, 0)  # noqa: E731
    ends, k = [], 0
    while k < 130:
        k += fast_dqn.stretch(at(k), CONFIG)
        ends.append(k)
    assert ends == [15, 30, 45, 50, 60, 64, 75, 90, 100, 105, 120, 128, 130]
