"""Inductor's compiler, hurried: object files side by side, errors not lost, nothing left changed."""

import time
from pathlib import Path

import pytest
import torch
from torch._inductor import cpp_builder, exc
from torch._inductor.cpu_vec_isa import VecAMX, VecAVX512, VecAVX512VNNI, VecISA

from upslope.control import compiler


def compiling(script: str, name: str) -> str:
    """A command line that looks like the compilation of one file."""
    return f"sh -c '{script}' {name}.cpp"


def test_objects_are_compiled_side_by_side_and_waited_for(tmp_path: Path) -> None:
    one, two, linked = (tmp_path / name for name in ("one", "two", "linked"))
    met = f"[ -e {one} ] && [ -e {two} ]"
    both = f"touch {{}}; for _ in $(seq 1000); do {met} && break; sleep 0.01; done; sleep 0.2; {met} && touch {{}}.o"
    with compiler.hurried():
        for path in (one, two):  # each waits until the other has begun
            cpp_builder.run_compile_cmd(compiling(both.format(path, path), path.name), str(tmp_path))
        cpp_builder.run_compile_cmd(f"cp {one}.o {linked}", str(tmp_path))
        assert linked.exists()
        assert Path(f"{two}.o").exists()


def test_a_failed_compilation_is_an_error_where_it_is_linked(tmp_path: Path) -> None:
    with compiler.hurried():
        cpp_builder.run_compile_cmd(compiling("yes error: no such instruction | head -n 100000; exit 1", "a"), ".")
        with pytest.raises(exc.CppCompileError, match="no such instruction"):
            cpp_builder.run_compile_cmd(f"touch {tmp_path / 'linked'}", str(tmp_path))
    assert not (tmp_path / "linked").exists()


def test_what_runs_is_ended_and_inductor_left_as_it_was(tmp_path: Path) -> None:
    run, check = cpp_builder.run_compile_cmd, VecISA.check_build

    def fail() -> None:
        with compiler.hurried():
            assert cpp_builder.run_compile_cmd is not run
            script = f"sleep 60 & echo $! > {tmp_path / 'child'}; touch {tmp_path / 'begun'}; wait"
            cpp_builder.run_compile_cmd(compiling(script, "a"), str(tmp_path))
            while not (tmp_path / "begun").exists():
                time.sleep(0.01)
            raise RuntimeError("elsewhere")

    began = time.monotonic()
    with pytest.raises(RuntimeError, match="elsewhere"):
        fail()
    assert time.monotonic() - began < 30.0
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}")
    for _ in range(1000):  # the compiler that the compiler had started ends as well
        if not child.exists() or "State:\tZ" in (child / "status").read_text():
            break
        time.sleep(0.01)
    else:
        raise AssertionError("it still runs")
    assert cpp_builder.run_compile_cmd is run
    assert VecISA.check_build is check


def test_only_what_old_compilers_may_not_know_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor's instructions beside AMX are taken for known; AMX and its half precision are asked for."""
    asked: list[str] = []

    def answer(self: VecISA, code: str) -> bool:
        asked.append(code)
        return False

    monkeypatch.setattr(VecISA, "check_build", answer)
    codes = [VecAMX._amx_code, VecAMX._amx_fp16_code, VecAVX512._avx512_bf16_code, VecAVX512VNNI._avx512_vnni_code]
    with compiler.hurried():
        assert [VecAMX().check_build(code) for code in codes] == [False, False, True, True]
    assert asked == codes[:2]


def test_this_compiler_knows_what_is_not_tried() -> None:
    """By dry runs of the instructions that this processor has."""
    if torch.cpu._is_avx512_bf16_supported():
        assert VecAVX512VNNI().check_build(VecAVX512._avx512_bf16_code)
    if torch.cpu._is_vnni_supported():
        assert VecAVX512VNNI().check_build(VecAVX512VNNI._avx512_vnni_code)
