"""Inductor with less to do: object files side by side, fewer dry runs; in its programs a gradient's parts are computed
in the gradient, and a loop's turn is lent what it reads."""

import contextlib
import math
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple


class Started(NamedTuple):
    """A compilation that is under way."""

    command: list[str]
    process: subprocess.Popen
    output: IO[bytes]


LENT = """
struct Lent {  // a tensor that another owns for longer
  AtenTensorHandle handle;
  operator AtenTensorHandle() const { return handle; }
  AtenTensorHandle get() const { return handle; }
  void* data_ptr() const {
    void* data;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
    return data;
  }
  void reset() {}
};
inline AtenTensorHandle another(AtenTensorHandle of) {
  AtenTensorHandle handle;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_assign_tensors_out(of, &handle));
  return handle;
}
"""


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    """Within it Inductor's object files are compiled side by side, and waited for when they are linked.

    Of its dry runs, which find out what instructions the compiler knows, those about AMX are left: any compiler with
    C++20 knows the instructions that the others are about. A gradient's parts are computed in the gradient, not copied
    into it, and loops are lent what they take.

    Raises, when something is linked:
        torch._inductor.exc.CppCompileError: an object file could not be compiled.
    """
    from torch._inductor import cpp_builder, ir
    from torch._inductor.cpu_vec_isa import VecAMX, VecISA

    concat: Any = ir.ConcatKernel
    run, check, realize = cpp_builder.run_compile_cmd, VecISA.check_build, concat.realize_into
    started: list[Started] = []

    def begin_or_link(line: str, cwd: str) -> None:
        command = shlex.split(line)
        if "-c" in command and any(word.endswith(".cpp") for word in command):  # not .S, which is removed at once
            started.append(_start(command))
            return
        while started and "-c" not in command:
            _finish(started.pop(0))
        run(line, cwd)

    cpp_builder.run_compile_cmd = begin_or_link  # type: ignore[assignment]
    tried = (VecAMX._amx_code, VecAMX._amx_fp16_code)
    VecISA.check_build = lambda self, code: code not in tried or check(self, code)  # type: ignore[method-assign]
    concat.realize_into = classmethod(lambda cls, part, whole: _within(part, whole) or realize(part, whole))
    try:
        with _lending():
            yield
    finally:
        concat.realize_into = realize
        cpp_builder.run_compile_cmd, VecISA.check_build = run, check  # type: ignore[method-assign]
        for left in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(left.process.pid, signal.SIGTERM)  # the compiler itself is a child of the one that was called
            left.process.wait()
            left.output.close()


@contextlib.contextmanager
def _lending() -> Iterator[None]:
    """Within it a loop's condition and body, as all parts of a program, are lent the tensors that they take.

    By itself Inductor makes another handle of each tensor for each of the two at every turn: an eighth of PPO's program
    with four tensor CartPoles. PyTorch refuses loops with a result that is a view of what was taken; one that is
    a taken tensor in another place than its own would be an error of the C++ compiler.
    """
    from torch._inductor import ir
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    wrapper: Any = CppWrapperCpu
    prefix, suffix = wrapper.codegen_subgraph_prefix, wrapper.codegen_subgraph_suffix
    defined: list[Any] = []  # in which files

    def lend(self: Any, subgraph: Any, given: list[str], taken: list[str]) -> None:
        if self not in defined:
            defined.append(self)
            self.header.splice(LENT)
        for (name, value), place in zip(subgraph.graph.graph_inputs.items(), given, strict=True):
            if isinstance(value, ir.TensorBox):
                lent = place.isidentifier()  # and no expression
                self.writeline(
                    f"Lent {name}{{{place}}};" if lent else f"RAIIAtenTensorHandle {name}(another({place}));"
                )

    def give_back(self: Any, subgraph: Any, given: list[str], taken: list[str]) -> None:
        lent = list(zip(subgraph.graph.graph_inputs, given, strict=True))
        for out, place in zip(subgraph.graph.graph_outputs, taken, strict=True):
            value = out.codegen_reference()
            if (value, place) not in lent:  # what was written into stays where it is
                number = isinstance(out, ir.ShapeAsConstantBuffer)
                self.writeline(f"{place} = {value};" if number else f"{place} = std::move({value});")

    wrapper.codegen_subgraph_prefix, wrapper.codegen_subgraph_suffix = lend, give_back
    try:
        yield
    finally:
        wrapper.codegen_subgraph_prefix, wrapper.codegen_subgraph_suffix = prefix, suffix


def _within(part: Any, whole: Any) -> Any:
    """A product that is a part of a vector, as a gradient is of θ's, computed where it is to lie; else None."""
    from torch._inductor import ir

    view: Any = part.data if isinstance(part, ir.TensorBox) else part
    product = view.data.data if isinstance(view, ir.ReinterpretView) and isinstance(view.data, ir.StorageBox) else None
    if not isinstance(product, ir.ExternKernelOut) or not ir.is_storage_and_layout(whole):
        return None
    own: Any = product.layout
    storage, there = ir.as_storage_and_layout(whole)
    fits = isinstance(own, ir.FixedLayout | ir.FlexibleLayout) and own.is_contiguous() and own.dtype == there.dtype
    whole_product = math.prod(view.layout.size) == math.prod(own.size) == there.size[0] and not view.layout.offset
    if not fits or len(there.size) != 1 or there.stride != [1] or not view.layout.is_contiguous() or not whole_product:
        return None
    place = ir.FixedLayout(own.device, own.dtype, own.size, own.stride, there.offset)
    product.layout = ir.NonOwningLayout(ir.ReinterpretView(data=storage, layout=place))
    return product


def _start(command: list[str]) -> Started:
    """Not in Inductor's working directory, which is removed at once; into a file, for nobody reads a pipe meanwhile."""
    output: Any = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    return Started(command, process, output)


def _finish(started: Started) -> None:
    from torch._inductor.exc import CppCompileError

    with started.output as output:
        if started.process.wait() != 0:
            output.seek(0)
            raise CppCompileError(started.command, output.read().decode(errors="replace"))
