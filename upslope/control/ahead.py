"""Functions of tensors compiled ahead of time: traced once, kept as a library that later processes load and call.

Loading takes milliseconds and neither tracer nor compiler. What is kept lies in `compilation.cache()`, under a key of
everything that the program is made from (`fingerprints.py`).
"""

import json
import logging
import os
import shutil
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from upslope.control import compilation, fingerprints

log = logging.getLogger(__name__)

LIBRARY, TABLE, HELD = "program.so", "program.json", "held.safetensors"
BROKEN = (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError)  # raised where one of them is


class Program(NamedTuple):
    """What is called, and how its flat tensors are those of the function."""

    run: Callable[[list[Tensor]], list[Tensor]]
    takes: list[int]  # places among the arguments' tensors and, after those, the held ones
    gives: Any  # the result's structure, see `_described`
    held: list[Tensor]  # what the function holds besides its arguments


def compiled(function: Callable[..., Any], loops: bool = True) -> Callable[..., Any]:
    """The function as one program, made or loaded at its first call; a part that cannot be in it is an error.

    It is called with tensors of the same shapes, types and strides each time, no tensor in two places. Arguments that
    are numbers or None stay what they were at first, and so does all else that the function reads. Tensors that
    the function writes in place are written in place.

    Args:
        function: of tensors in tuples, lists and dicts, and so are its results.
        loops: there may be a `loop` in it. Buffers are then not overwritten in place, for Inductor's C++ wrapper
            declares a loop's results twice if they are.
    """
    made: list[Program] = []

    def program(*inputs: Any) -> Any:
        leaves: list[Tensor] = []
        _flatten(inputs, leaves)
        if not made:
            made.append(_load_or_make(function, inputs, leaves, loops))
        run, takes, gives, held = made[0]
        leaves += held
        outs = run([leaves[place] for place in takes])
        return outs[gives] if isinstance(gives, int) else _built(gives, outs, leaves)

    return program


def _flatten(value: Any, leaves: list[Tensor]) -> None:
    """The tensors, those of a dict in the order of its names."""
    if isinstance(value, Tensor):
        leaves.append(value)
    elif isinstance(value, dict):
        for name in sorted(value):
            _flatten(value[name], leaves)
    elif isinstance(value, tuple | list):
        for part in value:
            _flatten(part, leaves)


def _load_or_make(function: Callable[..., Any], inputs: Any, leaves: list[Tensor], loops: bool) -> Program:
    assert len({id(leaf) for leaf in leaves}) == len(leaves), "one tensor in two places: which is it later?"
    key = fingerprints.key(function, inputs, loops, compilation.onednn_pays())
    folder = compilation.cache() / "upslope" / "programs"
    folder.mkdir(parents=True, exist_ok=True)
    if key is not None and (folder / key).exists():
        try:
            return _load(folder / key)
        except BROKEN as error:
            log.warning("%s: cannot be loaded, made again: %s", folder / key, error)
            shutil.rmtree(folder / key)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        _make(function, inputs, leaves, loops, made)
        if key is None:
            return _load(made)  # a library that is loaded can be removed
        try:
            os.rename(made, folder / key)
        except OSError:  # another process was faster
            if not (folder / key).exists():
                raise
        return _load(folder / key)


def _load(folder: Path) -> Program:
    table = json.loads((folder / TABLE).read_text())
    held = load_file(folder / HELD)
    # one call at a time: it would else wait for the last one's memory
    runner: Any = torch._C._aoti.AOTIModelContainerRunnerCpu(str(folder / LIBRARY), 1)
    return Program(runner.run, table["takes"], _typed(table["gives"]), [held[str(i)] for i in range(len(held))])


def _make(function: Callable[..., Any], inputs: Any, leaves: list[Tensor], loops: bool, folder: Path) -> None:
    """Trace and compile into a folder."""
    from torch._inductor.compile_fx import compile_fx_aot
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    graph, given, outs, result = _trace(function, inputs)
    place = {id(leaf): i for i, leaf in enumerate(leaves)}
    held = [part for part in given if id(part) not in place]
    place |= {id(part): len(leaves) + i for i, part in enumerate(held)}
    from_graph = {id(out): i for i, out in enumerate(outs)}
    table = {"takes": [place[id(part)] for part in given], "gives": _described(result, from_graph, place)}
    (folder / TABLE).write_text(json.dumps(table))
    save_file({str(i): part.detach().clone().contiguous() for i, part in enumerate(held)}, folder / HELD)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes: list[Any] = [mode.from_tensor(part.detach(), static_shapes=True) for part in given]
    with tempfile.TemporaryDirectory(dir=folder) as sources, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch's own code
        options = {"inplace_buffers": not loops, "aot_inductor.output_path": str(Path(sources) / LIBRARY)}
        library: Any = compile_fx_aot(graph, fakes, config_patches=compilation.options() | options)
        os.rename(library, folder / LIBRARY)


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

    with torch.no_grad():
        result = torch.compile(_copy(function), backend=backend, fullgraph=True, dynamic=False)(*inputs)
    return *found.pop(), result  # Dynamo keeps the backend, which is to keep nothing else


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function in code of its own: Dynamo keeps what it traced by the code."""
    parts = (function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    return types.FunctionType(function.__code__.replace(), *parts)


def _described(value: Any, outs: dict[int, int], given: dict[int, int]) -> Any:
    """A result as JSON: the place of an output, of a tensor that was given, a plain value, or parts of these."""
    if isinstance(value, Tensor):
        return outs[id(value)] if id(value) in outs else {"given": given[id(value)]}
    if isinstance(value, dict):
        return {"dict": {name: _described(part, outs, given) for name, part in value.items()}}
    if isinstance(value, tuple | list):
        kind = type(value)
        return {
            "tuple": [_described(part, outs, given) for part in value],
            "type": f"{kind.__module__}:{kind.__name__}",
        }
    assert value is None or isinstance(value, bool | int | float), f"a program cannot give {value!r}"
    return {"value": value}


def _typed(described: Any) -> Any:
    """With the types of tuples in place of their names: types that exist already, nothing is imported by name."""
    if isinstance(described, int) or "given" in described or "value" in described:
        return described
    if "dict" in described:
        return {"dict": {name: _typed(part) for name, part in described["dict"].items()}}
    module, name = described["type"].split(":")
    kind = getattr(sys.modules[module], name)
    if not (isinstance(kind, type) and issubclass(kind, tuple | list)):
        raise ValueError(f"{TABLE}: {described['type']} is not a tuple")
    return {"tuple": [_typed(part) for part in described["tuple"]], "type": kind}


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
