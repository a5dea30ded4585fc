"""C++ of Upslope's: compiled once, kept where compiled programs are; who asks goes on without it where that fails."""

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

SHARED = ("-shared", "-fPIC")


@functools.cache
def library(source: Path, flags: tuple[str, ...], version: str = "", build: bool = True) -> ctypes.CDLL | None:
    """A file's functions, by $CXX or the first of c++, g++ and clang++; None, and the reason logged, without them.

    Args:
        source: the file.
        flags: the compiler's.
        version: of what it is compiled against.
        build: is it compiled where it is not yet?
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        log.info("%s: not compiled, there is no C++ compiler", source.name)
        return None
    text = source.read_bytes() + repr((compiler, flags, version, platform.platform())).encode()
    target = compilation.cache() / "upslope" / f"{source.stem}-{hashlib.sha256(text).hexdigest()[:16]}.so"
    try:
        if not target.exists():
            if not build:
                return None
            _build([compiler, str(source), *SHARED, *flags], target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        log.info("%s: not compiled: %s", source.name, error)
        return None


def _build(command: list[str], target: Path) -> None:
    """Under a temporary name first: another process never sees half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, timeout=120)
        os.replace(made, target)
