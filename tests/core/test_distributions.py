"""Action distributions against torch.distributions, against sums over all actions, and against their own samples."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import distributions as reference

from upslope.core import distributions as ours

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def sizes_of(logits: tuple[torch.Tensor, ...]) -> list[int]:
    return [part.shape[-1] for part in logits]


PAIRS: dict[str, tuple[Any, Any, list[Any]]] = {  # ours, another of the same kind, every action
    "categorical": (
        ours.Categorical(normal(5)),
        ours.Categorical(normal(5, seed=1)),
        [torch.tensor(a) for a in range(5)],
    ),
    "multi-categorical": (
        ours.MultiCategorical((normal(2), normal(3, seed=2))),
        ours.MultiCategorical((normal(2, seed=3), normal(3, seed=4))),
        [torch.tensor(a) for a in itertools.product(range(2), range(3))],
    ),
    "bernoulli": (
        ours.Bernoulli(normal(3)),
        ours.Bernoulli(normal(3, seed=1)),
        [torch.tensor(a) for a in itertools.product(range(2), repeat=3)],
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_discrete_definitions_by_summing_over_all_actions(name: str) -> None:
    """Σ π = 1, H = -Σ π log π, KL = Σ π (log π - log q), the mode is the likeliest action."""
    policy, other, actions = PAIRS[name]
    logp = torch.stack([policy.log_prob(a) for a in actions])
    logq = torch.stack([other.log_prob(a) for a in actions])
    assert logp.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    assert policy.entropy().item() == pytest.approx(-(logp.exp() * logp).sum().item(), abs=1e-12)
    assert policy.kl(other).item() == pytest.approx((logp.exp() * (logp - logq)).sum().item(), abs=1e-12)
    assert policy.kl(policy).item() == pytest.approx(0.0, abs=1e-12)
    assert torch.equal(policy.mode(), actions[int(logp.argmax())])
    both = policy.log_prob_entropy(actions[1])
    assert both[0].item() == pytest.approx(logp[1].item(), abs=1e-12)
    assert both[1].item() == pytest.approx(policy.entropy().item(), abs=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_discrete_samples_have_the_policys_frequencies(name: str) -> None:
    policy, _, actions = PAIRS[name]
    n, generator = 20_000, torch.Generator().manual_seed(5)
    draw = ours.logistic if name == "bernoulli" else ours.gumbel
    width = sum(sizes_of(policy.logits)) if name == "multi-categorical" else policy.logits.shape[-1]
    noise = draw((n, width), generator, DOUBLE)
    spread = type(policy)(
        tuple(part.expand(n, -1) for part in policy.logits)
        if name == "multi-categorical"
        else policy.logits.expand(n, -1)
    )
    samples = spread.sample(noise).reshape(n, -1)
    counts = [int((samples == a.reshape(1, -1)).all(1).sum()) for a in actions]
    expected = [n * policy.log_prob(a).exp().item() for a in actions]
    assert sum(counts) == n
    assert stats.chisquare(counts, expected, sum_check=False).pvalue > 1e-3


def test_an_action_ruled_out_has_probability_exactly_zero() -> None:
    policy = ours.Categorical(torch.tensor([0.0, -1e8, 1.0]))
    assert policy.log_probs().exp()[1] == 0
    two = ours.Categorical(torch.tensor([0.0, 1.0]))
    assert policy.entropy().item() == pytest.approx(two.entropy().item(), abs=1e-6)
    logits = policy.logits.clone().requires_grad_()
    ours.Categorical(logits).entropy().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_gaussian_is_torchs() -> None:
    mean, log_std, action = normal(4, 3), 0.3 * normal(3, seed=1), normal(4, 3, seed=2)
    policy = ours.DiagonalGaussian(mean, log_std)
    same = reference.Independent(reference.Normal(mean, log_std.exp().expand(4, 3)), 1)
    torch.testing.assert_close(policy.log_prob(action), same.log_prob(action), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(policy.entropy(), same.entropy(), rtol=1e-12, atol=1e-12)
    both = policy.log_prob_entropy(action)
    torch.testing.assert_close(both[0], same.log_prob(action), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(both[1], same.entropy(), rtol=1e-12, atol=1e-12)
    other_mean, other_log_std = normal(4, 3, seed=3), 0.2 * normal(3, seed=4)
    other = reference.Independent(reference.Normal(other_mean, other_log_std.exp().expand(4, 3)), 1)
    kl = policy.kl(ours.DiagonalGaussian(other_mean, other_log_std))
    torch.testing.assert_close(kl, reference.kl_divergence(same, other), rtol=1e-12, atol=1e-12)
    assert torch.equal(policy.mode(), mean)
    noise = normal(4, 3, seed=5)
    torch.testing.assert_close(policy.sample(noise), mean + log_std.exp() * noise)


def test_state_dependent_noise_has_the_variance_it_claims() -> None:
    """ε = E^T x with E_ij ~ N(0, σ_ij²): Var ε_j = Σ_i x_i² σ_ij², by 100,000 draws of E."""
    features, log_std, mean = normal(1, 4), 0.3 * normal(4, 2, seed=1), normal(1, 2, seed=2)
    policy = ours.StateDependentGaussian(mean, features, log_std)
    exact = (features.square() @ (2 * log_std).exp()).squeeze(0)
    torch.testing.assert_close(policy.gaussian().log_std.exp().square().squeeze(0), exact + 1e-6)
    n = 100_000
    noise = ours.normal((n, 4, 2), torch.Generator().manual_seed(0), DOUBLE)
    many = ours.StateDependentGaussian(mean.expand(n, 2), features.expand(n, 4), log_std)
    samples = many.sample(noise)
    np.testing.assert_allclose(samples.var(0), exact, rtol=5 * math.sqrt(2 / n))  # five standard errors
    np.testing.assert_allclose(samples.mean(0), mean.squeeze(0), atol=5 * math.sqrt(exact.max().item() / n))
    action = samples[:1]
    gaussian = policy.gaussian()
    assert torch.equal(policy.log_prob(action), gaussian.log_prob(action))
    assert torch.equal(policy.entropy(), gaussian.entropy())
    assert torch.equal(policy.log_prob_entropy(action)[0], gaussian.log_prob(action))
    assert torch.equal(policy.mode(), mean)
    shifted = ours.StateDependentGaussian(mean + 1, features, log_std)
    assert policy.kl(shifted).item() == pytest.approx((1 / (2 * (exact + 1e-6))).sum().item(), rel=1e-9)


def test_state_dependent_noise_sends_no_gradient_into_the_features() -> None:
    features = normal(2, 4).requires_grad_()
    policy = ours.StateDependentGaussian(torch.zeros(2, 2, dtype=DOUBLE), features, torch.zeros(4, 2, dtype=DOUBLE))
    assert not policy.log_prob(normal(2, 2)).requires_grad


def test_noise_has_its_distribution() -> None:
    generator = torch.Generator().manual_seed(3)
    for draw, name in ((ours.gumbel, "gumbel_r"), (ours.logistic, "logistic"), (ours.normal, "norm")):
        sample = draw((20_000,), generator, DOUBLE).numpy()
        assert stats.kstest(sample, name).pvalue > 1e-3


BATCHED = {
    "categorical": (
        ours.Categorical(normal(2, 3, 5)),
        ours.Categorical(normal(2, 3, 5, seed=1)),
        normal(2, 3, 5, seed=9),
    ),
    "multi-categorical": (
        ours.MultiCategorical((normal(2, 3, 2), normal(2, 3, 3, seed=2))),
        ours.MultiCategorical((normal(2, 3, 2, seed=3), normal(2, 3, 3, seed=4))),
        normal(2, 3, 5, seed=9),
    ),
    "bernoulli": (ours.Bernoulli(normal(2, 3, 4)), ours.Bernoulli(normal(2, 3, 4, seed=1)), normal(2, 3, 4, seed=9)),
    "gaussian": (
        ours.DiagonalGaussian(normal(2, 3, 4), normal(2, 3, 4, seed=2)),
        ours.DiagonalGaussian(normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=3)),
        normal(2, 3, 4, seed=9),
    ),
}


def part(policy: Any, i: int, j: int) -> Any:
    """The policy of one element of the batch."""
    return type(policy)(*(tuple(x[i, j] for x in p) if isinstance(p, tuple) else p[i, j] for p in policy))


@pytest.mark.parametrize("name", BATCHED)
def test_every_axis_but_the_last_is_batch(name: str) -> None:
    policy, other, noise = BATCHED[name]
    action, mode = policy.sample(noise), policy.mode()
    found = {
        "logp": policy.log_prob(action),
        "entropy": policy.entropy(),
        "kl": policy.kl(other),
        "both0": policy.log_prob_entropy(action)[0],
        "both1": policy.log_prob_entropy(action)[1],
    }
    if name != "gaussian":
        assert action.dtype == mode.dtype == torch.int64
    for i, j in itertools.product(range(2), range(3)):
        one = part(policy, i, j)
        assert torch.equal(one.sample(noise[i, j]), action[i, j])
        assert torch.equal(one.mode(), mode[i, j])
        expected = {
            "logp": one.log_prob(action[i, j]),
            "entropy": one.entropy(),
            "kl": one.kl(part(other, i, j)),
            "both0": one.log_prob(action[i, j]),
            "both1": one.entropy(),
        }
        for key, value in expected.items():
            torch.testing.assert_close(found[key][i, j], value, rtol=1e-12, atol=1e-12, msg=key)


def test_state_dependent_noise_of_a_batch_of_two_axes() -> None:
    mean, features, log_std = normal(2, 3, 2), normal(2, 3, 4, seed=1), normal(4, 2, seed=2)
    noise = normal(2, 3, 4, 2, seed=3)
    found = ours.StateDependentGaussian(mean, features, log_std).sample(noise)
    by_hand = mean + np.einsum("...f,fk,...fk->...k", features, log_std.exp(), noise)
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=1e-12)


def test_bernoulli_in_single_precision_is_exact_in_double() -> None:
    """The action's type never sets the precision of the log-probability."""
    policy = ours.Bernoulli(normal(3))
    action = torch.tensor([1, 0, 1], dtype=torch.int8)
    p = torch.sigmoid(policy.logits)
    expected = (p[0] * (1 - p[1]) * p[2]).log()
    torch.testing.assert_close(policy.log_prob(action), expected, rtol=1e-14, atol=0)
    assert ours.Bernoulli(torch.zeros(2)).mode().tolist() == [0, 0]  # a tie is no yes
    assert ours.Bernoulli(torch.tensor([-0.5, 0.5, 1.5])).mode().tolist() == [0, 1, 1]
    assert ours.Bernoulli(torch.zeros(2)).sample(torch.zeros(2)).tolist() == [0, 0]
    assert ours.Bernoulli(torch.zeros(2)).sample(torch.tensor([1.0, -1.0])).tolist() == [1, 0]


@pytest.mark.parametrize("draw", [ours.gumbel, ours.logistic, ours.normal])
def test_noise_is_a_function_of_the_generator(draw: Any) -> None:
    one, again = (draw((4, 2), torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, draw((4, 2), torch.Generator().manual_seed(8)))
    assert one.dtype == torch.float32
    assert draw((2,), torch.Generator(), DOUBLE).dtype == DOUBLE
    default = torch.get_default_dtype()
    torch.set_default_dtype(DOUBLE)
    try:
        assert draw((2,), torch.Generator()).dtype == torch.float32
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("method", ["log_prob", "log_prob_entropy"])
def test_actions_of_another_shape_are_refused(name: str, method: str) -> None:
    """They would broadcast to a matrix of log-probabilities, and nobody would notice."""
    policy, _, noise = BATCHED[name]
    action = policy.sample(noise)
    for wrong in (action[:1], action.unsqueeze(-1), action[0, 0]):
        with pytest.raises((ValueError, TypeError), match=r"action"):
            getattr(policy, method)(wrong)
