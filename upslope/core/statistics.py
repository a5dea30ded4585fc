"""Running mean and variance that merge exactly: what a normaliser remembers."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations of all samples seen so far, per feature, in float64."""

    number: Float[Tensor, ""]
    mean: Float[Tensor, "*feature"]
    squares: Float[Tensor, "*feature"]

    def variance(self) -> Float[Tensor, "*feature"]:
        """Population variance; 1 before anything was seen, so that normalising is then the identity."""
        return torch.where(self.number > 0, self.squares / self.number.clamp(min=1.0), 1.0)

    def normalize(
        self, values: Float[Tensor, "*batch_feature"], clip: float = 10.0, epsilon: float = 1e-8
    ) -> Float[Tensor, "*batch_feature"]:
        """clip((x - mean) / sqrt(var + epsilon), -clip, clip), in the dtype of `values`."""
        scale = (self.variance() + epsilon).rsqrt()
        return ((values.to(torch.float64) - self.mean) * scale).clamp(-clip, clip).to(values.dtype)


def moments(shape: tuple[int, ...]) -> Moments:
    """Nothing seen yet.

    >>> moments((2,)).variance().tolist()
    [1.0, 1.0]
    """
    return Moments(
        torch.zeros((), dtype=torch.float64),
        torch.zeros(shape, dtype=torch.float64),
        torch.zeros(shape, dtype=torch.float64),
    )


def observe(
    seen: Moments, samples: Float[Tensor, "batch *feature"], valid: Bool[Tensor, " batch"] | None = None
) -> Moments:
    """Add a batch of samples (Chan, Golub & LeVeque 1979, eq 2.1; Welford 1962 for a batch of one).

    Args:
        seen: what was seen before.
        samples: new samples, batch first.
        valid: which of them count; all when `None`.

    >>> observe(moments(()), torch.tensor([1.0, 2.0, 3.0])).mean.item()
    2.0
    """
    if samples.shape[1:] != seen.mean.shape:
        raise ValueError(f"samples has features of shape {tuple(samples.shape[1:])}, expected {tuple(seen.mean.shape)}")
    samples = samples.to(torch.float64)
    if valid is not None:
        samples = samples[valid]
    if samples.shape[0] == 0:
        return seen
    mean = samples.mean(0)
    return merge(seen, Moments(seen.number.new_tensor(samples.shape[0]), mean, (samples - mean).square().sum(0)))


def merge(one: Moments, other: Moments) -> Moments:
    """The moments of both sets together; also how ranks agree on their statistics.

    >>> a, b = observe(moments(()), torch.tensor([1.0])), observe(moments(()), torch.tensor([3.0]))
    >>> merge(a, b).variance().item()
    1.0
    """
    count = one.number + other.number
    share = other.number / count.clamp(min=1.0)
    shift = other.mean - one.mean
    return Moments(count, one.mean + shift * share, one.squares + other.squares + shift.square() * one.number * share)


def explained_variance(
    values: Float[Tensor, "*shape"], targets: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None = None
) -> Float[Tensor, ""]:
    """1 - Var(target - value)/Var(target): 1 is a perfect critic, 0 one that knows the mean only, below 0 a worse one.

    NaN where the targets do not vary.

    >>> explained_variance(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]))
    tensor(1.)
    """
    spread = _variance(targets, mask)
    return torch.where(spread > 0, 1 - _variance(targets - values, mask) / spread, torch.nan)


def _variance(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None) -> Float[Tensor, ""]:
    """Of the elements that count; by sums, not by picking them out, so that shapes do not depend on the mask."""
    if mask is None:
        return x.var(correction=0)
    count = mask.sum()
    kept = x.masked_fill(~mask, 0.0)
    return (kept - kept.sum() / count).masked_fill(~mask, 0.0).square().sum() / count
