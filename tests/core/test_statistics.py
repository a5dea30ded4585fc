"""Running moments and the explained variance, by NumPy."""

import numpy as np
import pytest
import torch

from upslope.core import statistics
from upslope.core.statistics import Moments


def test_moments_of_parts_are_the_moments_of_the_whole() -> None:
    """Also far from 0, where sums of squares would cancel."""
    samples = torch.from_numpy(np.random.default_rng(0).normal(1e6, 1.0, (300, 2)))
    seen = statistics.moments((2,))
    for part in samples.split([1, 2, 97, 200]):
        seen = statistics.observe(seen, part)
    np.testing.assert_allclose(seen.mean, samples.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(seen.variance(), samples.numpy().var(0), rtol=1e-7)
    assert seen.number == 300
    halves = [statistics.observe(statistics.moments((2,)), part) for part in samples.chunk(2)]
    np.testing.assert_allclose(statistics.merge(*halves).variance(), samples.numpy().var(0), rtol=1e-7)
    np.testing.assert_allclose(statistics.merge(*halves[::-1]).mean, samples.numpy().mean(0), rtol=1e-12)


def test_nothing_seen_changes_nothing() -> None:
    empty = statistics.moments((3,))
    values = torch.tensor([[1.0, -2.0, 30.0]])
    assert torch.allclose(empty.normalize(values), torch.tensor([[1.0, -2.0, 10.0]]))
    some = statistics.observe(empty, values)
    assert statistics.observe(some, values, torch.tensor([False])) is some
    assert torch.equal(statistics.merge(some, empty).mean, some.mean)


def test_normalised_values_have_mean_0_and_variance_1() -> None:
    samples = torch.from_numpy(np.random.default_rng(1).normal(5.0, 3.0, (1000, 2)).astype(np.float32))
    seen = statistics.observe(statistics.moments((2,)), samples)
    normal = seen.normalize(samples)
    assert normal.dtype == torch.float32
    np.testing.assert_allclose(normal.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(normal.var(0, correction=0), 1, atol=1e-4)
    assert seen.normalize(samples, clip=0.5).abs().max() == 0.5


def test_only_valid_samples_count() -> None:
    samples, valid = torch.tensor([[1.0], [100.0], [3.0]]), torch.tensor([True, False, True])
    seen = statistics.observe(statistics.moments((1,)), samples, valid)
    assert (seen.number.item(), seen.mean.item(), seen.variance().item()) == (2.0, 2.0, 1.0)


def test_wrong_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"samples has features of shape \(3,\), expected \(2,\)"):
        statistics.observe(statistics.moments((2,)), torch.zeros(4, 3))


def test_explained_variance_by_definition() -> None:
    random = np.random.default_rng(2)
    values, targets = random.normal(size=50), random.normal(size=50)
    valid = random.random(50) < 0.7
    found = statistics.explained_variance(torch.from_numpy(values), torch.from_numpy(targets))
    assert found == pytest.approx(1 - (targets - values).var() / targets.var())
    kept = statistics.explained_variance(torch.from_numpy(values), torch.from_numpy(targets), torch.from_numpy(valid))
    assert kept == pytest.approx(1 - (targets - values)[valid].var() / targets[valid].var())
    constant = torch.full((4,), 2.0)
    assert np.isnan(statistics.explained_variance(torch.zeros(4), constant))
    mean = torch.full((50,), float(targets.mean()), dtype=torch.float64)
    assert statistics.explained_variance(mean, torch.from_numpy(targets)) == pytest.approx(0.0, abs=1e-12)


def test_moments_are_plain_data() -> None:
    assert Moments._fields == ("number", "mean", "squares")


def test_statistics_are_kept_in_float64() -> None:
    """Of float32 samples too, far from 0, also where a feature is one number."""
    assert all(part.dtype == torch.float64 for part in statistics.moments((2,)))
    parts = np.array([0, 0.125, 0.25, 0.4375])
    samples = torch.from_numpy((1e6 + parts).astype(np.float32))  # exact in float32, as their mean is not
    seen = statistics.observe(statistics.moments(()), samples)
    assert seen.mean.item() == 1e6 + parts.mean()
    assert seen.variance().item() == pytest.approx(parts.var(), rel=1e-9)
    np.testing.assert_allclose(seen.normalize(samples), (parts - parts.mean()) / parts.std(), rtol=1e-5)


def test_what_does_not_vary_is_normalised_to_0() -> None:
    one = statistics.observe(statistics.moments((1,)), torch.tensor([[5.0]]))
    assert one.variance().item() == 0
    assert one.normalize(torch.tensor([[5.0]])).item() == 0
    assert one.normalize(torch.tensor([[6.0]]), epsilon=0.25).item() == 2  # (6 - 5) / √(0 + 0.25)


def test_constant_targets_cannot_be_explained() -> None:
    assert np.isnan(statistics.explained_variance(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0])))
