"""PyTorch's memory for tensors on the CPU, small blocks kept for others of their size: see caching_allocator.cpp."""

import ctypes
import functools
from pathlib import Path

import torch

from upslope.control import native

SOURCE = Path(__file__).with_name("caching_allocator.cpp")
FLAGS = ("-O2", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")


def library(build: bool) -> ctypes.CDLL | None:
    """Its functions; None where it cannot be compiled, or is not yet and `build` is False."""
    torch_home = Path(torch.__file__).parent
    found = (f"-I{torch_home / 'include'}", f"-L{torch_home / 'lib'}", "-lc10")
    return native.library(SOURCE, (*FLAGS, *found), torch.__version__, build)


@functools.cache
def install(build: bool) -> bool:
    """Let tensors of this process take their memory there from now on; False where there is no library."""
    functions = library(build)
    if functions is not None:
        functions.install()
    return functions is not None
