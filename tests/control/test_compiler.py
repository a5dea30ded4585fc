"""Inductor's compiler, hurried: object files side by side, errors not lost, nothing left changed."""

import time
from pathlib import Path

import pytest
from torch._inductor import cpp_builder, exc
from torch._inductor.cpu_vec_isa import VecISA, valid_vec_isa_list

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
            cpp_builder.run_compile_cmd(compiling("exec sleep 60", "a"), str(tmp_path))
            raise RuntimeError("elsewhere")

    began = time.monotonic()
    with pytest.raises(RuntimeError, match="elsewhere"):
        fail()
    assert time.monotonic() - began < 30.0
    assert cpp_builder.run_compile_cmd is run
    assert VecISA.check_build is check


def test_fewer_dry_runs_find_the_same_instructions() -> None:
    valid_vec_isa_list.cache_clear()
    with compiler.hurried():
        hurried = [str(isa) for isa in valid_vec_isa_list()]
    valid_vec_isa_list.cache_clear()
    assert hurried == [str(isa) for isa in valid_vec_isa_list()]
