"""θ as one vector: views, gradients, and optimisers that are torch.optim's step for step."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from upslope.control import optimizers
from upslope.control.parameters import ALIGNMENT, Net


def make_module() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def square(theta: torch.Tensor, net: Net, x: torch.Tensor) -> tuple[torch.Tensor, None]:
    return -net(theta, x).square().sum(), None


def test_theta_holds_the_parameters_aligned() -> None:
    module = make_module()
    net = Net(module)
    theta = net.initial()
    views = net.views(theta)
    for name, parameter in make_module().named_parameters():
        assert torch.equal(views[name], parameter)
        assert views[name].data_ptr() >= theta.data_ptr()
    assert all(segment.start % ALIGNMENT == 0 for segment in net.layout.segments)
    assert sum(s.size for s in net.layout.segments) == 3 * 5 + 5 + 5 * 2 + 2


def test_bound_pure_and_plain_module_agree_in_value_and_gradient() -> None:
    x = torch.randn(7, 3, dtype=torch.float64)
    net, module = Net(make_module()), make_module()
    theta = net.bind(net.initial())
    free = theta.clone().requires_grad_()
    assert torch.equal(net(theta, x), module(x))
    assert torch.equal(net(free, x), module(x))
    gradient, value, _ = net.gradient(square, theta, net, x)
    (pure,) = torch.autograd.grad(square(free, net, x)[0], free)
    square(theta, lambda _, x: module(x), x)[0].backward()  # type: ignore[arg-type]
    flat = net.views(gradient)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(flat[name], parameter.grad, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, pure, rtol=1e-12, atol=0)
    assert value.item() == pytest.approx(-module(x).square().sum().item())
    again, _, _ = net.gradient(square, theta, net, x)  # the buffer is emptied first
    torch.testing.assert_close(again, pure, rtol=1e-12, atol=0)


def test_functional_transforms_see_a_pure_function() -> None:
    net = Net(make_module())
    theta, x = net.bind(net.initial()), torch.randn(4, 3, dtype=torch.float64)
    per_sample = torch.func.vmap(torch.func.grad(lambda t, row: net(t, row).sum()), (None, 0))(theta.clone(), x)
    total = torch.func.grad(lambda t: net(t, x).sum())(theta.clone())
    torch.testing.assert_close(per_sample.sum(0), total)


def test_a_step_in_place_is_seen_by_the_bound_module() -> None:
    net = Net(make_module())
    theta, x = net.bind(net.initial()), torch.ones(1, 3, dtype=torch.float64)
    before = net(theta, x).detach().clone()
    theta.add_(0.1)
    assert not torch.equal(net(theta, x), before)
    torch.testing.assert_close(net(theta, x), net(theta.clone(), x))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="batch normalisation"):
        Net(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    with pytest.raises(ValueError, match="no parameters"):
        Net(nn.Tanh())
    net = Net(make_module())
    with pytest.raises(ValueError, match=r"theta has shape \(3,\)"):
        net.views(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"bind\(\)"):
        net.gradient(square, net.initial(), net, torch.zeros(1, 3))


PAIRS: dict[str, tuple[optimizers.Optimizer, Callable[..., torch.optim.Optimizer]]] = {
    "adam": (optimizers.Adam(0.01, 1e-5), lambda p: torch.optim.Adam(p, 0.01, eps=1e-5, maximize=True)),
    "adam-large-epsilon": (
        optimizers.Adam(0.01, 0.5, 0.8, 0.9),
        lambda p: torch.optim.Adam(p, 0.01, (0.8, 0.9), eps=0.5, maximize=True),
    ),
    "rmsprop": (
        optimizers.RMSProp(0.01, 1e-3, 0.9),
        lambda p: torch.optim.RMSprop(p, 0.01, 0.9, eps=1e-3, maximize=True),
    ),
    "sgd": (optimizers.SGD(0.01), lambda p: torch.optim.SGD(p, 0.01, maximize=True)),
    "momentum": (optimizers.SGD(0.01, 0.9), lambda p: torch.optim.SGD(p, 0.01, 0.9, maximize=True)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_optimisers_are_torchs_step_for_step(name: str) -> None:
    """200 steps on gradients of widely different sizes, zeros among them; rounding is all that may differ."""
    ours, theirs = PAIRS[name]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(50, dtype=torch.float64, generator=generator)
    theta, parameter = start.clone(), nn.Parameter(start.clone())
    state, reference = ours.start(theta), theirs([parameter])
    scale = torch.logspace(-8, 3, 50, dtype=torch.float64)
    for step in range(200):
        gradient = torch.randn(50, dtype=torch.float64, generator=generator) * scale * (step % 7 != 3)
        parameter.grad = gradient.clone()
        reference.step()
        theta, state = ours.ascend(theta, state, gradient, ours.learning_rate)
        torch.testing.assert_close(theta, parameter.detach(), rtol=1e-11, atol=1e-13)
    assert state.step == 200


def test_rmsprop_with_epsilon_inside_the_root() -> None:
    """TensorFlow's: v starts at 1, θ + lr g/√(v + ε). By hand: v = .9 + .1·4 = 1.3, step 2/√1.5."""
    theta, _ = (o := optimizers.RMSProp(1.0, 0.2, 0.9, epsilon_inside=True)).ascend(
        torch.zeros(1), o.start(torch.zeros(1)), torch.tensor([2.0]), 1.0
    )
    assert theta.item() == pytest.approx(2 / 1.5**0.5)


def test_clip_norm_is_torchs() -> None:
    for scale in (0.1, 10.0):
        gradient = torch.randn(40, generator=torch.Generator().manual_seed(1)) * scale
        parameter = nn.Parameter(torch.zeros(40))
        parameter.grad = gradient.clone()
        norm = nn.utils.clip_grad_norm_([parameter], 0.5)
        assert optimizers.clip_norm(gradient, 0.5) == pytest.approx(norm.item(), rel=1e-6)
        torch.testing.assert_close(gradient, parameter.grad)


def test_pack_and_unpack_are_inverse() -> None:
    adam = optimizers.Adam()
    theta = torch.ones(3)
    _, state = adam.ascend(theta, adam.start(theta), torch.ones(3), 0.1)
    back = optimizers.unpack(optimizers.pack(state))
    assert back.step == 1
    assert all(map(torch.equal, back.memory, state.memory))
