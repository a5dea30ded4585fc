"""Metrics of a run: one JSON object a line, and the same numbers as TensorBoard events."""

import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
EVENT_SECONDS = 1.0  # between two writes of TensorBoard events


class Metrics:
    """Appends to `metrics.jsonl` and a TensorBoard event file; a resume cuts both back to its checkpoint."""

    def __init__(self, directory: Path, offsets: dict[str, int] | None = None) -> None:
        self.directory = directory
        if offsets is not None:
            cut(directory, offsets)
        self._file = open(directory / METRICS, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        # 0.3 s: only runs that write pay it. Not TensorBoard's EventFileWriter, which has a thread: an interrupt that
        # comes as a lock of its queue was just taken leaves the lock held, and closing the run would wait for ever.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        place = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._events = RecordWriter(open(directory / f"events.out.tfevents.{place}", "wb"))  # noqa: SIM115 - as above
        self._events.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        self._pending: list[tuple[int, float, dict[str, float | None]]] = []  # events: many at once cost a third
        self._written = time.monotonic()

    def record(self, step: int, seconds: float, numbers: dict[str, float | None]) -> None:
        """One line and one event. A number that is not finite is written as null: JSON has no NaN."""
        row: dict[str, Any] = {"step": step, "seconds": round(seconds, 3)}
        row |= {k: v if v is None or isinstance(v, int) or math.isfinite(v) else None for k, v in numbers.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._pending.append((step, time.time(), numbers))
        if time.monotonic() - self._written > EVENT_SECONDS:
            self._write_events()

    def _write_events(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for step, at, numbers in self._pending:
            values = [Summary.Value(tag=k, simple_value=v) for k, v in numbers.items() if v is not None]
            event = Event(step=step, wall_time=at, summary=Summary(value=values))
            self._events.write(event.SerializeToString())
        self._events.flush()
        self._pending, self._written = [], time.monotonic()

    def offsets(self) -> dict[str, int]:
        """Bytes of every append-only file so far, all of them on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._write_events()
        return {path.name: path.stat().st_size for path in append_only(self.directory)}

    def close(self) -> None:
        self._file.close()
        self._write_events()
        self._events.close()


def cut(directory: Path, offsets: dict[str, int]) -> None:
    """Cut every append-only file to its length at the checkpoint; remove those begun after it."""
    for path in append_only(directory):
        if path.name not in offsets:
            path.unlink()
        elif path.stat().st_size > offsets[path.name]:
            os.truncate(path, offsets[path.name])


def read(directory: Path) -> list[dict[str, Any]]:
    """All complete lines of a run's metrics."""
    lines = (directory / METRICS).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is a line still being written


def append_only(directory: Path) -> list[Path]:
    """A run's files that only grow: lines and events."""
    return sorted([*directory.glob("*.jsonl"), *directory.glob("events.out.tfevents.*")])
