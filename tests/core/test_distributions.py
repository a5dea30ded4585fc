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


def test_squashed_state_dependent_noise_is_the_squashed_marginal() -> None:
    """Actions drawn with matrices have the density of the squashed marginal: moments by draws and by quadrature."""
    features, log_std = torch.tensor([[0.6, -0.8]], dtype=DOUBLE), torch.tensor([[0.1], [-0.2]], dtype=DOUBLE)
    low, high = torch.tensor([-1.0], dtype=DOUBLE), torch.tensor([3.0], dtype=DOUBLE)
    inner = ours.StateDependentGaussian(torch.tensor([[0.3]], dtype=DOUBLE), features, log_std)
    policy = ours.SquashedStateDependentGaussian(inner, low, high)
    n = 200_000
    noise = ours.normal((n, 2, 1), torch.Generator().manual_seed(0), DOUBLE)
    actions = ours.rescale((0.3 + (features[0, :, None] * log_std.exp() * noise).sum(1)).tanh(), low, high)
    torch.testing.assert_close(policy.sample(noise[:1]), actions[:1], rtol=1e-12, atol=1e-12)
    grid = torch.linspace(-1 + 1e-6, 3 - 1e-6, 200_001, dtype=DOUBLE).unsqueeze(-1)
    density = policy.squashed()._replace(mean=inner.mean.expand(len(grid), 1)).log_prob(grid).exp()
    assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1, abs=1e-3)
    for moment in (1, 2):
        exact = torch.trapezoid(density * grid[:, 0] ** moment, grid[:, 0]).item()
        powers = actions[:, 0] ** moment
        assert abs(powers.mean().item() - exact) < 5 * powers.std().item() / math.sqrt(n) + 1e-3
    drawn, logp = policy.sample_log_prob(torch.tensor([[0.5]], dtype=DOUBLE))
    torch.testing.assert_close(policy.log_prob(drawn), logp, rtol=1e-9, atol=1e-9)
    assert policy.mode().item() == pytest.approx(1 + 2 * math.tanh(0.3), rel=1e-12)
    shifted = policy._replace(inner=inner._replace(mean=inner.mean + 1))
    assert policy.kl(shifted).item() == pytest.approx(inner.kl(shifted.inner).item(), rel=1e-12)


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


LOW, HIGH = torch.tensor([-2.0, 0.0], dtype=DOUBLE), torch.tensor([1.0, 10.0], dtype=DOUBLE)


def test_squashed_density_by_numbers() -> None:
    """In one dimension the density integrates to 1 and is the slope of the distribution function P(u <= u(a))."""
    mean, log_std, low, high = 0.3, -0.4, -2.0, 5.0
    given = [torch.tensor([x], dtype=DOUBLE) for x in (mean, log_std, low, high)]
    policy = ours.SquashedGaussian(*(x.expand(20_001, 1) for x in given[:2]), *given[2:])
    action = np.linspace(low, high, 20_001)[:, None]
    density = policy.log_prob(torch.from_numpy(action)).exp().numpy()
    inside = np.clip(2 * (action[:, 0] - low) / (high - low) - 1, -1 + 1e-15, 1 - 1e-15)
    cdf = stats.norm.cdf((np.arctanh(inside) - mean) / math.exp(log_std))
    assert np.trapezoid(density, action[:, 0]) == pytest.approx(1.0, abs=1e-6)
    slope = np.gradient(cdf, action[:, 0])
    np.testing.assert_allclose(density[100:-100], slope[100:-100], rtol=1e-4, atol=1e-6)


def test_squashed_samples_and_their_log_prob() -> None:
    policy = ours.SquashedGaussian(normal(100, 2), 0.3 * normal(2, seed=1), LOW, HIGH)
    action, logp = policy.sample_log_prob(normal(100, 2, seed=2))
    assert torch.equal(action, policy.sample(normal(100, 2, seed=2)))
    assert ((action > LOW) & (action < HIGH)).all()
    torch.testing.assert_close(policy.log_prob(action), logp, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(policy.log_prob_before(policy.gaussian().sample(normal(100, 2, seed=2))), logp)
    base = reference.Normal(policy.mean, policy.log_std.exp())
    squashed = reference.TransformedDistribution(
        base, [reference.TanhTransform(), reference.AffineTransform((LOW + HIGH) / 2, (HIGH - LOW) / 2)]
    )
    torch.testing.assert_close(squashed.log_prob(action).sum(-1), logp, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(policy.mode(), LOW + (policy.mean.tanh() + 1) * (HIGH - LOW) / 2)


def test_squashed_samples_are_reparametrised() -> None:
    """The slopes of action and log π in mean and log_std are those of finite differences with the noise held."""
    noise, h = normal(2, seed=2), 1e-6
    weight = torch.tensor([0.7, -0.2], dtype=DOUBLE)

    def value(mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
        action, logp = ours.SquashedGaussian(mean, log_std, LOW, HIGH).sample_log_prob(noise)
        return (weight * action).sum() + 0.5 * logp

    given = [normal(2).requires_grad_(), (0.1 * normal(2, seed=1)).requires_grad_()]
    slopes = torch.autograd.grad(value(*given), given)
    for which in range(2):
        for i in range(2):
            step = [x.detach().clone() for x in given], [x.detach().clone() for x in given]
            step[0][which][i] += h
            step[1][which][i] -= h
            numeric = float(value(*step[0]) - value(*step[1])) / (2 * h)
            assert float(slopes[which][i]) == pytest.approx(numeric, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_det_at_saturation(dtype: torch.dtype) -> None:
    """|u| = 20, where tanh is 1 in float64: log(1 - tanh²u) = log 4 - 2|u| up to e^-40; slope -2 tanh u."""
    u = torch.tensor([20.0, -20.0, 100.0, 0.5], dtype=dtype, requires_grad=True)
    found = ours.log_one_minus_tanh_squared(u)
    expected = [math.log(4) - 40, math.log(4) - 40, math.log(4) - 200, math.log(1 - math.tanh(0.5) ** 2)]
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-6)
    (slope,) = torch.autograd.grad(found.sum(), u)
    np.testing.assert_allclose(slope.numpy(), [-2, 2, -2, -2 * math.tanh(0.5)], rtol=1e-6)
    one = torch.ones(1, dtype=dtype)
    for mean in (20.0, -20.0):
        policy = ours.SquashedGaussian(mean * one, 0 * one, -one, one)
        action, logp = policy.sample_log_prob(0 * one)
        assert logp.item() == pytest.approx(-0.5 * math.log(2 * math.pi) - math.log(4) + 40, rel=1e-6)
        assert policy.log_prob(action).isfinite().all()
        assert abs(action.item()) <= 1


def test_squashing_keeps_the_kl() -> None:
    """E_p[log p - log q] over actions is that of the Gaussians."""
    mean, other = normal(2), normal(2, seed=1)
    many = torch.randn(400_000, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))
    p = ours.SquashedGaussian(mean, torch.tensor([-0.5, 0.1], dtype=DOUBLE), LOW, HIGH)
    q = ours.SquashedGaussian(other, torch.tensor([0.2, -0.3], dtype=DOUBLE), LOW, HIGH)
    wide = ours.SquashedGaussian(*(x.expand(400_000, 2) for x in p[:2]), LOW, HIGH)
    u = wide.gaussian().sample(many)
    gap = wide.log_prob_before(u) - ours.SquashedGaussian(
        *(x.expand(400_000, 2) for x in q[:2]), LOW, HIGH
    ).log_prob_before(u)
    assert p.kl(q).item() == pytest.approx(gap.mean().item(), abs=5 * gap.std().item() / math.sqrt(400_000))
    assert p.kl(p).item() == pytest.approx(0.0, abs=1e-12)


def test_squashed_action_of_another_shape_is_refused() -> None:
    policy = ours.SquashedGaussian(normal(3, 2), normal(2), LOW, HIGH)
    with pytest.raises(ValueError, match="action has shape"):
        policy.log_prob(normal(3, 1))
