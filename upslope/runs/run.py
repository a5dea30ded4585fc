"""A run: its directory, its resolved configuration, its metrics and checkpoints, and how it goes on after a kill."""

import contextlib
import functools
import json
import logging
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Annotated, Any, Self

import torch
import tyro
from torch import Tensor

from upslope.runs import allocator, checkpoint, denormals, distributed, metrics, progress, settings
from upslope.runs.checkpoint import Checkpoint

log = logging.getLogger(__name__)

CONFIG, SUMMARY, CHECKPOINTS, LOCK = "config.json", "summary.json", "checkpoints", ".lock"


@dataclass(frozen=True)
class Config:
    """What every run has."""

    seed: int = 1
    run_dir: Path | None = None  # None: nothing is written
    checkpoint_seconds: float = 60.0  # between checkpoints; 0 writes one every iteration (a program may make many)
    log_interval: int = 1  # iterations between two lines of metrics
    threads: int = 1  # of torch; small networks are fastest with one
    quiet: bool = False  # no progress display
    compile: bool | None = None  # --compile, --no-compile: gradient steps as one program; None: where it pays

    def __post_init__(self) -> None:
        settings.within(self, 0, None, "checkpoint_seconds")
        settings.within(self, 1, None, "threads", "log_interval")


Options = Annotated[Config, tyro.conf.OmitArgPrefixes]  # on the command line: --seed, not --run.seed


class Run:
    """The edge between an algorithm and the disk. Without a directory it only shows progress."""

    def __init__(self, algorithm: str, config: Any, total_steps: int) -> None:
        """Create the run's directory, or take up the one that `resume` names.

        Args:
            algorithm: name on the command line.
            config: the algorithm's frozen dataclass with a `run: Config`.
            total_steps: where the progress bar ends.

        Raises:
            ValueError: the directory holds a run already.
        """
        self.config: Config = config.run
        named = self.config.run_dir if distributed.rank() == 0 else None  # one rank writes for all
        self.directory = None if named is None else Path(named)
        torch.set_num_threads(self.config.threads)
        self.restored: Checkpoint | None = None
        if self.directory is not None:
            _create(self.directory, algorithm, config)
        self._lock = _lock(self.directory) if self.directory else None
        self._open(algorithm, total_steps)
        self._untouched = True  # nothing was learned yet in the directory that was just made

    @classmethod
    def resume(cls, directory: Path, algorithm: str, config: Any, total_steps: int) -> Self:
        """Take up a run where its newest valid checkpoint left it; `restored` holds that checkpoint."""
        run = cls.__new__(cls)
        run.config, run.directory = config.run, directory if distributed.rank() == 0 else None
        run._lock = _lock(run.directory) if run.directory else None  # first: another process may be writing here
        if run.directory is not None:
            checkpoint.clean(directory / CHECKPOINTS)
        run.restored = checkpoint.newest(directory / CHECKPOINTS)
        written_by = run.restored.state.get("world_size", 1) if run.restored else distributed.world_size()
        if written_by != distributed.world_size():
            raise ValueError(
                f"{directory} was written by {written_by} ranks, not {distributed.world_size()}: resume with as many"
            )
        torch.set_num_threads(run.restored.state["threads"] if run.restored else config.run.threads)
        run._open(algorithm, total_steps)
        return run

    def _open(self, algorithm: str, total_steps: int) -> None:
        allocator.keep_freed_memory()
        state: dict[str, Any] = self.restored.state if self.restored else {"seconds": 0.0, "offsets": {}}
        self._began = time.monotonic() - state["seconds"]
        self._saved_at = time.monotonic()
        self._untouched, self._alone = False, distributed.world_size() == 1
        self.compiled: bool | None = None  # as `compilation.decide` says
        self._resources = contextlib.ExitStack()
        self._saved_step = self.restored.step if self.restored else None
        self._segments: dict[str, str] = state.get("segments", {})  # of the last checkpoint
        self._rate = (time.monotonic(), self.restored.step if self.restored else 0)
        self.metrics = metrics.Metrics(self.directory, state["offsets"]) if self.directory else None
        start = self.restored.step if self.restored else 0
        self.display = progress.Display(algorithm, total_steps, start, self.config.quiet or distributed.rank() > 0)

    def closes(self, resource: Any) -> None:
        """Close this when the run ends, however it ends: workers are not left behind by an error."""
        self._resources.callback(resource.close)

    def __enter__(self) -> Self:
        self.display.__enter__()
        self._resources.enter_context(denormals.flushed())
        return self

    def __exit__(self, *error: Any) -> None:
        self.display.__exit__(*error)
        self._resources.close()
        if self.metrics is not None:
            self.metrics.close()
        if self._lock is not None:
            self._lock.close()
        if self.directory is not None and self._untouched and isinstance(error[1], Exception):
            _remove_empty(self.directory)  # a setting was wrong: the corrected command may use the same name

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training, those before a resume counted in."""
        return time.monotonic() - self._began

    def record(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Metrics and progress of one iteration."""
        self._untouched = False
        now = time.monotonic()
        since, before = self._rate
        speed = (step - before) / max(now - since, 1e-9)
        if now - since > 2.0:  # a rate over the last seconds, not over one iteration
            self._rate = (now, step)
        if self.metrics is not None:
            self.metrics.record(step, self.seconds, dict(numbers))
        self.display.update(step, {**numbers, "steps_per_second": speed})

    def due(self) -> bool:
        """Is it time for a checkpoint?"""
        if self.config.run_dir is None:
            return False
        late = time.monotonic() - self._saved_at >= self.config.checkpoint_seconds
        return late if self._alone else distributed.agreed(late)

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        described: dict[str, Any],
        segments: checkpoint.Segments | None = None,
    ) -> None:
        """Write a checkpoint: `tensors` is all resumable state, `described` what a reader wants to know about it.

        `segments` are immutable parts of that state, each written once.

        A step that has its checkpoint is not written again: replacing it could lose the only one to a kill.
        """
        if self.directory is None or self.metrics is None or step == self._saved_step:
            return
        state = {
            **described,
            "seconds": self.seconds,
            "threads": torch.get_num_threads(),
            "world_size": distributed.world_size(),
            "compiled": bool(self.compiled),
            "versions": versions(),
            "offsets": self.metrics.offsets(),
        }
        path = checkpoint.write(
            self.directory / CHECKPOINTS, step, tensors, state, segments=segments, written=self._segments
        )
        if segments:
            self._segments = json.loads((path / checkpoint.STATE).read_text())["segments"]
        self._saved_at, self._saved_step = time.monotonic(), step

    def finish(self, step: int, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`: the run is complete."""
        if self.directory is not None:
            text = json.dumps({"step": step, "seconds": round(self.seconds, 3), **summary}, indent=1)
            _write_atomically(self.directory / SUMMARY, text)


def read_config(directory: Path) -> dict[str, Any]:
    """A run's `config.json`.

    Raises:
        ValueError: there is no run in the directory, or the file is damaged.
    """
    path = Path(directory) / CONFIG
    try:
        described = json.loads(path.read_text())
        if not isinstance(described, dict) or not {"algorithm", "config"} <= described.keys():
            raise ValueError("it does not name an algorithm and its configuration")
        return described
    except FileNotFoundError as error:
        raise ValueError(f"{directory} is not a run directory: it has no {CONFIG}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


@functools.cache  # not with every checkpoint: looking them up runs finalisers, in which Python drops a Ctrl-C
def versions() -> dict[str, str]:
    """Of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("upslope", "torch", "gymnasium", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _lock(directory: Path) -> IO[str]:
    """Hold the run: two processes on one directory would write over each other.

    Raises:
        ValueError: another process holds it.
    """
    file = open(directory / LOCK, "w")  # noqa: SIM115 - held as long as the run
    try:
        import fcntl
    except ImportError:  # Windows has no advisory locks of this kind
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(f"{directory} is running already in another process") from error
    return file


def _create(directory: Path, algorithm: str, config: Any) -> None:
    if (directory / CONFIG).exists() or (directory.is_dir() and any(directory.iterdir())):
        raise ValueError(
            f"run_dir {directory} exists already; go on with it (upslope resume {directory}) "
            "or name another (--run-dir)"
        )
    directory.mkdir(parents=True, exist_ok=True)
    described = {"algorithm": algorithm, "config": settings.to_json(config), "versions": versions()}
    _write_atomically(directory / CONFIG, json.dumps(described, indent=1))


def _remove_empty(directory: Path) -> None:
    """Remove a run that never took a step, and nothing that is not a run's."""
    for path in (directory / CONFIG, directory / LOCK, *metrics.append_only(directory)):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # someone put something else there
        directory.rmdir()


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
