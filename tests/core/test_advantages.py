"""Group-relative, leave-one-out, process and whitened advantages: by hand and against NumPy."""

import numpy as np
import pytest
import torch

from upslope.core import advantages


def test_group_relative_by_hand():
    """1, 2, 6: mean 3, deviations -2, -1, 3, std_1 = sqrt(14/2)."""
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.1, 0.1, 0.1]], dtype=torch.float64)
    deviations = np.array([-2.0, -1.0, 3.0])
    np.testing.assert_allclose(advantages.group_relative(rewards)[0], deviations / (np.sqrt(7) + 1e-4), rtol=1e-12)
    np.testing.assert_allclose(
        advantages.group_relative(rewards, ddof=0, eps=0.5)[0], deviations / (np.sqrt(14 / 3) + 0.5), rtol=1e-12
    )
    np.testing.assert_allclose(advantages.group_relative(rewards, scale="none")[0], deviations, rtol=1e-12)
    batch = advantages.group_relative(rewards, scale="batch")
    np.testing.assert_allclose(batch[0], deviations / (rewards.numpy().std(ddof=1) + 1e-4), rtol=1e-12)
    batch = advantages.group_relative(rewards, scale="batch", ddof=0, eps=0.5)
    np.testing.assert_allclose(batch[0], deviations / (rewards.numpy().std(ddof=0) + 0.5), rtol=1e-12)
    for scale in ("group", "batch", "none"):
        assert advantages.group_relative(rewards, scale=scale)[1].tolist() == [0.0, 0.0, 0.0]  # exactly


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1])
@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_equal_rewards_give_exactly_zero(value, eps):
    """The mean of n equal floats need not be that float; divided by eps the rounding would count."""
    rewards = torch.full((2, 7), value)
    for scale in ("group", "batch", "none"):
        assert (advantages.group_relative(rewards, scale=scale, eps=eps) == 0).all()
    assert (advantages.leave_one_out(rewards) == 0).all()
    assert (advantages.whiten(rewards) == 0).all()
    assert (advantages.whiten(rewards, rewards > 0, eps=eps) == 0).all()
    part = torch.arange(14).view(2, 7) % 3 != 0
    assert (advantages.whiten(rewards, part, eps=eps) == 0).all()
    ends = torch.arange(7).expand(2, 7).contiguous()
    assert (advantages.process_relative(rewards, ends, 7, eps=eps) == 0).all()


def test_leave_one_out():
    rewards = np.random.default_rng(0).normal(size=(3, 5))
    wanted = [[r - np.mean(np.delete(row, i)) for i, r in enumerate(row)] for row in rewards]
    np.testing.assert_allclose(advantages.leave_one_out(torch.from_numpy(rewards)), wanted)
    assert advantages.leave_one_out(torch.tensor([3.0, 5.0])).tolist() == [-2.0, 2.0]


@pytest.mark.parametrize(("ddof", "eps"), [(1, 1e-4), (0, 0.3)])
def test_process_relative_against_numpy(ddof, eps):
    """Pooled over all steps of the group; a token is credited with every step that ends at or after it."""
    rng = np.random.default_rng(1)
    group, steps, length = 4, 5, 20
    ends = np.full((group, steps), -1)
    rewards = np.full((group, steps), np.nan)
    for i, count in enumerate((5, 2, 0, 3)):
        ends[i, :count] = np.sort(rng.choice(length, size=count, replace=False))
        rewards[i, :count] = rng.normal(size=count)
    pool = rewards[ends >= 0]
    normal = (rewards - pool.mean()) / (pool.std(ddof=ddof) + eps)
    wanted = np.zeros((group, length))
    for i in range(group):
        for t in range(length):
            wanted[i, t] = sum(normal[i, j] for j in range(steps) if ends[i, j] >= t)
    found = advantages.process_relative(torch.from_numpy(rewards), torch.from_numpy(ends), length, ddof, eps)
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
    assert (found[2] == 0).all()
    assert (found[3, ends[3].max() + 1 :] == 0).all()


def test_process_relative_with_two_steps_that_end_together():
    found = advantages.process_relative(torch.tensor([[1.0, 3.0]]), torch.tensor([[1, 1]]), 3, eps=0.0)
    assert found.tolist() == [[0.0, 0.0, 0.0]]  # -1/sqrt2 + 1/sqrt2


def test_whiten_against_numpy():
    rng = np.random.default_rng(2)
    x, mask = rng.normal(3, 5, size=(4, 6)), rng.random((4, 6)) < 0.6
    values = torch.from_numpy(np.where(mask, x, np.nan))
    kept = x[mask]
    wanted = np.where(mask, (x - kept.mean()) / (kept.std(ddof=1) + 1e-8), 0)
    np.testing.assert_allclose(advantages.whiten(values, torch.from_numpy(mask)), wanted, rtol=1e-10)
    still = np.where(mask, (x - kept.mean()) / (kept.std(ddof=1) + 0.5) + kept.mean(), 0)
    np.testing.assert_allclose(
        advantages.whiten(values, torch.from_numpy(mask), shift_mean=False, eps=0.5), still, rtol=1e-10
    )
    np.testing.assert_allclose(advantages.whiten(torch.from_numpy(x)), (x - x.mean()) / (x.std(ddof=1) + 1e-8))
    np.testing.assert_allclose(
        advantages.whiten(torch.from_numpy(x), shift_mean=False, eps=0.5),
        (x - x.mean()) / (x.std(ddof=1) + 0.5) + x.mean(),
    )


def test_whiten_by_hand():
    """5, 6, 7, 8: mean 6.5, std_1 = sqrt(5/3). (A known library keeps the mean here.)"""
    found = advantages.whiten(torch.tensor([5.0, 6.0, 7.0, 8.0]))
    assert found.mean().item() == pytest.approx(0, abs=1e-7)
    assert found.tolist() == pytest.approx([-1.5 / np.sqrt(5 / 3), -0.5 / np.sqrt(5 / 3), 0.387298, 1.161895], rel=1e-5)


def test_advantage():
    assert advantages.advantage(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 4.0])).tolist() == [2.0, -3.0]
