"""Every surrogate and every Psi: its exact expected gradient against the exact gradient of J.

The rows of `upslope.methods` say which are unbiased; here each claim is held to enumeration, in float64 to 1e-8. For
every row that is biased, the test states what the expectation is instead: the bias and its source.
"""

import importlib
from math import comb

import numpy as np
import pytest
import torch

from tests.core.problems import PROBLEMS, bandit, endless, expected_gradient, problem, stochastic_episode
from upslope import methods
from upslope.core import advantages, returns, surrogates
from upslope.exact import policy_gradient as exact

TOLERANCE = {"rtol": 0, "atol": 1e-8}
PSIS = {row.name: row for row in methods.PSIS}
SURROGATES = {row.name: row for row in methods.SURROGATES}


def resolve(function: str):
    module, name = function.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def weights(row: str, p) -> torch.Tensor:
    """Psi_t of a row along the trajectories of a problem, times gamma^t: its part of grad J's discounted objective."""
    f, d = resolve(PSIS[row].function), p.data
    along = (p.next_values, p.discounts, p.continues)
    zero = torch.zeros_like(p.values)
    state_baseline = p.values.sin() + d.states[:, :-1]  # any function of the state
    match row:
        case "total":
            return f(d.rewards, *along)
        case "to-go":
            return p.elapsed * f(d.rewards, *along)
        case "to-go minus baseline":
            return p.elapsed * f(d.rewards, state_baseline, *along)
        case "Q":
            return p.elapsed * f(p.q_rows, d.actions)
        case "advantage":
            return p.elapsed * f(p.q, p.values)
        case "TD residual":
            return p.elapsed * f(d.rewards, p.values, p.next_values, p.discounts)
        case "k-step":
            return p.elapsed * f(d.rewards, p.values, *along, k=2)
        case "GAE":
            return p.elapsed * f(d.rewards, p.values, p.next_values, p.discounts, 0.6 * p.continues)
        case "V-trace":
            ones = torch.ones_like(zero)
            result = f(d.rewards, p.values, p.next_values, p.discounts, p.continues, ones)
            return p.elapsed * result.advantages
    raise KeyError(row)


ON_POLICY = ["total", "to-go", "to-go minus baseline", "Q", "advantage", "TD residual", "k-step", "GAE"]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("surrogate", [row.name for row in methods.SURROGATES if row.unbiased])
@pytest.mark.parametrize("psi", ON_POLICY)
def test_unbiased_surrogate_and_psi(psi, surrogate, name):
    assert PSIS[psi].unbiased
    p = PROBLEMS[name]()
    f, weight = resolve(SURROGATES[surrogate].function), weights(psi, p)
    old = {"log-probability": (), "decoupled": (p.logp, p.logp)}.get(surrogate, (p.logp,))
    torch.testing.assert_close(expected_gradient(p, lambda logp: f(logp, *old, weight)), p.gradient, **TOLERANCE)


def test_every_claim_of_the_table_is_tested():
    off_policy = {"importance, trajectory", "importance, causal", "leave-one-out"}
    assert {row.name for row in methods.PSIS if row.unbiased} == set(ON_POLICY) | off_policy
    assert all(row.reason for row in methods.PSIS + methods.SURROGATES + methods.METHODS)


@pytest.mark.parametrize("name", PROBLEMS)
def test_vtrace_on_policy_is_unbiased(name):
    p = PROBLEMS[name]()
    gradient = expected_gradient(p, lambda logp: surrogates.log_prob(logp, weights("V-trace", p)))
    torch.testing.assert_close(gradient, p.gradient, **TOLERANCE)


@pytest.mark.parametrize("name", PROBLEMS)
def test_arbitrary_torch_policy(name):
    """A policy with fewer parameters than a table, shared by the states, non-linear."""
    states, actions = PROBLEMS[name]().evaluation.q.shape[-2:]
    features = torch.randn(states, 3, generator=torch.manual_seed(3), dtype=torch.float64)

    def policy(theta):
        hidden = torch.tanh(features @ theta[:6].view(3, 2))
        return (hidden @ theta[6 : 6 + 2 * actions].view(2, actions)).log_softmax(-1)

    theta = torch.randn(6 + 2 * actions, generator=torch.manual_seed(4), dtype=torch.float64)
    p = PROBLEMS[name](policy=policy, theta=theta)
    gradient = expected_gradient(p, lambda logp: surrogates.log_prob(logp, weights("GAE", p)))
    torch.testing.assert_close(gradient, p.gradient, **TOLERANCE)


@pytest.mark.parametrize("name", PROBLEMS)
def test_dropping_gamma_t_weighs_late_states_by_one(name):
    """Bias of REINFORCE as everyone runs it: sum_t P(s_t = s) in place of sum_t gamma^t P(s_t = s)."""
    p = PROBLEMS[name]()
    gradient = expected_gradient(p, lambda logp: surrogates.log_prob(logp, weights("to-go", p) / p.elapsed))
    powers = p.mdp.gamma ** torch.arange(len(p.evaluation.visits), dtype=torch.float64)
    undiscounted = p.evaluation.visits / powers.unsqueeze(-1)
    without = exact.all_action_gradient(p.policy, p.theta, undiscounted, p.evaluation.q)
    torch.testing.assert_close(gradient, without, **TOLERANCE)
    assert (gradient - p.gradient).abs().max() > 1e-3 or p.mdp.gamma == 1


def test_discounting_an_undiscounted_objective_is_biased():
    """S0 2.1: gamma < 1 in the estimator, gamma = 1 in the objective: the gradient of another problem."""
    mdp = stochastic_episode().replace(gamma=1.0)
    p = problem(mdp)
    discounts = 0.9 * (p.discounts != 0)
    psi = returns.return_to_go(p.data.rewards, p.next_values, discounts, p.continues)
    gradient = expected_gradient(p, lambda logp: surrogates.log_prob(logp, psi))
    q = exact.evaluate(stochastic_episode(), p.policy(p.theta).exp()).q  # Q of gamma = 0.9 on undiscounted visits
    torch.testing.assert_close(
        gradient, exact.all_action_gradient(p.policy, p.theta, p.evaluation.visits, q), **TOLERANCE
    )
    assert (gradient - p.gradient).abs().max() > 1e-2


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_gae_with_a_wrong_value_is_biased_by_its_error_ahead(name, lam):
    """v = V + e adds (1 - lam) sum_l gamma^{l+1} lam^l e(s_{t+l+1}) to the mean of A_t (and a harmless -e(s_t)).

    At a truncation the last error keeps its whole weight lam^{N-1}; nothing is left at lam = 1 but that.
    """
    p = PROBLEMS[name]()
    d, steps = p.data, p.data.rewards.shape[1]
    error = torch.linspace(-1, 2, p.mdp.num_states, dtype=torch.float64)
    alive = torch.from_numpy(~p.mdp.terminal)
    here, there = (error * alive)[d.states[:, :-1]], (error * alive)[d.states[:, 1:]]
    psi = advantages.gae(d.rewards, p.values + here, p.next_values + there, p.discounts, lam * p.continues)
    gradient = expected_gradient(p, lambda logp: surrogates.log_prob(logp, p.elapsed * psi))

    ahead = np.zeros(tuple(d.rewards.shape))
    discount, goes_on, e = p.discounts.numpy(), p.continues.numpy(), there.numpy()
    for n in range(len(ahead)):
        for t in range(steps):
            reach, lam_power = 1.0, 1.0
            for k in range(t, steps):
                reach *= discount[n, k]
                last = goes_on[n, k] == 0 or k == steps - 1
                ahead[n, t] += reach * e[n, k] * lam_power * (1.0 if last else 1.0 - lam)
                lam_power *= lam
                if goes_on[n, k] == 0:
                    break
    bias = exact.score_gradient(d, p.policy, p.theta, p.elapsed * torch.from_numpy(ahead))
    torch.testing.assert_close(gradient, p.gradient + bias, **TOLERANCE)
    if lam < 1:
        assert bias.abs().max() > 1e-3
    elif not d.truncated.any():
        assert bias.abs().max() < 1e-12


def test_gae_with_lambda_1_and_any_value_is_unbiased_where_nothing_is_cut():
    p = PROBLEMS["stochastic, terminating"]()
    wrong = torch.randn(p.values.shape, generator=torch.manual_seed(5), dtype=torch.float64)
    # A value of the state alone: the same in every trajectory that passes there.
    table = torch.randn(p.mdp.num_states, generator=torch.manual_seed(6), dtype=torch.float64)
    table[torch.from_numpy(p.mdp.terminal)] = 0
    values, ahead = table[p.data.states[:, :-1]], table[p.data.states[:, 1:]]
    psi = advantages.gae(p.data.rewards, values, ahead, p.discounts, p.continues)
    gradient = expected_gradient(p, lambda logp: surrogates.log_prob(logp, p.elapsed * psi))
    torch.testing.assert_close(gradient, p.gradient, **TOLERANCE)
    # ... and one that sees the trajectory is no baseline.
    psi = advantages.baselined_return(p.data.rewards, wrong, p.next_values, p.discounts, p.continues)
    gradient = expected_gradient(p, lambda logp: surrogates.log_prob(logp, p.elapsed * psi))
    assert (gradient - p.gradient).abs().max() > 1e-3


@pytest.mark.parametrize("name", PROBLEMS)
def test_ratio_away_from_pi_old_keeps_old_states(name):
    """grad E_old[rho Psi] at theta != theta_old: new actions on old states, judged by the old advantage."""
    p = PROBLEMS[name]()
    new = p.theta + 0.3 * torch.randn(p.theta.shape, generator=torch.manual_seed(7), dtype=torch.float64)
    weight = weights("advantage", p)
    gradient = expected_gradient(p, lambda logp: surrogates.ratio(logp, p.logp, weight), at=new)
    first_order = exact.all_action_gradient(p.policy, new, p.evaluation.visits, p.evaluation.advantages)
    torch.testing.assert_close(gradient, first_order, **TOLERANCE)
    final = exact.evaluate(p.mdp, p.policy(p.theta).exp()).values if p.mdp.horizon is None else None
    steps = p.data.rewards.shape[1]
    true = exact.exact_policy_gradient(p.mdp, p.policy, new, steps=steps, final_values=final)
    assert (gradient - true).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["clipped ratio", "dual clip", "CISPO", "decoupled"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_bias_of_clipping_is_what_it_drops(name, kind):
    """Away from pi_old: each clip's expected gradient is sum Psi w grad log pi with an explicit weight w."""
    p = PROBLEMS[name]()
    new = p.theta + 1.5 * torch.randn(p.theta.shape, generator=torch.manual_seed(9), dtype=torch.float64)
    psi = weights("advantage", p)
    rho = (exact.log_probs(p.data, p.policy(new)) - p.logp).exp()
    clip_free = ((psi >= 0) & (rho <= 1.28)) | ((psi < 0) & (rho >= 0.8))
    behavior = p.logp + 0.9 * torch.sin(torch.arange(p.logp.numel(), dtype=torch.float64)).view(p.logp.shape)
    cases = {
        "clipped ratio": (lambda x: surrogates.clipped_ratio(x, p.logp, psi, 0.2, 0.28), rho * clip_free),
        "dual clip": (
            lambda x: surrogates.dual_clip(x, p.logp, psi, 0.2, 0.28, 1.5),
            rho * clip_free * ~((psi < 0) & (rho > 1.5)),
        ),
        "CISPO": (lambda x: surrogates.cispo(x, p.logp, psi, 0.2, 0.28), rho.clamp(0.8, 1.28)),
        "decoupled": (
            lambda x: surrogates.decoupled(x, p.logp, behavior, psi, 0.2, 0.28, 1.4),
            rho * clip_free * (p.logp - behavior).exp().clamp(max=1.4),
        ),
    }
    surrogate, weight = cases[kind]
    drawn = exact.trajectory_gradients(p.data, p.policy, new, psi * weight)
    gradient = expected_gradient(p, surrogate, at=new)
    torch.testing.assert_close(gradient, p.probabilities @ drawn, **TOLERANCE)
    unclipped = p.probabilities @ exact.trajectory_gradients(p.data, p.policy, new, psi * rho)
    assert (gradient - unclipped).abs().max() > 1e-4  # some element is really clipped


def test_partial_observation_changes_nothing():
    """S4 2.2.3: two states look alike, with noise; the score-function estimator is still exact."""
    observation = np.array([[0.8, 0.2], [0.7, 0.3], [0.1, 0.9], [0.5, 0.5]])
    mdp, seen = exact.partially_observed(stochastic_episode().replace(horizon=3), observation)
    table = exact.softmax_table(2, 2)
    theta = torch.tensor([0.3, -0.2, 0.5, 1.0], dtype=torch.float64)
    p = problem(mdp, policy=lambda theta: table(theta)[seen], theta=theta)
    for psi in ("total", "to-go", "GAE"):
        weight = weights(psi, p)
        gradient = expected_gradient(p, lambda logp, w=weight: surrogates.log_prob(logp, w))
        torch.testing.assert_close(gradient, p.gradient, **TOLERANCE)


def test_entropy_bonus_and_penalty_add_their_own_gradients():
    p = PROBLEMS["stochastic, terminating"]()
    theta = p.theta.clone().requires_grad_()
    logp = p.policy(theta)
    entropy = -(logp.exp() * logp).sum(-1)
    bonus = surrogates.entropy_bonus(torch.zeros_like(entropy), entropy, coef=0.3).sum()
    (gradient,) = torch.autograd.grad(bonus, theta)
    probs = p.policy(p.theta).exp()
    centred = probs * (p.policy(p.theta) + entropy.detach().unsqueeze(-1))
    torch.testing.assert_close(gradient, -0.3 * centred.reshape(-1), **TOLERANCE)  # dH/dlogit_a = -p_a (log p_a + H)


# ---- groups of completions: one prompt, one decision, G draws ------------------------------------------------------


def group_gradient(p, psi_of_rewards, size: int) -> torch.Tensor:
    """E over groups of (1/G) sum_i Psi_i grad log pi(o_i), every group enumerated."""
    count = len(p.probabilities)
    groups = torch.cartesian_prod(*[torch.arange(count)] * size)
    rewards = p.data.rewards.sum(-1)[groups]
    psi = psi_of_rewards(rewards)
    scores = exact.trajectory_gradients(p.data, p.policy, p.theta, torch.ones_like(p.data.rewards))
    drawn = (psi.unsqueeze(-1) * scores[groups]).mean(1)
    return p.probabilities[groups].prod(-1) @ drawn


GROUP_PROBLEMS = {
    "three arms": lambda: problem(bandit([1.0, 0.0, 3.0])),
    "two arms": lambda: problem(bandit([1.0, 0.0])),
    "two tokens": lambda: problem(
        stochastic_episode().replace(horizon=2, gamma=1.0, initial=[0.0, 1.0, 0.0, 0.0]),
    ),
}


@pytest.mark.parametrize("name", GROUP_PROBLEMS)
def test_leave_one_out_is_unbiased_and_the_group_mean_scales(name):
    p = GROUP_PROBLEMS[name]()
    for size in (2, 3):
        if len(p.probabilities) ** size > 200_000:
            continue
        loo = group_gradient(p, advantages.leave_one_out, size)
        torch.testing.assert_close(loo, p.gradient, **TOLERANCE)
        mean = group_gradient(p, lambda r: advantages.group_relative(r, scale="none"), size)
        torch.testing.assert_close(mean, (1 - 1 / size) * p.gradient, **TOLERANCE)


def test_group_std_reweighs_prompts():
    """Bernoulli rewards, G = 4: grad p is scaled by E[k (4 - k) / (16 std_k)] / (p q), which depends on p.

    k successes among 4 have std_k = sqrt(k (4 - k) / 12) with ddof 1. Rare successes weigh more than even odds: of two
    prompts the harder is favoured, and the direction of the sum is biased.
    """
    factors = []
    for success in (0.05, 0.5):
        theta = torch.tensor([np.log(success / (1 - success)), 0.0, 0.0, 0.0], dtype=torch.float64)
        p = problem(bandit([1.0, 0.0]), theta=theta)
        gradient = group_gradient(p, lambda r: advantages.group_relative(r, eps=0.0), 4)
        chances = [comb(4, k) * success**k * (1 - success) ** (4 - k) for k in range(5)]
        expected = sum(chances[k] * k * (4 - k) / 16 / np.sqrt(k * (4 - k) / 12) for k in (1, 2, 3))
        np.testing.assert_allclose(gradient[0], expected, atol=1e-12)
        np.testing.assert_allclose(p.gradient[0], success * (1 - success), atol=1e-12)
        factors.append((gradient[0] / p.gradient[0]).item())
    assert factors[0] > 1.05 * factors[1]


def test_process_rewards_bend_the_direction():
    """Process rewards: with completions of 1 or 2 steps the pooled mean is no baseline; the direction changes."""
    p = problem(bandit([0.0, 1.0, 5.0]))
    # Arm 0 is a completion of one step worth 2; arms 1 and 2 have two steps worth 1 each, and (3, 0).
    steps = torch.tensor([[2.0, 0.0], [1.0, 1.0], [3.0, 0.0]], dtype=torch.float64)
    ends = torch.tensor([[0, -1], [0, 1], [0, 1]])
    total = torch.tensor([2.0, 2.0, 3.0], dtype=torch.float64)
    scores = exact.trajectory_gradients(p.data, p.policy, p.theta, torch.ones_like(p.data.rewards))
    arms = p.data.actions[:, 0]
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    true = (p.probabilities * total[arms]) @ scores
    estimate = torch.zeros_like(true)
    for i, j in pairs.tolist():
        rows = arms[[i, j]]
        psi = advantages.process_relative(steps[rows], ends[rows], length=2)[:, 0]
        estimate += p.probabilities[i] * p.probabilities[j] * (psi @ scores[[i, j]]) / 2
    cosine = torch.nn.functional.cosine_similarity(true, estimate, dim=0)
    assert cosine < 0.999


def test_truncation_is_not_termination():
    """Cutting an endless problem without bootstrapping is the gradient of the 3-step problem, another one."""
    p = PROBLEMS["truncated and bootstrapped"]()
    zero = torch.zeros_like(p.next_values)
    psi = p.elapsed * returns.return_to_go(p.data.rewards, zero, p.discounts, p.continues)
    gradient = expected_gradient(p, lambda logp: surrogates.log_prob(logp, psi))
    short = exact.exact_policy_gradient(endless().replace(horizon=3), p.policy, p.theta)
    torch.testing.assert_close(gradient, short, **TOLERANCE)
    assert (gradient - p.gradient).abs().max() > 1e-3
