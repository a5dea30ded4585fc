"""The bench measures what it says it measures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from upslope.bench import control
from upslope.bench.control import Options, Result, Timed, Workload
from upslope.control import ahead, program
from upslope.control.environments import Environments
from upslope.control.parameters import Net


def test_ratios_are_of_pairs_and_stand_in_table_page_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of each is left out; every repeat is set against the peer's beside it."""
    ours, theirs = iter([1.0, 80.0, 100.0, 90.0]), iter([2.0, 20.0, 20.0, 30.0])

    class Beside:
        def __init__(self, python: str) -> None:
            assert python == "python"

        def rate(self, workload: Workload, seed: int) -> float:
            return next(theirs)

        def close(self) -> None:
            pass

    monkeypatch.setattr(control, "Peer", Beside)
    shares = {"environment": 0.5, "other": 0.005}
    monkeypatch.setattr(control, "train", lambda workload, vector, seed, profile: Timed(next(ours), 2.0, shares))
    (row,) = control.compare(tmp_path, Options(("W6",), repeats=3, peer="python"))
    assert row.ratios() == [4.0, 5.0, 3.0]
    page = (tmp_path / "control.md").read_text()
    assert "| W6 | Gymnasium | 90 (80–100) | 20 (20–30) | 4.00 (3.00–5.00) × | 2.0 s | environment 50% |" in page
    assert json.loads((tmp_path / "control.json").read_text())[0]["rates"] == [80.0, 100.0, 90.0]
    assert (tmp_path / "control.png").stat().st_size > 1000


def test_without_a_peer_nothing_is_compared() -> None:
    row = Result("W1", "", "tensor", [10.0], [], 1.0, {})
    assert row.ratios() == []
    assert control.cells(row)[3:5] == ["–", "–"]


def test_a_run_is_timed_and_its_time_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run of TRPO; what is wrapped for the profile is put back."""
    before = Environments.step
    small = next(w for w in control.WORKLOADS if w.name == "W6")._replace(steps=4 * 2048)
    timed = control.train(small, "sync", 1)
    assert Environments.step is before
    assert timed.rate > 0 < timed.start
    assert sum(timed.shares.values()) == pytest.approx(1.0, abs=0.02)
    assert {"environment", "inference", "update", "logging"} <= timed.shares.keys()
    assert min(timed.shares["environment"], timed.shares["inference"], timed.shares["update"]) > 0.05


@pytest.mark.parametrize("vector", ["tensor", "auto"])
@pytest.mark.parametrize(("name", "steps"), [("W1", 3 * 256), ("W4", 1_300)])
def test_a_profile_knows_the_program(name: str, vector: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of compiled runs, here as they stand."""
    plain: Any = lambda function, **options: function  # noqa: E731
    monkeypatch.setattr(ahead, "compiled", plain)
    monkeypatch.setattr(program, "compiled", plain)

    def gradient(net: Net, objective: Any, theta: torch.Tensor, *inputs: Any) -> Any:
        found, (value, extra) = torch.func.grad_and_value(objective, has_aux=True)(theta, *inputs)
        return found.detach(), value, extra

    monkeypatch.setattr(Net, "gradient", gradient)
    small = next(w for w in control.WORKLOADS if w.name == name)._replace(steps=steps)
    assert control.train(small, vector, 1).shares["program"] > 0.2


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"workloads": ("W9",)}, "workload 'W9' is unknown, allowed: W1"), ({"repeats": 0}, "repeats is 0, allowed")],
)
def test_what_is_not_known_is_refused(asked: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**asked)
