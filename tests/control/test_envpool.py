"""EnvPool behind the same interface, where it is installed."""

import math
from dataclasses import replace

import numpy as np
import pytest

from upslope.control import environments, ppo
from upslope.control.environments import Config
from upslope.control.ppo import PPO
from upslope.runs import run as runs

pytest.importorskip("envpool")

POOL = Config("Pendulum-v1", 3, "envpool", kwargs={"max_episode_steps": 7})


def test_rows_are_next_step_rows() -> None:
    """Pendulum's reward follows from the observation before the step: -(θ² + 0.1 θ̇² + 0.001 u²)."""
    envs, observation = environments.make(POOL, 0)
    assert isinstance(observation, np.ndarray)
    for t in range(20):
        step = envs.step(np.zeros((3, 1), np.float32))
        assert step.valid is not None
        assert step.valid.tolist() == [t % 8 != 7] * 3
        assert step.truncated.tolist() == [t % 8 == 6] * 3
        assert not step.terminated.any()
        angle = np.arctan2(observation[:, 1], observation[:, 0])
        expected = -(angle**2 + 0.1 * observation[:, 2] ** 2)
        np.testing.assert_allclose(step.reward[step.valid], expected[step.valid], rtol=1e-3, atol=1e-4)
        observation = step.observation
    envs.close()


def test_ppo_trains_on_a_pool() -> None:
    config = PPO(environment=POOL, run=runs.Config(quiet=True), total_steps=100, rollout_length=16, minibatch_size=16)
    agent = ppo.train(config)
    assert math.isfinite(float(agent.theta.sum()))
    assert (agent.evaluate(4).lengths == 7).all()


def test_unknown_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="not one of EnvPool's"):
        environments.make(replace(POOL, id="NoSuch-v0"), 0)
