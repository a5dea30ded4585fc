"""Checkpoints that survive a kill at any instant: tensors as safetensors, the rest as JSON, checksummed, no pickle.

A checkpoint is a directory `<step>/`. It is written under a temporary name, every file is synced, and one rename makes
it visible; so what is visible is whole. What is damaged later is found by its checksum, and the one before it is used.

What is large and only grows, a replay, is kept in segments: files that are written once, the same way, and never
changed. Checkpoints name those that they need; one that no kept checkpoint names is removed.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

log = logging.getLogger(__name__)

STATE, TENSORS, SEGMENTS = "state.json", "tensors.safetensors", "segments"
KEEP = 2  # the newest, and the one before it should the newest be damaged


class Checkpoint(NamedTuple):
    """Everything a run needs to go on: `tensors` is resumable state, `state` describes it and the run around it."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    segments: dict[str, Path] = {}  # noqa: RUF012 - files beside it that belong to it, whole


class DamagedCheckpointError(ValueError):
    """A checkpoint whose bytes are not those that were written."""


Segments = Mapping[str, Callable[[], dict[str, Tensor]]]  # name -> its tensors, asked for when it is first written


def write(
    root: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: int = KEEP,
    segments: Segments | None = None,
    written: Mapping[str, str] | None = None,
) -> Path:
    """Write `<root>/<step>/` atomically and durably, then remove the oldest beyond `keep`, and any of a later step.

    Args:
        root: the directory of all checkpoints.
        step: names this one.
        tensors: resumable state.
        state: what describes it; the segments' checksums are added as `segments`.
        keep: how many checkpoints stay.
        segments: immutable parts of the state in files of their own.
        written: checksums of segments that the run's last checkpoint named: they are not written again.

    Raises:
        OSError: the disk is full or not writable; nothing visible has changed and the partial directory is removed.
    """
    final, partial = root / str(step), root / f".partial-{step}"
    _remove(partial)
    try:
        partial.mkdir(parents=True)
        checksums = _write_segments(root / SEGMENTS, segments, written or {}) if segments else {}
        state = {**state, "segments": checksums} if checksums else state
        payload = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        _write_synced(partial / TENSORS, payload)
        described = {**state, "step": step, "sha256": {TENSORS: hashlib.sha256(payload).hexdigest()}}
        text = json.dumps({**described, "self": _digest(described)}, indent=1)
        _write_synced(partial / STATE, text.encode())
        _sync_directory(partial)
        if final.exists():  # the same step again, after a resume from an older checkpoint
            _remove(final)
        os.replace(partial, final)
        _sync_directory(root)
    except OSError as error:
        _remove(partial)
        raise OSError(
            error.errno,
            f"checkpoint at step {step} was not written ({error.strerror}); the last good one is kept",
            str(final),
        ) from error
    present = steps(root)
    abandoned = [other for other in present if other > step]  # damaged: the run went on from one before them
    # out of sight first, so that a kill leaves no half-removed checkpoint behind
    for old in [*abandoned, *[other for other in present if other <= step][:-keep]]:
        hidden = root / f".partial-{old}"
        os.replace(root / str(old), hidden)
        _remove(hidden)
    _collect_garbage(root)
    return final


def _write_segments(directory: Path, segments: Segments, written: Mapping[str, str]) -> dict[str, str]:
    """Write those that are not there yet, each whole or not at all; name -> checksum of all."""
    checksums = {}
    for name, tensors in segments.items():
        if name not in written:
            directory.mkdir(exist_ok=True)
            partial = directory / f".partial-{name}"
            payload = save({key: tensor.contiguous() for key, tensor in tensors().items()})
            try:
                _write_synced(partial, payload)
                os.replace(partial, directory / f"{name}.safetensors")
            except OSError:
                _remove(partial)
                raise
            _sync_directory(directory)
            checksums[name] = hashlib.sha256(payload).hexdigest()
        else:
            checksums[name] = written[name]
    return checksums


def _collect_garbage(root: Path) -> None:
    """Remove the segments that no visible checkpoint names; of a damaged one nothing can be read."""
    present = list((root / SEGMENTS).glob("*.safetensors"))
    named: set[str] = set()
    for step in steps(root) if present else ():
        with contextlib.suppress(OSError, ValueError):
            named |= json.loads((root / str(step) / STATE).read_text()).get("segments", {}).keys()
    for path in present:
        if path.stem not in named:
            path.unlink()


def read(root: Path, step: int) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        DamagedCheckpointError: a file is missing, unreadable or differs from its checksum.
    """
    path = root / str(step)
    try:
        state = json.loads((path / STATE).read_text())
        payload = (path / TENSORS).read_bytes()
        described = {key: value for key, value in state.items() if key != "self"}
        whole = state["self"] == _digest(described) and state["sha256"][TENSORS] == hashlib.sha256(payload).hexdigest()
        whole = whole and state["step"] == step
        segments = {name: root / SEGMENTS / f"{name}.safetensors" for name in state.get("segments", {})}
        for name, segment in segments.items():
            with open(segment, "rb") as file:
                whole = whole and hashlib.file_digest(file, "sha256").hexdigest() == state["segments"][name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path}: {error!r}") from error
    if not whole:
        raise DamagedCheckpointError(f"{path}: checksum mismatch")
    return Checkpoint(step, load(payload), state, segments)


def read_segment(path: Path) -> dict[str, Tensor]:
    """The tensors of a segment that `read` found whole."""
    return load(path.read_bytes())


def newest(root: Path) -> Checkpoint | None:
    """The newest valid checkpoint; damaged ones are named in a warning and passed over. None if there is none.

    Raises:
        DamagedCheckpointError: there are checkpoints and every one is damaged.
    """
    present = steps(root)
    for step in reversed(present):
        try:
            return read(root, step)
        except DamagedCheckpointError as error:
            log.warning("damaged checkpoint, falling back to the one before it: %s", error)
    if present:
        raise DamagedCheckpointError(f"{root}: all checkpoints are damaged (steps {', '.join(map(str, present))})")
    return None


def steps(root: Path) -> list[int]:
    """Steps of the visible checkpoints, ascending."""
    return sorted(int(path.name) for path in root.iterdir() if path.name.isdigit()) if root.is_dir() else []


def fingerprint(tensors: dict[str, Tensor], segments: Mapping[str, str] | None = None) -> str:
    """One SHA-256 over the sorted name, dtype, shape and little-endian bytes of all resumable state.

    Of segments their checksums count, which are over the same.

    >>> a = {"x": torch.zeros(2), "y": torch.ones(1)}
    >>> fingerprint(a) == fingerprint(dict(reversed(a.items())))
    True
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    for name, checksum in sorted((segments or {}).items()):
        digest.update(f"{name}|{checksum}|".encode())
    return digest.hexdigest()


def clean(root: Path) -> None:
    """Remove what a kill left behind: the half-written, and segments that no checkpoint names any more."""
    for path in _partials(root):
        _remove(path)
    _collect_garbage(root)


def _partials(root: Path) -> Iterator[Path]:
    return itertools.chain(root.glob(".partial-*"), (root / SEGMENTS).glob(".partial-*"))


def _digest(described: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _write_synced(path: Path, payload: bytes) -> None:
    with open(path, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
