"""The run directory: configuration, metrics and events, over kills."""

import dataclasses
import itertools
import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from upslope.control import environments, networks, optimizers, presets
from upslope.control.ppo import PPO
from upslope.runs import checkpoint, metrics
from upslope.runs import run as runs
from upslope.runs.run import Run
from upslope.runs.settings import from_json, to_json


@dataclasses.dataclass(frozen=True)
class Settings:
    """The least that a run needs."""

    run: runs.Config = dataclasses.field(default_factory=runs.Config)


def settings(directory: Path | None) -> Settings:
    return Settings(runs.Config(run_dir=directory, quiet=True, checkpoint_seconds=0.0))


def through_a_file(value: Any) -> Any:
    return json.loads(json.dumps(to_json(value), allow_nan=False))


# Configuration


@pytest.mark.parametrize("name", presets.PPO_PRESETS)
def test_every_preset_comes_back(name: str) -> None:
    config = presets.PPO_PRESETS[name]
    back = from_json(PPO, through_a_file(config))
    assert back == config
    assert type(back.optimizer) is type(config.optimizer)
    assert type(back.network.hidden) is tuple


@pytest.mark.parametrize(
    "optimizer",
    [optimizers.SGD(0.1, 0.9), optimizers.RMSProp(epsilon_inside=True), optimizers.Adam(1e-4)],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_the_member_of_a_union_comes_back(optimizer: optimizers.Optimizer) -> None:
    config = PPO(optimizer=optimizer, clip_value=0.2, target_kl=0.01, max_grad_norm=None)
    config = dataclasses.replace(
        config,
        environment=environments.Config(
            "X-v0", 3, "async", "same-step", environments.Atari(noop_max=7), {"a": [1, "b"]}
        ),
        network=networks.Config(hidden=()),
        run=runs.Config(seed=2**40, run_dir=Path("some/where")),
    )
    back = from_json(PPO, through_a_file(config))
    assert back == config
    assert isinstance(back.run.run_dir, Path)


def test_no_field_is_left_out() -> None:
    def count(value: Any) -> int:
        if not dataclasses.is_dataclass(value):
            return 0
        return sum(1 + count(getattr(value, field.name)) for field in dataclasses.fields(value))

    def count_json(value: Any) -> int:
        nested = isinstance(value, dict) and "type" in value
        return sum(1 + count_json(part) for key, part in value.items() if key != "type") if nested else 0

    config = presets.PPO_PRESETS["ALE/Pong-v5"]
    assert count_json(through_a_file(config)) == count(config)


@pytest.mark.parametrize("where", [(), ("environment",), ("optimizer",), ("run",)])
def test_an_unknown_field_is_refused(where: tuple[str, ...]) -> None:
    value = through_a_file(PPO())
    inner = value
    for key in where:
        inner = inner[key]
    inner["gamm"] = 1
    with pytest.raises(ValueError, match=r"has no field gamm; allowed: ") as caught:
        from_json(PPO, value)
    if not where:
        assert "gamma" in str(caught.value)


def test_values_are_checked_again_when_read() -> None:
    value = through_a_file(PPO())
    value["gamma"] = 1.5
    with pytest.raises(ValueError, match=r"gamma is 1\.5, allowed: 0 to 1"):
        from_json(PPO, value)


@pytest.mark.parametrize("named", [{"checkpoint_seconds": -1.0}, {"checkpoint_seconds": math.nan}, {"threads": 0}])
def test_a_run_that_cannot_be(named: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(named))):
        runs.Config(**named)


def test_config_is_readable(tmp_path: Path) -> None:
    with Run("ppo", settings(tmp_path / "run"), 10):
        described = runs.read_config(tmp_path / "run")
    assert described["algorithm"] == "ppo"
    assert torch.__version__.startswith(described["versions"]["torch"].split("+")[0])
    assert from_json(Settings, described["config"]) == settings(tmp_path / "run")


# The directory


@pytest.mark.parametrize("inside", ["config.json", "notes.txt", "checkpoints"])
def test_a_directory_that_exists_is_not_touched(tmp_path: Path, inside: str) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / inside).mkdir() if inside == "checkpoints" else (directory / inside).write_text("mine")
    with pytest.raises(ValueError, match="exists already") as caught:
        Run("ppo", settings(directory), 10)
    assert f"upslope resume {directory}" in str(caught.value)
    assert "--run-dir" in str(caught.value)
    assert [path.name for path in directory.iterdir()] == [inside]


def test_an_empty_directory_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        with Run("ppo", settings(directory), 10):
            assert (directory / "config.json").exists()


def test_without_a_directory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Run("ppo", settings(None), 10) as run:
        run.record(5, {"x": 1.0})
        assert not run.due()
        run.save(5, {"x": torch.zeros(1)}, {})
        run.finish(5, {})
    assert list(tmp_path.iterdir()) == []


def test_the_summary_is_written_at_the_end_only(tmp_path: Path) -> None:
    with Run("ppo", settings(tmp_path / "run"), 10) as run:
        run.record(5, {"x": 1.0})
        run.save(5, {"x": torch.zeros(1)}, {})
        assert not (tmp_path / "run" / "summary.json").exists()
        run.finish(10, {"episode_return": 3.0})
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["step"] == 10
    assert summary["episode_return"] == 3.0


# Metrics and events over a resume


def events(directory: Path) -> Iterator[tuple[int, str, float]]:
    """Every number in the event files, as TensorBoard reads them."""
    for path in sorted(directory.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                number = value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value
                yield event.step, value.tag, number


def interrupted(directory: Path, steps: range, saved: int) -> None:
    """A run that records every step, saves at `saved`, and is dropped without being closed."""
    run = Run("ppo", settings(directory), 10)
    for step in steps:
        run.record(step, {"x": step / 2, "undefined": math.nan, "none": None, "whole": step})
        if step == saved:
            run.save(step, {"step": torch.tensor(step)}, {})
    assert run.metrics is not None
    run.metrics.offsets()  # what a process leaves behind that was killed: all of it is in the files


def test_metrics_and_events_are_written_without_a_thread(tmp_path: Path) -> None:
    """An interrupt may leave the lock of a thread's queue held: closing the run would then wait for ever."""
    before = threading.enumerate()
    written = metrics.Metrics(tmp_path)
    written.record(1, 0.5, {"x": 2.0})
    offsets = written.offsets()
    assert threading.enumerate() == before
    assert {name: (tmp_path / name).stat().st_size for name in offsets} == offsets  # all of it is in the files
    assert list(events(tmp_path)) == [(1, "x", 2.0)]
    written.close()


def test_an_interrupt_at_any_call_of_a_save_is_heeded(tmp_path: Path) -> None:
    """Python drops what is raised in a finaliser: a Ctrl-C that comes there would leave the run going."""
    directory = tmp_path / "run"
    with Run("ppo", settings(directory), 10**6) as session:
        session.save(0, {"a": torch.zeros(3)}, {})
        for step in itertools.count(1):
            left = step

            def interrupt(frame: object, event: str, argument: object) -> None:
                nonlocal left
                left -= event == "call"
                if left == 0:
                    sys.setprofile(None)
                    raise KeyboardInterrupt

            try:
                session.record(step, {"x": 1.0})
                sys.setprofile(interrupt)
                session.save(step, {"a": torch.full((3,), step)}, {})
            except KeyboardInterrupt:
                continue
            finally:
                sys.setprofile(None)
            break
    assert step > 20  # so many calls were interrupted, and in the last save none was left
    assert left > 0, "an interrupt was lost"
    end = checkpoint.newest(directory / "checkpoints")
    assert end is not None
    assert end.tensors["a"].tolist() == [end.step] * 3


def test_metrics_and_events_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    interrupted(directory, range(1, 7), saved=4)
    assert [row["step"] for row in metrics.read(directory)] == [1, 2, 3, 4, 5, 6]
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "sec')  # the line that was being written
    with Run.resume(directory, "ppo", settings(directory), 10) as run:
        assert run.restored is not None
        assert run.restored.step == 4
        assert [row["step"] for row in metrics.read(directory)] == [1, 2, 3, 4]
        for step in range(5, 9):
            run.record(step, {"x": float(step), "whole": step})
    rows = metrics.read(directory)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["x"] for row in rows] == [0.5, 1.0, 1.5, 2.0, 5.0, 6.0, 7.0, 8.0]
    assert [step for step, tag, _ in events(directory) if tag == "x"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [value for _, tag, value in events(directory) if tag == "x"] == [row["x"] for row in rows]


def test_before_the_first_checkpoint_everything_begins_again(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    interrupted(directory, range(1, 4), saved=99)
    with Run.resume(directory, "ppo", settings(directory), 10) as run:
        assert run.restored is None
        assert metrics.read(directory) == []
        run.record(1, {"x": 9.0})
    assert [row["x"] for row in metrics.read(directory)] == [9.0]
    assert [value for _, tag, value in events(directory) if tag == "x"] == [9.0]


def test_resumed_twice_from_one_checkpoint(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    interrupted(directory, range(1, 4), saved=2)
    for last in (5, 4):
        run = Run.resume(directory, "ppo", settings(directory), 10)
        for step in range(3, last + 1):
            run.record(step, {"x": float(step)})
        assert run.metrics is not None
        run.metrics.offsets()
        del run  # its process is gone, and its hold on the directory with it
    assert [row["step"] for row in metrics.read(directory)] == [1, 2, 3, 4]
    assert sorted(step for step, tag, _ in events(directory) if tag == "x") == [1, 2, 3, 4]


def test_from_the_checkpoint_before_a_damaged_one(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    run = Run("ppo", settings(directory), 10)
    for step in range(1, 6):
        run.record(step, {"x": float(step)})
        run.save(step, {"step": torch.tensor(step)}, {})
    assert checkpoint.steps(directory / "checkpoints") == [4, 5]
    del run
    (directory / "checkpoints" / "5" / "tensors.safetensors").write_bytes(b"no")
    with Run.resume(directory, "ppo", settings(directory), 10) as run:
        assert run.restored is not None
        assert int(run.restored.tensors["step"]) == 4
        assert [row["step"] for row in metrics.read(directory)] == [1, 2, 3, 4]
        run.record(5, {"x": 5.0})
        run.save(5, {"step": torch.tensor(5)}, {})
    assert checkpoint.read(directory / "checkpoints", 5).tensors["step"].item() == 5
    assert checkpoint.steps(directory / "checkpoints") == [4, 5]


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    with Run("ppo", settings(tmp_path / "run"), 10) as run:
        run.record(1, {"nan": math.nan, "inf": math.inf, "none": None, "big": 10**30, "x": 0.1})
    text = (tmp_path / "run" / "metrics.jsonl").read_text()

    def refuse(constant: str) -> Literal["never"]:
        raise AssertionError(constant)

    row = json.loads(text, parse_constant=refuse)
    assert (row["nan"], row["inf"], row["none"], row["big"], row["x"]) == (None, None, None, 10**30, 0.1)


def test_seconds_go_on_over_a_resume(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    run = Run("ppo", settings(directory), 10)
    time.sleep(0.3)
    run.record(1, {})
    run.save(1, {"x": torch.zeros(1)}, {})
    assert run.metrics is not None
    run.metrics.close()
    del run
    time.sleep(0.5)  # nobody trains: not counted
    with Run.resume(directory, "ppo", settings(directory), 10) as run:
        run.record(2, {})
        run.finish(2, {})
    first, second = (row["seconds"] for row in metrics.read(directory))
    summary = json.loads((directory / "summary.json").read_text())
    assert 0.3 <= first <= second <= summary["seconds"]
    assert second - first < 0.5


def test_a_run_is_held_by_one_process(tmp_path: Path) -> None:
    """And a resumed run is never removed, whatever goes wrong before its first step."""
    directory = tmp_path / "run"
    with Run("ppo", settings(directory), 10) as run:
        run.record(1, {"x": 1.0})
        half = directory / "checkpoints" / ".partial-1"  # what the holder is writing at this moment
        half.mkdir(parents=True)
        with pytest.raises(ValueError, match="is running already in another process"):
            Run.resume(directory, "ppo", settings(directory), 10)
        assert half.exists()
    with (
        pytest.raises(RuntimeError, match="the simulator"),
        Run.resume(directory, "ppo", settings(directory), 10),
    ):
        raise RuntimeError("the simulator is not installed here")
    assert (directory / "config.json").exists()
