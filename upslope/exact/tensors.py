"""An MDP as the tensor environment that deep agents train on: what they see, a time limit, noise as blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from upslope.exact.mdp import MDP
from upslope.exact.sampling import BatchedMDP, Chains


class Place(NamedTuple):
    """Where each of N chains is."""

    state: Int64[Tensor, " N"]
    time: Int64[Tensor, " N"]  # steps since the reset


@dataclass(frozen=True, eq=False)
class TensorMDP:
    """`reset(noise) -> state`, `step(state, action, noise) -> state, reward, terminated, truncated`, `observe(state)`.

    Any number of chains; the noise is uniform in [0, 1). The horizon terminates, the time limit truncates.

    >>> from upslope.exact import zoo
    >>> problem = TensorMDP(zoo.random_walk(), time_limit=9)
    >>> state = problem.reset(torch.rand(2, 1))
    >>> problem.step(state, torch.zeros(2, dtype=torch.int64), torch.tensor([[0.1], [0.9]]))[0].time
    tensor([1, 1])

    Raises:
        ValueError: rewards are noisy.
    """

    mdp: MDP
    time_limit: int
    features: Float[Tensor, "S d"] | None = None  # what is seen in each state; None: its number
    reset_noise: int = 1
    step_noise: int = 1

    def __post_init__(self) -> None:
        if self.mdp.reward_std is not None:
            raise ValueError("reward_std: an MDP with noisy rewards has no tensor form for deep agents")

    @cached_property
    def _chains(self) -> BatchedMDP:
        return BatchedMDP(self.mdp, 1, self.time_limit)

    @cached_property
    def _counter(self) -> Int64[Tensor, ""]:
        return torch.zeros((), dtype=torch.int64)  # of noise that is never drawn: all of it is handed in

    def reset(self, noise: Float[Tensor, "N 1"]) -> Place:
        """s_0 ~ ρ₀."""
        zero = torch.zeros(noise.shape[:-1], dtype=torch.int64)
        begun = self._chains.restart(Chains(zero, zero, self._counter), zero == 0, noise[..., 0].double())
        return Place(begun.observation, begun.time)

    def step(
        self, state: Place, action: Int64[Tensor, " N"], noise: Float[Tensor, "N 1"]
    ) -> tuple[Place, Float[Tensor, " N"], Bool[Tensor, " N"], Bool[Tensor, " N"]]:
        """s' ~ P(·|s, a)."""
        after, *rest = self._chains.step(Chains(*state, self._counter), action, noise[..., 0].double())
        return Place(after.observation, after.time), *rest  # type: ignore[return-value]

    def observe(self, state: Place) -> Tensor:
        return state.state if self.features is None else self.features[state.state]
