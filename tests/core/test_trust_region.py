"""Fisher products, conjugate gradient, line search, adaptive penalties, K-FAC: against exact matrices and by hand."""

import numpy as np
import pytest
import torch

from tests.core.problems import PROBLEMS, bandit, problem
from upslope.core import divergences, kronecker, trust_region
from upslope.exact import policy_gradient as exact


def spd(size, seed=0):
    a = torch.randn(size, size, generator=torch.manual_seed(seed), dtype=torch.float64)
    return a @ a.T + 0.1 * torch.eye(size, dtype=torch.float64)


def network_policy(states=5, actions=3):
    features = torch.randn(states, 4, generator=torch.manual_seed(1), dtype=torch.float64)

    def logits(theta):
        return torch.tanh(features @ theta[:12].view(4, 3)) @ theta[12:].view(3, actions)

    theta = torch.randn(12 + 3 * actions, generator=torch.manual_seed(2), dtype=torch.float64)
    return logits, theta


def mean_kl(weights=None):
    def kl(old, new):
        each = divergences.categorical_kl(old, new)
        return each.mean() if weights is None else weights @ each

    return kl


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_fisher_vector_product_is_the_exact_fisher_times_the_vector(damping):
    logits, theta = network_policy()
    log_policy = lambda t: logits(t).log_softmax(-1)  # noqa: E731
    table = exact.score_table(log_policy, theta)
    probs = log_policy(theta).exp()
    fisher = torch.einsum("sa,sai,saj->ij", probs / len(probs), table, table)
    for seed in range(3):
        v = torch.randn(theta.shape, generator=torch.manual_seed(seed), dtype=torch.float64)
        found = trust_region.fisher_vector_product(logits, mean_kl(), theta, v, damping)
        torch.testing.assert_close(found, fisher @ v + damping * v, rtol=1e-10, atol=1e-12)
        hessian = torch.func.hessian(lambda t: mean_kl()(logits(theta), logits(t)))(theta)
        torch.testing.assert_close(found, hessian @ v + damping * v, rtol=1e-8, atol=1e-10)


def test_fisher_of_an_mdp_and_of_a_gaussian():
    p = PROBLEMS["stochastic, terminating"]()
    visits = p.evaluation.visits.sum(0)
    weights = visits / visits.sum()
    v = torch.randn(p.theta.shape, generator=torch.manual_seed(5), dtype=torch.float64)
    found = trust_region.fisher_vector_product(p.policy, mean_kl(weights), p.theta, v)
    torch.testing.assert_close(found, exact.exact_fisher(p.mdp, p.policy, p.theta) @ v, rtol=1e-10, atol=1e-12)

    # N(m, s): Fisher is diag(1/s^2, 2) in (m, log s).
    def outputs(theta):
        return theta[:2].unsqueeze(0), theta[2:].unsqueeze(0)

    theta = torch.tensor([0.3, -1.0, 0.2, -0.5], dtype=torch.float64)
    kl = lambda old, new: divergences.gaussian_kl(*old, *new).mean()  # noqa: E731
    v = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    diagonal = torch.cat([torch.exp(-2 * theta[2:]), torch.full((2,), 2.0, dtype=torch.float64)])
    torch.testing.assert_close(trust_region.fisher_vector_product(outputs, kl, theta, v), diagonal * v)


@pytest.mark.parametrize("tolerance", [0.2, 1e-3, 1e-6])
def test_conjugate_gradient_solves_to_tolerance(tolerance):
    a, b = spd(12), torch.randn(12, generator=torch.manual_seed(3), dtype=torch.float64)
    calls = []

    def product(v):
        calls.append(1)
        return a @ v

    x = trust_region.conjugate_gradient(product, b, iterations=50, tolerance=tolerance)
    assert (a @ x - b).norm() <= 1.1 * tolerance * b.norm()
    assert len(calls) <= 50
    # It stopped as soon as it might: one step earlier the residual was too large.
    before = trust_region.conjugate_gradient(product, b, iterations=len(calls) - 1, tolerance=0.0)
    assert (a @ before - b).norm() > tolerance * b.norm()
    torch.testing.assert_close(
        trust_region.conjugate_gradient(product, b, 60, 1e-14), torch.linalg.solve(a, b), rtol=1e-8, atol=1e-8
    )


def test_conjugate_gradient_ends_in_d_steps_and_after_the_given_number():
    """Exact after as many steps as there are distinct eigenvalues; one step is the steepest descent's exact step."""
    diagonal = torch.tensor([1.0, 1.0, 5.0, 5.0, 9.0], dtype=torch.float64)
    b = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    x = trust_region.conjugate_gradient(lambda v: diagonal * v, b, iterations=3)
    torch.testing.assert_close(x, b / diagonal, rtol=1e-12, atol=1e-12)
    one = trust_region.conjugate_gradient(lambda v: diagonal * v, b, iterations=1)
    torch.testing.assert_close(one, b * (b @ b) / (b @ (diagonal * b)))
    assert trust_region.conjugate_gradient(lambda v: diagonal * v, 0 * b).abs().max() == 0


def test_conjugate_gradient_refuses_what_is_not_positive_definite():
    for singular in (lambda v: -v, lambda v: 0 * v):
        with pytest.raises(ValueError, match="positive definite"):
            trust_region.conjugate_gradient(singular, torch.ones(2), iterations=1)
    with pytest.raises(ValueError, match="positive definite"):
        trust_region.conjugate_gradient(lambda v: v * torch.nan, torch.ones(2))


def test_natural_gradient_and_step():
    a, g = spd(6), torch.randn(6, generator=torch.manual_seed(4), dtype=torch.float64)
    product = lambda v: a @ v  # noqa: E731
    x = trust_region.natural_gradient(product, g, iterations=30)
    torch.testing.assert_close(x, torch.linalg.solve(a, g))
    rough = trust_region.natural_gradient(product, g, iterations=30, tolerance=0.5)
    assert (a @ rough - g).norm() > 1e-3 * g.norm()  # stops early when it may
    step = trust_region.natural_step(product, g, delta=0.01, iterations=30)
    assert (0.5 * step @ a @ step).item() == pytest.approx(0.01, rel=1e-9)  # its KL to second order
    assert torch.nn.functional.cosine_similarity(step, x, dim=0).item() == pytest.approx(1)
    # No other step of that size gains more to first order.
    other = torch.randn(200, 6, generator=torch.manual_seed(6), dtype=torch.float64)
    other = other * (0.02 / torch.einsum("ni,ij,nj->n", other, a, other)).sqrt().unsqueeze(-1)
    assert (other @ g).max() < step @ g
    assert trust_region.natural_step(product, 0 * g, delta=0.01).abs().max() == 0
    tiny = trust_region.natural_step(product, 1e-3 * g, delta=0.01, iterations=30)
    torch.testing.assert_close(tiny, step)  # the gradient's length does not matter


def test_natural_gradient_does_not_depend_on_the_parametrisation():
    """theta = M phi: the natural gradient in phi, mapped back by M, is the natural gradient in theta."""
    features = torch.randn(40, 6, generator=torch.manual_seed(8), dtype=torch.float64)

    def outputs(theta):  # the mean of a Gaussian of standard deviation 1
        mean = torch.sinh(features @ theta).unsqueeze(-1)
        return mean, torch.zeros_like(mean)

    kl = lambda old, new: divergences.gaussian_kl(*old, *new).mean()  # noqa: E731
    theta = 0.1 * torch.ones(6, dtype=torch.float64)
    m, g = spd(6, 9), torch.randn(6, generator=torch.manual_seed(10), dtype=torch.float64)
    direct = trust_region.natural_gradient(trust_region.fisher_operator(outputs, kl, theta), g, 60, 1e-12)
    phi = torch.linalg.solve(m, theta)
    mapped = trust_region.fisher_operator(lambda x: outputs(m @ x), kl, phi)
    torch.testing.assert_close(m @ trust_region.natural_gradient(mapped, m.T @ g, 60, 1e-12), direct)


def trpo_problem(delta):
    logits, theta = network_policy()
    advantages = torch.randn(5, 3, generator=torch.manual_seed(12), dtype=torch.float64)
    old = logits(theta)
    probs = old.softmax(-1)
    advantages = advantages - (probs * advantages).sum(-1, keepdim=True)

    def surrogate(t):
        return (logits(t).softmax(-1) * advantages).sum(-1).mean()

    def evaluate(t):
        return surrogate(t), mean_kl()(old, logits(t))

    g = torch.func.grad(surrogate)(theta)
    step = trust_region.natural_step(trust_region.fisher_operator(logits, mean_kl(), theta, 1e-3), g, delta)
    return theta, step, g, evaluate


@pytest.mark.parametrize("delta", [1e-4, 1e-2, 0.3, 5.0])
def test_an_accepted_step_never_exceeds_delta(delta):
    theta, step, g, evaluate = trpo_problem(delta)
    found = trust_region.line_search(evaluate, theta, step, (g @ step).item(), delta)
    surrogate, kl = evaluate(found.theta)
    assert found.accepted
    assert kl <= delta
    assert found.kl == kl.item()
    assert found.improvement == pytest.approx((surrogate - evaluate(theta)[0]).item())
    assert found.improvement >= 0.1 * 0.5**found.backtracks * (g @ step).item() > 0
    torch.testing.assert_close(found.theta, theta + 0.5**found.backtracks * step)


def line(x):
    return x.sum(), x.square().sum()


@pytest.mark.parametrize(
    ("evaluate", "options", "accepted", "backtracks"),
    [
        (line, {"delta": 1.0}, True, 0),  # at the limit: KL = delta is allowed
        (line, {"delta": 1.0, "max_backtracks": 0}, True, 0),
        (line, {"delta": 0.999}, True, 1),
        (line, {"delta": 0.06}, True, 3),  # (1/8)^2 < 0.06 < (1/4)^2
        (line, {"delta": 0.06, "shrink": 0.2}, True, 1),
        (line, {"delta": 0.06, "max_backtracks": 2}, False, 2),
        (line, {"delta": 0.06, "max_backtracks": 3}, True, 3),
        (lambda x: (x.sum() - 7, x.square().sum() + 0.01), {"delta": 0.999}, True, 1),  # the start is no zero
        (lambda x: (5 - x.sum(), x.square().sum()), {"delta": 1.0}, False, 10),  # downhill
        (lambda x: (0 * x.sum(), x.square().sum()), {"delta": 1.0, "expected": 0.0}, False, 10),  # no gain
        (lambda x: (x.sum() * 0.09, 0.0), {"delta": 1.0}, False, 10),  # gains less than a tenth of what was expected
        (lambda x: (x.sum() * 0.1, 0.0), {"delta": 1.0}, True, 0),
        (lambda x: (x.sum() * 0.09, 0.0), {"delta": 1.0, "accept_ratio": 0.05}, True, 0),
        (lambda x: (x.sum() * torch.nan, 0.0), {"delta": 1.0}, False, 10),
        (lambda x: (x.sum(), torch.nan), {"delta": 1.0}, False, 10),
        (lambda x: ((x - x**2).sum(), 0.0), {"delta": 1.0, "expected": 1.0}, True, 1),  # overshoots at first
    ],
)
def test_line_search_by_hand(evaluate, options, accepted, backtracks):
    start, step = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    found = trust_region.line_search(evaluate, start, step, **{"expected": 1.0, **options})
    assert (found.accepted, found.backtracks) == (accepted, backtracks)
    if not accepted:
        assert torch.equal(found.theta, start)
        assert (found.improvement, found.kl) == (0.0, 0.0)


def test_linear_quadratic_step_maximises_its_model():
    a, g, beta = spd(5), torch.randn(5, generator=torch.manual_seed(7), dtype=torch.float64), 0.7
    x = trust_region.linear_quadratic_step(lambda v: a @ v, g, beta, iterations=30)
    torch.testing.assert_close(g - beta * a @ x, 0 * g, rtol=0, atol=1e-9)  # its gradient vanishes


def test_limit_l2_in_place_of_the_kl_is_the_vanilla_gradient():
    g = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(trust_region.linear_quadratic_step(lambda v: v, g, beta=4.0), g / 4)


def test_limit_without_penalty_is_policy_iteration():
    """A softmax table: F^+ grad J is proportional to A(s, a) in every state, so beta -> 0 ends at argmax A."""
    p = PROBLEMS["truncated and bootstrapped"]()
    mdp, states, actions = p.mdp, p.mdp.num_states, p.mdp.num_actions
    known = exact.evaluate(mdp, p.policy(p.theta).exp())
    gradient = exact.exact_policy_gradient(mdp, p.policy, p.theta)
    fisher = exact.exact_fisher(mdp, p.policy, p.theta)
    # Directions that shift a whole state's logits change no policy: give them curvature, they have no gradient.
    flat = torch.block_diag(*[torch.ones(actions, actions, dtype=torch.float64)] * states)
    for beta, agree in ((1e-4, 1e-6), (1e3, None)):
        step = trust_region.linear_quadratic_step(lambda v: (fisher + flat) @ v, gradient, beta, iterations=30)
        torch.testing.assert_close(
            step.view(states, actions) * beta * (1 - mdp.gamma),
            known.advantages - known.advantages.mean(-1, keepdim=True),
            rtol=1e-6,
            atol=1e-8,
        )
        new = p.policy(p.theta + step).exp()
        greedy = torch.nn.functional.one_hot(known.q.argmax(-1), actions).double()
        if agree:
            torch.testing.assert_close(new, greedy, rtol=0, atol=agree)
        else:
            assert (new - p.policy(p.theta).exp()).abs().max() < 0.1  # a heavy penalty hardly moves


@pytest.mark.parametrize(
    ("preset", "high", "low", "up", "down"),
    [
        (trust_region.modular_rl, 1.3, 0.7, 1.5, 1.5),
        (trust_region.ppo_paper, 1.5, 1 / 1.5, 2.0, 2.0),
        (trust_region.lecture, 1.5, 1 / 1.5, 1.5, 1.5),
    ],
)
def test_adaptive_kl(preset, high, low, up, down):
    state = preset(target=0.5, coef=3.0)
    assert trust_region.adapt(state, high * 0.5 * 1.0001).coef == pytest.approx(3.0 * up)
    assert trust_region.adapt(state, torch.tensor(low * 0.5 * 0.9999)).coef == pytest.approx(3.0 / down)
    # Strict: at a threshold exactly, and in between, nothing changes.
    for kl in (state.high * 0.5, state.low * 0.5, 0.5):
        assert trust_region.adapt(state, kl) == state
    assert trust_region.adapt(state, 0.0).coef == pytest.approx(3.0 / down)
    assert preset(0.1).coef == 1.0
    assert state.target == 0.5


def test_adaptive_factors_may_differ_up_and_down():
    state = trust_region.AdaptiveKL(coef=1.0, target=1.0, high=2.0, low=0.5, factor_up=3.0, factor_down=7.0)
    assert trust_region.adapt(state, 2.1).coef == 3.0
    assert trust_region.adapt(state, 0.4).coef == pytest.approx(1 / 7)


@pytest.mark.parametrize(
    ("kl", "samples", "coef"),
    [
        (6.0, 512, 0.15),
        (6.6, 512, 0.15 * (1 + 0.1 * 512 / 10_000)),
        (60.0, 512, 0.15 * (1 + 0.2 * 512 / 10_000)),
        (0.0, 512, 0.15 * (1 - 0.2 * 512 / 10_000)),
        (-3.0, 512, 0.15 * (1 - 0.2 * 512 / 10_000)),
        (5.4, 10_000, 0.15 * 0.9),
        (60.0, 0, 0.15),
    ],
)
def test_zieglers_rule(kl, samples, coef):
    """lm-human-preferences: target 6, horizon 10,000."""
    state = trust_region.ProportionalKL(coef=0.15, target=6.0, horizon=10_000)
    assert trust_region.adapt_proportionally(state, torch.tensor(kl), samples).coef == pytest.approx(coef)


# ---- K-FAC ---------------------------------------------------------------------------------------------------------


def test_kronecker_factors_are_exact_for_one_sample_and_for_independent_ones():
    """One sample: F = (g g^T) x (x x^T) exactly. Products of all x with all g: the expectation factorises."""
    x = torch.randn(4, 3, generator=torch.manual_seed(0), dtype=torch.float64)
    g = torch.randn(5, 2, generator=torch.manual_seed(1), dtype=torch.float64)
    xs, gs = x.repeat_interleave(5, 0), g.repeat(4, 1)
    layer = kronecker.factors(xs, gs)
    with_bias = torch.cat([xs, torch.ones(20, 1, dtype=torch.float64)], -1)
    each = torch.einsum("no,ni->noi", gs, with_bias).flatten(1)
    fisher = each.T @ each / 20
    torch.testing.assert_close(torch.kron(layer.outputs, layer.inputs), fisher)
    assert kronecker.factors(xs, gs, bias=False).inputs.shape == (3, 3)


def test_preconditioning_is_the_inverse_of_the_kronecker_product():
    a, s = spd(4, 1), spd(3, 2)
    inverse = kronecker.inverses(kronecker.Factors(a, s), damping=0.2)
    pi = ((a.trace() / 4) / (s.trace() / 3)).sqrt()
    damped_a = a + pi * np.sqrt(0.2) * torch.eye(4, dtype=torch.float64)
    damped_s = s + np.sqrt(0.2) / pi * torch.eye(3, dtype=torch.float64)
    gradient = torch.randn(3, 4, generator=torch.manual_seed(3), dtype=torch.float64)
    wanted = torch.linalg.solve(torch.kron(damped_s, damped_a), gradient.flatten()).view(3, 4)
    torch.testing.assert_close(kronecker.precondition(gradient, inverse), wanted)


def test_factored_damping_survives_dead_units():
    """A layer whose outputs never change has G = 0; the damping still makes it invertible."""
    for bias in (True, False):
        dead = kronecker.factors(torch.zeros(3, 2), torch.zeros(3, 2), bias=bias)
        assert all(x.isfinite().all() for x in kronecker.inverses(dead, damping=0.01))


def test_running_average_and_step_scale():
    one = kronecker.Factors(torch.ones(1, 1), torch.ones(1, 1))
    new = kronecker.Factors(torch.full((1, 1), 2.0), torch.full((1, 1), 5.0))
    found = kronecker.average(one, new, decay=0.75)
    assert (found.inputs.item(), found.outputs.item()) == (1.25, 2.0)
    # x^T F x = 0.08: the KL of lr x is lr^2 0.04 = kl_clip at lr = 0.5.
    assert kronecker.step_scale(0.08, learning_rate=1.0, kl_clip=0.01) == pytest.approx(0.5)
    assert kronecker.step_scale(torch.tensor(0.08), learning_rate=0.25, kl_clip=0.01) == 0.25
    assert kronecker.step_scale(0.0, learning_rate=0.25, kl_clip=0.01) == 0.25


def test_kfac_of_a_linear_softmax_policy_is_near_its_natural_gradient():
    """One state repeated: inputs are constant, so F = F_out x (x x^T) and the factored inverse points the same way."""
    p = problem(bandit([1.0, 0.0, 3.0]))
    probs = p.policy(p.theta).exp()[0]
    x = torch.ones(3, 1, dtype=torch.float64)
    g = (torch.eye(3, dtype=torch.float64) - probs) * (3 * probs).sqrt().unsqueeze(-1)  # scores, weighted to mean
    layer = kronecker.factors(x, g, bias=False)
    torch.testing.assert_close(layer.outputs, torch.diag(probs) - torch.outer(probs, probs))
    inverse = kronecker.inverses(layer, damping=1e-12)
    natural = kronecker.precondition(p.gradient[:3].unsqueeze(-1), inverse)[:, 0]
    advantage = p.evaluation.advantages[0, 0]
    torch.testing.assert_close(natural - natural.mean(), advantage - advantage.mean(), rtol=1e-4, atol=1e-4)
