"""Returns against hand numbers and against an independent NumPy recursion."""

import numpy as np
import torch

from upslope.core import returns


def test_hand_numbers_with_a_termination_and_a_truncation():
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0])
    next_values = torch.tensor([float("nan"), 10.0, 20.0, 30.0])[[1, 0, 2, 3]]
    terminated = torch.tensor([False, True, False, False])
    truncated = torch.tensor([False, False, True, False])
    discounts, continues = returns.boundaries(terminated, truncated, 0.5, 1.0)
    torch.testing.assert_close(
        returns.return_to_go(rewards, next_values, discounts, continues), torch.tensor([2.0, 2.0, 14.0, 23.0])
    )
    assert np.isfinite(returns.n_step_return(rewards, next_values, discounts, continues, 2).numpy()).all()
