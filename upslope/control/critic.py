"""The critic: what it is fitted to (S3 eqs 21, 22), and its own fit by gradient steps on φ alone (S3 alg 8).

φ ← argmin Σ (V_φ - target)² + κ‖φ - φ_i‖²
"""

from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.control import learner, optimizers, rollout
from upslope.control.parameters import Net
from upslope.core import reductions, returns, values


class Config(learner.Config, Protocol):
    """What the settings of an algorithm with such a fit have."""

    @property
    def critic_epochs(self) -> int: ...
    @property
    def critic_minibatch(self) -> int: ...
    @property
    def kappa(self) -> float: ...


Target = Literal["lambda", "monte-carlo", "td"]


def target(data: rollout.Rollout, psi: Float[Tensor, "N T"], gamma: float, kind: Target) -> Float[Tensor, "N T"]:
    """What V is fitted to: Ψ + V, the λ-return where Ψ is GAE; the return (S3 eq 22); or r + γ V(s') (S3 eq 21)."""
    discounts, continues = returns.boundaries(data.terminated, data.truncated, gamma, 1.0)
    if kind == "td":
        return values.td_target(data.reward, data.next_value, discounts)
    if kind == "monte-carlo":
        return returns.return_to_go(data.reward, data.next_value, discounts, continues)
    return psi + data.value


def error(value: Float[Tensor, " B"], batch: rollout.Batch, clip: float | None) -> Float[Tensor, " B"]:
    """(V - target)², the move from the old value clipped where `clip` says how far it may go."""
    if clip is None:
        return values.squared_error(value, batch.value_target)
    return values.clipped_squared_error(value, batch.value_old, batch.value_target, clip)


def objective(
    theta: Float[Tensor, " d"], net: Net, batch: rollout.Batch, anchor: Float[Tensor, " p"], kappa: float
) -> tuple[Tensor, Tensor]:
    """Scalar to maximise: - mean (V_φ - target)² - κ‖φ - φ_i‖², and its first part."""
    error = values.squared_error(net.only("critic", theta, batch.observation), batch.value_target)
    mean = reductions.token_mean(error, batch.valid)
    if not kappa:
        return -mean, mean
    phi = torch.nn.utils.parameters_to_vector(net.module.get_submodule("critic").parameters())
    return -mean - values.proximal(phi, anchor, kappa), mean


def fit(
    theta: Float[Tensor, " d"],
    memory: optimizers.State,
    net: Net,
    batch: rollout.Batch,
    config: Config,
    rate: float,
    shuffle: torch.Generator,
) -> tuple[optimizers.State, dict[str, float]]:
    """Epochs of minibatch steps on φ, in place; the optimiser's memory and the numbers of the last step."""
    anchor = torch.nn.utils.parameters_to_vector(net.module.get_submodule("critic").parameters()).detach().clone()
    phi = net.part("critic")
    for minibatch in rollout.minibatches(batch, config.critic_epochs, config.critic_minibatch, shuffle):
        gradient, _, error = net.gradient(objective, theta, net, minibatch, anchor, config.kappa)
        _, memory, norm = learner.ascend(theta, memory, gradient, config, rate, phi)
    return memory, {"value_error": float(error.detach()), "critic_grad_norm": norm, "critic_steps": memory.step}
