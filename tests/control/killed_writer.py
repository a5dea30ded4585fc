"""Trains in children that SIGKILL themselves at the n-th disk operation of a checkpoint, for every n, and resumes them.

usage: python -m tests.control.killed_writer DIRECTORY SAVES ALGORITHM FLAGS…

Prints one JSON object: the operations of each of the first SAVES checkpoints, and what became of each kill.
"""

import builtins
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import upslope.control.ppo  # noqa: F401 - once, for all children
from upslope import cli
from upslope.control import environments, replay
from upslope.runs import checkpoint, metrics

WATCHED = ("fsync", "replace", "unlink", "rmdir")


class Disk:
    """Counts the writer's operations and dies before the one that it is told to."""

    def __init__(self, save: int = 0, at: int = 0) -> None:
        self.save, self.at = save, at
        self.saves, self.count, self.inside = 0, 0, False
        self.operations: list[list[str]] = []
        self.steps: list[int] = []

    def install(self) -> None:
        for name in WATCHED:
            setattr(os, name, self.watched(name, getattr(os, name)))
        checkpoint.open = self.open  # type: ignore[attr-defined]
        write = checkpoint.write

        def written(root: Path, step: int, *arguments: Any, **named: Any) -> Any:
            self.saves, self.count, self.inside = self.saves + 1, 0, True
            self.operations.append([])
            self.steps.append(step)
            result = write(root, step, *arguments, **named)
            self.inside = False
            if self.saves == self.save:  # after the last operation
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        checkpoint.write = written

    def operation(self, name: str, die: Callable[[], None] = lambda: None) -> None:
        if not self.inside:
            return
        self.operations[-1].append(name)
        self.count += 1
        if self.saves == self.save and self.count == self.at:
            die()
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.operation(name)
            return function(*arguments, **named)

        return call

    def open(self, *arguments: Any, **named: Any) -> Any:
        return File(builtins.open(*arguments, **named), self)


class File:
    """A file that dies with half of the bytes written."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, payload: bytes) -> None:
        def half() -> None:
            self.file.write(payload[: len(payload) // 2])
            self.file.flush()

        self.disk.operation("write", half)
        self.file.write(payload)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def in_child(function: Callable[..., None], *arguments: Any) -> tuple[int, Any]:
    """Run in a forked process; its exit code and what it sent."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=function, args=(*arguments, there))
    process.start()
    there.close()
    try:
        sent = here.recv()
    except EOFError:
        sent = None
    process.join()
    assert process.exitcode is not None
    return process.exitcode, sent


def train(arguments: list[str], disk: Disk, pipe: Any) -> None:
    disk.install()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    assert cli.main(["train", *arguments]) == 0
    pipe.send((disk.operations, disk.steps))


def resume(arguments: list[str], directory: Path, pipe: Any) -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    steps, recorded = 0, []
    step, record = environments.Environments.step, metrics.Metrics.record

    def counted(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*given)

    def noted(self: Any, at: int, *given: Any) -> None:
        recorded.append(at)
        record(self, at, *given)

    environments.Environments.step = counted  # type: ignore[method-assign]
    metrics.Metrics.record = noted  # type: ignore[method-assign]
    assert cli.main(["resume", str(directory)]) == 0
    pipe.send((steps, recorded))


def newest_step(directory: Path) -> int | None:
    found = checkpoint.newest(directory / "checkpoints")
    return None if found is None else found.step


def main(root: Path, saves: int, arguments: list[str]) -> None:
    replay.SEGMENT_BYTES = 2**13  # 256 rows; the children are forked
    status, sent = in_child(train, [*arguments, "--run-dir", str(root / "whole")], Disk())
    assert status == 0
    operations, steps = sent
    saves = min(saves, len(steps))
    killed = []
    for save in range(1, saves + 1):
        names = operations[save - 1]
        for at in range(1, len(names) + (2 if save == saves else 1)):
            directory = root / f"{save}-{at}"
            status, _ = in_child(train, [*arguments, "--run-dir", str(directory)], Disk(save, at))
            assert status == -signal.SIGKILL, status
            before = newest_step(directory)
            status, sent = in_child(resume, arguments, directory)
            assert status == 0, (save, at, status)
            killed.append(
                {
                    "save": save,
                    "at": at,
                    "operation": names[at - 1] if at <= len(names) else "leaving",
                    "directory": str(directory),
                    "before": before,
                    "env_steps": sent[0],
                    "recorded": sent[1],
                }
            )
    sys.stdout.write(json.dumps({"operations": operations[:saves], "steps": steps, "killed": killed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
