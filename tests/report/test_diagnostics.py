import numpy as np
import pytest

from upslope.report.diagnostics import meaning, ordered, recent, warnings


def told(**numbers: list[float]) -> tuple[str, ...]:
    length = max(len(values) for values in numbers.values())
    rows = [
        {"step": float(step)} | {name: values[step] for name, values in numbers.items() if step < len(values)}
        for step in range(length)
    ]
    return warnings(rows)


def test_a_healthy_run_has_no_warning() -> None:
    healthy = {
        "episode_return": list(np.linspace(20, 500, 50)),
        "clip_fraction": [0.15] * 50,
        "kl": [0.012] * 50,
        "explained_variance": [-0.5] * 5 + [0.9] * 45,  # bad at first, as every critic is
        "entropy": list(np.linspace(0.69, 0.4, 50)),
    }
    assert told(**healthy) == ()


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("clip_fraction", [0.1] * 45 + [0.41] * 5, "Clip fraction is lately 0.41"),
        ("kl", [0.01] * 45 + [0.06] * 5, "lately 0.060 nats"),
        ("explained_variance", [0.9] * 45 + [-0.1] * 5, "worse than a constant"),
        ("entropy", [1.0] * 45 + [0.04] * 5, "Entropy fell from 1.00 to 0.040"),
        ("episode_return", [0, 100, 90, 80, 49], "was 100.0 at step 1 and is now 49.0"),
        ("value_error", [1.0, float("nan"), 2.0], "Value error is nan at step 1 (1 of 3 points)"),
        ("surrogate", [1.0, 1.0, float("inf")], "Surrogate is inf at step 2"),
    ],
)
def test_each_worry_is_told_alone(name: str, values: list[float], message: str) -> None:
    found = told(**{name: values})
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("clip_fraction", [0.9] * 40 + [0.4] * 10),  # at the limit, not above it, and long ago
        ("kl", [0.05] * 10),
        ("explained_variance", [-1.0] * 4),  # too early to tell
        ("entropy", [1.0] * 45 + [-2.0] * 5),  # differential entropy
        ("episode_return", [0, 100, 51]),
    ],
)
def test_what_is_not_worrying(name: str, values: list[float]) -> None:
    assert told(**{name: values}) == ()


def test_no_episode_yet_is_said_where_episodes_are_counted() -> None:
    assert "No episode has finished" in told(episodes=[0.0, 0.0])[0]
    assert told(loss=[1.0, 0.5]) == ()


def test_recent_is_the_last_tenth_but_at_least_five() -> None:
    rows = [{"step": float(step), "kl": float(step)} for step in range(100)]
    assert recent(rows, "kl") == np.mean(range(90, 100))
    assert recent(rows[:7], "kl") == np.mean([2, 3, 4, 5, 6])
    assert np.isnan(recent(rows[:4], "kl"))


def test_known_numbers_come_first() -> None:
    assert ordered(("margin", "entropy", "kl")) == ("kl", "entropy", "margin")
    assert meaning("margin").title == "Margin"
