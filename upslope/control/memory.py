"""Recurrence: cells of matrix products, and what a policy with a memory sees.

The cells are written out because `torch.nn.LSTM` has no forward-mode derivative. A memory is one row of numbers per
environment, the hidden and cell states of actor and critic side by side, and belongs to the caller: it is handed in
and comes back. 0 when an episode begins.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Remembered(NamedTuple):
    """What a policy with a memory sees, in the place of an observation.

    One step of N environments; or sequences of T, for which the memories are rebuilt from the first on.
    """

    observation: Any  # [N, ...] or [N, T, ...]
    memory: Float[Tensor, "N M"]  # before the first step
    begins: Bool[Tensor, "N T"] | None  # an episode begins here: what is remembered is of another; None: one step

    def rows(self) -> Any:
        """The observations, one row per step."""
        return self.observation if self.begins is None else merge(self.observation)


class LSTM(nn.Module):
    """Long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000 for f), its states h and c.

    i, f, o = σ(W x + U h + b), g = tanh(W x + U h + b); c ← f c + i g, h ← o tanh(c).
    """

    states = 2

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__()
        self.input, self.recurrent = nn.Linear(inputs, 4 * size), nn.Linear(size, 4 * size, bias=False)
        self.size = size

    def keep_longer(self, bias: float) -> None:
        """Add to the bias of f, the gate that keeps c."""
        with torch.no_grad():
            self.input.bias[self.size : 2 * self.size] += bias

    def step(self, gates: Float[Tensor, "N G"], state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The states after one step, h first, from W x + b and those before."""
        h, c = state
        gates = torch.addmm(gates, h, self.recurrent.weight.T)
        i, f, o = torch.sigmoid(gates[:, : 3 * self.size]).chunk(3, -1)
        c = f * c + i * torch.tanh(gates[:, 3 * self.size :])
        return o * torch.tanh(c), c


class GRU(nn.Module):
    """Gated recurrent unit (Cho et al. 2014, with the reset gate after the product), its state h.

    r, z = σ(W x + U h + b), n = tanh(W x + b + r (U h + b')); h ← (1 - z) n + z h.
    """

    states = 1

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__()
        self.input, self.recurrent = nn.Linear(inputs, 3 * size), nn.Linear(size, 3 * size)
        self.size = size

    def keep_longer(self, bias: float) -> None:
        """Add to the bias of z, the gate that keeps h."""
        with torch.no_grad():
            self.input.bias[self.size : 2 * self.size] += bias

    def step(self, gates: Float[Tensor, "N G"], state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The state after one step, from W x + b and the one before."""
        (h,) = state
        own, both = self.recurrent(h), 2 * self.size
        r, z = torch.sigmoid(gates[:, :both] + own[:, :both]).chunk(2, -1)
        n = torch.tanh(gates[:, both:] + r * own[:, both:])
        return (n + z * (h - n),)


def cell(kind: str, inputs: int, size: int) -> LSTM | GRU | None:
    """The cell of a name, or None for "none"."""
    return None if kind == "none" else LSTM(inputs, size) if kind == "lstm" else GRU(inputs, size)


def run(
    unit: LSTM | GRU, features: Float[Tensor, "B F"], memory: Float[Tensor, "N S"], begins: Bool[Tensor, "N T"] | None
) -> tuple[Float[Tensor, "B H"], Float[Tensor, "N S"]]:
    """Outputs and the memory after, of one step (B = N) or of sequences (B = N·T), anew where an episode begins."""
    gates, state = unit.input(features), memory.chunk(unit.states, -1)  # W x + b of all steps at once
    if begins is None:
        state = unit.step(gates, state)
        return state[0], torch.cat(state, -1)
    outputs, keeps = [], (~begins).to(memory.dtype).unsqueeze(-1).unbind(1)
    for now, keep in zip(gates.unflatten(0, begins.shape).unbind(1), keeps, strict=True):
        state = unit.step(now, tuple(part * keep for part in state))
        outputs.append(state[0])
    return torch.stack(outputs, 1).flatten(0, 1), torch.cat(state, -1)


class _Net(Protocol):
    module: Any

    def __call__(self, theta: Tensor, *inputs: Any) -> Any: ...


def start(net: _Net, num_envs: int) -> Float[Tensor, "N M"] | None:
    """The memory that episodes begin with; None for a policy without."""
    size = getattr(net.module, "memory_size", 0)
    return torch.zeros(num_envs, size) if size else None


def step(
    net: _Net, theta: Float[Tensor, " d"], observation: Any, memory: Float[Tensor, "N M"] | None
) -> tuple[Any, Float[Tensor, " N"], Float[Tensor, "N M"] | None]:
    """π and V of one step's observations, and the memory after it."""
    if memory is None:
        return (*net(theta, observation), None)
    return net(theta, Remembered(observation, memory, None), True)


def forget(memory: Float[Tensor, "N M"] | None, begins: Bool[np.ndarray, " N"]) -> Float[Tensor, "N M"] | None:
    """The memory without that of the environments in which an episode begins."""
    if memory is None or not begins.any():
        return memory
    return memory * torch.from_numpy(~begins).unsqueeze(1)


def merge(observation: Any) -> Any:
    """[N, T, ...] -> [N·T, ...], of every part."""
    if isinstance(observation, dict):
        return {key: part.flatten(0, 1) for key, part in observation.items()}
    return observation.flatten(0, 1)
