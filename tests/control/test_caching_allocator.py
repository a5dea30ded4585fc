"""Tensors' memory is aligned, nobody else's while they live, given again after, bounded; whoever frees it, and when."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.program import ENVIRONMENT, ROOT
from upslope.control import native

COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
BEGIN = """
import threading, numpy as np, torch
from upslope.control import caching_allocator
before, theirs = torch.arange(1000), [torch.ones(n, n).to_mkldnn() for n in (10, 40, 100, 300)]
assert caching_allocator.install(build=True) is True
functions = caching_allocator.library(build=True)
kept = lambda: functions.kept_bytes()
"""


def run(code: str, **environment: str) -> str:
    """In a process of its own: what is installed stays."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env={**ENVIRONMENT, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@COMPILER
def test_living_tensors_keep_what_is_written_into_them() -> None:
    """10,000 are made and freed in random order, of 0 bytes to 1 MiB, in two threads that free each other's."""
    run(BEGIN + """
shared, lock = {}, threading.Lock()
def live(seed):
    random = np.random.default_rng(seed)
    for i in range(5000):
        size = int(2 ** random.uniform(-1, 17 if i % 50 else 20))
        number = seed * 5000 + i
        tensor = torch.full((size,), number % 251, dtype=torch.uint8)
        assert tensor.data_ptr() % 64 == 0
        with lock:
            shared[number] = tensor
            gone = [shared.pop(list(shared)[int(random.integers(len(shared)))]) for _ in range(len(shared) > 200)]
            items = list(shared.items())[:: 20]
        for name, other in items:
            assert (other == name % 251).all(), name
        del gone
threads = [threading.Thread(target=live, args=(seed,)) for seed in (0, 1)]
failed = []
threading.excepthook = lambda info: failed.append(info)
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failed, failed
for name, tensor in shared.items():
    assert (tensor == name % 251).all()
spans = sorted((t.data_ptr(), t.numel()) for t in shared.values() if t.numel())
assert all(a + n <= b for (a, n), (b, _) in zip(spans, spans[1:]))
assert before.tolist() == list(range(1000))
""")  # fmt: skip


@COMPILER
def test_what_is_freed_is_the_next_ones_of_its_size() -> None:
    run(BEGIN + """
for numbers in (1, 16, 17, 1000, 2**14):  # float32: 64 bytes are 16, the largest that are kept are 2**14
    torch.empty(numbers)
    tensor = torch.empty(numbers)
    place = tensor.data_ptr()
    del tensor
    assert torch.empty(numbers).data_ptr() == place
    other = torch.empty(numbers)
    assert other.data_ptr() == place and torch.empty(numbers).data_ptr() != place
for bytes, size in ((1, 64), (64, 64), (65, 128), (128, 128), (2**16 - 1, 2**16), (2**16, 2**16), (2**16 + 128, 0)):
    some = [torch.empty(bytes, dtype=torch.uint8) for _ in range(3)]
    before, places = kept(), {x.data_ptr() for x in some}
    del some
    assert kept() - before == 3 * size, bytes
    again = [torch.empty(bytes, dtype=torch.uint8) for _ in range(3)]
    assert size == 0 or {x.data_ptr() for x in again} == places
    assert kept() == before
    del again
before = kept()
for _ in range(10_000):  # more than are kept at once
    torch.empty(2**12)
assert kept() == before + 2**14
""")  # fmt: skip


@COMPILER
def test_no_more_than_a_mebibyte_of_a_size_is_kept() -> None:
    run(BEGIN + """
many = [torch.empty(2**12) for _ in range(1000)]  # 16 KiB each
start = kept()
del many
assert kept() - start == 2**20
def inside():
    some = [torch.empty(100) for _ in range(10)]
    places.update(x.data_ptr() for x in some)
    del some
    told.append(kept())
    freed.set()
    asked.wait()
places, told, start, freed, asked = set(), [], kept(), threading.Event(), threading.Event()
thread = threading.Thread(target=inside)
thread.start()
freed.wait()
assert not places & {x.data_ptr() for x in [torch.empty(100) for _ in range(100)]}
asked.set()
thread.join()
assert told[0] == 10 * 512  # a thread keeps what it freed for itself
""")  # fmt: skip


@COMPILER
def test_what_a_thread_keeps_ends_with_it() -> None:
    """One that frees what others made, and makes nothing."""
    run(BEGIN + """
import psutil
def ends(threads):
    for _ in range(threads):
        box = [torch.ones(2**12) for _ in range(64)]  # 1 MiB
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join()
    return psutil.Process().memory_info().rss
assert ends(80) - ends(20) < 30 * 2**20
""")  # fmt: skip


@COMPILER
def test_ways_in_and_out_of_a_tensors_memory() -> None:
    """oneDNN's, made before and freed after; a storage that grows, NumPy's views, a copy, a file, another process."""
    run(BEGIN + """
import copy, os, tempfile
assert float(theirs[3].to_dense().sum()) == 90_000
theirs.clear()
tensor = torch.arange(10.0)
tensor.resize_(5000)
assert tensor[:10].tolist() == list(map(float, range(10)))
array = torch.arange(6.0).numpy()
assert array.sum() == 15
assert copy.deepcopy(torch.arange(4)).tolist() == [0, 1, 2, 3]
with tempfile.NamedTemporaryFile() as file:
    torch.save(torch.arange(7), file.name)
    assert torch.load(file.name, weights_only=True).tolist() == list(range(7))
shared = torch.arange(8).share_memory_()
child = os.fork()
if not child:
    shared += torch.ones(8, dtype=torch.int64)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert shared.tolist() == list(range(1, 9))
assert torch.empty(0).numel() == 0
assert torch.ones(300, 300).to_mkldnn().to_dense().sum() == 90_000  # oneDNN takes and gives back by itself
for refused in (lambda: torch.empty(2**60), lambda: torch.ones(4).untyped_storage().resize_(-1)):
    try:
        refused()
    except RuntimeError as error:
        assert "alloc" in str(error), error
    else:
        raise AssertionError
""")  # fmt: skip


def test_without_a_compiler_or_where_none_is_wanted_it_is_pytorchs(tmp_path: Path) -> None:
    code = (
        "import torch; from upslope.control import caching_allocator as c; print(c.install(True), torch.ones(3).sum())"
    )
    missing = {"CXX": str(tmp_path / "missing"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    assert run(code, **missing) == "False tensor(3.)\n"
    assert run(code.replace("True", "False"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path)) == "False tensor(3.)\n"


@COMPILER
def test_two_sources_or_versions_are_two_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    source = tmp_path / "one.cpp"
    native.library.cache_clear()
    try:
        for text, version, flags, answer in (
            ("1", "", (), 1),
            ("2", "", (), 2),
            ("2", "", ("-DX",), 2),
            ("2", "b", (), 2),
        ):
            source.write_text(f'extern "C" int number() {{ return {text}; }}')
            native.library.cache_clear()
            found = native.library(source, flags, version)
            assert found is not None
            assert found.number() == answer
        assert len(list((tmp_path / "upslope").glob("one-*.so"))) == 4
    finally:
        native.library.cache_clear()
