"""The sum tree's C++, NumPy's twin: compiled once, kept where compiled programs are; without a compiler, NumPy."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from upslope.control import compilation

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("sum_tree.cpp")
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC")  # no fused multiply-add: sums are NumPy's


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions of `SOURCE`, by $CXX or the first of c++, g++ and clang++; None where that does not work."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        log.info("%s: no C++ compiler, NumPy instead", SOURCE.name)
        return None
    text = SOURCE.read_bytes() + repr((compiler, FLAGS, platform.platform())).encode()
    target = compilation.cache() / "upslope" / f"{SOURCE.stem}-{hashlib.sha256(text).hexdigest()[:16]}.so"
    try:
        if not target.exists():
            _build(compiler, target)
        return _typed(ctypes.CDLL(str(target)))
    except (OSError, subprocess.SubprocessError) as error:
        log.info("%s: not compiled, NumPy instead: %s", SOURCE.name, error)
        return None


def _build(compiler: str, target: Path) -> None:
    """Under a temporary name first: another process never sees half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        os.replace(made, target)


def _typed(functions: ctypes.CDLL) -> ctypes.CDLL:
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    functions.set.argtypes = (pointer, long, long, pointer, long)
    functions.find.argtypes = (pointer, long, long, pointer, long)
    functions.set.restype, functions.find.restype = ctypes.c_bool, ctypes.c_double
    return functions
