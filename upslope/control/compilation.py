"""Compiled programs: how they are made, where they are kept, and whether a run is long enough to be worth one."""

import functools
import hashlib
import json
import logging
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    options = {
        "inplace_buffers": not loops,
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
        "unsafe_marked_cacheable_functions": {"torch.ops.higher_order.scan": "1"},
    }
    return torch.compile(_copy(function), fullgraph=True, dynamic=False, options=_options() | options)


def direct(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As `compiled`, for a function of tensors without a `loop` that is called often and gives one tensor.

    Only its first call goes through Dynamo, which looks at every call's arguments and takes half of a small one's time.
    Arguments that are numbers or None stay what they were then.
    """
    made: list[tuple[Callable[..., Any], list[int | Tensor]]] = []

    def program(*inputs: Any) -> Tensor:
        leaves = _leaves(inputs)
        if not made:
            made.append(_trace(function, inputs, leaves))
        inner, takes = made[0]
        return inner(*(leaves[part] if isinstance(part, int) else part for part in takes))[0]

    return program


def _leaves(inputs: tuple[Any, ...]) -> list[Any]:
    """The arguments, those of a dict in the order of its names."""
    leaves: list[Any] = []
    for part in inputs:
        leaves.extend(part[name] for name in sorted(part)) if isinstance(part, dict) else leaves.append(part)
    return leaves


def _trace(
    function: Callable[..., Tensor], inputs: tuple[Any, ...], leaves: list[Any]
) -> tuple[Callable[..., Any], list[int | Tensor]]:
    """Inductor's program, and what it takes: places among the leaves, and tensors that the function holds."""
    from torch._inductor.compile_fx import compile_fx

    place = {id(leaf): i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    known = (Tensor, float, int, type(None))
    assert all(isinstance(leaf, known) for leaf in leaves), "tensors, dicts of tensors, and what stays as it is"
    assert len(place) == sum(isinstance(leaf, Tensor) for leaf in leaves), (
        "one tensor in two places: which is it later?"
    )
    found: list[Any] = []

    def backend(graph: Any, examples: Any) -> Callable[..., Any]:
        inner: Any = compile_fx(graph, examples, config_patches=_options())

        def first(*given: Tensor) -> Any:
            found.append((inner, [place.get(id(part), part) for part in given]))
            return inner(*given)

        return first

    torch.compile(_copy(function), backend=backend, fullgraph=True, dynamic=False)(*inputs)
    return found.pop()  # Dynamo keeps the backend, which is to keep nothing else


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function in code of its own: programs are kept by their code."""
    parts = (function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    return types.FunctionType(function.__code__.replace(), *parts)


def _options() -> dict[str, Any]:
    """What all programs are compiled with."""
    options: dict[str, Any] = {"cpp_wrapper": True}
    if onednn_pays():
        from upslope.control.products import Products  # Inductor with it, a second

        options["post_grad_custom_post_pass"] = Products()
    return options


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
