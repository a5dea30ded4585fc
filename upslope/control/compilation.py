"""Compiled programs: how they are made, where they are kept, and whether a run is long enough to be worth one."""

import hashlib
import json
import logging
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from upslope.runs import settings
from upslope.runs.run import Run

log = logging.getLogger(__name__)

COLD, WARM = 25.0, 5.0  # seconds that compiling takes on one core, without and with a filled cache


def compiled(function: Callable[..., Any], loops: bool = True) -> Callable[..., Any]:
    """The function as one program; a part that cannot be in it is an error.

    Its guards are left out: whoever makes a program calls it with tensors of the same shapes and types and changes
    nothing else that it reads. A copy of the code keeps the programs of two runs apart.

    Two settings are for `loop`: buffers are not overwritten in place, for Inductor's C++ wrapper declares a loop's
    results twice if they are; and programs with a loop are kept in the cache, whose key has the loop's body in it.

    Args:
        function: of tensors, in and out.
        loops: there may be a `loop` in it.
    """
    from upslope.control import products  # Inductor with it, a second that a run that is not compiled need not wait

    options: dict[str, Any] = {
        "cpp_wrapper": True,
        "inplace_buffers": not loops,
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
        "unsafe_marked_cacheable_functions": {"torch.ops.higher_order.scan": "1"},
    }
    if products.pays():
        options["post_grad_custom_post_pass"] = products.Products()
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(copy, fullgraph=True, dynamic=False, options=options)


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
    text = json.dumps([described, torch.__version__], sort_keys=True, default=repr)  # kwargs may hold objects
    return hashlib.sha256(text.encode()).hexdigest()[:16]
