import numpy as np
import pytest

from upslope.report.bootstrap import aggregate, common_steps, interval, steps_to
from upslope.report.records import Series


def run(steps: list[float], values: list[float]) -> Series:
    return Series(np.array(steps, dtype=float), np.array(values, dtype=float))


def covered(seeds: int, confidence: float, draw, mean: float, trials: int = 1500) -> float:
    """The share of intervals that hold the true mean. Every point of the curve is a trial of its own."""
    low, high = interval(draw((seeds, trials)), confidence, resamples=4000)
    return float(np.mean((low <= mean) & (mean <= high)))


@pytest.mark.parametrize(("seeds", "confidence"), [(10, 0.95), (30, 0.95), (30, 0.8)])
def test_interval_covers_the_mean_of_a_normal(seeds: int, confidence: float) -> None:
    rng = np.random.default_rng(1)
    share = covered(seeds, confidence, lambda shape: rng.normal(3.0, 2.0, shape), mean=3.0)
    # 1500 trials: the standard error is at most 0.011; the method itself is good to first order only.
    assert abs(share - confidence) < 0.03


def test_interval_covers_the_mean_of_a_skewed_distribution() -> None:
    rng = np.random.default_rng(2)
    assert covered(30, 0.95, lambda shape: rng.exponential(1.0, shape), mean=1.0) > 0.90


def test_five_seeds_are_covered_better_than_by_plain_percentiles() -> None:
    rng = np.random.default_rng(3)
    # Plain percentiles give 0.83; the range of 5 values holds the mean with probability 1 − 2^−4 = 0.9375.
    assert 0.89 < covered(5, 0.95, rng.standard_normal, mean=0.0) <= 0.95


def test_three_seeds_give_their_range() -> None:
    low, high = interval(np.array([[4.0, 1.0], [2.0, 1.0], [9.0, 7.0]]))
    np.testing.assert_array_equal(low, [2.0, 1.0])
    np.testing.assert_array_equal(high, [9.0, 7.0])


def test_width_agrees_with_student_for_many_seeds() -> None:
    values = np.random.default_rng(4).normal(size=(100, 1))
    low, high = interval(values, resamples=40_000)
    student = 2 * 1.9842 * values.std(ddof=1) / 10  # t_{0.975, 99} = 1.9842
    assert (high - low)[0] == pytest.approx(student, rel=0.03)  # Monte Carlo error of two tail quantiles


def test_interval_refuses_one_seed_and_odd_confidence() -> None:
    with pytest.raises(ValueError, match="at least 2 seeds, got 1"):
        interval(np.zeros((1, 5)))
    with pytest.raises(ValueError, match="confidence"):
        interval(np.zeros((3, 5)), confidence=95)


def test_interpolation_by_hand() -> None:
    a = run([100, 200, 400], [0, 10, 30])
    b = run([0, 300, 350], [0, 30, 20])
    curve = aggregate([a, b], points=6)
    # Shared: 100 … 350. At 150: a = 5, b = 15. At 250: a = 15, b = 25. At 350: a = 25, b = 20.
    np.testing.assert_array_equal(curve.steps, [100, 150, 200, 250, 300, 350])
    np.testing.assert_allclose(curve.mean, [5, 10, 15, 20, 25, 22.5])
    np.testing.assert_allclose(curve.low, [0, 5, 10, 15, 20, 20])  # two seeds: the interval is their range
    assert curve.seeds == 2


def test_one_seed_keeps_its_points_and_has_no_interval() -> None:
    curve = aggregate([run([3, 7], [1, 2])])
    np.testing.assert_array_equal(curve.steps, [3, 7])
    np.testing.assert_array_equal(curve.mean, [1, 2])
    assert curve.low is None
    assert curve.high is None


def test_runs_that_cannot_be_averaged_are_refused() -> None:
    with pytest.raises(ValueError, match="share no steps: one begins at 50, another ends at 20"):
        common_steps([run([0, 20], [1, 1]), run([50, 90], [1, 1])])
    with pytest.raises(ValueError, match="no points"):
        aggregate([run([], []), run([1], [1])])
    with pytest.raises(ValueError, match="NaN or infinite"):
        aggregate([run([1, 2], [1, np.nan])])
    with pytest.raises(ValueError, match="at least one"):
        aggregate([])


def test_steps_to_a_threshold() -> None:
    climbing = run([10, 20, 30], [1, 5, 4])
    assert steps_to(climbing, 5) == 20
    assert steps_to(climbing, 5.1) == float("inf")
