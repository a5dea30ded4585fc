"""K-FAC on θ: F⁻¹∇J layer by layer (Martens & Grosse 2015, arXiv:1503.05671; Grosse & Martens 2016, arXiv:1602.01407).

layer         F of y = W x + b is taken as A ⊗ G, A = E[x xᵀ] with a 1 for the bias, G = E[g gᵀ]   core/kronecker.py
g             ∂ log-likelihood / ∂y of outputs *sampled from the model*, not of the actions that were taken
              actor: a ~ π(·|s);  critic: V(s) + standard normal noise, which makes F its Gauss-Newton matrix
convolution   x a patch; A summed and G averaged over the picture's places                         1602.01407 eq 22
log_std       of a Gaussian policy is no layer: its Fisher matrix is exactly 2 I
step          ½ xᵀF x ≤ kl_clip in every network, then momentum                                    1708.05144 3.2

g is the gradient with respect to a zero that is added to every layer's output: nothing is left behind on the module.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from upslope.control.networks import Head, Observation
from upslope.control.optimizers import State
from upslope.control.parameters import Net
from upslope.core import distributions, kronecker
from upslope.runs import distributed, settings

LOG_STD = "policy.head.log_std"
LOG_STD_FISHER = 2.0  # E[(∂ log π / ∂ log σ)²] = E[(z² - 1)²], z standard normal


@dataclass(frozen=True)
class KFAC:
    """The natural gradient's settings; its memory is the velocity and, per layer, A, G and their damped inverses."""

    learning_rate: float = 0.25  # the step where the trust region allows it; 1 is a whole Newton step
    momentum: float = 0.9
    stats_decay: float = 0.99  # of the running averages of A and G, per gradient step
    damping: float = 0.01  # λ of F + λ I
    kl_clip: float = 0.001  # nats: the largest ½ xᵀF x of the policy's step, or of a shared network's
    critic_kl_clip: float = 0.1  # of a critic with a network of its own: ½ (ΔV)², in squared units of the return
    inverse_interval: int = 10  # gradient steps between two inversions

    def __post_init__(self) -> None:
        settings.positive(self, "learning_rate", "damping", "kl_clip", "critic_kl_clip")
        settings.below_one(self, "momentum", "stats_decay")
        settings.within(self, 1, None, "inverse_interval")

    def start(self, theta: Float[Tensor, " d"]) -> State:
        return State(0, (torch.zeros_like(theta),))  # the factors come with the first batch

    def ascend(
        self, theta: Float[Tensor, " d"], state: State, gradient: Float[Tensor, " d"], learning_rate: float
    ) -> tuple[Float[Tensor, " d"], State]:
        """v ← μ v + (1-μ) x;  θ ← θ + lr · v. A mean of steps inside the trust region is inside it."""
        velocity = state.memory[0]
        velocity.lerp_(gradient, 1 - self.momentum)
        theta.add_(velocity, alpha=learning_rate)
        return theta, State(state.step + 1, state.memory)


class Layer(NamedTuple):
    """Where a layer's weight and bias lie in θ, and the weight as a matrix."""

    name: str
    weight: slice
    bias: slice
    outputs: int
    inputs: int  # without the bias


def layers(net: Net) -> tuple[Layer, ...]:
    """The layers that have factors, in the order of θ.

    Raises:
        ValueError: a parameter without a Fisher block, naming it and what is supported.
    """
    where = {s.name: slice(s.start, s.start + s.size) for s in net.layout.segments}
    found, left = [], dict(where)
    for name, module in net.module.named_modules():
        bare = isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding == (0, 0)
        if (isinstance(module, nn.Linear) or bare) and module.bias is not None:
            weight, bias = left.pop(f"{name}.weight"), left.pop(f"{name}.bias")
            found.append(Layer(name, weight, bias, len(module.weight), module.weight[0].numel()))
    if not net.module.policy.head.state_dependent:  # type: ignore[union-attr]
        left.pop(LOG_STD, None)
    if left:
        raise ValueError(
            f"K-FAC has no Fisher block for {', '.join(left)}; allowed: Linear and Conv2d layers with a bias, without "
            "groups or padding, and a log_std that does not depend on the state (no gSDE)"
        )
    return tuple(found)


def observe(
    memory: State,
    net: Net,
    theta: Float[Tensor, " d"],
    observation: Observation,
    valid: Bool[Tensor, " B"] | None,
    config: KFAC,
    noise: torch.Generator,
) -> State:
    """The memory with the factors of this batch averaged in and, when it is time, inverted again."""
    found, velocity, known = layers(net), memory.memory[0], memory.memory[1:]
    head: Head = net.module.policy.head  # type: ignore[assignment, union-attr]
    rows = len(next(iter(observation.values())) if isinstance(observation, dict) else observation)
    of_action, of_value = head.noise((rows, *head.noise_shape), noise), distributions.normal((rows,), noise)
    kept = slice(None) if valid is None else valid
    table: list[Tensor] = []
    for i, (x, g) in enumerate(scores(net, theta, observation, of_action, of_value, found)):
        new = factors(x[kept], g[kept])
        for part in new:
            distributed.average_(part)
        old = kronecker.Factors(*known[4 * i : 4 * i + 2]) if known else new
        mean = kronecker.average(old, new, config.stats_decay)
        inverse = kronecker.Factors(*known[4 * i + 2 : 4 * i + 4]) if known else mean
        if memory.step % config.inverse_interval == 0:
            exact = kronecker.inverses(kronecker.Factors(*(part.double() for part in mean)), config.damping)
            inverse = kronecker.Factors(*(part.to(theta.dtype).contiguous() for part in exact))  # as when read again
        table += [*mean, *inverse]
    return State(memory.step, (velocity, *table))


def scores(
    net: Net,
    theta: Float[Tensor, " d"],
    observation: Observation,
    of_action: Float[Tensor, "rows ..."],
    of_value: Float[Tensor, " rows"],
    found: tuple[Layer, ...],
) -> list[tuple[Float[Tensor, "rows places inputs"], Float[Tensor, "rows places outputs"]]]:
    """x and g of every layer and row, for the outputs that this noise samples from the model: one backward pass."""
    views = net.views(theta.detach())
    with torch.enable_grad(), Taps({id(views[f"{layer.name}.weight"]): layer.name for layer in found}) as taps:
        policy, value = torch.func.functional_call(net.module, views, (observation,))
        action, target = policy.sample(of_action).detach(), (value + of_value).detach()
        likelihood = policy.log_prob(action) - 0.5 * (target - value).square()  # of both, up to a constant
    inputs, zeros = zip(*(taps.seen[layer.name] for layer in found), strict=True)
    return list(zip(inputs, torch.autograd.grad(likelihood.sum(), zeros), strict=True))


def factors(x: Float[Tensor, "rows places inputs"], g: Float[Tensor, "rows places outputs"]) -> kronecker.Factors:
    """Places are summed in A and averaged in G: derivatives at two places of a picture are taken as uncorrelated."""
    mean = kronecker.factors(x.flatten(0, 1), g.flatten(0, 1))
    return mean._replace(inputs=x.shape[1] * mean.inputs)


class Taps(TorchFunctionMode):
    """While entered, a zero is added to the output of every named layer: [rows, places, outputs], one place if linear.

    `seen` has the layer's inputs, as [rows, places, inputs], and that zero.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names  # id of the weight -> the layer's name
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func not in (nn.functional.linear, nn.functional.conv2d) or id(args[1]) not in self.names:
            return output
        x, weight = args[0].detach(), args[1]
        if func is nn.functional.linear:
            patches = x.unsqueeze(1)
        else:
            patches = nn.functional.unfold(x, weight.shape[2:], dilation=args[5], stride=args[3]).transpose(1, 2)
        zero = output.new_zeros((*patches.shape[:2], len(weight))).requires_grad_()
        self.seen[self.names[id(weight)]] = patches, zero
        return output + zero.transpose(1, 2).reshape(output.shape)


def natural(
    gradient: Float[Tensor, " d"], memory: State, net: Net, config: KFAC, rate: float
) -> tuple[Float[Tensor, " d"], dict[str, float]]:
    """x, the natural gradient, so short that a step of `rate` times x stays inside the trust region; its numbers.

    Raises:
        ValueError: a gradient that is not finite.
    """
    distributed.average_(gradient)
    if not gradient.isfinite().all():
        raise ValueError(f"the gradient is not finite after {memory.step} gradient steps; θ was not changed")
    x = torch.zeros_like(gradient)
    for i, layer in enumerate(layers(net)):
        inverse = kronecker.Factors(*memory.memory[4 * i + 3 : 4 * i + 5])
        slope = torch.cat([gradient[layer.weight].view(layer.outputs, layer.inputs), gradient[layer.bias, None]], 1)
        solved = kronecker.precondition(slope, inverse)
        x[layer.weight], x[layer.bias] = solved[:, :-1].reshape(-1), solved[:, -1]
    for s in net.layout.segments:
        if s.name == LOG_STD:
            x[s.start : s.start + s.size] = gradient[s.start : s.start + s.size] / (LOG_STD_FISHER + config.damping)
    numbers = {}
    for name, part, clip in _networks(net, config):
        squared = float(torch.dot(x[part], gradient[part]).clamp(min=0))  # xᵀ(F + λI)x
        step = kronecker.step_scale(squared, rate, clip)
        x[part] *= step / rate
        numbers[f"{name}step_size"], numbers[f"{name}kl_model"] = step, 0.5 * step**2 * squared
    return x, numbers


def _networks(net: Net, config: KFAC) -> list[tuple[str, slice, float]]:
    """The parts of θ with a trust region of their own: name, place, largest KL."""
    if net.module.shared:
        return [("", slice(None), config.kl_clip)]
    return [("", net.part("policy"), config.kl_clip), ("critic_", net.part("critic"), config.critic_kl_clip)]
