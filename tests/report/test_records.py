import json
from pathlib import Path

import numpy as np
import pytest

from tests.report.fakes import straight, write_run
from upslope.report.records import finite, names, read_run, series


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [{"step": 8, "seconds": 0.5, "kl": None, "entropy": 0.6}, {"step": 16, "kl": 0.01}]
    path = write_run(tmp_path / "run", rows, seed=3, summary={"mean_return": 200.0})
    for step in ("900", "1000"):
        (path / "checkpoints" / step).mkdir(parents=True)
        (path / "checkpoints" / step / "theta.safetensors").write_bytes(bytes(12))
    (path / "checkpoints" / ".1100.tmp").mkdir()
    record = read_run(path)
    assert (record.algorithm, record.environment, record.seed) == ("ppo", "CartPole-v1", 3)
    assert record.metrics == ({"step": 8.0, "seconds": 0.5, "entropy": 0.6}, {"step": 16.0, "kl": 0.01})
    assert record.summary == {"mean_return": 200.0}
    assert record.checkpoints == ((900, 12), (1000, 12))  # by number, not by name
    assert names(record.metrics) == ("entropy", "kl")


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    (path / "metrics.jsonl").unlink()
    record = read_run(path)
    assert record.metrics == ()
    assert record.summary is None
    assert record.checkpoints == ()


@pytest.mark.parametrize("tail", ['{"step": 30, "kl', '{"step": 30, "kl": 0.', '{"step"\n', "\x00\x00\x00", "\n\n"])
def test_a_last_line_cut_short_is_left_out(tmp_path: Path, tail: str) -> None:
    path = write_run(tmp_path / "run", [{"step": 10}, {"step": 20}])
    with (path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    assert [row["step"] for row in read_run(path).metrics] == [10, 20]


def test_a_last_line_cut_inside_a_character_is_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [{"step": 10}])
    with (path / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 20, "é'.encode()[:-1])
    assert len(read_run(path).metrics) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 20, "kl', "line 2 is damaged"),
        ("", "line 2 is damaged"),
        ("[20, 0.1]", "line 2: expected one JSON object, got list"),
        ('{"kl": 0.1}', 'line 2: "step" must be a finite number, got None'),
        ('{"step": NaN}', 'line 2: "step" must be a finite number, got nan'),
        ('{"step": 20, "kl": "low"}', "line 2: \"kl\" must be a number or null, got 'low'"),
        ('{"step": 20, "kl": true}', 'line 2: "kl" must be a number or null, got True'),
        ('{"step": 5}', "line 2: step goes back from 10 to 5"),
    ],
)
def test_damage_is_named_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = write_run(tmp_path / "run")
    (path / "metrics.jsonl").write_text(f'{{"step": 10}}\n{line}\n{{"step": 30}}\n')
    with pytest.raises(ValueError) as caught:
        read_run(path)
    assert str(path / "metrics.jsonl") in str(caught.value)
    assert message in str(caught.value)


def test_a_missing_run_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        read_run(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / "config.json") in str(caught.value)


@pytest.mark.parametrize(("name", "text"), [("config.json", "{"), ("config.json", "[]"), ("summary.json", '{"a": ')])
def test_a_damaged_document_names_the_path(tmp_path: Path, name: str, text: str) -> None:
    path = write_run(tmp_path / "run")
    (path / name).write_text(text)
    with pytest.raises(ValueError) as caught:
        read_run(path)
    assert str(path / name) in str(caught.value)


def test_settings_that_are_no_object_are_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    (path / "config.json").write_text(json.dumps({"algorithm": "ppo", "config": [1]}))
    with pytest.raises(ValueError, match='"config" must be an object'):
        read_run(path)


def test_series_skips_gaps_and_keeps_the_last_of_equal_steps() -> None:
    rows = [{"step": 1.0, "kl": 0.1}, {"step": 2.0}, {"step": 2.0, "kl": 0.2}, {"step": 2.0, "kl": np.nan}]
    found = series(rows, "kl")
    np.testing.assert_array_equal(found.steps, [1, 2])
    np.testing.assert_array_equal(found.values, [0.1, np.nan])
    np.testing.assert_array_equal(finite(found).steps, [1])


def test_reading_leaves_the_directory_alone(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", straight(1.0))
    before = sorted(path.rglob("*"))
    read_run(path)
    assert sorted(path.rglob("*")) == before
