"""Programs that are kept: what keeps them apart; they are loaded without a compiler, and made again if broken."""

import json
import logging
import math
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.program import ENVIRONMENT, metrics
from upslope.control import (
    ahead,
    compilation,
    environments,
    fingerprints,
    learner,
    networks,
    ppo,
    presets,
    program,
    tensor_environments,
)
from upslope.control.tensor_environments import CartPole
from upslope.exact import zoo
from upslope.exact.registration import TabularEnv
from upslope.runs import run as runs
from upslope.runs.run import Run

wrap = tensor_environments._wrapped  # a function of a tensor, of Upslope's


def key_of(*values: Any, x: Any = None) -> str | None:
    return fingerprints.key(wrap, (torch.zeros(2, 3) if x is None else x,), *values)


def started(**changed: Any) -> tuple[Any, Any]:
    """A net whose θ is bound, and the settings that its programs see."""
    where = {name: changed.pop(name) for name in ("seed", "run_dir") if name in changed}
    config = ppo.PPO(environment=environments.Config("CartPole-v1", 2, "tensor"), rollout_length=8, minibatch_size=16)
    config = replace(config, run=runs.Config(quiet=True, **where), **changed)
    with Run("ppo", config, config.total_steps) as session:
        state, net = learner.start(config, session)
        state.theta.add_(1.0)
        return net.pure(), compilation.inside(config)


def test_what_makes_another_program_makes_another_key() -> None:
    """Settings, networks, environments and arguments; each differs from all others."""
    table = np.arange(5000.0)  # its repr is abridged
    other = table.copy()
    other[2500] += 1e-9
    x = torch.zeros(2, 3)
    keys = [
        key_of(*started()),
        key_of(*started(gamma=0.9)),
        key_of(*started(network=networks.Config(hidden=(8, 8)))),
        key_of(*started(network=networks.Config(activation="relu"))),
        *(key_of(started(network=networks.Config(hidden=hidden))[0]) for hidden in ((8,), (16,), (8, 8))),
        *(key_of(torch.nn.Parameter(torch.full((2,), value))) for value in (1.0, 2.0)),  # held, not θ
        key_of(CartPole(500)),
        key_of(CartPole(200)),
        *(key_of(TabularEnv(problem).tensors(9)) for problem in (zoo.random_walk(), zoo.short_corridor())),
        key_of(torch.from_numpy(table)),
        key_of(torch.from_numpy(other)),
        key_of(table),
        key_of(other),
        key_of(x=x),
        key_of(x=x.double()),
        key_of(x=torch.zeros(3, 3)),
        key_of(x=torch.zeros(3, 2).T),
        key_of(x=(x,)),
        key_of(x={"a": x}),
        key_of(x=(x, 1)),
        key_of(x=(x, None)),
        key_of(x={"a": x, "b": x}),
        key_of(x={"b": x, "a": x}),
        key_of(True),
        fingerprints.key(tensor_environments._no_time, (x,)),
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_what_does_not_change_a_program_does_not_change_its_key(tmp_path: Path) -> None:
    """Seed, place, length, θ and randomness."""
    one = key_of(*started())
    assert one == key_of(*started(seed=7, run_dir=tmp_path / "run", total_steps=123_456))
    assert key_of(np.random.default_rng(1)) == key_of(np.random.default_rng(2))
    assert key_of("".join(["a", "b"]), "ab") == key_of("ab", "ab")  # one object or two


def test_code_of_others_has_no_key() -> None:
    """What it reads besides its arguments cannot be told, of a function or of a value's type; nor a lambda's."""
    assert key_of() is not None
    assert fingerprints.key(key_of, (torch.zeros(1),)) is None
    assert key_of(Outer.State(torch.zeros(1), 1)) is None
    assert key_of(key_of) is None
    assert key_of(lambda x: x) is None


def test_changed_source_makes_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any file of Upslope's; one that changes while the process runs is not what was imported."""
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(fingerprints.upslope, "__file__", str(tmp_path / "__init__.py"))
    assert key_of() is None  # an archive
    keys = []
    for text in ("two = 2", "two = 3", "two = 2"):
        (tmp_path / "inner" / "helper.py").write_text(text)
        assert key_of() is None
        with monkeypatch.context() as later:
            later.setattr(fingerprints, "BEGAN", time.time() + 10)
            keys.append(key_of())
    assert keys[0] == keys[2] != keys[1]
    assert None not in keys


def run_python(code: str, cache: Path) -> str:
    environment = {**ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


TRAIN = """
    import sys
    from upslope.control import environments, fast_ppo, networks, ppo
    from upslope.runs import run as runs
    config = ppo.PPO(
        environment=environments.Config("CartPole-v1", 2, "native"), network=networks.Config(hidden=(8,)),
        rollout_length=8, minibatch_size=16, num_epochs=1, total_steps=64,
        run=runs.Config(seed=1, quiet=True, compile=True, run_dir="RUN"),
    )
    fast_ppo.train(config)
    print("torch._inductor" in sys.modules, "torch._dynamo" in sys.modules)
"""


@pytest.mark.slow
def test_a_second_process_needs_neither_tracer_nor_compiler(tmp_path: Path) -> None:
    """And is, to the bit, what the first was."""
    said = []
    for name in ("first", "second"):
        code = TRAIN.replace("RUN", str(tmp_path / name))
        said.append(run_python(code, tmp_path / "cache").split())
    assert said == [["True", "True"], ["False", "False"]]
    assert metrics(tmp_path / "first") == metrics(tmp_path / "second")
    assert len(list((tmp_path / "cache" / "upslope").glob("caching_allocator-*.so"))) == 1


@pytest.mark.slow
def test_what_is_kept_and_broken_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compilation, "cache", lambda: tmp_path)
    caplog.set_level(logging.WARNING)
    x, expected, kept = torch.tensor([1.0, 4.0]), pytest.approx([1.0, 4.0 - 2 * math.pi]), []
    assert ahead.compiled(wrap, kept=lambda: kept.append(1))(x).tolist() == expected
    (folder,) = (tmp_path / "upslope" / "programs").iterdir()
    assert sorted(file.name for file in folder.iterdir()) == sorted([ahead.LIBRARY, ahead.TABLE, ahead.HELD])
    table = json.loads((folder / ahead.TABLE).read_text())
    strange = json.dumps(table | {"gives": {"tuple": [0], "type": "os:system"}})
    for name, text in (
        (ahead.TABLE, "{"), (ahead.TABLE, "null"), (ahead.TABLE, strange), (ahead.LIBRARY, "no"), (ahead.HELD, ""),
    ):  # fmt: skip
        broken = Path(tempfile.mkdtemp(dir=tmp_path)) / "broken"  # a library is known by its path
        shutil.copytree(folder, broken)
        (broken / name).write_text(text)
        with pytest.raises(ahead.BROKEN):
            ahead._load(broken)
    (folder / ahead.TABLE).write_text("{")
    for said in ("made again", ""):
        caplog.clear()
        assert ahead.compiled(wrap, kept=lambda: kept.append(2))(x).tolist() == expected
        assert said in caplog.text
        assert bool(said) == bool(caplog.text)
    assert kept == [1, 2, 2]
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compilation, "cache", lambda: tmp_path / "file")  # where no folder can be
    assert ahead.compiled(wrap, kept=lambda: kept.append(3))(x).tolist() == expected
    assert "cannot be kept" in caplog.text
    assert kept == [1, 2, 2]


class Outer:
    class State(NamedTuple):
        theta: torch.Tensor
        count: int


@pytest.mark.slow
def test_results_keep_their_structure() -> None:
    """Tuples of every kind, dicts, numbers, an argument handed through, one that is written in place."""

    def function(begun: Outer.State, rate: float, more: dict[str, torch.Tensor]) -> Any:
        begun.theta.add_(more["b"])
        return begun._replace(count=7), {"twice": rate * more["a"], "same": more["b"]}, [None, True], (rate,)

    compiled = ahead.compiled(function, loops=False)
    for _ in range(2):
        theta, a, b = torch.ones(3), torch.arange(2.0), torch.full((3,), 2.0)
        state, numbers, rest, plain = compiled(Outer.State(theta, 1), 2.0, {"b": b, "a": a})
        assert isinstance(state, Outer.State)
        assert theta.tolist() == state.theta.tolist() == [3.0, 3.0, 3.0]
        assert state.count == 7
        assert numbers["twice"].tolist() == [0.0, 2.0]
        assert numbers["same"] is b
        assert (rest, plain) == ([None, True], (2.0,))
    for wrong in (torch.ones(4), torch.ones(3).double(), torch.ones(6)[::2]):
        with pytest.raises(ValueError, match=r"a program was made for tensors .* called with"):
            compiled(Outer.State(wrong, 1), 2.0, {"b": b, "a": a})
    with pytest.raises(ValueError, match="one tensor in two places"):
        ahead.compiled(function)(Outer.State(a, 1), 2.0, {"b": a, "a": b})
    with pytest.raises(TypeError, match="takes tensors, numbers, strings and None, got set"):
        ahead.compiled(function)(Outer.State(a, 1), {1}, {})


@pytest.mark.slow
def test_steady_arguments_may_be_others() -> None:
    """Looked at again only where one is another object: its numbers count, and its kinds are checked."""
    compiled = ahead.compiled(lambda held, x: held["a"] * held["b"] + x, loops=False, steady=1)
    first = {"a": torch.tensor([2.0]), "b": torch.tensor([3.0])}
    assert [compiled(first, torch.tensor([x])).item() for x in (1.0, 2.0)] == [7.0, 8.0]
    first["a"].fill_(5.0)  # the same tensor with another number
    assert compiled(first, torch.tensor([1.0])).item() == 16.0
    assert compiled({"a": torch.tensor([7.0]), "b": torch.tensor([2.0])}, torch.tensor([1.0])).item() == 15.0
    assert compiled(first, torch.tensor([1.0])).item() == 16.0
    for wrong in ({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.ones(1)}):
        for _ in range(2):  # refused, it is not taken for looked at
            with pytest.raises(ValueError, match=r"a program was made for tensors .* called with"):
                compiled(wrong, torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"a program was made for tensors .* called with"):
        compiled(first, torch.ones(2))


def test_a_structure_survives_its_way_through_a_file() -> None:
    gives = {"tuple": [0, {"dict": {"a": {"given": 3}, "b": {"value": None}}}], "type": Outer.State}
    assert ahead._typed(json.loads(json.dumps(ahead._named(gives)))) == gives


@pytest.mark.slow
def test_what_is_held_may_lie_anyhow_and_operators_may_be_pytorchs() -> None:
    """Transposed and expanded tensors; `solve` is none of those that a library has compiled in or linked."""
    table, row = torch.arange(9.0).reshape(3, 3).T, torch.tensor([[1.0], [2.0]]).expand(2, 3)

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(torch.eye(3) * 2.0, (x @ table + row).T)

    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    torch.testing.assert_close(ahead.compiled(function)(x), function(x))


def test_a_short_run_is_compiled_only_if_its_programs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """CartPole's 100,000 steps are shorter than compiling, ten times as many are not. What was compiled is kept."""
    monkeypatch.setattr(compilation, "cache", lambda: tmp_path)
    caplog.set_level(logging.INFO)

    config = presets.ppo("CartPole-v1")
    assert config is not None
    (tmp_path / "upslope").mkdir()

    def chosen(total_steps: int, answer: bool | None = None, **changed: Any) -> bool:
        asked = replace(config, total_steps=total_steps, run=runs.Config(quiet=True, compile=answer), **changed)
        with Run("ppo", asked, total_steps) as session:
            return program.chosen(asked, session)

    assert not chosen(100_000)
    assert chosen(1_000_000)
    assert not chosen(100_000)  # nothing was made yet
    assert "not in the cache" in caplog.text
    caplog.clear()
    compilation.remember(replace(config, total_steps=1_000_000, run=runs.Config(seed=5)))
    assert chosen(100_000)
    assert "about 0 s, in the cache" in caplog.text
    assert not chosen(100_000, answer=False)
    assert not chosen(100_000, gamma=0.9)
