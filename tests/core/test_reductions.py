"""Reductions: the same number and gradient however the batch is padded, ordered or split. float64, to 1e-12."""

import pytest
import torch

from upslope.core import reductions

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
REDUCTIONS = {
    "token": lambda x, mask, total=None: reductions.token_mean(x, mask, total),
    "sequence": lambda x, mask, total=None: reductions.sequence_mean(x, mask, total),
    "fixed length": lambda x, mask, total=None: reductions.fixed_length_mean(x, mask, 11, total),
}
TOTALS = {
    "token": lambda mask: mask.sum(),
    "sequence": lambda mask: mask.any(-1).sum(),
    "fixed length": lambda mask: len(mask),
}


def draw(rows=12, time=9):
    torch.manual_seed(0)
    lengths = torch.randint(1, time + 1, (rows,))
    return torch.randn(rows, time, dtype=torch.float64), torch.arange(time) < lengths.unsqueeze(-1)


def value_and_gradient(f, x):
    leaf = x.clone().requires_grad_()
    result = f(leaf)
    (gradient,) = torch.autograd.grad(result, leaf)
    return result.detach(), gradient


def test_by_hand():
    x = torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert reductions.token_mean(x, mask).item() == 3.0
    assert reductions.sequence_mean(x, mask).item() == (1.5 + 6.0) / 2
    assert reductions.fixed_length_mean(x, mask, 5).item() == pytest.approx(9 / 10)
    assert reductions.token_mean(x, mask, total=9).item() == 1.0
    assert reductions.sequence_mean(x, mask, total=3).item() == 2.5
    assert reductions.fixed_length_mean(x, mask, 5, total=3).item() == pytest.approx(9 / 15)
    full = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    for value in (
        reductions.token_mean(full),
        reductions.sequence_mean(full),
        reductions.fixed_length_mean(full, None, 2),
    ):
        assert value.item() == 4.0
    assert reductions.token_mean(full, total=8).item() == 2.0


def test_several_batch_axes_and_a_single_token():
    x, mask = draw()
    boxed = x.view(2, 6, 9), mask.view(2, 6, 9)
    for reduce in REDUCTIONS.values():
        torch.testing.assert_close(reduce(*boxed), reduce(x, mask), **TIGHT)
    token = torch.tensor([[3.0], [5.0]])
    assert [reductions.sequence_mean(token).item(), reductions.fixed_length_mean(token, None, 4).item()] == [4.0, 1.0]


@pytest.mark.parametrize("name", REDUCTIONS)
class TestInvariance:
    def test_padding(self, name):
        """More columns and rows of padding, NaN in them, change nothing (the fixed length counts its rows: columns)."""
        x, mask = draw()
        reduce = REDUCTIONS[name]
        wanted, gradient = value_and_gradient(lambda z: reduce(z, mask), x)
        rows = 0 if name == "fixed length" else 3
        pad = lambda z, v: torch.nn.functional.pad(z, (0, 4, 0, rows), value=v)  # noqa: E731
        found, wide = value_and_gradient(lambda z: reduce(z, pad(mask, False)), pad(x, torch.nan))
        torch.testing.assert_close(found, wanted, **TIGHT)
        torch.testing.assert_close(wide, pad(gradient, 0.0), **TIGHT)

    def test_order(self, name):
        x, mask = draw()
        reduce = REDUCTIONS[name]
        wanted, gradient = value_and_gradient(lambda z: reduce(z, mask), x)
        shuffle = torch.randperm(len(x), generator=torch.manual_seed(1))
        found, shuffled = value_and_gradient(lambda z: reduce(z, mask[shuffle]), x[shuffle])
        torch.testing.assert_close(found, wanted, **TIGHT)
        torch.testing.assert_close(shuffled, gradient[shuffle], **TIGHT)

    @pytest.mark.parametrize("sizes", [[12], [6, 6], [1, 11], [5, 4, 3], [1] * 12])
    def test_micro_batches(self, name, sizes):
        """Parts with the whole's count add up, in value and gradient; parts without it do not."""
        x, mask = draw()
        reduce, total = REDUCTIONS[name], TOTALS[name](mask)
        wanted, gradient = value_and_gradient(lambda z: reduce(z, mask), x)
        parts = [
            value_and_gradient(lambda z, m=m: reduce(z, m, total), z)
            for z, m in zip(x.split(sizes), mask.split(sizes), strict=True)
        ]
        torch.testing.assert_close(sum(v for v, _ in parts), wanted, **TIGHT)
        torch.testing.assert_close(torch.cat([g for _, g in parts]), gradient, **TIGHT)

    def test_ranks_that_average_gradients(self, name):
        """Ranks of unequal numbers of tokens, gradients averaged by the framework: times the number of ranks."""
        x, mask = draw()
        reduce, total = REDUCTIONS[name], TOTALS[name](mask)
        scale = torch.ones((), dtype=torch.float64)
        (wanted,) = torch.autograd.grad(reduce(x * scale.requires_grad_(), mask), scale)
        ranks = []
        for rows in (slice(0, 2), slice(2, 9), slice(9, 12)):
            loss = 3 * reduce(x[rows] * scale, mask[rows], total)
            ranks.append(torch.autograd.grad(loss, scale)[0])
        torch.testing.assert_close(torch.stack(ranks).mean(), wanted, **TIGHT)

    def test_a_part_without_tokens_adds_nothing(self, name):
        x, mask = draw()
        nothing = REDUCTIONS[name](x * torch.nan, torch.zeros_like(mask), total=5)
        assert nothing.item() == 0.0


def test_the_naive_mean_of_means_depends_on_the_split():
    """What the peers' code does, and why `total` exists."""
    x, mask = draw()
    whole = reductions.token_mean(x, mask)
    halves = [reductions.token_mean(x[rows], mask[rows]) for rows in (slice(0, 6), slice(6, 12))]
    assert (sum(halves) / 2 - whole).abs() > 1e-3


def test_length_bias_of_the_three():
    """Weights of one token in a sequence of 1 and one of 4: equal, 1 to 1/4, equal and constant."""
    mask = torch.tensor([[True] + [False] * 3, [True] * 4])
    x = torch.zeros(2, 4, dtype=torch.float64)
    slopes = {name: value_and_gradient(lambda z, f=f: f(z, mask), x)[1] for name, f in REDUCTIONS.items()}
    assert slopes["token"][0, 0] == slopes["token"][1, 0] == 1 / 5
    assert slopes["sequence"][0, 0] == 4 * slopes["sequence"][1, 0] == 1 / 2
    assert slopes["fixed length"][0, 0] == slopes["fixed length"][1, 0] == pytest.approx(1 / 22)
