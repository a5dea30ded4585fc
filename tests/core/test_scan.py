"""The fast recurrence against its definition, and against its definition in NumPy."""

import numpy as np
import pytest
import torch

from upslope.core import _scan

SHAPES = [
    (1,),
    (2,),
    (8, 32),
    (4, 128),
    (3, 17),
    (16, 1024),
    (2, 3, 300),
    (0, 40),
    (5, 4097),
    (1, 33000),
    (600, 16),
    (300, 33),
]


def draw(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator, dtype=dtype)
    c = 0.5 + 0.55 * torch.rand(shape, generator=generator, dtype=dtype)
    return c.masked_fill(torch.rand(shape, generator=generator) < 0.05, 0.0), x


def by_numpy(c, x):
    y = np.zeros_like(x)
    carry = np.zeros(x.shape[:-1])
    for t in reversed(range(x.shape[-1])):
        carry = x[..., t] + c[..., t] * carry
        y[..., t] = carry
    return y


@pytest.mark.parametrize("shape", SHAPES)
def test_scan_is_the_recurrence(shape):
    c, x = draw(shape)
    wanted = torch.from_numpy(by_numpy(c.numpy(), x.numpy()))
    torch.testing.assert_close(_scan.scan(c, x), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(_scan.scan_loop(c, x), wanted, rtol=1e-12, atol=1e-12)
    forward = torch.from_numpy(by_numpy(c.flip(-1).numpy(), x.flip(-1).numpy())).flip(-1)
    torch.testing.assert_close(_scan.scan_forward(c, x), forward, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(8, 32), (90, 300), (600, 16)])
def test_gradients_are_those_of_the_loop(shape):
    c, x = draw(shape)
    weight = torch.randn(shape, generator=torch.manual_seed(1), dtype=torch.float64)

    def gradients(f):
        leaves = [c.clone().requires_grad_(), x.clone().requires_grad_()]
        return torch.autograd.grad((weight * f(*leaves)).sum(), leaves)

    fast, slow = gradients(_scan.scan), gradients(_scan.scan_loop)
    # The last coefficient multiplies nothing; every other gradient agrees.
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fast[1], slow[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(8, 32), (90, 300), (400, 30)])
def test_the_last_coefficient_and_what_lies_beyond_a_zero_do_not_matter(shape):
    c, x = draw(shape)
    changed = c.clone()
    changed[..., -1] = 7.0
    torch.testing.assert_close(_scan.scan(changed, x), _scan.scan(c, x), rtol=0, atol=0)
    c[..., 20] = 0.0
    other = x.clone()
    other[..., 21:] += 100.0
    torch.testing.assert_close(_scan.scan(c, other)[..., :21], _scan.scan(c, x)[..., :21], rtol=1e-12, atol=1e-12)


def count_operations(f, *args):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        calls = 0
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            Counter.calls += 1
            Counter.elements += sum(x.numel() for x in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(x))
            return result

    with Counter():
        f(*args)
    return Counter.calls, Counter.elements


def test_linear_work_and_a_short_graph_at_32k():
    """A loop would take 32,768 steps; the blocks take a few hundred operations, and work in proportion to T."""
    sizes = {}
    for time in (2_048, 32_768):
        sizes[time] = count_operations(_scan.scan, *draw((4, time)))
    assert sizes[32_768][0] < 600
    assert sizes[32_768][1] < 17 * sizes[2_048][1]


def test_float32_stays_accurate_over_32k_steps():
    c, x = draw((2, 32_768))
    c = c.clamp(max=0.999)
    exact = _scan.scan_loop(c, x)
    found = _scan.scan(c.float(), x.float()).double()
    assert ((found - exact).abs().max() / exact.abs().max()).item() < 1e-5


def test_works_under_vmap_and_grad():
    c, x = draw((6, 40))
    torch.testing.assert_close(torch.vmap(_scan.scan)(c, x), _scan.scan(c, x))
    slope = torch.func.grad(lambda y: _scan.scan(c, y).sum())(x)
    torch.testing.assert_close(slope, torch.func.grad(lambda y: _scan.scan_loop(c, y).sum())(x))


@pytest.mark.parametrize("time", [1, 5, 300])
def test_mixed_precision_is_the_wider_one(time: int) -> None:
    """float32 factors never narrow a float64 sum."""
    torch.manual_seed(0)
    c, x = torch.rand(2, time), torch.rand(2, time, dtype=torch.float64)
    for function in (_scan.scan, _scan.scan_forward):
        torch.testing.assert_close(function(c, x), function(c.double(), x), rtol=0, atol=0)
