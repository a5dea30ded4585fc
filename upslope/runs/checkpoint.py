"""Checkpoints that survive a kill at any instant: tensors as safetensors, the rest as JSON, checksummed, no pickle.

A checkpoint is a directory `<step>/`. It is written under a temporary name, every file is synced, and one rename makes
it visible; so what is visible is whole. What is damaged later is found by its checksum, and the one before it is used.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

log = logging.getLogger(__name__)

STATE, TENSORS = "state.json", "tensors.safetensors"
KEEP = 2  # the newest, and the one before it should the newest be damaged


class Checkpoint(NamedTuple):
    """Everything a run needs to go on: `tensors` is resumable state, `state` describes it and the run around it."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class DamagedCheckpointError(ValueError):
    """A checkpoint whose bytes are not those that were written."""


def write(root: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int = KEEP) -> Path:
    """Write `<root>/<step>/` atomically and durably, then remove the oldest beyond `keep`, and any of a later step.

    Raises:
        OSError: the disk is full or not writable; nothing visible has changed and the partial directory is removed.
    """
    final, partial = root / str(step), root / f".partial-{step}"
    _remove(partial)
    try:
        partial.mkdir(parents=True)
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
    return final


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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path}: {error!r}") from error
    if not whole:
        raise DamagedCheckpointError(f"{path}: checksum mismatch")
    return Checkpoint(step, load(payload), state)


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


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """One SHA-256 over the sorted name, dtype, shape and little-endian bytes of all resumable state.

    >>> a = {"x": torch.zeros(2), "y": torch.ones(1)}
    >>> fingerprint(a) == fingerprint(dict(reversed(a.items())))
    True
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def clean(root: Path) -> None:
    """Remove what a kill left behind half-written."""
    for path in _partials(root):
        _remove(path)


def _partials(root: Path) -> Iterator[Path]:
    return root.glob(".partial-*") if root.is_dir() else iter(())


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
    if path.exists():
        shutil.rmtree(path)
