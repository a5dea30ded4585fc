"""A key of everything that a compiled program is made from.

Code counts by its source, settings and networks by what they hold, arguments by shape and type. Only code of Upslope
and of the libraries that it stands on has a key: what others' code reads besides its arguments cannot be told.
"""

import functools
import hashlib
import importlib.metadata
import io
import logging
import pickle  # writes what is hashed; nothing is read by it
import platform
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import upslope
from upslope.control.parameters import Net

log = logging.getLogger(__name__)

BEGAN = time.time()  # seconds; a file that is younger may not be what was imported
LIBRARIES = ("torch", "numpy", "scipy", "gymnasium")
KNOWN = {*sys.stdlib_module_names, "upslope", *LIBRARIES}


class _Telling(pickle.Pickler):
    """Writes what a value holds; it is hashed and never read. Randomness and the parameters of a `Net` are left out."""

    def __init__(self, file: io.BytesIO, skeleton: bool = False) -> None:
        super().__init__(file, protocol=4)
        self.fast = True  # equal values are written equally, whether they are one object or two
        self.skeleton = skeleton

    def persistent_id(self, part: Any) -> Any:
        if isinstance(part, Net):  # programs are given θ
            return "net", _sha(_told((part.layout, part.module), skeleton=True))
        if isinstance(part, Tensor):
            kind = (str(part.dtype), tuple(part.shape), part.stride())
            if self.skeleton and part.requires_grad:
                return kind
            return (*kind, _sha(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))
        return "generator" if isinstance(part, np.random.Generator | torch.Generator) else None

    def reducer_override(self, part: Any) -> Any:
        _known(part if isinstance(part, type | types.FunctionType) else type(part))
        return NotImplemented


def key(function: Callable[..., Any], inputs: Any, *more: Any) -> str | None:
    """The key of a program, or None.

    Args:
        function: what it closes over counts by content.
        inputs: its arguments.
        more: whatever else matters.
    """
    try:
        _known(function)
        code: Any = function.__code__
        around = [cell.cell_contents for cell in function.__closure__ or ()]
        place = (function.__module__, function.__qualname__, [*code.co_positions()])
        defaults = (function.__defaults__, function.__kwdefaults__)
        told = _told((place, around, defaults, _signature(inputs), more))
    except Exception as error:  # whatever a value's own way of being pickled raises
        log.debug("no key: %s", error)
        return None
    source = _source()
    if source is None:
        return None
    libraries = (sys.version, torch.__version__, [importlib.metadata.version(name) for name in LIBRARIES])
    torch_state = (
        torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu"),
        torch.backends.cpu.get_cpu_capability(),
    )  # fmt: skip
    return _sha(repr((libraries, torch_state, _processor(), source)).encode() + told)[:32]


def _signature(value: Any) -> Any:
    """Arguments without the values of their tensors; the names of a dict in their order."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.stride()
    if isinstance(value, dict):
        return [(name, _signature(part)) for name, part in value.items()]
    if isinstance(value, tuple | list):
        return type(value), [_signature(part) for part in value]
    return value


def _told(value: Any, skeleton: bool = False) -> bytes:
    text = io.BytesIO()
    _Telling(text, skeleton).dump(value)
    return text.getvalue()


def _known(code: Any) -> None:
    if code.__module__.partition(".")[0] not in KNOWN:
        raise pickle.PicklingError(f"{code} is code of another's")


def _source() -> str | None:
    """Of Upslope; None if a file has changed since it was imported, or there are none."""
    files = sorted(Path(upslope.__file__).parent.rglob("*.py"))
    stats = [file.stat() for file in files]
    if not files or max(max(stat.st_mtime, stat.st_ctime) for stat in stats) > BEGAN:
        return None
    return _sha("".join(_sha(file.read_bytes()) for file in files).encode())


@functools.cache
def _processor() -> str:
    """What -march=native stands for."""
    cpus = Path("/proc/cpuinfo")
    if not cpus.exists():
        return platform.processor()
    lines = {line for line in cpus.read_text().splitlines() if line.startswith(("model name", "flags", "Features"))}
    return _sha("\n".join(sorted(lines)).encode())


def _sha(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()
