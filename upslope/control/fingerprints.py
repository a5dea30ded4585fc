"""A key of everything that a compiled program is made from: two programs of one key are the same program.

Code counts by its source, settings and networks by what they hold, arguments by shape and type. Where that cannot be
told, for code typed at a prompt for example, there is no key, and nothing is kept.
"""

import hashlib
import io
import os
import pickle
import platform
import sys
import sysconfig
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import upslope

BEGAN = time.time()  # seconds; a file that is younger may not be what was imported


class _Telling(pickle.Pickler):
    """Writes what a value holds; it is hashed and never read. Randomness and the values of parameters are left out."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=4)
        self.fast = True  # equal values are written equally, whether they are one object or two
        self.files: set[Path] = set()

    def persistent_id(self, part: Any) -> Any:
        if isinstance(part, Tensor):
            kind = (str(part.dtype), tuple(part.shape), part.stride())
            if part.requires_grad:  # its value is θ's, which programs are given
                return kind
            return (*kind, _sha(part.contiguous().reshape(-1).view(torch.uint8).numpy()))
        return "generator" if isinstance(part, np.random.Generator | torch.Generator) else None

    def reducer_override(self, part: Any) -> Any:
        """Notes where the code of what is written stands."""
        self.note(part if isinstance(part, type | types.FunctionType) else type(part))
        return NotImplemented

    def note(self, code: Any) -> None:
        module = sys.modules.get(code.__module__)
        file = _file(module)
        if file is not None:
            self.files.add(file)
        elif getattr(module, "__spec__", None) is None:
            raise pickle.PicklingError(f"{code} has no source")


def key(function: Callable[..., Any], inputs: Any, *more: Any) -> str | None:
    """The key of a program, or None.

    Args:
        function: what it reads around it counts by content.
        inputs: its arguments.
        more: whatever else matters.
    """
    if not isinstance(function, types.FunctionType):
        return None
    around = [cell.cell_contents for cell in function.__closure__ or ()]
    place = (function.__module__, function.__qualname__, [*function.__code__.co_positions()])
    text = io.BytesIO()
    pickler = _Telling(text)
    try:
        pickler.note(function)
        pickler.dump((place, around, function.__defaults__, _signature(inputs), more))
    except (pickle.PicklingError, AttributeError, TypeError, ValueError):
        return None
    code = _sources(pickler.files)
    if code is None:
        return None
    defaults = (torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_default_dtype())
    return _sha(repr((torch.__version__, _processor(), defaults, code)).encode() + text.getvalue())[:32]


def _signature(value: Any) -> Any:
    """Arguments without the values of their tensors."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.stride()
    if isinstance(value, dict):
        return {name: _signature(value[name]) for name in sorted(value)}
    if isinstance(value, tuple | list):
        return type(value), [_signature(part) for part in value]
    return value


def _sources(files: set[Path]) -> str | None:
    """Of these files, of Upslope, and of whatever is loaded that was not installed: the user's own; None if changed."""
    installed = tuple({f"{path}{os.sep}" for name, path in sysconfig.get_paths().items() if name.endswith("lib")})
    loaded = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    mine = {Path(file) for file in loaded if file.endswith(".py") and not file.startswith(installed)}
    told = sorted({*files, *filter(Path.is_file, mine), *Path(upslope.__file__).parent.rglob("*.py")})
    if any(file.stat().st_mtime > BEGAN for file in told):
        return None
    return _sha("".join(_sha(file.read_bytes()) for file in told).encode())


def _file(module: Any) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file) if isinstance(file, str) and file.endswith(".py") and os.path.isfile(file) else None


def _processor() -> str:
    """What -march=native stands for."""
    cpus = Path("/proc/cpuinfo")
    if not cpus.exists():
        return platform.processor()
    lines = {line for line in cpus.read_text().splitlines() if line.startswith(("model name", "flags", "Features"))}
    return _sha("\n".join(sorted(lines)).encode())


def _sha(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()
