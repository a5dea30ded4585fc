"""Action distributions as plain data: parameters in, log-probabilities, entropies, samples and divergences out.

Every distribution is a `NamedTuple` of tensors. Sampling is a deterministic function of the parameters and of noise
that the caller drew, so that a policy can be sampled inside a compiled graph and a run can be repeated exactly.
The last axis of the parameters is the action's; every axis before it is batch.

An action of another shape than the policy's is refused with a `ValueError`; NaN parameters are found where the
log-probabilities enter a surrogate.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


def gumbel(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gumbel noise, -log(E) with E exponential: argmax(logits + noise) is a categorical sample.

    >>> gumbel((2, 3), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3])
    """
    return torch.empty(shape, dtype=dtype).exponential_(generator=generator).clamp_(min=1e-30).log_().neg_()


def logistic(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard logistic noise, log(u) - log(1-u): (logits + noise > 0) is a Bernoulli sample.

    >>> logistic((4,), torch.Generator().manual_seed(0)).isfinite().all().item()
    True
    """
    return torch.empty(shape, dtype=dtype).uniform_(1e-7, 1 - 1e-7, generator=generator).logit_()


def normal(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise: mean + std * noise is a Gaussian sample.

    >>> normal((4,), torch.Generator().manual_seed(0)).shape
    torch.Size([4])
    """
    return torch.empty(shape, dtype=dtype).normal_(generator=generator)


class Categorical(NamedTuple):
    """π(a) = softmax(logits)_a over n actions (S4 eq 2.1's discrete policy).

    Logits are finite: an action is ruled out by a logit so low that its probability is exactly 0, not by -inf.

    >>> policy = Categorical(torch.tensor([0.0, math.log(3.0)]))
    >>> policy.log_prob(torch.tensor(1)).exp()
    tensor(0.7500)
    >>> round(policy.entropy().item(), 4)
    0.5623
    """

    logits: Float[Tensor, "*batch n"]

    def log_probs(self) -> Float[Tensor, "*batch n"]:
        return torch.log_softmax(self.logits, dim=-1)

    def log_prob(self, action: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        _fits(action, self.logits.shape[:-1])
        return self.log_probs().gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def log_prob_entropy(self, action: Int[Tensor, "*batch"]) -> tuple[Tensor, Tensor]:
        """Both at once, from one softmax: what a gradient step needs."""
        _fits(action, self.logits.shape[:-1])
        log_probs = self.log_probs()
        return log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1), _entropy(log_probs)

    def entropy(self) -> Float[Tensor, "*batch"]:
        """H = -Σ p log p in nats; an action of probability 0 adds 0."""
        return _entropy(self.log_probs())

    def mode(self) -> Int[Tensor, "*batch"]:
        return self.logits.argmax(dim=-1)

    def sample(self, noise: Float[Tensor, "*batch n"]) -> Int[Tensor, "*batch"]:
        """The Gumbel-max sample for standard Gumbel noise."""
        return (self.logits + noise).argmax(dim=-1)

    def kl(self, other: "Categorical") -> Float[Tensor, "*batch"]:
        """KL[self || other] = Σ p (log p - log q), exact, in nats."""
        log_p, log_q = self.log_probs(), other.log_probs()
        return (log_p.exp() * (log_p - log_q)).sum(-1)


class MultiCategorical(NamedTuple):
    """Independent categoricals, one for each component of a multi-discrete action: π(a) = Π_i π_i(a_i).

    >>> policy = MultiCategorical((torch.zeros(2), torch.zeros(4)))
    >>> policy.log_prob(torch.tensor([1, 3])).exp().item()
    0.125
    """

    logits: tuple[Float[Tensor, "*batch n_i"], ...]

    def _parts(self) -> list[Categorical]:
        return [Categorical(logits) for logits in self.logits]

    def log_prob(self, action: Int[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
        _fits(action, (*self.logits[0].shape[:-1], len(self.logits)))
        return sum(part.log_prob(action[..., i]) for i, part in enumerate(self._parts()))  # type: ignore[return-value]

    def log_prob_entropy(self, action: Int[Tensor, "*batch k"]) -> tuple[Tensor, Tensor]:
        _fits(action, (*self.logits[0].shape[:-1], len(self.logits)))
        pairs = [part.log_prob_entropy(action[..., i]) for i, part in enumerate(self._parts())]
        return sum(p for p, _ in pairs), sum(e for _, e in pairs)  # type: ignore[return-value]

    def entropy(self) -> Float[Tensor, "*batch"]:
        return sum(part.entropy() for part in self._parts())  # type: ignore[return-value]

    def mode(self) -> Int[Tensor, "*batch k"]:
        return torch.stack([part.mode() for part in self._parts()], dim=-1)

    def sample(self, noise: Float[Tensor, "*batch sum_n"]) -> Int[Tensor, "*batch k"]:
        pieces = noise.split([logits.shape[-1] for logits in self.logits], dim=-1)
        return torch.stack([part.sample(piece) for part, piece in zip(self._parts(), pieces, strict=True)], dim=-1)

    def kl(self, other: "MultiCategorical") -> Float[Tensor, "*batch"]:
        return sum(p.kl(q) for p, q in zip(self._parts(), other._parts(), strict=True))  # type: ignore[return-value]


class Bernoulli(NamedTuple):
    """Independent bits, the multi-binary action: π(a) = Π_i σ(l_i)^{a_i} (1-σ(l_i))^{1-a_i}.

    >>> policy = Bernoulli(torch.tensor([0.0, math.log(3.0)]))
    >>> round(policy.log_prob(torch.tensor([1, 1])).exp().item(), 6)
    0.375
    """

    logits: Float[Tensor, "*batch k"]

    def log_prob(self, action: Int[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
        _fits(action, self.logits.shape)
        sign = 2 * action.to(self.logits.dtype) - 1
        return torch.nn.functional.logsigmoid(sign * self.logits).sum(-1)

    def log_prob_entropy(self, action: Int[Tensor, "*batch k"]) -> tuple[Tensor, Tensor]:
        return self.log_prob(action), self.entropy()

    def entropy(self) -> Float[Tensor, "*batch"]:
        """H = Σ_i log(1+e^{l_i}) - l_i σ(l_i), in nats."""
        return (torch.nn.functional.softplus(self.logits) - self.logits * torch.sigmoid(self.logits)).sum(-1)

    def mode(self) -> Int[Tensor, "*batch k"]:
        return (self.logits > 0).to(torch.int64)

    def sample(self, noise: Float[Tensor, "*batch k"]) -> Int[Tensor, "*batch k"]:
        return (self.logits + noise > 0).to(torch.int64)

    def kl(self, other: "Bernoulli") -> Float[Tensor, "*batch"]:
        softplus, p = torch.nn.functional.softplus, torch.sigmoid(self.logits)
        return (p * (self.logits - other.logits) - softplus(self.logits) + softplus(other.logits)).sum(-1)


class DiagonalGaussian(NamedTuple):
    """π(a) = Π_i N(a_i; mean_i, exp(log_std_i)²); log_std broadcasts against mean.

    >>> policy = DiagonalGaussian(torch.zeros(2), torch.zeros(2))
    >>> round(policy.log_prob(torch.zeros(2)).item(), 4)  # -log 2π
    -1.8379
    """

    mean: Float[Tensor, "*batch k"]
    log_std: Float[Tensor, "*#batch k"]

    def log_prob(self, action: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
        _fits(action, self.mean.shape)
        z = (action - self.mean) * (-self.log_std).exp()
        return (-0.5 * z.square() - self.log_std - 0.5 * LOG_2PI).sum(-1)

    def log_prob_entropy(self, action: Float[Tensor, "*batch k"]) -> tuple[Tensor, Tensor]:
        return self.log_prob(action), self.entropy()

    def entropy(self) -> Float[Tensor, "*batch"]:
        """H = Σ_i log σ_i + ½ log 2πe, in nats."""
        return (self.log_std + 0.5 * (1 + LOG_2PI)).sum(-1).expand(self.mean.shape[:-1])

    def mode(self) -> Float[Tensor, "*batch k"]:
        return self.mean

    def sample(self, noise: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        return self.mean + self.log_std.exp() * noise

    def kl(self, other: "DiagonalGaussian") -> Float[Tensor, "*batch"]:
        """KL[self || other] = Σ log σ_q/σ_p + (σ_p² + (μ_p-μ_q)²)/(2σ_q²) - ½, exact, in nats."""
        variance_ratio = (2 * (self.log_std - other.log_std)).exp()
        shift = ((self.mean - other.mean) * (-other.log_std).exp()).square()
        return (other.log_std - self.log_std + 0.5 * (variance_ratio + shift) - 0.5).sum(-1)


class StateDependentGaussian(NamedTuple):
    """Generalised state-dependent exploration, gSDE (Raffin et al. 2020, arXiv:2005.05719, eqs 4-7).

    The noise is a linear function of the policy's features, ε(s) = E^T x(s) with E_ij ~ N(0, exp(log_std_ij)²), so the
    action given the state is Gaussian with variance Σ_i x_i² σ_ij² while E stays fixed for several steps: smooth motion
    instead of jitter. The features enter the variance without a gradient.

    >>> policy = StateDependentGaussian(torch.zeros(1), torch.tensor([3.0, 4.0]), torch.zeros(2, 1))
    >>> policy.gaussian().log_std.exp().item()
    5.0
    """

    mean: Float[Tensor, "*batch k"]
    features: Float[Tensor, "*batch f"]
    log_std: Float[Tensor, "f k"]

    def gaussian(self) -> DiagonalGaussian:
        """The marginal distribution of the action; 1e-6 keeps the variance positive where all features are 0."""
        variance = self.features.detach().square() @ (2 * self.log_std).exp()
        return DiagonalGaussian(self.mean, 0.5 * (variance + 1e-6).log())

    def log_prob(self, action: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
        return self.gaussian().log_prob(action)

    def log_prob_entropy(self, action: Float[Tensor, "*batch k"]) -> tuple[Tensor, Tensor]:
        return self.gaussian().log_prob_entropy(action)

    def entropy(self) -> Float[Tensor, "*batch"]:
        return self.gaussian().entropy()

    def mode(self) -> Float[Tensor, "*batch k"]:
        return self.mean

    def sample(self, noise: Float[Tensor, "*batch f k"]) -> Float[Tensor, "*batch k"]:
        """mean + x^T (σ ∘ noise), noise a standard normal matrix that the caller keeps for several steps."""
        return self.mean + torch.einsum("...f,...fk->...k", self.features, self.log_std.exp() * noise)

    def kl(self, other: "StateDependentGaussian") -> Float[Tensor, "*batch"]:
        return self.gaussian().kl(other.gaussian())


class SquashedGaussian(NamedTuple):
    """a = tanh(u), u ~ DiagonalGaussian(mean, log_std), stretched from [-1, 1] to [low, high].

    log π(a) = log N(u) - Σ_i log((high_i - low_i)/2) - Σ_i log(1 - tanh²u_i) (Haarnoja et al. 2018, arXiv:1801.01290,
    eq 21), the last term from u itself: finite where tanh u has long rounded to ±1. The entropy has no closed form;
    -log π of a sample is an unbiased estimate of it.

    >>> policy = SquashedGaussian(torch.zeros(1), torch.zeros(1), torch.tensor([-1.0]), torch.tensor([1.0]))
    >>> round(policy.log_prob(torch.zeros(1)).item(), 4)  # that of u = 0: -½ log 2π
    -0.9189
    """

    mean: Float[Tensor, "*batch k"]  # of u
    log_std: Float[Tensor, "*#batch k"]  # of u
    low: Float[Tensor, " k"]
    high: Float[Tensor, " k"]

    def gaussian(self) -> DiagonalGaussian:
        """The distribution of u."""
        return DiagonalGaussian(self.mean, self.log_std)

    def log_prob(self, action: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
        """Of an action; within rounding of a bound u is lost, and taken to be the largest that is not rounded to it."""
        _fits(action, self.mean.shape)
        largest = 1 - torch.finfo(self.mean.dtype).eps
        return self.log_prob_before(unit(action, self.low, self.high).clamp(-largest, largest).atanh())

    def log_prob_before(self, u: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
        """log π of the action that u becomes."""
        return self.gaussian().log_prob(u) - self._log_det(u)

    def mode(self) -> Float[Tensor, "*batch k"]:
        """The median, where u is its mean, as is usual; the density's peak may lie elsewhere."""
        return rescale(self.mean.tanh(), self.low, self.high)

    def sample(self, noise: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        return rescale(self.gaussian().sample(noise).tanh(), self.low, self.high)

    def sample_log_prob(self, noise: Float[Tensor, "*batch k"]) -> tuple[Tensor, Tensor]:
        """A sample and its log π, differentiable in the parameters through both."""
        u = self.gaussian().sample(noise)
        normal = (-0.5 * noise.square() - self.log_std - 0.5 * LOG_2PI).sum(-1)
        return rescale(u.tanh(), self.low, self.high), normal - self._log_det(u)

    def kl(self, other: "SquashedGaussian") -> Float[Tensor, "*batch"]:
        """KL[self || other] with the same bounds: that of the Gaussians, for an invertible map keeps it."""
        return self.gaussian().kl(other.gaussian())

    def _log_det(self, u: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
        return (log_one_minus_tanh_squared(u) + ((self.high - self.low) / 2).log()).sum(-1)


class SquashedStateDependentGaussian(NamedTuple):
    """gSDE under a tanh: a = tanh(u), u ~ StateDependentGaussian, stretched from [-1, 1] to [low, high].

    Behaviour draws u with a matrix that it keeps for several steps; in an objective, where rows are independent, u's
    marginal is all that counts: `squashed()`, a SquashedGaussian.

    >>> inner = StateDependentGaussian(torch.zeros(1), torch.tensor([3.0, 4.0]), torch.zeros(2, 1))
    >>> policy = SquashedStateDependentGaussian(inner, torch.tensor([-2.0]), torch.tensor([2.0]))
    >>> policy.squashed().log_std.exp().item(), policy.sample(torch.zeros(2, 1)).item()
    (5.0, 0.0)
    """

    inner: StateDependentGaussian  # of u
    low: Float[Tensor, " k"]
    high: Float[Tensor, " k"]

    def squashed(self) -> SquashedGaussian:
        """The marginal distribution of the action."""
        return SquashedGaussian(*self.inner.gaussian(), self.low, self.high)

    def log_prob(self, action: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
        return self.squashed().log_prob(action)

    def mode(self) -> Float[Tensor, "*batch k"]:
        return rescale(self.inner.mode().tanh(), self.low, self.high)

    def sample(self, noise: Float[Tensor, "*batch f k"]) -> Float[Tensor, "*batch k"]:
        """With a standard normal matrix that the caller keeps for several steps."""
        return rescale(self.inner.sample(noise).tanh(), self.low, self.high)

    def sample_log_prob(self, noise: Float[Tensor, "*batch k"]) -> tuple[Tensor, Tensor]:
        """A sample of the marginal and its log π, differentiable in the parameters through both."""
        return self.squashed().sample_log_prob(noise)

    def kl(self, other: "SquashedStateDependentGaussian") -> Float[Tensor, "*batch"]:
        return self.inner.kl(other.inner)


def log_one_minus_tanh_squared(u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(1 - tanh²u) = 2 (log 2 - u - softplus(-2u)), without the cancellation of the left side.

    >>> log_one_minus_tanh_squared(torch.tensor([0.0, 20.0, -20.0]))
    tensor([  0.0000, -38.6137, -38.6137])
    """
    return 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))


def rescale(unit: Float[Tensor, "*batch k"], low: Float[Tensor, " k"], high: Float[Tensor, " k"]) -> Tensor:
    """From [-1, 1] to [low, high].

    >>> rescale(torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([4.0]))
    tensor([3.])
    """
    return low + (unit + 1) * ((high - low) / 2)


def unit(action: Float[Tensor, "*batch k"], low: Float[Tensor, " k"], high: Float[Tensor, " k"]) -> Tensor:
    """From [low, high] to [-1, 1].

    >>> unit(torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([4.0]))
    tensor([0.5000])
    """
    return (action - low) * (2 / (high - low)) - 1


Distribution = Categorical | MultiCategorical | Bernoulli | DiagonalGaussian | StateDependentGaussian


def _fits(action: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(action.shape) != tuple(shape):
        raise ValueError(f"action has shape {tuple(action.shape)}, the policy's actions have {tuple(shape)}")


def _entropy(log_probs: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    return -(log_probs.exp() * log_probs).sum(-1)
