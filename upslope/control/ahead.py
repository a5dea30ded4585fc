"""Functions of tensors compiled ahead of time: traced once, kept as a library that later processes load and call.

Loading takes milliseconds and neither tracer nor compiler. What is kept lies in `compilation.cache()`, under a key of
everything that the program is made from (`fingerprints.py`).
"""

import functools
import json
import logging
import operator
import os
import shutil
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from upslope.control import caching_allocator, compilation, compiler, fingerprints

log = logging.getLogger(__name__)

LIBRARY, TABLE, HELD = "program.so", "table.json", "held.safetensors"
FALLBACKS = "program.json"  # PyTorch's own: operators that the library asks PyTorch for by name
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)  # of what was kept
PLAIN, SEVERAL = (bool, int, float, str, type(None)), (tuple, list)
OLD = 86_400  # seconds, of what a killed process has left half made


class Program(NamedTuple):
    """What is called, and how its flat tensors are those of the function."""

    run: Callable[[list[Tensor]], list[Tensor]]
    takes: list[int]  # places among the arguments' tensors and, after those, the held ones
    gives: Any  # the result's structure, see `_described`
    held: list[Tensor]  # what the function holds besides its arguments


def compiled(
    function: Callable[..., Any],
    loops: bool = True,
    kept: Callable[[], None] | None = None,
    steady: int = 0,
    often: bool = True,
) -> Callable[..., Any]:
    """The function as one program, made or loaded at its first call; a part that cannot be in it is an error.

    It is called with tensors of the same shapes, types and strides each time, no tensor in two places. Arguments that
    are not tensors stay what they were at first, and so does all else that the function reads. What it writes into its
    arguments is written; what else it does in Python is done once.

    Args:
        function: of tensors, numbers, strings and None in tuples, lists and dicts, and so are its results.
        loops: there may be a `loop` in it. Buffers are then not overwritten in place, for Inductor's C++ wrapper
            declares a loop's results twice if they are.
        kept: called once there is a program that later processes will find.
        steady: so many of the first arguments are the same objects at call after call, with the same tensors in them:
            they are looked at again only where one is another object.
        often: it is called so often, or loops so long, that compiling it for seconds more pays.

    Raises, when called:
        ValueError: tensors of other shapes, types or strides than at first.
        TypeError: an argument or a result of another kind.
    """
    made: list[tuple[Program, Callable[[list[Tensor]], Any] | None, list[Any]]] = []
    firm: list[Any] = []
    known: list[Tensor] = []  # theirs

    def program(*inputs: Any) -> Any:
        new = not made or not all(map(operator.is_, firm, inputs))
        leaves: list[Tensor] = [] if new else known.copy()
        _flatten(inputs[:steady] if new else (), leaves)
        theirs = len(leaves)
        _flatten(inputs[steady:], leaves)
        if not made:
            new_one = _load_or_make(function, inputs, leaves, loops, kept, often)
            together = operator.itemgetter(*new_one.takes) if len(new_one.takes) > 1 else None
            made.append((new_one, together, [_kind(leaf) for leaf in leaves]))
        (run, takes, gives, held), several, kinds = made[0]
        first = 0 if new else theirs
        if [_kind(leaf) for leaf in leaves[first:]] != kinds[first:]:
            called = [_kind(leaf) for leaf in leaves]
            raise ValueError(f"a program was made for tensors {kinds} (shape, strides, type), called with {called}")
        if new:  # only now that they fit
            firm[:], known[:] = inputs[:steady], leaves[:theirs]
        leaves += held
        outs = run([leaves[place] for place in takes] if several is None else list(several(leaves)))
        return outs[gives] if isinstance(gives, int) else _built(gives, outs, leaves)

    return program


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _flatten(value: Any, leaves: list[Tensor]) -> None:
    """The tensors, those of a dict in the order of its names."""
    if isinstance(value, Tensor):
        leaves.append(value)
    elif isinstance(value, SEVERAL):
        for part in value:
            if type(part) is Tensor:  # most are, and a call would take longer than this
                leaves.append(part)
            elif part is not None:
                _flatten(part, leaves)
    elif isinstance(value, dict):
        for name in sorted(value):
            _flatten(value[name], leaves)
    elif not isinstance(value, PLAIN):
        raise TypeError(f"a program takes tensors, numbers, strings and None, got {type(value).__name__}")


def _load_or_make(
    function: Callable[..., Any], inputs: Any, leaves: list[Tensor], loops: bool, kept: Callable[[], None] | None,
    often: bool,
) -> Program:  # fmt: skip
    if len({id(leaf) for leaf in leaves}) < len(leaves):
        raise ValueError("one tensor in two places: which is it later?")
    key = fingerprints.key(function, inputs, loops, often, compilation.onednn_pays())
    folder = compilation.cache() / "upslope" / "programs"
    place = None if key is None else folder / key
    program = None if place is None or not place.exists() else _load_kept(place)
    if program is not None:
        caching_allocator.install(False)
    else:
        program, place = _make_in(folder, place, function, inputs, leaves, loops, often)
        threading.Thread(
            target=caching_allocator.install, args=(True,)
        ).start()  # seconds of a compiler, the first time
    if place is not None and kept is not None:
        kept()
    return program


def _load_kept(place: Path) -> Program | None:
    """What is there; where it is broken it is removed."""
    try:
        return _load(place)
    except BROKEN as error:
        log.warning("%s: cannot be loaded, made again: %s", place, error)
        shutil.rmtree(place, ignore_errors=True)
        return None


def _make_in(
    folder: Path,
    place: Path | None,
    function: Callable[..., Any],
    inputs: Any,
    leaves: list[Tensor],
    loops: bool,
    often: bool,
) -> tuple[Program, Path | None]:
    """A new program, and where it is kept, if it is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("tmp*"):
            if left.stat().st_mtime < time.time() - OLD:
                shutil.rmtree(left, ignore_errors=True)
        temporary = tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        log.warning("compiled programs cannot be kept: %s", error)
        temporary, place = tempfile.TemporaryDirectory(), None
    with temporary:
        made = Path(temporary.name) / "made"
        made.mkdir()
        # a library that is loaded may go
        program = _make(function, inputs, leaves, loops, often, made, place is not None)
        if place is not None:
            try:
                os.rename(made, place)
            except OSError:  # another process was faster
                if not place.exists():
                    raise
    return program, place


def _load(folder: Path) -> Program:
    table, held = json.loads((folder / TABLE).read_text()), load_file(folder / HELD)
    gives = _typed(table["gives"])
    return Program(_runner(folder), table["takes"], gives, [held[str(i)] for i in range(len(held))])


def _runner(folder: Path) -> Callable[[list[Tensor]], list[Tensor]]:
    runner: Any = torch._C._aoti.AOTIModelContainerRunnerCpu(str(folder / LIBRARY), 1)
    return runner.run


def _make(
    function: Callable[..., Any], inputs: Any, leaves: list[Tensor], loops: bool, often: bool, folder: Path, keep: bool
) -> Program:
    """Trace and compile into a folder."""
    from torch._inductor.compile_fx import compile_fx_aot
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    graph, given, outs, result = _trace(function, inputs)
    place = {id(leaf): i for i, leaf in enumerate(leaves)}
    ours = [part for part in given if id(part) not in place]
    place |= {id(part): len(leaves) + i for i, part in enumerate(ours)}
    takes = [place[id(part)] for part in given]
    gives = _described(result, {id(out): i for i, out in enumerate(outs)}, place)
    held = [part.detach().clone(memory_format=torch.contiguous_format) for part in ours]
    if keep:
        table = {"takes": takes, "gives": _named(gives)}
        (folder / TABLE).write_text(json.dumps(table))
        save_file({str(i): part for i, part in enumerate(held)}, folder / HELD)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    every = [*leaves, *held]
    fakes: list[Any] = [mode.from_tensor(every[i].detach(), static_shapes=True) for i in takes]
    with tempfile.TemporaryDirectory(dir=folder) as sources, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch's own code
        options = {"inplace_buffers": not loops, "aot_inductor.output_path": str(Path(sources) / LIBRARY)}
        with compiler.hurried():
            library: Any = compile_fx_aot(graph, fakes, config_patches=compilation.options(often) | options)
        os.rename(library, folder / LIBRARY)
        for file in Path(sources).glob("*.wrapper.json"):
            os.rename(file, folder / FALLBACKS)
    return Program(_runner(folder), takes, gives, held)


def _trace(function: Callable[..., Any], inputs: Any) -> tuple[Any, list[Tensor], list[Tensor], Any]:
    """Dynamo's graph, the tensors that it takes, empty ones in place of those that it gives, the result of these."""
    found: list[tuple[Any, list[Tensor], list[Tensor]]] = []

    def backend(graph: Any, examples: Any) -> Callable[..., Any]:
        def first(*given: Tensor) -> list[Tensor]:
            returned = graph.graph.find_nodes(op="output")[0].args[0]
            metas = [node.meta["example_value"] for node in returned]
            outs = [torch.empty(meta.shape, dtype=meta.dtype) for meta in metas]
            found.append((graph, list(given), outs))
            return outs

        return first

    try:
        with torch.no_grad():
            result = torch.compile(_copy(function), backend=backend, fullgraph=True, dynamic=False)(*inputs)
    except torch._dynamo.exc.TorchDynamoException as error:
        error.add_note("Not everything here can be in a compiled program. With --no-compile the run is as it stands.")
        raise
    return *found.pop(), result  # Dynamo keeps the backend, which is to keep nothing else


def _copy(function: Any) -> Callable[..., Any]:
    """The same function in code of its own: Dynamo keeps what it traced by the code."""
    parts = (function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy = types.FunctionType(function.__code__.replace(), *parts)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _described(value: Any, outs: dict[int, int], given: dict[int, int]) -> Any:
    """A result: the place of an output, of a tensor that was given, a plain value, or parts of these."""
    if isinstance(value, Tensor):
        return outs[id(value)] if id(value) in outs else {"given": given[id(value)]}
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {"dict": {name: _described(part, outs, given) for name, part in value.items()}}
    if isinstance(value, tuple | list):
        return {"tuple": [_described(part, outs, given) for part in value], "type": type(value)}
    if not isinstance(value, PLAIN):
        raise TypeError(f"a program gives tensors, numbers, strings and None, got {type(value).__name__}")
    return {"value": value}


def _named(gives: Any) -> Any:
    """As JSON: with the names of types in their place."""
    if isinstance(gives, dict) and "dict" in gives:
        return {"dict": {name: _named(part) for name, part in gives["dict"].items()}}
    if isinstance(gives, dict) and "tuple" in gives:
        kind = gives["type"]
        return {"tuple": [_named(part) for part in gives["tuple"]], "type": f"{kind.__module__}:{kind.__qualname__}"}
    return gives


def _typed(named: Any) -> Any:
    """The inverse. The types exist already: nothing is imported by name."""
    if isinstance(named, dict) and "dict" in named:
        return {"dict": {name: _typed(part) for name, part in named["dict"].items()}}
    if isinstance(named, dict) and "tuple" in named:
        module, name = named["type"].split(":")
        kind = functools.reduce(getattr, name.split("."), sys.modules[module])
        if not (isinstance(kind, type) and issubclass(kind, tuple | list)):
            raise ValueError(f"{TABLE}: {named['type']} is not a tuple")
        return {"tuple": [_typed(part) for part in named["tuple"]], "type": kind}
    return named


def _built(gives: Any, outs: list[Tensor], leaves: list[Tensor]) -> Any:
    if isinstance(gives, int):
        return outs[gives]
    if "given" in gives:
        return leaves[gives["given"]]
    if "value" in gives:
        return gives["value"]
    if "dict" in gives:
        return {name: _built(part, outs, leaves) for name, part in gives["dict"].items()}
    parts = [_built(part, outs, leaves) for part in gives["tuple"]]
    return gives["type"](*parts) if hasattr(gives["type"], "_fields") else gives["type"](parts)
