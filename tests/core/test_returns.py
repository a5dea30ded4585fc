"""Returns and GAE: identities, the explicit weighted sum, and an independent NumPy recursion on random boundaries."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from upslope.core import advantages, returns

NAN = float("nan")


def tensors(*rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def ends(terminated, truncated, gamma, lam=1.0):
    flags = torch.tensor(terminated, dtype=torch.bool), torch.tensor(truncated, dtype=torch.bool)
    return returns.boundaries(*flags, gamma, lam, dtype=torch.float64)


# Two episodes and a piece of a third in one row: a termination after step 1, a truncation after step 3, the cut at 5.
REWARDS, VALUES, NEXT = tensors(
    [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
    [3.0, 1.0, 2.0, 5.0, 4.0, 6.0],
    [1.0, NAN, 5.0, 7.0, 6.0, 10.0],
)
TERMINATED, TRUNCATED = [0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]


def test_by_hand():
    """gamma = 1/2. To-go: 1 + 2/2; 2; 4 + (8 + 7/2)/2; 8 + 7/2; 16 + (32 + 10/2)/2; 32 + 10/2."""
    discounts, continues = ends(TERMINATED, TRUNCATED, 0.5)
    assert discounts.tolist() == [0.5, 0.0, 0.5, 0.5, 0.5, 0.5]
    assert continues.tolist() == [1, 0, 1, 0, 1, 1]
    to_go = returns.return_to_go(REWARDS, NEXT, discounts, continues)
    assert to_go.tolist() == [2.0, 2.0, 9.75, 11.5, 34.5, 37.0]
    total = returns.total_return(REWARDS, NEXT, discounts, continues)
    assert total.tolist() == [2.0, 2.0, 9.75, 9.75, 34.5, 34.5]
    one_step = returns.n_step_return(REWARDS, NEXT, discounts, continues, 1)
    assert one_step.tolist() == [1.5, 2.0, 6.5, 11.5, 19.0, 37.0]
    two_step = returns.n_step_return(REWARDS, NEXT, discounts, continues, 2)
    assert two_step.tolist() == to_go.tolist()
    assert returns.elapsed_discount(discounts, continues).tolist() == [1.0, 0.5, 1.0, 0.5, 1.0, 0.5]
    assert returns.episode_start(continues).tolist() == [0, 0, 2, 2, 4, 4]
    # lambda = 1/2: A_t = delta_t + 1/4 A_{t+1} inside an episode.
    deltas = [1 + 0.5 - 3, 2 - 1, 4 + 2.5 - 2, 8 + 3.5 - 5, 16 + 3 - 4, 32 + 5 - 6]
    assert advantages.td_residual(REWARDS, VALUES, NEXT, discounts).tolist() == deltas
    gae = advantages.gae(REWARDS, VALUES, NEXT, discounts, 0.5 * continues)
    wanted = [deltas[0] + deltas[1] / 4, deltas[1], deltas[2] + deltas[3] / 4, deltas[3], deltas[4] + deltas[5] / 4]
    assert gae.tolist() == [*wanted, deltas[5]]


def test_two_step_return_in_a_longer_episode():
    rewards, next_values = tensors([1.0, 2.0, 4.0, 8.0], [10.0, 20.0, 30.0, 40.0])
    discounts, continues = ends([0, 0, 0, 0], [0, 0, 0, 0], 0.5)
    # r_t + r_{t+1}/2 + v(s_{t+2})/4; the last is cut after one step.
    found = returns.n_step_return(rewards, next_values, discounts, continues, 2)
    assert found.tolist() == [1 + 1 + 5, 2 + 2 + 7.5, 4 + 4 + 10, 8 + 20]
    whole = returns.return_to_go(rewards, next_values, discounts, continues)
    for n in (4, 5, 1000):
        assert returns.n_step_return(rewards, next_values, discounts, continues, n).tolist() == whole.tolist()
    values = torch.tensor([1.0, -2.0, 3.0, 5.0], dtype=torch.float64)
    k_step = advantages.k_step(rewards, values, next_values, discounts, continues, 2)
    assert k_step.tolist() == [7 - 1, 11.5 + 2, 18 - 3, 28 - 5]


ROWS = st.integers(1, 40).flatmap(
    lambda time: st.tuples(
        hnp.arrays(np.float64, (3, 2, time), elements=st.floats(-5, 5, width=32)),
        hnp.arrays(np.int8, (2, time), elements=st.sampled_from([0, 0, 0, 1, 2, 3])),
        st.floats(0, 1),
        st.floats(0, 1),
        st.integers(1, 45),
    )
)


def by_numpy(data, kind, gamma, lam):
    """GAE, lambda-return and n-step returns from their definitions: look ahead from every step, one term at a time."""
    rewards, values, following = data
    rows, time = rewards.shape
    gae, g = np.zeros((rows, time)), np.zeros((rows, time))
    for b in range(rows):
        for t in range(time):
            reach, trace, total = 1.0, 1.0, 0.0
            n_steps, partial = [], 0.0
            for k in range(t, time):
                ended, cut = kind[b, k] & 1, kind[b, k] >= 2
                ahead = 0.0 if ended else gamma * following[b, k]
                total += reach * trace * (rewards[b, k] + ahead - values[b, k])
                partial += reach * rewards[b, k]
                n_steps.append(partial + reach * ahead)
                reach *= gamma
                trace *= lam
                if ended or cut:
                    break
            gae[b, t] = total
            weights = [(1 - lam) * lam**n for n in range(len(n_steps))]
            weights[-1] = lam ** (len(n_steps) - 1)
            g[b, t] = np.dot(weights, n_steps)
    return gae, g


@hypothesis.settings(max_examples=1000, deadline=None)
@hypothesis.given(ROWS)
def test_gae_and_lambda_return_on_random_boundaries(case):
    """1,000 patterns of terminations, truncations, both at once; values that follow a termination are NaN.

    Also the explicit sum (1 - lam) sum lam^{n-1} G^(n) with the remainder's weight lam^{N-1} on the last.
    """
    data, kind, gamma, lam, _ = case
    terminated, truncated = (kind & 1) == 1, kind >= 2
    # The recursion telescopes only if v(s_{t+1}) is one number; here next_values are free, so GAE is summed as it is.
    gae, g = by_numpy(data, kind, gamma, lam)
    rewards, values, following = (torch.from_numpy(x) for x in data)
    discounts, traces = ends(terminated, truncated, gamma, lam)
    following = following.masked_fill(torch.from_numpy(terminated), NAN)
    found = advantages.gae(rewards, values, following, discounts, traces)
    np.testing.assert_allclose(found, gae, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(returns.lambda_return(rewards, following, discounts, traces), g, rtol=1e-9, atol=1e-9)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(ROWS)
def test_identities_on_random_boundaries(case):
    """lam = 0: TD residual. lam = 1: return-to-go minus v. GAE + v = lambda-return. k-step: n-step return minus v."""
    data, kind, gamma, lam, n = case
    rewards, values, following = (torch.from_numpy(x) for x in data)
    # One value per state: what follows a step inside an episode is the value at the next.
    inside = torch.from_numpy(kind == 0)
    following[..., :-1] = torch.where(inside[..., :-1], values[..., 1:], following[..., :-1])
    discounts, traces = ends((kind & 1) == 1, kind >= 2, gamma, lam)
    continues = ends((kind & 1) == 1, kind >= 2, gamma).traces
    close = {"rtol": 1e-9, "atol": 1e-9}

    def gae(trace):
        return advantages.gae(rewards, values, following, discounts, trace)

    residual = advantages.td_residual(rewards, values, following, discounts)
    to_go = returns.return_to_go(rewards, following, discounts, continues)
    torch.testing.assert_close(gae(0 * traces), residual, **close)
    torch.testing.assert_close(gae(continues), to_go - values, **close)
    torch.testing.assert_close(
        gae(traces) + values, returns.lambda_return(rewards, following, discounts, traces), **close
    )
    torch.testing.assert_close(
        advantages.baselined_return(rewards, values, following, discounts, continues), to_go - values, **close
    )
    k_step = advantages.k_step(rewards, values, following, discounts, continues, n)
    torch.testing.assert_close(k_step, explicit_k_step(residual, discounts, continues, n), **close)
    ones = torch.ones_like(rewards)
    vtrace = advantages.vtrace(rewards, values, following, discounts, traces, ones)
    torch.testing.assert_close(vtrace.targets, gae(traces) + values, **close)


def explicit_k_step(residual, discounts, continues, k):
    """A^(k) = sum_{l<k} gamma^l delta_{t+l} (S4 2.3.2), stopped at the episode's end."""
    found = np.zeros(tuple(residual.shape))
    for b in range(residual.shape[0]):
        for t in range(residual.shape[1]):
            reach = 1.0
            for j in range(t, min(t + k, residual.shape[1])):
                found[b, t] += reach * residual[b, j]
                reach *= discounts[b, j] * continues[b, j]
    return torch.from_numpy(found)


def test_discounted_products_restart_and_total_return_counts_from_the_start():
    rng = np.random.default_rng(0)
    kind = rng.choice(4, p=[0.7, 0.1, 0.1, 0.1], size=(5, 60))
    discounts, continues = ends((kind & 1) == 1, kind >= 2, 0.9)
    rewards = torch.from_numpy(rng.normal(size=(5, 60)))
    following = torch.from_numpy(rng.normal(size=(5, 60)))
    elapsed, total = np.ones((5, 60)), np.zeros((5, 60))
    for b in range(5):
        start = 0
        for t in range(60):
            elapsed[b, t] = 0.9 ** (t - start)
            if kind[b, t] or t == 59:
                span = slice(start, t + 1)
                tail = 0.9 * following[b, t] * elapsed[b, t] * (1 - (kind[b, t] & 1))
                total[b, span] = (elapsed[b, span] * rewards[b, span].numpy()).sum() + tail
                start = t + 1
    np.testing.assert_allclose(returns.elapsed_discount(discounts, continues), elapsed, rtol=1e-12)
    np.testing.assert_allclose(returns.total_return(rewards, following, discounts, continues), total, rtol=1e-10)


def test_vtrace_against_its_definition():
    """IMPALA eq 1 term by term, caps binding: v_s = V(s) + sum_t gamma^{t-s} (prod_{i<t} c_i) rho_t delta_t."""
    rng = np.random.default_rng(3)
    time, gamma, lam, rho_bar, c_bar = 12, 0.9, 0.7, 1.3, 0.8
    rewards, values, following = (rng.normal(size=time) for _ in range(3))
    ratio = rng.lognormal(size=time)
    kind = np.zeros(time, dtype=int)
    kind[4], kind[8] = 1, 2
    discount, goes_on = gamma * (kind != 1), kind == 0
    rho, c = np.minimum(rho_bar, ratio), lam * np.minimum(c_bar, ratio)
    delta = rho * (rewards + discount * following - values)
    correction = np.zeros(time)
    for s in range(time):
        reach = 1.0
        for t in range(s, time):
            correction[s] += reach * delta[t]
            reach *= discount[t] * c[t]
            if not goes_on[t]:
                break
    later = np.append(correction[1:], 0.0) * goes_on * lam
    advantage = rho * (rewards + discount * (following + later) - values)
    row = [torch.from_numpy(x) for x in (rewards, values, following, discount, lam * goes_on, ratio)]
    found = advantages.vtrace(*row, rho_bar, c_bar)
    np.testing.assert_allclose(found.targets, values + correction, rtol=1e-10)
    np.testing.assert_allclose(found.advantages, advantage, rtol=1e-10)


def test_vtrace_targets_are_the_return_to_go_on_policy_with_lambda_1():
    discounts, continues = ends(TERMINATED, TRUNCATED, 0.5)
    following = torch.tensor([1.0, NAN, 5.0, 7.0, 6.0, 10.0], dtype=torch.float64)
    found = advantages.vtrace(REWARDS, VALUES, following, discounts, continues, torch.ones_like(REWARDS))
    assert found.targets.tolist() == returns.return_to_go(REWARDS, following, discounts, continues).tolist()


def test_lambda_may_vary_by_row():
    flags = torch.zeros(2, 3, dtype=torch.bool)
    lam = torch.tensor([[0.2], [0.8]])
    assert returns.boundaries(flags, flags, 1.0, lam).traces[:, 0].tolist() == pytest.approx([0.2, 0.8])
    assert returns.boundaries(flags, flags, 1.0, 1.0).discounts.dtype == torch.float32


def test_length_adaptive_lambda():
    found = advantages.length_adaptive_lambda(torch.tensor([5.0, 40.0, 400.0]), alpha=0.05)
    assert found.tolist() == pytest.approx([0.0, 0.5, 0.95])
