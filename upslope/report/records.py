"""What a run directory says about its run: text files only, never a weight, never code.

`config.json` must be there; `metrics.jsonl`, `summary.json` and `checkpoints/` may still be missing, since a report
may be asked for while the run is going on.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

Row = Mapping[str, float]


class Series(NamedTuple):
    """One number over the run: steps strictly increasing, values as recorded (NaN and infinity included)."""

    steps: Float[np.ndarray, " points"]
    values: Float[np.ndarray, " points"]


class Checkpoint(NamedTuple):
    step: int
    size: int  # bytes


class Record(NamedTuple):
    """A run as its directory tells it."""

    path: Path
    algorithm: str
    config: Mapping[str, Any]  # the resolved configuration, nested
    versions: Mapping[str, Any]
    header: Mapping[str, Any]  # what else config.json says at its top level
    metrics: tuple[Row, ...]
    summary: Mapping[str, Any] | None  # None while the run is not finished
    checkpoints: tuple[Checkpoint, ...]

    @property
    def environment(self) -> str:
        """The environment's id; empty where the algorithm has none."""
        nested = self.config.get("environment")
        return str(nested.get("id", "")) if isinstance(nested, Mapping) else str(nested or "")

    @property
    def seed(self) -> Any:
        """The run's seed; None where the settings name none."""
        flat = flatten(self.config)
        return flat.get("run.seed", flat.get("seed"))


def read_run(path: Path | str) -> Record:
    """Read a run directory.

    Raises ValueError, naming file and line, when `config.json` is missing or a file is damaged.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not a run directory: {path / 'config.json'} does not exist")
    document = read_object(path / "config.json")
    known = {"algorithm", "config", "versions"}
    for name in ("config", "versions"):
        if not isinstance(document.get(name, {}), dict):
            raise ValueError(f'{path / "config.json"}: "{name}" must be an object, got {document[name]!r}')
    metrics, summary = path / "metrics.jsonl", path / "summary.json"
    return Record(
        path=path,
        algorithm=str(document.get("algorithm", "unknown")),
        config=document.get("config", {}),
        versions=document.get("versions", {}),
        header={name: value for name, value in document.items() if name not in known},
        metrics=read_metrics(metrics) if metrics.is_file() else (),
        summary=read_object(summary) if summary.is_file() else None,
        checkpoints=read_checkpoints(path / "checkpoints"),
    )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold one JSON object, got {type(document).__name__}")
    return document


def read_metrics(path: Path) -> tuple[Row, ...]:
    """The rows of a `metrics.jsonl`, nulls left out; steps never go back.

    A last line that is cut short is dropped: the run is still writing it, or was killed there.
    """
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            document = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is damaged: {error}") from None
        rows.append(checked_row(document, f"{path}, line {number}"))
        if number > 1 and rows[-1]["step"] < rows[-2]["step"]:
            raise ValueError(f"{path}, line {number}: step goes back from {rows[-2]['step']:g} to {rows[-1]['step']:g}")
    return tuple(rows)


def checked_row(document: object, where: str) -> Row:
    if not isinstance(document, dict):
        raise ValueError(f"{where}: expected one JSON object, got {type(document).__name__}")
    row = {name: value for name, value in document.items() if value is not None}
    for name, value in row.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f'{where}: "{name}" must be a number or null, got {value!r}')
    if not np.isfinite(row.get("step", np.nan)):
        raise ValueError(f'{where}: "step" must be a finite number, got {document.get("step")!r}')
    return {name: float(value) for name, value in row.items()}


def read_checkpoints(path: Path) -> tuple[Checkpoint, ...]:
    """Checkpoints by step. Names that are no step belong to a writer at work and are left out."""
    if not path.is_dir():
        return ()
    folders = [entry for entry in path.iterdir() if entry.is_dir() and entry.name.isdecimal()]
    sizes = {entry: sum(file.stat().st_size for file in entry.rglob("*") if file.is_file()) for entry in folders}
    return tuple(sorted(Checkpoint(int(entry.name), size) for entry, size in sizes.items()))


def series(metrics: Iterable[Row], name: str) -> Series:
    """One number over the run, without the rows that lack it; of several rows at one step the last.

    >>> series([{"step": 1.0, "kl": 0.1}, {"step": 2.0}, {"step": 3.0, "kl": 0.3}], "kl").values
    array([0.1, 0.3])
    """
    points = {row["step"]: row[name] for row in metrics if name in row}
    return Series(np.array(list(points), dtype=float), np.array(list(points.values()), dtype=float))


def finite(series: Series) -> Series:
    """The points whose value is a finite number."""
    keep = np.isfinite(series.values)
    return Series(series.steps[keep], series.values[keep])


def names(metrics: Iterable[Row]) -> tuple[str, ...]:
    """The numbers that occur in a run, in the order of their first appearance, without step and seconds."""
    found = dict.fromkeys(name for row in metrics for name in row)
    return tuple(name for name in found if name not in {"step", "seconds"})


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; the "type" of a nested object is the value of the object itself.

    >>> flatten({"gamma": 0.99, "optimizer": {"type": "Adam", "epsilon": 1e-05}})
    {'gamma': 0.99, 'optimizer': 'Adam', 'optimizer.epsilon': 1e-05}
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix.removesuffix(".") if prefix and name == "type" else f"{prefix}{name}"] = value
    return flat
