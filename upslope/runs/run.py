"""A run: its directory, its resolved configuration, its metrics and checkpoints, and how it goes on after a kill."""

import dataclasses
import json
import logging
import os
import platform
import time
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import tyro
from torch import Tensor

from upslope.runs import checkpoint, metrics, progress
from upslope.runs.checkpoint import Checkpoint

log = logging.getLogger(__name__)

CONFIG, SUMMARY, CHECKPOINTS = "config.json", "summary.json", "checkpoints"


@dataclass(frozen=True)
class Config:
    """What every run has."""

    seed: int = 1
    run_dir: Path | None = None  # None: nothing is written
    checkpoint_seconds: float = 60.0  # between checkpoints; 0 writes one every iteration
    threads: int = 1  # of torch; small networks are fastest with one
    quiet: bool = False  # no progress display

    def __post_init__(self) -> None:
        if not self.checkpoint_seconds >= 0:
            raise ValueError(f"checkpoint_seconds is {self.checkpoint_seconds}, allowed: 0 or more")
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}, allowed: 1 or more")


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
        self.directory = None if self.config.run_dir is None else Path(self.config.run_dir)
        torch.set_num_threads(self.config.threads)
        self.restored: Checkpoint | None = None
        if self.directory is not None:
            _create(self.directory, algorithm, config)
        self._open(algorithm, total_steps)

    @classmethod
    def resume(cls, directory: Path, algorithm: str, config: Any, total_steps: int) -> Self:
        """Take up a run where its newest valid checkpoint left it; `restored` holds that checkpoint."""
        run = cls.__new__(cls)
        run.config, run.directory = config.run, directory
        checkpoint.clean(directory / CHECKPOINTS)
        run.restored = checkpoint.newest(directory / CHECKPOINTS)
        torch.set_num_threads(run.restored.state["threads"] if run.restored else config.run.threads)
        run._open(algorithm, total_steps)
        return run

    def _open(self, algorithm: str, total_steps: int) -> None:
        state: dict[str, Any] = self.restored.state if self.restored else {"seconds": 0.0, "offsets": {}}
        self._began = time.monotonic() - state["seconds"]
        self._saved_at = time.monotonic()
        self._rate = (time.monotonic(), self.restored.step if self.restored else 0)
        self.metrics = metrics.Metrics(self.directory, state["offsets"]) if self.directory else None
        start = self.restored.step if self.restored else 0
        self.display = progress.Display(algorithm, total_steps, start, self.config.quiet)

    def __enter__(self) -> Self:
        self.display.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.display.__exit__(*error)
        if self.metrics is not None:
            self.metrics.close()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training, those before a resume counted in."""
        return time.monotonic() - self._began

    def record(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Metrics and progress of one iteration."""
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
        return self.directory is not None and time.monotonic() - self._saved_at >= self.config.checkpoint_seconds

    def save(self, step: int, tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
        """Write a checkpoint: `tensors` is all resumable state, `described` what a reader wants to know about it."""
        if self.directory is None or self.metrics is None:
            return
        state = {
            **described,
            "seconds": self.seconds,
            "threads": torch.get_num_threads(),
            "compiled": False,
            "versions": versions(),
            "offsets": self.metrics.offsets(),
        }
        checkpoint.write(self.directory / CHECKPOINTS, step, tensors, state)
        self._saved_at = time.monotonic()

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
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{directory} is not a run directory: it has no {CONFIG}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def to_json(config: Any) -> Any:
    """A dataclass as JSON values; dataclasses say their type, so that a union can be read back.

    >>> to_json(Config(seed=3))["seed"]
    3
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": type(config).__name__, **fields}
    if isinstance(config, Path):
        return str(config)
    if isinstance(config, Mapping):
        return {str(key): to_json(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_json(value) for value in config]
    return config


def from_json(kind: Any, value: Any) -> Any:
    """The inverse of `to_json` for a type annotation.

    >>> from_json(Config, to_json(Config(seed=3))) == Config(seed=3)
    True
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return from_json(arguments[0], value)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        named = [a for a in arguments if dataclasses.is_dataclass(a) and getattr(a, "__name__", None) == _type(value)]
        plain = [a for a in arguments if a is not type(None)]
        return from_json((named or plain)[0], value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind, include_extras=True)
        names = {f.name for f in dataclasses.fields(kind)}
        unknown = set(value) - names - {"type"}
        if unknown:
            raise ValueError(
                f"{kind.__name__} has no field {', '.join(sorted(unknown))}; allowed: {', '.join(sorted(names))}"
            )
        return kind(**{name: from_json(hints[name], value[name]) for name in names if name in value})
    if origin is tuple:
        return tuple(from_json(arguments[0], item) for item in value)
    return Path(value) if kind is Path else value


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("upslope", "torch", "gymnasium", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _type(value: Any) -> str | None:
    return value.get("type") if isinstance(value, dict) else None


def _create(directory: Path, algorithm: str, config: Any) -> None:
    if (directory / CONFIG).exists() or (directory.is_dir() and any(directory.iterdir())):
        raise ValueError(
            f"run_dir {directory} exists already; go on with it (upslope resume {directory}) "
            "or name another (--run-dir)"
        )
    directory.mkdir(parents=True, exist_ok=True)
    described = {"algorithm": algorithm, "config": to_json(config), "versions": versions()}
    _write_atomically(directory / CONFIG, json.dumps(described, indent=1))


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
