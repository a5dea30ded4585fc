"""Programs that are kept: what keeps them apart; they are loaded without a compiler, and made again if broken."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.program import ENVIRONMENT, metrics
from upslope.control import ahead, compilation, environments, fingerprints, learner, networks, ppo, presets, program
from upslope.control.tensor_environments import CartPole
from upslope.runs import run as runs
from upslope.runs.run import Run


def double(x: torch.Tensor) -> torch.Tensor:
    return 2.0 * x


def about(*values: Any) -> Any:
    """A function that reads these values around it."""

    def function(x: torch.Tensor) -> Any:
        return x, values

    return function


def key_of(*values: Any, x: Any = None) -> str | None:
    return fingerprints.key(about(*values), (torch.zeros(2, 3) if x is None else x,))


def started(**changed: Any) -> tuple[Any, Any]:
    """A net whose θ is bound, and the settings that its programs see."""
    where = {name: changed.pop(name) for name in ("seed", "run_dir") if name in changed}
    config = ppo.PPO(environment=environments.Config("CartPole-v1", 2, "tensor"), rollout_length=8, minibatch_size=16)
    config = replace(config, run=runs.Config(quiet=True, **where), **changed)
    with Run("ppo", config, config.total_steps) as session:
        state, net = learner.start(config, session)
        state.theta.add_(1.0)
        return net.pure(), compilation.inside(config)


def test_what_makes_another_program_makes_another_key(tmp_path: Path) -> None:
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
        key_of(CartPole(500)),
        key_of(CartPole(200)),
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
        fingerprints.key(double, (x,)),
        fingerprints.key(double, (x,), True),
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_what_does_not_change_a_program_does_not_change_its_key(tmp_path: Path) -> None:
    """Seed, place, length, θ and randomness."""
    one = key_of(*started())
    assert one == key_of(*started(seed=7, run_dir=tmp_path / "run", total_steps=123_456))
    assert key_of(np.random.default_rng(1)) == key_of(np.random.default_rng(2))
    assert key_of("".join(["a", "b"]), "ab") == key_of("ab", "ab")  # one object or two


def test_code_typed_at_a_prompt_has_no_key(tmp_path: Path) -> None:
    """It may be typed again, otherwise; and what is passed by value only has no name."""
    typed: dict[str, Any] = {"__name__": "typed"}
    exec("class Typed: pass\ndef f(x): return x", typed)
    assert fingerprints.key(typed["f"], (torch.zeros(1),)) is None
    assert key_of(typed["Typed"]()) is None
    assert key_of(lambda x: x) is None


def run_python(code: str, cache: Path, folder: Path) -> str:
    environment = {**ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(folder)}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def write(file: Path, text: str) -> None:
    """As if it had been there for long."""
    file.write_text(text)
    os.utime(file, (1e9, 1e9))


def test_an_edited_file_of_the_user_is_another_program(tmp_path: Path) -> None:
    """Also one that the function's own module imports; an edit while the process runs gives no key."""
    code = """
        import torch, mine
        from upslope.control import fingerprints
        print(fingerprints.key(mine.f, (torch.zeros(1),)))
    """
    write(tmp_path / "mine.py", "from helper import two\ndef f(x): return two * x\n")
    keys = []
    for text in ("two = 2\n", "two = 3\n", "two = 2\n"):
        write(tmp_path / "helper.py", text)
        keys.append(run_python(code, tmp_path / "cache", tmp_path))
    assert keys[0] == keys[2] != keys[1]
    assert "None" not in keys[0]
    late = textwrap.dedent(code).replace("print(", f"os.chdir({str(tmp_path)!r}); os.utime('helper.py'); print(")
    assert run_python("import os\n" + late, tmp_path / "cache", tmp_path).strip() == "None"


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
        said.append(run_python(code, tmp_path / "cache", tmp_path).split())
    assert said == [["True", "True"], ["False", "False"]]
    assert metrics(tmp_path / "first") == metrics(tmp_path / "second")


@pytest.mark.slow
def test_what_is_kept_and_broken_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compilation, "cache", lambda: tmp_path)
    caplog.set_level(logging.WARNING)
    x = torch.arange(3.0)
    assert ahead.compiled(double)(x).tolist() == [0.0, 2.0, 4.0]
    (folder,) = (tmp_path / "upslope" / "programs").iterdir()
    assert sorted(file.name for file in folder.iterdir()) == sorted([ahead.LIBRARY, ahead.TABLE, ahead.HELD])
    table = json.loads((folder / ahead.TABLE).read_text())
    strange = json.dumps(table | {"gives": {"tuple": [0], "type": "os:system"}})
    for name, text in ((ahead.TABLE, "{"), (ahead.TABLE, strange), (ahead.LIBRARY, "no library"), (ahead.HELD, "")):
        broken = Path(tempfile.mkdtemp(dir=tmp_path)) / "broken"  # a library is known by its path
        shutil.copytree(folder, broken)
        (broken / name).write_text(text)
        with pytest.raises(ahead.BROKEN):
            ahead._load(broken)
    (folder / ahead.TABLE).write_text("{")
    for said in ("made again", ""):
        caplog.clear()
        assert ahead.compiled(double)(x).tolist() == [0.0, 2.0, 4.0]
        assert said in caplog.text
        assert bool(said) == bool(caplog.text)


@pytest.mark.slow
def test_results_keep_their_structure(tmp_path: Path) -> None:
    """Tuples of every kind, dicts, numbers, an argument handed through, one that is written in place."""

    def function(begun: learner.State, rate: float, more: dict[str, torch.Tensor]) -> Any:
        begun.theta.add_(more["b"])
        return begun._replace(step=7), {"twice": rate * more["a"], "same": more["b"]}, [None, True], (rate,)

    nothing: Any = None
    compiled = ahead.compiled(function, loops=False)
    for _ in range(2):
        theta, a, b = torch.ones(3), torch.arange(2.0), torch.full((3,), 2.0)
        state, numbers, rest, plain = compiled(learner.State(theta, nothing, nothing, 1, 2, {}), 2.0, {"b": b, "a": a})
        assert isinstance(state, learner.State)
        assert theta.tolist() == state.theta.tolist() == [3.0, 3.0, 3.0]
        assert (state.iteration, state.step) == (1, 7)
        assert numbers["twice"].tolist() == [0.0, 2.0]
        assert numbers["same"] is b
        assert (rest, plain) == ([None, True], (2.0,))


def test_a_short_run_is_compiled_only_if_its_programs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """CartPole's 100,000 steps are shorter than compiling, ten times as many are not. What was compiled is kept."""
    monkeypatch.setattr(compilation, "cache", lambda: tmp_path)
    caplog.set_level(logging.INFO)

    def chosen(total_steps: int, answer: bool | None = None, **changed: Any) -> bool:
        config = presets.ppo("CartPole-v1")
        assert config is not None
        config = replace(config, total_steps=total_steps, run=runs.Config(quiet=True, compile=answer), **changed)
        with Run("ppo", config, total_steps) as session:
            return program.chosen(config, session)

    assert not chosen(100_000)
    assert "not in the cache" in caplog.text
    assert chosen(1_000_000)
    caplog.clear()
    assert chosen(100_000)  # of another length, the same programs
    assert "in the cache" in caplog.text
    assert not chosen(100_000, answer=False)
    assert not chosen(100_000, gamma=0.9)
    assert chosen(100_000, answer=True, gamma=0.9)
    assert chosen(100_000, gamma=0.9)
