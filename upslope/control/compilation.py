"""Compiled programs: what they are compiled with, where they are kept, and whether a run is long enough for one."""

import contextlib
import functools
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from upslope.control import fingerprints
from upslope.runs import run as runs
from upslope.runs.run import Run

log = logging.getLogger(__name__)

COLD, WARM = 25.0, 0.5  # seconds to the first call on one core, without and with a filled cache


def options(often: bool) -> dict[str, Any]:
    """What a program is compiled with. Half of the time is the C++ compiler's, much of it for nothing by default."""
    from upslope.control.replacements import Replacements  # Inductor with it, a second

    return {
        "post_grad_custom_post_pass": Replacements(onednn_pays()),
        # What calls the kernels: seconds of compilation, and a twentieth of a step of DQN.
        "aot_inductor.compile_wrapper_opt_level": "O1" if often else "O0",
        "aot_inductor.precompile_headers": False,  # 16 s, of which a program saves less than 3
        "aot_inductor.enable_line_tables": False,  # for profilers
        "cpp.vec_isa_ok": True,  # a compiler that PyTorch's headers do with knows AVX: not tried on a program each
    }


@functools.cache
def onednn_pays() -> bool:
    """Is this a processor that MKL is slow on, so that large products are oneDNN's (replacements.py)?"""
    cpus = Path("/proc/cpuinfo")
    amd = cpus.exists() and "AuthenticAMD" in cpus.read_text()
    return amd and torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()


def cache() -> Path:
    """Where compiled programs are kept: TORCHINDUCTOR_CACHE_DIR, by default in the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "upslope" / "inductor")))


def decide(session: Run, config: Any, saves: float, obstacle: str | None) -> bool:
    """Is this run compiled? As the settings say, as it was before a resume, or if that pays. The reason is logged.

    A session is asked about once: what was decided stays.

    Args:
        session: the run; the answer is recorded in its checkpoints.
        config: the algorithm's settings.
        saves: seconds that a compiled run of this length is expected to save.
        obstacle: why it cannot be compiled, if it cannot.
    """
    if session.compiled is not None:
        return session.compiled
    marker = _marker(config)
    takes, state = (WARM, "in the cache") if marker is not None and marker.exists() else (COLD, "not in the cache")
    if obstacle is not None:
        answer, reason = False, obstacle
    elif session.restored is not None:
        answer, reason = bool(session.restored.state["compiled"]), "as before the resume"
    elif session.config.compile is not None:
        answer, reason = session.config.compile, "as the settings say"
    else:
        answer = saves > takes
        reason = f"it would save about {saves:.0f} s and take about {takes:.0f} s, {state}"
    log.info("%s: %s", "compiled" if answer else "not compiled", reason)
    session.compiled = answer
    return answer


def remember(config: Any) -> None:
    """The programs of these settings are in the cache now."""
    marker = _marker(config)
    if marker is not None:
        with contextlib.suppress(OSError):  # it cannot be written: then nothing is remembered
            marker.touch()


def _marker(config: Any) -> Path | None:
    name = fingerprints.key(decide, inside(config), onednn_pays())
    return None if name is None else cache() / "upslope" / name


def inside(config: Any) -> Any:
    """The settings that programs are made with: the same however long a run is and wherever it is kept."""
    return replace(config, run=runs.Config(), total_steps=1)
