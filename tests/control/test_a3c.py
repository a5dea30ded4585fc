"""A3C: one worker is A2C, several lose nothing but elements, and what dies is noticed and leaves no trace."""

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from tests.control.faulty import KILL, RAISE, REWARD
from tests.control.test_kill import group, lines, wait_for_group
from tests.program import ENVIRONMENT, ROOT, command, metrics, succeed
from upslope.control import a3c, actor_critic, agent, environments, learner, normalization, optimizers, presets, rollout
from upslope.control.a3c import A3C
from upslope.control.learner import State
from upslope.control.parameters import Net
from upslope.control.shared import Report, Shared
from upslope.control.shared import start as share
from upslope.control.workers import Ended, Workers
from upslope.core import advantages, returns
from upslope.runs import checkpoint, distributed
from upslope.runs import run as runs
from upslope.runs.run import CHECKPOINTS, Run

QUIET = runs.Config(quiet=True, log_interval=10)
AFTER = 300  # steps of a worker's process until its environment goes wrong; its self-check takes fewer


def small(environment_id: str = "CartPole-v1", **changes: object) -> A3C:
    config = A3C(environment=environments.Config(environment_id, 2, "sync"), run=QUIET, workers=1, total_steps=200)
    return replace(config, **changes)  # type: ignore[arg-type]


def faulty(fault: int, **changes: object) -> A3C:
    environment = environments.Config("tests.control.faulty:Faulty-v0", 1, kwargs={"after": AFTER, "fault": fault})
    return small(**{"environment": environment, "workers": 2, "total_steps": 100_000, **changes})


def first_batch(config: A3C) -> tuple[State, Net, rollout.Batch]:
    """What the first update starts from."""
    state, net = learner.start(config.a2c(), Run("a2c", config.a2c(), config.total_steps))
    data, _ = learner.collect(net, state, config.a2c(), config.rollout_length)
    discounts, traces = returns.boundaries(data.terminated, data.truncated, config.gamma, 1.0)
    psi = advantages.gae(data.reward, data.value, data.next_value, discounts, traces)
    return state, net, rollout.flatten(data, psi, psi + data.value)


@pytest.mark.parametrize("optimizer", [optimizers.RMSProp(), optimizers.Adam(), optimizers.SGD(1e-2, 0.9)])
def test_an_update_is_a2cs(optimizer: optimizers.Optimizer) -> None:
    """The same batch, the same θ, the same averages afterwards; several steps, so that the averages matter."""
    config = small(optimizer=optimizer)
    state, net, batch = first_batch(config)
    shared = share(config, Run("a3c", config, config.total_steps), state.theta.clone())[0]
    for step in range(3):
        ours = state._replace(optimizer=optimizers.State(step, shared.averages))
        a3c.update(shared, ours, net, batch, config.a2c())  # the gradient at θ' = state.theta
        theta, memory, _ = actor_critic.update(state, net, batch, config.a2c())
        torch.testing.assert_close(shared.theta, theta, rtol=1e-5, atol=1e-7)
        state = state._replace(theta=theta, optimizer=memory)
    for mine, theirs in zip(shared.averages, state.optimizer.memory, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9)


def test_one_worker_is_a2c() -> None:
    """The whole loop: 20 iterations on the same environments with the same noise."""
    config = small()
    shared = share(config, Run("a3c", config, config.total_steps), None)[0]
    start = shared.theta.clone()
    sent: list[Report] = []
    a3c.work(0, sent.append, config.a2c(), shared, None)
    torch.testing.assert_close(shared.theta, actor_critic.train(config.a2c()).theta, rtol=1e-4, atol=1e-6)
    assert (shared.theta - start).abs().max() > 1e-3
    assert (int(shared.iterations), int(shared.steps)) == (20, 200)
    assert sum(len(report.episodes) for report in sent) == int(shared.episodes)
    assert all((report.episodes[:, 0] == report.episodes[:, 1]).all() for report in sent)  # CartPole pays 1 a step


def test_a_non_finite_gradient_does_not_reach_the_shared_theta(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(max_grad_norm=None)
    state, net, batch = first_batch(config)
    shared = share(config, Run("a3c", config, config.total_steps), state.theta)[0]
    before = shared.theta.clone()
    times_infinity = lambda *given: (actor_critic.objective(*given)[0] * torch.inf, None)  # noqa: E731
    monkeypatch.setattr(a3c, "objective", times_infinity)
    with pytest.raises(ValueError, match="gradient is not finite"):
        a3c.update(shared, state, net, batch, config.a2c())
    assert torch.equal(shared.theta, before)
    assert not shared.averages[0].any()


ADDITIONS = 2000


def add(worker: int, send: Callable[[int], None], shared: Shared) -> None:
    for _ in range(ADDITIONS):
        shared.theta.add_(1.0)
        shared.iterations[worker] += 1
    send(worker)


def test_concurrent_updates_arrive() -> None:
    """Counters are exact. An element may lose additions to the other worker (Hogwild), never below one worker's own."""
    config = small(workers=2)
    shared = share(config, Run("a3c", config, config.total_steps), None)[0]
    shared.theta.zero_()
    crew, sent = Workers(add), []
    for worker in (0, 1):
        crew.start(worker, shared)
    while crew.running:
        sent += crew.wait(1.0)
    assert sorted(message for message in sent if not isinstance(message[1], Ended)) == [(0, 0), (1, 1)]
    assert [message for message in sent if isinstance(message[1], Ended)] != []
    assert shared.iterations.tolist() == [ADDITIONS, ADDITIONS]
    assert shared.theta.max() <= 2 * ADDITIONS
    assert shared.theta.mean() > ADDITIONS  # more than one worker's arrived


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            REWARD,
            r"worker \d: .*NaN or infinite reward in environment 0 at step \d of its episode \d+ \(its reset seed",
        ),
        (RAISE, r"worker \d: RuntimeError: the simulator fell over"),
    ],
)
def test_a_workers_error_ends_the_run(fault: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        a3c.train(faulty(fault, workers=1 if fault == RAISE else 2))
    if fault == RAISE:
        assert "reset seed" in caught.value.__notes__[0]
    assert not spawned()


def test_when_all_workers_are_lost_the_run_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = replace(QUIET, run_dir=tmp_path / "run", checkpoint_seconds=0)
    with caplog.at_level(logging.WARNING), pytest.raises(ChildProcessError, match="every worker is lost, at step"):
        a3c.train(faulty(KILL, run=run))
    said = [record.getMessage() for record in caplog.records]
    for worker in (0, 1):
        assert any(f"worker {worker} is lost, its exit code is -9" in line for line in said)
    saved = checkpoint.newest(tmp_path / "run" / CHECKPOINTS)
    assert saved is not None
    assert saved.tensors["theta"].isfinite().all()
    assert saved.step == int(saved.tensors["workers.steps"].sum())
    assert saved.step == 5 * int(saved.tensors["optimizer.step"])  # T = 5 in one environment each
    assert not spawned()


@pytest.mark.slow
def test_lost_workers_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each process lives for less than `AFTER` steps, so two alone could not take these."""
    run = replace(QUIET, run_dir=tmp_path / "run")
    config = faulty(KILL, run=run, restart_workers=True, total_steps=2 * AFTER + 50)
    with caplog.at_level(logging.WARNING):
        a3c.train(config)
    saved = checkpoint.newest(tmp_path / "run" / CHECKPOINTS)
    assert saved is not None
    assert saved.step >= config.total_steps
    assert int(saved.tensors["workers.place"].max()) >= 2  # a replacement's episodes are new ones
    assert any("another takes its place" in record.getMessage() for record in caplog.records)


def spawned(process: psutil.Process | None = None) -> list[psutil.Process]:
    """Living worker processes of a process."""
    found = []
    for child in (process or psutil.Process()).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # gone since, or a zombie of another test's
            found += [child] if any("spawn_main" in word for word in child.cmdline()) else []
    return found


def started(directory: Path, *more: object) -> subprocess.Popen[str]:
    """A run in a process group of its own that has a checkpoint."""
    arguments = more or ("train", "a3c", "--total-steps", 10**8, "--run-dir", directory, "--checkpoint-seconds", 0)
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - a shell's background jobs ignore it
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=ENVIRONMENT, text=True, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=heed,
    )  # fmt: skip
    before, until = checkpoint.steps(directory / CHECKPOINTS), time.monotonic() + 90
    while checkpoint.steps(directory / CHECKPOINTS)[-1:] == before[-1:] and time.monotonic() < until:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    return process


@pytest.mark.slow
def test_kills_leave_no_orphans_and_the_run_goes_on(tmp_path: Path) -> None:
    """SIGKILL of the parent, then Ctrl-C; a resume after each, and to the end."""
    directory = tmp_path / "run"
    process = started(directory)
    try:
        assert len(group(process.pid)) >= 3
        process.send_signal(signal.SIGKILL)
        assert wait_for_group(process.pid), "workers outlive their parent"
        process = started(directory, "resume", directory)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
        assert wait_for_group(process.pid), "workers outlive Ctrl-C"
    finally:
        if group(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    saved = checkpoint.newest(directory / CHECKPOINTS)
    assert saved is not None
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace("100000000", str(saved.step + 2000)))
    succeed("resume", directory)
    end = checkpoint.newest(directory / CHECKPOINTS)
    assert end is not None
    assert saved.step + 2000 <= end.step <= saved.step + 2000 + 2 * 2 * 8 * 5  # at most an iteration too much for each
    for worker in (0, 1):
        assert distributed.own("world", end.tensors, worker)["steps"] == end.tensors["workers.steps"][worker]
    assert end.tensors["workers.place"].tolist() == [0, 1]  # the worlds were there
    assert end.step == int(end.tensors["workers.steps"].sum()) <= 40 * int(end.tensors["optimizer.step"])
    steps = [row["step"] for row in metrics(directory)]
    assert steps == sorted(steps)
    assert agent.load(presets.A3C_PRESETS["CartPole-v1"], directory).evaluate(3).returns.min() > 0


@pytest.mark.slow
def test_goes_on_learning_when_one_of_two_workers_is_killed(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    config = replace(presets.A3C_PRESETS["CartPole-v1"], total_steps=60_000)
    config = replace(config, run=runs.Config(seed=3, run_dir=directory, quiet=True, log_interval=25))

    def kill() -> None:
        until = time.monotonic() + 60
        while lines(directory) < 6 and time.monotonic() < until:
            time.sleep(0.01)
        spawned()[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    a3c.train(config)
    killer.join()
    rows = metrics(directory)
    alone = [row for row in rows if row["workers"] == 1 and row["step"] < config.total_steps]
    assert alone[0]["step"] < 15_000
    assert alone[0]["episode_return"] < 60
    assert len({row["worker"] for row in alone}) == 1  # the other one was lost for good
    assert rows[-1]["step"] >= config.total_steps
    assert rows[-1]["episode_return"] >= 120


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, r"workers is 0, allowed: 1 or more"),
        ({"k_step": 0}, r"k_step is 0, allowed: 1 or more"),
        ({"gamma": 1.5}, r"gamma is 1.5, allowed: 0 to 1"),
        ({"normalize": normalization.Config(observation=True)}, r"normalize.observation is True, but each worker"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        a3c.train(small())
