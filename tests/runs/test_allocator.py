"""Freed memory is kept: a step that takes and frees the same buffers asks the system for nothing."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from upslope.runs import allocator

def step():
    parts = [torch.ones(2**17) for _ in range(32)]  # of 512 KiB, 16 MiB in all
    del parts

kept = allocator.keep_freed_memory() if sys.argv[1] == "keep" else None
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(which: str, environment: dict[str, str]) -> tuple[str, int]:
    command = [sys.executable, "-c", FAULTS, which]
    kept, count = subprocess.check_output(command, text=True, env=environment).split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_a_repeated_step_takes_no_new_pages() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "GLIBC"))}
    kept, count = faults("keep", environment)
    assert kept == "True"
    trimmed = {**environment, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "131072"}
    assert count < 100  # of 20 steps of 4,096 pages
    assert faults("leave", trimmed)[1] > 20 * 4000  # the same steps where nothing is kept
