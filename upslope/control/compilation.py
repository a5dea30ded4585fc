"""Compiled programs: what they are compiled with, where they are kept, and whether a run is long enough for one."""

import functools
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from upslope.runs import settings
from upslope.runs.run import Run

log = logging.getLogger(__name__)

COLD, WARM = 25.0, 5.0  # seconds that compiling takes on one core, without and with a filled cache


def options() -> dict[str, Any]:
    """What all programs are compiled with."""
    given: dict[str, Any] = {}
    if onednn_pays():
        from upslope.control.products import Products  # Inductor with it, a second

        given["post_grad_custom_post_pass"] = Products()
    return given


@functools.cache
def onednn_pays() -> bool:
    """Is this a processor that MKL is slow on, so that large products are oneDNN's (products.py)?"""
    cpus = Path("/proc/cpuinfo")
    amd = cpus.exists() and "AuthenticAMD" in cpus.read_text()
    return amd and torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()


def cache() -> Path:
    """Where compiled programs are kept: TORCHINDUCTOR_CACHE_DIR, by default in the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "upslope" / "inductor")))


def decide(session: Run, config: Any, saves: float, obstacle: str | None) -> bool:
    """Is this run compiled? As the settings say, as it was before a resume, or if that pays. The reason is logged.

    Args:
        session: the run; the answer is recorded in its checkpoints.
        config: the algorithm's settings.
        saves: seconds that a compiled run of this length is expected to save.
        obstacle: why it cannot be compiled, if it cannot.
    """
    marker = cache() / "upslope" / _key(config)
    takes, state = (WARM, "in the cache") if marker.exists() else (COLD, "not in the cache")
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
    if answer:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    return answer


def _key(config: Any) -> str:
    """A name for the programs of these settings: what does not change them is left out."""
    described = settings.to_json(config)
    for name in ("run", "total_steps"):
        described.pop(name, None)
    products = hashlib.sha256(Path(__file__).with_name("products.py").read_bytes()).hexdigest()
    told = [described, torch.__version__, products if onednn_pays() else None]
    text = json.dumps(told, sort_keys=True, default=repr)  # kwargs may hold objects
    return hashlib.sha256(text.encode()).hexdigest()[:16]
