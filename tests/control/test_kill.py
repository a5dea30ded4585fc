"""A killed run that is resumed ends as the uninterrupted one: the same fingerprint, the same metrics but for times."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.program import ENVIRONMENT, ROOT, SMALL, command, fingerprint, metrics, succeed
from upslope.runs import checkpoint

KILLS = 5
ITERATIONS = 16

NORMALIZED = ("--normalize.observation", "--normalize.reward")
RAW = ("--normalize.no-observation", "--normalize.no-reward")
EVERY = ("--checkpoint-seconds", 0)


def flags(environment: str, num_envs: int, length: int, *more: object) -> tuple[object, ...]:
    """Of a small run of at least `ITERATIONS` iterations on the environment's preset."""
    total = ITERATIONS * num_envs * length
    size = ("--env", environment, "--environment.num-envs", num_envs, "--rollout-length", length)
    return ("ppo", *size, "--total-steps", total, *SMALL, *more)


def lines(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_when(arguments: list[str], directory: Path, count: int, delay: float) -> None:
    """Start a process and SIGKILL it `delay` seconds after its metrics have `count` lines."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        until = time.monotonic() + 60
        while lines(directory) < count and process.poll() is None and time.monotonic() < until:
            time.sleep(0.0005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL, (process.returncode, errors)
        assert wait_for_group(process.pid), "worker processes outlive the killed run"
    finally:
        if group(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def group(leader: int) -> list[psutil.Process]:
    """Living processes that the leader's session started."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def wait_for_group(leader: int, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while group(leader) and time.monotonic() < until:
        time.sleep(0.02)
    return not group(leader)


def killed_and_resumed(directory: Path, arguments: tuple[object, ...], seed: int) -> None:
    """Train, SIGKILLed at `KILLS` random moments and resumed after each."""
    moments = random.Random(seed)
    counts = sorted(moments.sample(range(ITERATIONS - 3), KILLS))  # lines written; 0: before or while the first is
    start = command("train", *arguments, "--run-dir", directory)
    for count in counts:
        kill_when(start, directory, count, moments.uniform(0, 0.03))
        if (directory / "config.json").exists():
            start = command("resume", directory, "--env", arguments[2])
    assert not (directory / "summary.json").exists()
    succeed("resume", directory, "--env", arguments[2])
    assert (directory / "summary.json").exists()


def same(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    assert fingerprint(one) == fingerprint(other)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (one, other)]
    for summary in summaries:
        del summary["seconds"]
    assert summaries[0] == summaries[1]


def check(tmp_path: Path, arguments: tuple[object, ...], seed: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeed("train", *arguments, "--run-dir", whole)  # with its checkpoints a minute apart: none but the last
    assert len(metrics(whole)) >= ITERATIONS
    killed_and_resumed(broken, (*arguments, *EVERY), seed)
    same(whole, broken)


def test_cartpole_normalized(tmp_path: Path) -> None:
    check(tmp_path, flags("CartPole-v1", 4, 32, *NORMALIZED), seed=1)


DQN = (
    "--environment.num-envs", 2, "--network.hidden", 8, "--network.dueling", "--network.noisy", "factorised",
    "--double", "--priority-exponent", 0.6, "--n-step", 3, "--batch-size", 8, "--learning-starts", 32,
    "--target-interval", 100, "--log-interval", 1, "--quiet",
)  # fmt: skip


def dqn(
    environment: str, length: int, capacity: int, *more: object, iterations: int = ITERATIONS
) -> tuple[object, ...]:
    """Everything of DQN at once on small segments: some are written, some forgotten again."""
    size = ("--train-interval", length, "--replay-capacity", capacity, "--total-steps", iterations * 2 * length)
    return ("dqn", "--env", environment, *DQN, *size, *more)


SLOW = {
    "cartpole": flags("CartPole-v1", 4, 32),
    "cartpole sync next-step": flags(
        "CartPole-v1", 3, 40, *NORMALIZED, "--environment.vectorization", "sync", "--environment.autoreset", "next-step"
    ),
    "cartpole sync same-step": flags(
        "CartPole-v1", 3, 40, *NORMALIZED, "--environment.vectorization", "sync", "--environment.autoreset", "same-step"
    ),
    "pendulum": flags("Pendulum-v1", 2, 64),
    "pendulum normalized": flags("Pendulum-v1", 2, 64, *NORMALIZED),
    "lunar lander": flags("LunarLander-v3", 2, 64),
    "lunar lander normalized": flags("LunarLander-v3", 2, 64, *NORMALIZED),
    "bipedal walker": flags("BipedalWalker-v3", 2, 64, *RAW),
    "bipedal walker normalized": flags("BipedalWalker-v3", 2, 64, *NORMALIZED),
    "recurrent masked next-step": flags(
        "tests.control.recall:Gates-v0",
        3,
        16,
        *NORMALIZED,
        "--network.memory",
        "gru",
        "--network.memory-size",
        4,
        "--environment.vectorization",
        "sync",
        "--environment.autoreset",
        "next-step",
    ),
    "dqn replayed, next-step": dqn(
        "LunarLander-v3", 64, 900, "--normalize.observation", "--environment.autoreset", "next-step"
    ),
    "pixels": flags("tests.control.pixels:Pixels-v0", 2, 32, "--network.cnn-features", 16, "--normalize.reward"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_killed_at_random_moments(tmp_path: Path, name: str) -> None:
    check(tmp_path, SLOW[name], seed=len(name))


@pytest.mark.slow
@pytest.mark.parametrize("autoreset", ["disabled", "same-step", "next-step"])
def test_killed_workers_equal_one_process(tmp_path: Path, autoreset: str) -> None:
    """Asynchronous, killed and resumed, against synchronous and whole: only the configuration tells them apart."""
    arguments = flags("LunarLander-v3", 2, 64, *NORMALIZED, "--environment.autoreset", autoreset)
    whole, broken = tmp_path / "sync", tmp_path / "async"
    succeed("train", *arguments, "--environment.vectorization", "sync", "--run-dir", whole)
    killed_and_resumed(broken, (*arguments, *EVERY, "--environment.vectorization", "async"), seed=3)
    same(whole, broken)


# Kills inside the checkpoint writer, at every operation that reaches the disk

WRITER = {  # environment, how many, rollout length, iterations
    "native": ("CartPole-v1", 4, 16, 6),
    "replayed": ("Pendulum-v1", 2, 32, 6),
    "a single iteration": ("Pendulum-v1", 2, 32, 1),
}
SAVES = 4  # the first two only write, from the third on the oldest is removed


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITER)
def test_killed_at_every_operation_of_the_writer(tmp_path: Path, name: str) -> None:
    environment, num_envs, length, iterations = WRITER[name]
    total = iterations * num_envs * length
    size = ("--environment.num-envs", num_envs, "--rollout-length", length, "--total-steps", total)
    kill_everywhere(tmp_path, ("ppo", "--env", environment, *size, *SMALL, *EVERY, *NORMALIZED), length, iterations)


@pytest.mark.slow
def test_killed_at_every_operation_of_the_writer_of_segments(tmp_path: Path) -> None:
    """Segments of 256 rows: every checkpoint adds two, the third forgets those that only the first named."""
    kill_everywhere(tmp_path, (*dqn("CartPole-v1", 256, 600, iterations=3), "--network.noisy", "none", *EVERY), 256, 3)
    assert list((tmp_path / "whole" / "checkpoints" / checkpoint.SEGMENTS).iterdir())


def named(directory: Path, step: int) -> list[str]:
    return list(checkpoint.read(directory / "checkpoints", step).segments)


def kill_everywhere(tmp_path: Path, flags: tuple[object, ...], length: int, iterations: int) -> None:
    arguments = [*map(str, flags)]
    driver = [sys.executable, "-m", "tests.control.killed_writer", str(tmp_path), str(SAVES), *arguments]
    result = subprocess.run(driver, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    names = [operation for save in told["operations"] for operation in save]
    assert {"write", "fsync", "replace"} <= set(names)
    assert iterations == 1 or {"unlink", "rmdir"} <= set(names)
    assert len(told["killed"]) == len(names) + 1  # before each, and after the last
    whole = tmp_path / "whole"
    expected, steps = metrics(whole), [row["step"] for row in metrics(whole)]
    final = fingerprint(whole)
    for kill in told["killed"]:
        where = f"killed before {kill['operation']} (operation {kill['at']}) of checkpoint {kill['save']}"
        directory = Path(kill["directory"])
        before = kill["before"]  # the newest valid checkpoint's step when the process was killed; None: there was none
        # what had been written before the interrupted checkpoint is never lost
        least = told["steps"][kill["save"] - 2] if kill["save"] >= 2 else None
        assert before in (least, told["steps"][kill["save"] - 1]), where
        assert metrics(directory) == expected, where
        newest = checkpoint.newest(directory / "checkpoints")
        assert newest is not None, where
        assert checkpoint.fingerprint(newest.tensors, newest.state.get("segments")) == final, where
        # no step before the last valid checkpoint is taken again, none after it is left out
        done = 0 if before is None else steps.index(before) + 1
        assert kill["recorded"] == steps[done:], where
        assert kill["env_steps"] == (len(steps) - done) * length, where
        assert not list((directory / "checkpoints").rglob(".partial-*")), where
        segments = {path.stem for path in (directory / "checkpoints" / checkpoint.SEGMENTS).glob("*")}
        assert segments == {
            name for step in checkpoint.steps(directory / "checkpoints") for name in named(directory, step)
        }
