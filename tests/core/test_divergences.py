"""KL estimators: exact bias and spread (closed forms, enumeration, quadrature), and the exact gradient of each."""

import numpy as np
import pytest
import torch

from upslope.core import divergences

ESTIMATORS = {f.__name__: f for f in (divergences.k1, divergences.k2, divergences.k3, divergences.reverse_k3)}


def normal_logp(x, mean):
    return -0.5 * (x - mean) ** 2 - 0.5 * np.log(2 * np.pi)


@pytest.mark.parametrize(
    ("shift", "k2_bias", "spread"),
    [
        # REFERENCE: bias / true and std / true for q = N(0, 1), p = N(shift, 1), KL = shift^2 / 2
        (0.1, 0.0025, {"k1": 20.0, "k2": 1.4177, "k3": 1.4166}),
        (1.0, 0.25, {"k1": 2.0, "k2": 1.7321, "k3": 1.6950}),
    ],
)
def test_bias_and_spread_of_the_published_experiment(shift, k2_bias, spread):
    """By quadrature over a fine grid: a trapezoid of a Gaussian is exact to rounding."""
    x = torch.linspace(-12, 13, 20_001, dtype=torch.float64)
    logp_q, logp_p = normal_logp(x, 0.0), normal_logp(x, shift)
    weight = logp_q.exp() * (x[1] - x[0])
    true = shift**2 / 2
    for name, expected_bias in (("k1", 0.0), ("k2", k2_bias), ("k3", 0.0)):
        k = ESTIMATORS[name](logp_q, logp_p)
        mean = weight @ k
        assert ((mean - true) / true).item() == pytest.approx(expected_bias, abs=1e-9)
        assert ((weight @ (k - mean).square()).sqrt() / true).item() == pytest.approx(spread[name], abs=6e-5)


def test_spread_in_closed_form():
    """k1 = -m x + m^2/2 has variance m^2. Var k2 = m^4/2 + m^6/4 ... from the moments of a normal, at m = 1: 3/4.

    k2 = (m x - m^2/2)^2 / 2: for y ~ N(-m^2/2, m^2), Var(y^2)/4 = (2 m^4 + m^6) / 4.
    """
    for m, relative in ((0.1, 1.4177), (1.0, 1.7321)):
        assert np.sqrt((2 * m**4 + m**6) / 4) / (m**2 / 2) == pytest.approx(relative, abs=5e-5)
        assert np.sqrt(m**2) / (m**2 / 2) == pytest.approx({0.1: 20.0, 1.0: 2.0}[m])


def test_values_by_hand():
    logp_q, logp_p = torch.tensor([0.25]).log(), torch.tensor([0.5]).log()  # r = 2
    log2 = np.log(2)
    for name, value in (("k1", -log2), ("k2", log2**2 / 2), ("k3", 1 - log2), ("reverse_k3", 2 * log2 - 1)):
        assert ESTIMATORS[name](logp_q, logp_p).item() == pytest.approx(value, rel=1e-6)


def test_k3_keeps_its_digits_where_policies_nearly_agree():
    """r = e^x with x = 1e-4: k3 = x^2/2 + x^3/6; (r - 1) - log r in float32 would have no digit right."""
    x = 1e-4
    k = divergences.k3(torch.zeros(1), torch.tensor([x]))
    assert k.item() == pytest.approx(x**2 / 2 + x**3 / 6, rel=2e-3)
    assert divergences.reverse_k3(torch.zeros(1, dtype=torch.float64), torch.tensor([x]).double()).item() == (
        pytest.approx(x**2 / 2 + x**3 / 3, rel=1e-6)
    )


def tables():
    torch.manual_seed(0)
    theta, old, reference = (torch.randn(5, dtype=torch.float64) for _ in range(3))
    return theta, old.log_softmax(-1), reference.log_softmax(-1)


def exact_gradient(direction: str) -> torch.Tensor:
    theta, _, reference = tables()

    def kl(t):
        logp = t.log_softmax(-1)
        if direction == "KL[pi, ref]":
            return (logp.exp() * (logp - reference)).sum()
        return (reference.exp() * (reference - logp)).sum()

    return torch.func.grad(kl)(theta)


def expected(place: str, estimator, behavior=None, weighted=True) -> torch.Tensor:
    """Expected gradient of an estimator placed in the loss or in the reward, samples of pi or of `behavior`."""
    theta, _, reference = tables()
    logp = theta.log_softmax(-1)
    sampler = logp if behavior is None else behavior

    def objective(t):
        now = t.log_softmax(-1)
        weight = (now - sampler).exp() if behavior is not None and weighted else torch.ones_like(now)
        if place == "loss":
            return (sampler.exp() * weight.detach() * estimator(now, reference)).sum()
        return (sampler.exp() * weight.detach() * estimator(logp, reference).detach() * now).sum()

    return torch.func.grad(objective)(theta)


def check(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("off_policy", [False, True])
def test_expected_gradients(off_policy):
    """With the factor pi / pi_old an old policy's samples give the on-policy findings exactly."""
    behavior = tables()[1] if off_policy else None
    forward, backward = exact_gradient("KL[pi, ref]"), exact_gradient("KL[ref, pi]")
    check(expected("reward", divergences.k1, behavior), forward)
    check(expected("loss", divergences.k1, behavior), torch.zeros(5, dtype=torch.float64))
    check(expected("loss", divergences.k2, behavior), forward)
    check(expected("loss", divergences.k3, behavior), backward)
    check(expected("reward", divergences.k3, behavior), forward - backward)
    assert (expected("reward", divergences.k2, behavior) - forward).abs().max() > 1e-2
    assert (expected("reward", divergences.k2, behavior) - backward).abs().max() > 1e-2


def test_reverse_k3_in_loss_and_reward():
    """In the reward E[(r log r - r + 1) grad log pi] = E_ref[log r grad log pi] - E_ref[grad log pi];

    in the loss E[grad (r log r - r + 1)] = -E_ref[log r grad log pi], since d(r log r - r)/dr = log r and
    grad r = -r grad log pi. Neither is grad KL[ref, pi] = -E_ref[grad log pi]; their sum is.
    """
    theta, _, reference = tables()
    score = torch.func.jacrev(lambda t: t.log_softmax(-1))(theta)
    log_r = reference - theta.log_softmax(-1)
    weighted = (reference.exp() * log_r) @ score
    check(expected("loss", divergences.reverse_k3), -weighted)
    check(expected("reward", divergences.reverse_k3), weighted - reference.exp() @ score)
    check(-reference.exp() @ score, exact_gradient("KL[ref, pi]"))
    assert (expected("loss", divergences.reverse_k3) - exact_gradient("KL[ref, pi]")).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_without_the_ratio_an_old_policys_samples_mislead(name):
    """S4 A.3.2 averages over pi_old without pi / pi_old: not the on-policy gradient of the same estimator."""
    behavior = tables()[1]
    found = expected("loss", ESTIMATORS[name], behavior, weighted=False)
    assert (found - expected("loss", ESTIMATORS[name])).abs().max() > 1e-2


def test_differentiating_the_ratio_as_well_recovers_the_kl_itself():
    """E_old[rho k] with a live rho is E_pi[k] with all its dependence on theta: the gradient of KL[pi, ref]."""
    theta, old, reference = tables()
    for estimator in (divergences.k1, divergences.k3):

        def objective(t, estimator=estimator):
            now = t.log_softmax(-1)
            return (old.exp() * (now - old).exp() * estimator(now, reference)).sum()

        check(torch.func.grad(objective)(theta), exact_gradient("KL[pi, ref]"))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_means_by_enumeration(name):
    theta, _, reference = tables()
    logp = theta.log_softmax(-1)
    mean = logp.exp() @ ESTIMATORS[name](logp, reference)
    log_r = reference - logp
    wanted = {
        "k1": (logp.exp() * -log_r).sum(),
        "k2": (logp.exp() * log_r**2).sum() / 2,
        "k3": (logp.exp() * -log_r).sum(),
        "reverse_k3": (reference.exp() * log_r).sum(),
    }[name]
    check(mean, wanted)
    if name != "k1":
        assert (ESTIMATORS[name](logp, reference) >= 0).all()


def test_categorical_kl():
    q, p = torch.tensor([[1.0, 3.0]]).log(), torch.tensor([[2.0, 2.0]]).log()
    wanted = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    assert divergences.categorical_kl(q, p).item() == pytest.approx(wanted, rel=1e-6)
    assert divergences.categorical_kl(q + 5, q).item() == pytest.approx(0, abs=1e-6)


def test_categorical_kl_with_actions_masked_out():
    """An impossible action adds nothing, in value and in gradient, whatever p gives it."""
    q = torch.tensor([0.0, 1.0, float("-inf")], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([0.5, 0.0, float("-inf")], dtype=torch.float64, requires_grad=True)
    value = divergences.categorical_kl(q, p)
    short = divergences.categorical_kl(q.detach()[:2], p.detach()[:2])
    torch.testing.assert_close(value, short)
    value.backward()
    assert q.grad.isfinite().all()
    assert p.grad.isfinite().all()
    # p allows what q does not: p's other actions have less than all the mass.
    wide = divergences.categorical_kl(q.detach(), torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64))
    assert wide > short


def test_gaussian_kl_against_quadrature():
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    mq, sq, mp, sp = 0.3, 0.7, -0.4, 1.9

    def logp(mean, std):
        return normal_logp(x / std, mean / std) - np.log(std)

    weight = logp(mq, sq).exp() * (x[1] - x[0])
    wanted = weight @ (logp(mq, sq) - logp(mp, sp))
    row = [torch.tensor([v], dtype=torch.float64) for v in (mq, np.log(sq), mp, np.log(sp))]
    torch.testing.assert_close(divergences.gaussian_kl(*row), wanted)
    twice = divergences.gaussian_kl(*(torch.cat([v, v]) for v in row))
    torch.testing.assert_close(twice, 2 * wanted)


def test_a_squashed_gaussians_kl_is_the_gaussians():
    """Change of variables y = tanh x: the log-det cancels in log q - log p."""
    x = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    y, jacobian = x.tanh(), (1 - x.tanh() ** 2).clamp(min=1e-300).log()
    squashed_q, squashed_p = normal_logp(x, 0.2) - jacobian, normal_logp(x, -0.3) - jacobian
    keep = (1 - y.abs()) > 1e-12
    mass = (squashed_q[keep].exp()[:-1] + squashed_q[keep].exp()[1:]) / 2 * y[keep].diff()
    change = (squashed_q - squashed_p)[keep]
    found = (mass * (change[:-1] + change[1:]) / 2).sum()
    zero = torch.zeros(1, dtype=torch.float64)
    wanted = divergences.gaussian_kl(zero + 0.2, zero, zero - 0.3, zero)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-3)
