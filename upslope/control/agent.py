"""A trained agent: θ, its network and its observation statistics, usable on its own."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float
from torch import Tensor

from upslope.control import environments, memory, networks, normalization
from upslope.control.factory import Single
from upslope.control.networks import to_tensors
from upslope.control.normalization import Normalizer
from upslope.control.parameters import Net
from upslope.runs import checkpoint, distributed
from upslope.runs.randomness import derive, generator
from upslope.runs.run import CHECKPOINTS

MAX_LENGTH = 1_000_000  # steps; evaluation gives up on an episode without an end


class Evaluation(NamedTuple):
    """Undiscounted returns and lengths of whole episodes."""

    returns: Float[np.ndarray, " episodes"]
    lengths: Float[np.ndarray, " episodes"]

    def summary(self) -> dict[str, float | int]:
        """`mean_return`, `std_return` (population), `mean_length`, `episodes`."""
        return {
            "mean_return": float(self.returns.mean()),
            "std_return": float(self.returns.std()),
            "mean_length": float(self.lengths.mean()),
            "episodes": len(self.returns),
        }


class Agent(NamedTuple):
    """What `train` returns."""

    net: Net
    theta: Float[Tensor, " d"]
    environment: environments.Config
    normalize: normalization.Config
    normalizer: Normalizer
    action_space: spaces.Space  # of one environment

    def act(self, observation: Any, noise: Tensor | None = None) -> np.ndarray:
        """Actions of the environment for raw observations: the policy's mode, or a sample where noise is given.

        Raises:
            ValueError: the policy has a memory; `step` takes it and gives it back.
        """
        if self.begin(1) is not None:
            raise ValueError("act: this policy has a memory; use memory = begin(n), step(observation, memory)")
        return self.step(observation, None, noise)[0]

    def begin(self, num_envs: int) -> Float[Tensor, "N M"] | None:
        """What a policy remembers where episodes begin; None for one without a memory."""
        return memory.start(self.net, num_envs)

    def step(
        self, observation: Any, remembered: Float[Tensor, "N M"] | None, noise: Tensor | None = None
    ) -> tuple[np.ndarray, Float[Tensor, "N M"] | None]:
        """As `act`, with the memory before and after; its row is set to 0 where a new episode begins."""
        action, after = self._choose(observation, remembered, noise)
        return environments.to_space(self.action_space, action), after

    @torch.no_grad()
    def _choose(
        self, observation: Any, remembered: Tensor | None, noise: Tensor | None = None
    ) -> tuple[np.ndarray, Tensor | None]:
        seen = normalization.observation(self.normalizer, to_tensors(observation), self.normalize)
        if remembered is None:
            policy, after = self.net.only("policy", self.theta, seen), None
        else:
            policy, _, after = memory.step(self.net, self.theta, seen, remembered)
        return (policy.mode() if noise is None else policy.sample(noise)).numpy(), after

    def evaluate(self, episodes: int = 100, seed: int = 0, deterministic: bool = True) -> Evaluation:
        """Play whole episodes with seeds of their own, the policy and its statistics frozen; rewards are the raw ones.

        Every environment plays its share to the end, so short episodes are not over-represented.

        Args:
            episodes: how many.
            seed: of the episodes; the training run's seeds are another stream.
            deterministic: act by the mode of π; else sample.
        """
        if episodes < 1:
            raise ValueError(f"episodes is {episodes}, allowed: 1 or more")
        count = min(episodes, 16)
        how: Literal["envpool", "sync"] = "envpool" if self.environment.vectorization == "envpool" else "sync"
        config = replace(self.environment, num_envs=count, vectorization=how, autoreset="disabled", group_size=1)
        envs, observation = environments.make(config, derive(seed, "evaluate"))
        share = np.array([episodes // count + (i < episodes % count) for i in range(count)])
        played, total, length = np.zeros(count, int), np.zeros(count), np.zeros(count, int)
        returns, lengths = [], []
        head: networks.Head = self.net.module.policy.head  # type: ignore[assignment, union-attr]
        random, remembered = generator(seed, "evaluate", "noise"), self.begin(count)
        while (played < share).any():
            noise = None if deterministic else head.noise((count, *head.noise_shape), random)
            action, remembered = self._choose(observation, remembered, noise)
            step = envs.step(action)
            remembered = memory.forget(remembered, step.ended if step.valid is None else ~step.valid)
            if length.max() >= MAX_LENGTH:
                raise ValueError(f"{self.environment.id}: an episode did not end within {MAX_LENGTH:,} steps")
            total, length = total + step.reward, length + (1 if step.valid is None else step.valid)
            for i in np.flatnonzero(step.ended):
                if played[i] < share[i]:
                    returns.append(total[i])
                    lengths.append(length[i])
                played[i] += 1
                total[i] = length[i] = 0
            observation = step.observation
        envs.close()
        return Evaluation(np.array(returns), np.array(lengths))

    def frames(self, seed: int = 0, max_steps: int = 10_000) -> Iterator[tuple[np.ndarray, float]]:
        """One deterministic episode as pictures [height, width, 3] with the return so far."""
        blind = Single(self.environment)()
        modes = blind.metadata.get("render_modes", [])
        blind.close()
        if "rgb_array" not in modes:
            raise ValueError(f"{self.environment.id} cannot be filmed: its render modes are {modes or 'none'}")
        env = Single(self.environment, render_mode="rgb_array")()
        observation, _ = env.reset(seed=derive(seed, "watch") % 2**31)
        total, over, remembered = 0.0, False, self.begin(1)
        yield np.asarray(env.render()), total
        for _ in range(max_steps):
            if over:
                break
            actions, remembered = self.step(_batch_of_one(observation), remembered)
            observation, reward, terminated, truncated, _ = env.step(actions[0])
            total, over = total + float(reward), terminated or truncated
            yield np.asarray(env.render()), total
        env.close()

    def frames_per_second(self) -> float:
        """What the environment declares, or 30."""
        return environments.describe(self.environment)[2]


def _batch_of_one(observation: Any) -> Any:
    if isinstance(observation, dict):
        return {key: np.asarray(value)[None] for key, value in observation.items()}
    return np.asarray(observation)[None]


def load(config: Any, directory: Path) -> Agent:
    """The agent of a run's newest valid checkpoint.

    Raises:
        ValueError: the run has no checkpoint yet, or its parameters do not fit its configuration.
    """
    saved = checkpoint.newest(directory / CHECKPOINTS)
    if saved is None:
        raise ValueError(f"{directory} has no checkpoint yet")
    observation_space, action_space, _ = environments.describe(config.environment)
    net = Net(config.network.build(observation_space, action_space, seed=0))
    if saved.state["layout"] != net.layout.table():
        raise ValueError(f"{directory}: the checkpoint's parameters do not fit the network of its configuration")
    normalizer = normalization.unpack(distributed.own("world", saved.tensors, 0), observation_space, config.normalize)
    return Agent(net, net.bind(saved.tensors["theta"]), config.environment, config.normalize, normalizer, action_space)
