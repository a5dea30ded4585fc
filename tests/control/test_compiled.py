"""Compiled and eager runs agree; a compiled run is killed and resumed to the bit; nothing leaves a program."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.control.test_kill import kill_when, same
from tests.program import command, succeed
from upslope.control import environments, fast_ppo, learner, networks, normalization, optimizers, penalty, ppo, rollout
from upslope.control import loop as loop_module
from upslope.control.ahead import compiled
from upslope.control.loop import loop
from upslope.control.parameters import Net
from upslope.runs import run as runs

UPDATES = 10
PENALTY = penalty.Config(coef=0.5)


def settings(vectorization: str, environment: str = "CartPole-v1", **more: Any) -> ppo.PPO:
    return ppo.PPO(
        environment=environments.Config(environment, 4, vectorization), network=networks.Config(hidden=(16, 16)),  # type: ignore
        optimizer=optimizers.Adam(1e-3), rollout_length=16, num_epochs=2, minibatch_size=32, total_steps=64 * UPDATES,
        run=runs.Config(seed=3, quiet=True), **more,
    )  # fmt: skip


def trace(config: ppo.PPO, monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, dict[str, float]]]:
    """θ and the numbers after every iteration."""
    seen: list[tuple[torch.Tensor, dict[str, float]]] = []

    def note(session: Any, state: learner.State, net: Net, config: Any, numbers: Any) -> None:
        seen.append((state.theta.clone(), {name: float(value) for name, value in numbers.items()}))

    monkeypatch.setattr(learner, "report", note)
    fast_ppo.train(config)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vectorization", "environment", "part", "more"),
    [
        ("tensor", "Pendulum-v1", 8, {"normalize": normalization.Config(observation=True), "kl_penalty": PENALTY}),
        ("native", "CartPole-v1", 512, {"clip_value": 0.2}),  # with reset rows
    ],
)
def test_compiled_and_eager_agree_over_ten_updates(
    vectorization: str,
    environment: str,
    part: int,
    more: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same noise, the same θ and numbers to 1e-4. A graph break would be an error: programs are whole."""
    config = settings(vectorization, environment, **more)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # kept programs are of parts of 512
    monkeypatch.setattr(loop_module, "PART", part)
    eager, fast = (
        trace(replace(config, run=replace(config.run, compile=answer)), monkeypatch) for answer in (False, True)
    )
    assert len(eager) == len(fast) >= UPDATES
    for (theta, numbers), (other, others) in zip(eager[:UPDATES], fast, strict=False):
        torch.testing.assert_close(theta, other, rtol=0, atol=1e-4)
        assert numbers.keys() == others.keys()
        for name, value in numbers.items():
            assert others[name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name
    assert (eager[0][0] - eager[-1][0]).abs().max() > 1e-3  # θ has moved


@pytest.mark.parametrize("valid", [None, 40, 3])
@pytest.mark.parametrize(
    ("environment", "more"),
    [
        ("Pendulum-v1", {"whiten_advantages": True, "clip_value": 0.2, "entropy_coef": 0.1}),
        ("CartPole-v1", {"whiten_advantages": False, "kl_penalty": PENALTY}),
        ("CartPole-v1", {"whiten_advantages": True, "minibatch_size": 64, "network": networks.Config(shared=True)}),
    ],
)
def test_what_is_computed_in_parts_is_that_of_the_whole(
    environment: str, more: dict[str, Any], valid: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollout and an update, of parts of 8 rows and undivided; with 3 valid rows most parts have none that counts."""
    config = replace(settings("tensor", environment), normalize=normalization.Config(observation=True), **more)
    counts = None if valid is None else torch.randperm(64, generator=torch.Generator().manual_seed(1)) < valid
    found = []
    for part in (8, 512):
        monkeypatch.setattr(loop_module, "PART", part)
        with runs.Run("ppo", config, config.total_steps) as session:
            state, net = learner.start(config, session, None)
            data, _ = learner.collect(net, state, config, config.rollout_length)
            batch = rollout.flatten(data, data.reward, value_target=data.reward + data.value)._replace(valid=counts)
            theta, _, numbers = fast_ppo.update(state, net, batch, config, fast_ppo.give(state, config))
        found.append((data, theta.clone(), {name: float(value) for name, value in numbers.items()}))
    (data, theta, numbers), (others_data, other, others) = found
    for name in ("logp", "value", "next_value"):
        torch.testing.assert_close(getattr(data, name), getattr(others_data, name))
    torch.testing.assert_close(theta, other, rtol=0, atol=2e-5)
    assert numbers == pytest.approx(others, rel=1e-4, abs=1e-6)
    assert ("kl_coef" in numbers) == ("kl_penalty" in more)


@pytest.mark.slow
def test_a_compiled_run_is_resumed_to_the_bit(tmp_path: Path) -> None:
    """SIGKILL in the middle; what is resumed ends as the uninterrupted run, and is compiled as it was."""
    flags = (
        "ppo", "--env", "CartPole-v1", "--environment.vectorization", "tensor", "--environment.num-envs", 4,
        "--network.hidden", 16, 16, "--rollout-length", 16, "--num-epochs", 2, "--minibatch-size", 32, "--no-preset",
        "--total-steps", 64 * 60, "--compile", "--quiet",
    )  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeed("train", *flags, "--run-dir", whole)
    kill_when(command("train", *flags, "--run-dir", broken, "--checkpoint-seconds", 0), broken, 20, 0.01)
    assert not (broken / "summary.json").exists()
    succeed("resume", broken)
    same(whole, broken)
    states = [json.loads((max((run / "checkpoints").iterdir()) / "state.json").read_text()) for run in (whole, broken)]
    assert [state["compiled"] for state in states] == [True, True]


@pytest.mark.slow
def test_a_loop_is_the_same_in_a_program_and_two_are_apart() -> None:
    """y ← a y + x and y ← a y - x differ in the body of the loop alone."""
    x = torch.arange(6.0).view(3, 2)
    for sign in (1.0, -1.0):

        def recurrence(start: torch.Tensor, x: torch.Tensor, sign: float = sign) -> Any:
            return loop(lambda y, x_t: (0.5 * y + sign * x_t, (2 * y,)), start, x)

        torch._dynamo.reset()
        start = torch.ones(2)
        last, (rows,) = compiled(recurrence)(start, x)
        expected, seen = start, []
        for x_t in x:
            seen.append(2 * expected)
            expected = 0.5 * expected + sign * x_t
        torch.testing.assert_close(last, expected)
        torch.testing.assert_close(rows, torch.stack(seen))


@pytest.mark.slow
def test_loops_are_the_same_in_a_program() -> None:
    """One without outs, in another: the sum of the gradients of |x·y|²/2 over the x of a part, and a step down it. One
    whose turns exchange what they carry, turn it round, leave it, write into it, and have it read by a loop within."""

    def total(y: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        return loop_module.fold(lambda sum_, x: sum_ + x * (x @ y), torch.zeros_like(y), part)

    def descend(y: torch.Tensor, parts: torch.Tensor) -> Any:
        return loop(lambda y, part: (y - 0.1 * total(y, part), (y.sum(),)), y, parts)

    def exchange(y: torch.Tensor, parts: torch.Tensor) -> Any:
        def turn(now: Any, part: torch.Tensor) -> Any:
            a, b, square, still, counts = now
            counts[1] += 1
            inner = loop(lambda s, x: (s + x @ a, (x * b,)), a.sum(), part)
            return (b, a + inner[0], square.T.contiguous(), still, counts), (inner[1][0].sum(0), square[0])

        square = torch.arange(4.0).view(2, 2)
        return loop(turn, (y, 2 * y, square, y.flip(0), torch.zeros(3)), parts)

    generator = torch.Generator().manual_seed(0)
    y, parts = torch.randn(5, generator=generator), torch.randn(3, 4, 5, generator=generator)
    expected, sums = y, []
    for part in parts:
        sums.append(expected.sum())
        expected = expected - 0.1 * part.T @ (part @ expected)
    program = compiled(lambda y, parts: (total(y, parts[0]), descend(y, parts), exchange(y, parts)))
    first, (last, (rows,)), (carry, outs) = program(y, parts)
    torch.testing.assert_close(first, parts[0].T @ (parts[0] @ y))
    torch.testing.assert_close(last, expected)
    torch.testing.assert_close(rows, torch.stack(sums))
    a, b, square = y, 2 * y, torch.arange(4.0).view(2, 2)
    for i, part in enumerate(parts):
        torch.testing.assert_close(outs[0][i], (part * b).sum(0))
        torch.testing.assert_close(outs[1][i], square[0])
        a, b, square = b, a + a.sum() + (part @ a).sum(), square.T
    for found, expected in zip(carry, (a, b, square, y.flip(0), torch.tensor([0.0, 3.0, 0.0])), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_cannot_be_compiled_says_why() -> None:
    for more, reason in (
        ({"target_kl": 0.01}, "target_kl"),
        ({"network": networks.Config(memory="gru")}, "memory"),
    ):
        config = replace(settings("tensor"), **more)
        config = replace(config, run=replace(config.run, compile=True))
        with pytest.raises(ValueError, match=f"compile is True, but this run cannot be compiled: .*{reason}"):
            fast_ppo.train(config)


def test_an_algorithm_that_is_not_compiled_says_so() -> None:
    config = settings("sync")
    with pytest.raises(ValueError, match="compile is True, but this algorithm is not compiled"):
        ppo.train(replace(config, run=replace(config.run, compile=True)))
