"""Inductor's C++ compiler in less time: what calls the kernels beside the kernels, and fewer dry runs before both."""

import contextlib
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


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    """Within it Inductor's object files are compiled side by side, and waited for when they are linked.

    Of its dry runs, which find out what instructions the compiler knows, those about AMX are left: any compiler with
    C++20 knows the instructions that the others are about.

    Raises, when something is linked:
        torch._inductor.exc.CppCompileError: an object file could not be compiled.
    """
    from torch._inductor import cpp_builder
    from torch._inductor.cpu_vec_isa import VecAMX, VecISA

    run, check = cpp_builder.run_compile_cmd, VecISA.check_build
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
    try:
        yield
    finally:
        cpp_builder.run_compile_cmd, VecISA.check_build = run, check  # type: ignore[method-assign]
        for left in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(left.process.pid, signal.SIGTERM)  # the compiler itself is a child of the one that was called
            left.process.wait()
            left.output.close()


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
