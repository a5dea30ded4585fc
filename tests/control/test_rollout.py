"""Truncation, termination and the three autoreset modes, on environments whose value is known in closed form."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.control import worlds
from upslope.control import environments, episodes, factory, normalization, rollout
from upslope.control.environments import Config
from upslope.core import advantages, distributions, returns

GAMMA = 0.9
MODES = ("disabled", "same-step", "next-step")
PLAIN = normalization.Config()


def clock(mode: str, vectorization: str = "sync", num_envs: int = 3, **kwargs: Any) -> Config:
    return Config("Clock-v0", num_envs, vectorization, mode, kwargs=kwargs)  # type: ignore[arg-type]


class ExactNet:
    """A uniform policy with the true value of Clock."""

    def __init__(self, truncate: bool) -> None:
        self.truncate = truncate
        head = SimpleNamespace(state_dependent=False, noise_shape=(2,), noise=distributions.gumbel)
        self.module = SimpleNamespace(policy=SimpleNamespace(head=head), shared=False)

    def only(self, child: str, theta: torch.Tensor, observation: torch.Tensor) -> object:
        return self(theta, observation)[("policy", "critic").index(child)]

    def __call__(
        self, theta: torch.Tensor, observation: torch.Tensor
    ) -> tuple[distributions.Categorical, torch.Tensor]:
        left = observation[:, 2] - observation[:, 0]
        value = 1 / (1 - GAMMA) * torch.ones_like(left) if self.truncate else (1 - GAMMA**left) / (1 - GAMMA)
        return distributions.Categorical(torch.zeros(len(observation), 2)), value


def collect(config: Config, truncate: bool, length: int = 23, seed: int = 0) -> rollout.Rollout:
    return collected(config, truncate, length, seed)[0]


def collected(
    config: Config, truncate: bool, length: int, seed: int = 0, episodes: int = 0
) -> tuple[rollout.Rollout, rollout.World]:
    world = rollout.begin(config, PLAIN, seed)
    generator = torch.Generator().manual_seed(1)
    net, theta = ExactNet(truncate), torch.zeros(1)
    data, world = rollout.collect(net, theta, world, length, generator, PLAIN, GAMMA, episodes)  # type: ignore
    world.envs.close()
    return data, world


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_true_values_have_no_advantage(mode: str, truncate: bool, vectorization: str) -> None:
    """With the true V every TD residual of a deterministic process is 0: if and only if the bootstrap is right."""
    data = collect(clock(mode, vectorization, end=5, truncate=truncate), truncate)
    discounts, traces = returns.boundaries(data.terminated, data.truncated, GAMMA, 0.95)
    psi = advantages.gae(data.reward, data.value, data.next_value, discounts, traces)
    valid = torch.ones_like(data.terminated) if data.valid is None else data.valid
    assert psi[valid].abs().max() < 1e-5
    assert bool((data.truncated if truncate else data.terminated)[valid].any())


def test_merging_the_two_ends_would_show() -> None:
    """The same rollout with truncation taken for termination misses γ V(final) at every cut: 9 here, by hand."""
    data = collect(clock("disabled", end=5, truncate=True), truncate=True)
    wrong, _ = returns.boundaries(data.truncated, data.terminated, GAMMA, 0.95)
    residual = advantages.td_residual(data.reward, data.value, data.next_value, wrong)
    assert torch.allclose(residual[data.truncated], torch.tensor(-GAMMA / (1 - GAMMA)), atol=1e-4)


def rows(config: Config, steps: int, seed: int = 7) -> list[list[tuple[Any, ...]]]:
    """Per environment, its valid rows under actions that depend on (environment, valid step) alone."""
    envs, observation = environments.make(config, seed)
    taken, found = np.zeros(config.num_envs, int), [[] for _ in range(config.num_envs)]  # type: ignore[var-annotated]
    while min(map(len, found)) < steps:
        action = np.array([(3 * i + 5 * k * k) % 7 % 2 for i, k in enumerate(taken)])
        before, step = observation, envs.step(action)
        for i in range(config.num_envs):
            if step.valid is None or step.valid[i]:
                numbers = step.reward[i], step.terminated[i], step.truncated[i], step.ended[i]
                found[i].append((before[i].tobytes(), step.next_observation[i].tobytes(), *numbers))
                taken[i] += 1
        observation = step.observation
    envs.close()
    return [part[:steps] for part in found]


@pytest.mark.parametrize(
    ("environment_id", "kwargs"),
    [("Clock-v0", {"end": 6}), ("CartPole-v1", {"max_episode_steps": 17}), ("Acrobot-v1", {"max_episode_steps": 9})],
)
def test_every_mode_and_vectorization_gives_the_same_rows(environment_id: str, kwargs: dict[str, Any]) -> None:
    """(observation, next_observation, reward, terminated, truncated) do not depend on how episodes are reset."""
    make = lambda how, mode: Config(environment_id, 2, how, mode, kwargs=kwargs)  # noqa: E731
    reference = rows(make("sync", "disabled"), 40)
    assert any(row[5] for part in reference for row in part)
    for how in ("sync", "async"):
        for mode in MODES:
            assert rows(make(how, mode), 40) == reference, (how, mode)


def test_next_step_rows_that_reset_are_marked_and_count_nowhere() -> None:
    data, world = collected(clock("next-step", end=5), truncate=False, length=18)
    assert data.valid is not None
    # 5 steps, 1 reset row, and again: rows 5, 11, 17 are resets
    assert (~data.valid).nonzero().tolist() == [[i, t] for i in range(3) for t in (5, 11, 17)]
    assert world.steps == 3 * 15
    batch = rollout.flatten(data, data.value, data.value)
    for size in (10, batch.psi.shape[0]):  # every transition once, no reset row
        parts = list(rollout.minibatches(batch, 1, size, torch.Generator().manual_seed(0)))
        assert all(part.valid is None for part in parts)
        assert torch.equal(
            torch.cat([part.logp_old for part in parts]).sort()[0], batch.logp_old[batch.valid].sort()[0]
        )
        assert sum(len(part.psi) for part in parts) == 45


def test_episode_seeds_differ_and_repeat() -> None:
    first, again, other = (rows(clock("disabled"), 12, seed=s) for s in (7, 7, 8))
    assert first == again != other
    starts = {part[k][0] for part in first for k in (0, 5, 10)}
    assert len(starts) == 9  # 3 environments × 3 episodes, each reset by a seed of its own


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("steps", [3, 5, 6, 12])
def test_a_snapshot_resumes_bit_for_bit(mode: str, vectorization: str, steps: int) -> None:
    """At any moment, an episode's end and an owed reset included."""
    config = clock(mode, vectorization, num_envs=2, end=5)
    act = lambda t: np.array([t % 2, (t // 2) % 2])  # noqa: E731
    envs, _ = environments.make(config, 3)
    for t in range(steps):
        envs.step(act(t))
    start = envs.snapshot()
    resumed, _ = environments.make(config, 3, start=start)
    for t in range(steps, steps + 9):
        one, other = envs.step(act(t)), resumed.step(act(t))
        for a, b in zip(one, other, strict=True):
            assert (a is None and b is None) or np.array_equal(a, b)
    envs.close()
    resumed.close()


def test_native_vector_environment_gives_the_scalar_environments_transitions() -> None:
    """CartPole's own vector environment against CartPole: the same states, the same actions, float rounding apart."""
    import gymnasium as gym

    config = Config("CartPole-v1", 4, "native")
    envs, _ = environments.make(config, 5)
    single = gym.make("CartPole-v1").unwrapped
    single.reset()
    random, ends = np.random.default_rng(0), 0
    for _ in range(200):
        state = envs.envs.unwrapped.state.copy()
        action = random.integers(0, 2, 4)
        step = envs.step(action)
        for i in np.flatnonzero(step.valid):
            single.state, single.steps_beyond_terminated = tuple(state[:, i]), None  # type: ignore[attr-defined]
            seen, reward, terminated, _, _ = single.step(int(action[i]))
            np.testing.assert_allclose(step.next_observation[i], seen, rtol=1e-5, atol=1e-6)
            assert (reward, terminated) == (step.reward[i], step.terminated[i])
            ends += terminated
        np.testing.assert_array_equal(step.observation, envs.envs.unwrapped.state.T.astype(np.float32))
    assert ends > 5


def test_what_a_native_vector_gave_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the vector uses the memory of its observations, rewards and ends again."""
    from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv

    def rows() -> list[Any]:
        envs, first = environments.make(Config("CartPole-v1", 4, "native"), 5)
        return [first, *(part for _ in range(40) for part in envs.step(np.ones(4, np.int64))[:5])]

    expected = [part.copy() for part in rows()]
    memory: dict[int, np.ndarray] = {}

    def again(place: int, given: np.ndarray) -> np.ndarray:
        memory.setdefault(place, given.copy())[:] = given
        return memory[place]

    step, reset = CartPoleVectorEnv.step, CartPoleVectorEnv.reset
    monkeypatch.setattr(
        CartPoleVectorEnv, "step",
        lambda envs, action: tuple(again(k, x) if k < 4 else x for k, x in enumerate(step(envs, action))),
    )  # fmt: skip
    monkeypatch.setattr(
        CartPoleVectorEnv, "reset", lambda envs, **given: (again(0, reset(envs, **given)[0]), {})
    )  # fmt: skip
    for one, other in zip(rows(), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_native_state_and_generator_come_back() -> None:
    config = Config("CartPole-v1", 4, "native")
    envs, _ = environments.make(config, 5)
    random = np.random.default_rng(0)
    for _ in range(57):
        envs.step(random.integers(0, 2, 4))
    resumed, _ = environments.make(config, 5, start=envs.snapshot())
    for _ in range(100):
        action = random.integers(0, 2, 4)
        for a, b in zip(envs.step(action), resumed.step(action), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_self_check_finds_who_forgets_and_who_does_not() -> None:
    assert episodes.replay_check(factory.Single(Config("Clock-v0"))) == (False, True)
    assert episodes.replay_check(factory.Single(Config("Forgetful-v0"))) == (True, True)
    assert episodes.replay_check(factory.Single(Config("BipedalWalker-v3"))) == (True, True)
    assert episodes.replay_check(factory.Single(Config("LunarLander-v3"))) == (False, True)


def test_returns_and_lengths_of_finished_episodes() -> None:
    world = rollout.begin(clock("next-step", end=5), PLAIN, 0)
    for _ in range(2):  # episodes go on over the border of rollouts
        _, world = rollout.collect(
            ExactNet(False),
            torch.zeros(1),
            world,
            9,
            torch.Generator().manual_seed(0),
            PLAIN,
            GAMMA,  # type: ignore
        )
    assert world.episodes == 9
    assert world.recent.tolist() == [[5.0, 5.0]] * 9
    world.envs.close()


def test_reward_normalisation_is_the_running_spread_of_the_discounted_return() -> None:
    config = normalization.Config(reward=True, reward_clip=100.0)
    space = worlds.BOX
    random = np.random.default_rng(0)
    reward = random.normal(3.0, 2.0, (2, 50))
    ended = random.random((2, 50)) < 0.1
    normalizer = normalization.start(space, 2, config)
    scaled = []
    for half in (slice(0, 25), slice(25, 50)):
        part, normalizer = normalization.rewards(
            normalizer, torch.from_numpy(reward[:, half]), torch.from_numpy(ended[:, half]), None, GAMMA, config
        )
        scaled.append(part.numpy())
    # by the definition, in plain loops
    seen, running = [], np.zeros(2)
    for t in range(50):
        running = GAMMA * running + reward[:, t]
        seen.append(running.copy())
        running[ended[:, t]] = 0
        if t == 24:
            np.testing.assert_allclose(scaled[0], reward[:, :25] / np.sqrt(np.var(seen) + 1e-8), rtol=1e-9)
    np.testing.assert_allclose(scaled[1], reward[:, 25:] / np.sqrt(np.var(seen) + 1e-8), rtol=1e-9)


def test_reset_rows_do_not_enter_observation_statistics() -> None:
    config = normalization.Config(observation=True)
    normalizer = normalization.start(worlds.BOX, 1, config)
    raw = torch.tensor([[[1.0, 0.0, 0.0], [1e6, 1e6, 1e6], [3.0, 0.0, 0.0]]])
    normalizer = normalization.observe(normalizer, raw, torch.tensor([[True, False, True]]))
    assert normalizer.observation[""].mean.tolist() == [2.0, 0.0, 0.0]
    seen = normalization.observation(normalizer, torch.tensor([[3.0, 0.0, 0.0]]), config)
    assert torch.allclose(seen, torch.tensor([[1.0, 0.0, 0.0]]))
