"""Several seeds into one curve with an interval that is honest about few seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from upslope.report.records import Series


class Curve(NamedTuple):
    """Mean over seeds on a common grid of steps. One seed has no interval: `low` and `high` are None."""

    steps: Float[np.ndarray, " points"]
    mean: Float[np.ndarray, " points"]
    low: Float[np.ndarray, " points"] | None
    high: Float[np.ndarray, " points"] | None
    seeds: int


def interval(
    values: Float[np.ndarray, "seeds points"], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Expanded percentile bootstrap interval of the mean over seeds (Hesterberg 2015, The American Statistician 69:4).

    The percentile bootstrap is too narrow for few seeds: its spread is sqrt((n−1)/n) too small, and it uses normal
    where Student quantiles belong. Reading the quantiles at Φ(sqrt(n/(n−1))·t_{α/2, n−1}) instead of α/2 mends both to
    first order: on normal data 95% intervals hold the mean in 92% instead of 83% of the cases for 5 seeds, and in 94%
    instead of 90% for 10. No mean of resampled data can leave their range, so below 6 seeds coverage is at most
    1 − 2^(1−n) for a symmetric distribution: 50% for 2 seeds, 75% for 3.

    Whole curves are resampled, with the same draws at every point, so the band is as smooth as the curves.

    >>> low, high = interval(np.array([[0.0], [1.0], [5.0]]))
    >>> float(low[0]), float(high[0])
    (0.0, 5.0)
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"values: an interval needs at least 2 seeds, got {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples) / n
    tail = stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf((1 - confidence) / 2, n - 1))
    low, high = np.quantile(weights @ values, [tail, 1 - tail], axis=0)
    return low, high


def common_steps(runs: Sequence[Series], points: int = 200) -> Float[np.ndarray, " points"]:
    """Evenly spaced steps over the range that all runs cover."""
    if any(len(run.steps) == 0 for run in runs):
        raise ValueError("runs: one of them has no points")
    first, last = max(run.steps[0] for run in runs), min(run.steps[-1] for run in runs)
    if first > last:
        raise ValueError(f"runs share no steps: one begins at {first:g}, another ends at {last:g}")
    return np.linspace(first, last, points if last > first else 1)


def aggregate(runs: Sequence[Series], confidence: float = 0.95, points: int = 200) -> Curve:
    """Interpolate the seeds linearly onto the steps they share; mean and interval at each. One seed keeps its points.

    >>> a = Series(np.array([0.0, 10.0]), np.array([0.0, 10.0]))
    >>> b = Series(np.array([0.0, 5.0, 20.0]), np.array([2.0, 2.0, 32.0]))
    >>> aggregate([a, b], points=3).mean
    array([ 1. ,  3.5, 11. ])
    """
    if not runs:
        raise ValueError("runs: at least one is needed")
    if not all(np.isfinite(run.values).all() for run in runs):
        raise ValueError("runs: a value is NaN or infinite; leave such points out first")
    if len(runs) == 1:
        return Curve(runs[0].steps, runs[0].values, None, None, 1)
    steps = common_steps(runs, points)
    values = np.stack([np.interp(steps, run.steps, run.values) for run in runs])
    low, high = interval(values, confidence)
    return Curve(steps, values.mean(axis=0), low, high, len(runs))


def steps_to(run: Series, threshold: float) -> float:
    """The first recorded step at which the value is at or above the threshold; infinity if there is none.

    >>> steps_to(Series(np.array([100.0, 200.0, 300.0]), np.array([20.0, 480.0, 470.0])), 475)
    200.0
    """
    reached = np.flatnonzero(run.values >= threshold)
    return float(run.steps[reached[0]]) if len(reached) else float("inf")
