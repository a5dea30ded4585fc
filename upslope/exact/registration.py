"""The zoo as Gymnasium environments: `gymnasium.make("upslope.exact.registration:upslope/ShortCorridor-v0")`.

Importing this module registers the ids (once); Gymnasium's own `module:id` form imports it, so whoever trains on them
needs no import of this wing. Problems are built when an environment is made, not when it is registered.

Observations are one-hot vectors [S], except where the problem says what is seen: the short corridor looks the same
everywhere, and the N-chain's features are a thermometer. `observation="index"` gives the state's number instead.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np
import torch
from jaxtyping import Float

from upslope.exact import zoo
from upslope.exact.mdp import MDP
from upslope.exact.sampling import draw, draw_start, outcomes
from upslope.exact.tensors import TensorMDP

IDS = {
    "Gridworld": "gridworld",
    "Gambler": "gambler",
    "JacksCars": "jacks-cars",
    "RandomWalk": "random-walk",
    "ShortCorridor": "short-corridor",
    "Cliff": "cliff",
    "MaximizationBias": "maximization-bias",
    "BlindCliffwalk": "blind-cliffwalk",
    "Chain": "chain",
    "DeepSea": "deep-sea",
}
TIME_LIMITS = {"Gridworld": 1000, "ShortCorridor": 1000, "Cliff": 1000, "JacksCars": 100}


class TabularEnv(gymnasium.Env[Any, np.int64]):
    """Any MDP as a Gymnasium environment. Its horizon terminates; a time limit is Gymnasium's wrapper and truncates.

    Args:
        mdp: the problem.
        features: what is seen in each state [S, d]; None shows the state's number.

    >>> env = TabularEnv(zoo.short_corridor(), features=np.ones((4, 1)))
    >>> env.reset(seed=0)[0].tolist(), env.step(np.int64(1))[1]
    ([1.0], -1.0)
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self, mdp: MDP, features: Float[np.ndarray, "S d"] | None = None) -> None:
        self.mdp, self.state, self.time = mdp, 0, 0
        self.features = None if features is None else np.asarray(features, np.float32)
        self._table = outcomes(mdp)
        self.action_space = gymnasium.spaces.Discrete(mdp.num_actions)
        if self.features is None:
            self.observation_space = gymnasium.spaces.Discrete(mdp.num_states)
        elif self.features.ndim != 2 or len(self.features) != mdp.num_states:
            raise ValueError(f"features: one row per state, [{mdp.num_states}, d], got {self.features.shape}")
        else:
            low, high = self.features.min(axis=0), self.features.max(axis=0)
            self.observation_space = gymnasium.spaces.Box(low, high, dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state, self.time = int(draw_start(self._table, self.np_random.random(1))[0]), 0
        return self._seen(), {}

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not self.action_space.contains(action):
            raise ValueError(f"action: 0…{self.mdp.num_actions - 1}, got {action!r}")
        state, reward = draw(self._table, np.array([self.state]), np.array([int(action)]), self.np_random)
        self.state, self.time = int(state[0]), self.time + 1
        terminated = bool(self._table.terminal[self.state]) or self.time == self.mdp.horizon
        return self._seen(), float(reward[0]), terminated, False, {}

    def tensors(self, time_limit: int) -> TensorMDP:
        """The problem in tensors: the same draws give the same episodes."""
        features = None if self.features is None else torch.from_numpy(self.features)
        return TensorMDP(self.mdp, time_limit, features)

    def _seen(self) -> Any:
        return self.state if self.features is None else self.features[self.state].copy()


def make(name: str, observation: Literal["features", "index"] = "features", **options: Any) -> TabularEnv:
    """The environment of a zoo problem; `options` go to its constructor, e.g. `size=20` for the DeepSea."""
    mdp = getattr(zoo, name.replace("-", "_"))(**options)
    if observation == "index":
        return TabularEnv(mdp)
    if observation != "features":
        raise ValueError(f'observation: "features" or "index", got {observation!r}')
    features = np.eye(mdp.num_states)
    if name == "short-corridor":
        features = np.ones((mdp.num_states, 1))
    elif name == "chain":
        features = np.tri(mdp.num_states)
    return TabularEnv(mdp, features)


def register() -> None:
    """Registers the ids with Gymnasium; a second call does nothing."""
    for name, problem in IDS.items():
        identifier = f"upslope/{name}-v0"
        if identifier not in gymnasium.registry:
            gymnasium.register(
                identifier,
                entry_point="upslope.exact.registration:make",
                max_episode_steps=TIME_LIMITS.get(name),
                kwargs={"name": problem},
            )


register()
