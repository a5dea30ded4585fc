"""What a user is told when an environment, a setting or the disk is at fault."""

import dataclasses
import errno
import logging
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.control import faulty
from tests.control.faulty import LENGTH, OBSERVATION, RAISE, RESET, REWARD
from upslope.control import agent, environments, factory, networks, normalization, ppo, presets
from upslope.control.environments import Config
from upslope.control.ppo import PPO
from upslope.runs import checkpoint
from upslope.runs import run as runs
from upslope.runs.run import Run

PENDULUM = Config("Pendulum-v1", 2, "sync")
FAULTY = "tests.control.faulty:Faulty-v0"
MODES = [("sync", "disabled"), ("sync", "same-step"), ("sync", "next-step"), ("async", "disabled"),
         ("async", "same-step"), ("async", "next-step")]  # fmt: skip


@pytest.fixture
def made(request: pytest.FixtureRequest) -> Iterator[Any]:
    opened: list[environments.Environments] = []

    def make(vectorization: str, autoreset: str, num_envs: int = 3, **kwargs: Any) -> environments.Environments:
        config = Config(FAULTY, num_envs, vectorization, autoreset, kwargs=kwargs)  # type: ignore[arg-type]
        opened.append(environments.make(config, seed=7)[0])
        return opened[-1]

    yield make
    for envs in opened:
        envs.envs.close(**({"terminate": True} if hasattr(envs.envs, "processes") else {}))


def play(envs: environments.Environments, index: int, until: tuple[int, int]) -> None:
    """Harmless steps until environment `index` has taken `until` = (episode, steps of it)."""
    reset_row = False
    while (int(envs.episode[index]), int(envs.length[index])) != until or reset_row:
        step = envs.step(np.zeros(envs.num_envs, dtype=np.int64))
        reset_row = step.valid is not None and bool(step.ended[index])  # the next row only resets


def act(envs: environments.Environments, index: int, action: int) -> None:
    actions = np.zeros(envs.num_envs, dtype=np.int64)
    actions[index] = action
    envs.step(actions)


def seeds(envs: environments.Environments, index: int) -> list[int]:
    """What the environment's `reset` was really given."""
    return envs.envs.get_attr("seeds")[index]  # type: ignore[attr-defined]


# Numbers that are none


@pytest.mark.parametrize(("vectorization", "autoreset"), MODES)
@pytest.mark.parametrize("fault", [OBSERVATION, REWARD])
@pytest.mark.parametrize("step", [1, 3, LENGTH])  # the first, one in the middle, and the one that ends the episode
def test_non_finite_numbers_are_located(made: Any, vectorization: str, autoreset: str, fault: int, step: int) -> None:
    value = math.nan if fault == OBSERVATION else -math.inf
    envs = made(vectorization, autoreset, value=value)
    play(envs, 1, (2, step - 1))
    with pytest.raises(ValueError, match="NaN or infinite") as caught:
        act(envs, 1, fault)
    said = str(caught.value)
    assert (
        f"{'observation' if fault == OBSERVATION else 'reward'} in environment 1 at step {step} of its episode 2"
        in said
    )
    assert f"seed {seeds(envs, 1)[2]})" in said
    assert FAULTY in said


@pytest.mark.parametrize(("vectorization", "autoreset"), MODES)
def test_a_non_finite_first_observation_is_located(made: Any, vectorization: str, autoreset: str) -> None:
    envs = made(vectorization, autoreset)
    play(envs, 2, (1, LENGTH - 1))

    def end_and_go_on() -> None:
        act(envs, 2, RESET)  # ends episode 1
        act(envs, 2, 0)  # where the reset has a row of its own

    with pytest.raises(ValueError, match="NaN or infinite observation in environment 2 ") as caught:
        end_and_go_on()
    assert "at the reset of its episode 2" in str(caught.value)
    assert f"seed {seeds(envs, 2)[2]})" in str(caught.value)


@pytest.mark.parametrize("fault", [OBSERVATION, REWARD])
def test_non_finite_numbers_of_a_native_vector_are_located(fault: int) -> None:
    config = Config("tests.control.faulty:FaultyVector-v0", 4, "native")
    envs, _ = environments.make(config, seed=7)
    play(envs, 3, (0, 6))
    with pytest.raises(ValueError, match="NaN or infinite") as caught:
        act(envs, 3, fault)
    assert "in environment 3 at step 7 of its episode 0 (run seed 7)" in str(caught.value)


def test_large_numbers_are_none_of_these(made: Any) -> None:
    envs = made("sync", "disabled", value=3e38)  # two of them overflow a float32 sum
    act(envs, 0, OBSERVATION)
    envs.step(np.full(3, OBSERVATION))


def small(environment: Config, directory: Path, **changes: Any) -> PPO:
    return dataclasses.replace(
        PPO(
            environment=environment,
            network=networks.Config(hidden=(8,)),
            normalize=normalization.Config(observation=True),
            run=runs.Config(run_dir=directory, quiet=True, checkpoint_seconds=0.0),
            total_steps=64 * 8,
            rollout_length=32,
            minibatch_size=32,
            num_epochs=1,
        ),
        **changes,
    )


@pytest.mark.parametrize("fault", [OBSERVATION, REWARD, RAISE], ids=["observation", "reward", "raise"])
def test_the_last_good_checkpoint_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int) -> None:
    monkeypatch.setattr(faulty.Faulty, "count", 0)
    environment = Config(FAULTY, 2, "sync", kwargs={"after": 10**9, "fault": fault})
    config = small(environment, tmp_path / "run")
    real = environments.Environments.step
    calls = 0

    def step(self: environments.Environments, action: np.ndarray) -> Any:
        nonlocal calls
        calls += 1
        if calls == 32 * 3 + 5:  # in the fourth rollout
            for env in self.envs.envs:  # type: ignore[attr-defined]
                env.unwrapped.after = faulty.Faulty.count + 2  # in the second environment
        return real(self, action)

    with monkeypatch.context() as patch:
        patch.setattr(environments.Environments, "step", step)
        with pytest.raises(RuntimeError if fault == RAISE else ValueError) as caught:
            ppo.train(config)
    said = str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))
    assert "environment 1" in said
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [128, 192]
    assert not (tmp_path / "run" / "summary.json").exists()
    trained = agent.load(config, tmp_path / "run")
    assert np.isfinite(trained.evaluate(episodes=2).returns).all()
    resumed = ppo.train(config, Run.resume(tmp_path / "run", "ppo", config, config.total_steps))
    assert np.isfinite(resumed.theta.numpy()).all()
    assert (tmp_path / "run" / "summary.json").exists()


# An environment that raises


def test_an_environment_that_raises_says_where(made: Any) -> None:
    envs = made("sync", "disabled")
    play(envs, 2, (1, 2))
    with pytest.raises(RuntimeError, match="the simulator fell over") as caught:
        act(envs, 2, RAISE)
    note = "\n".join(caught.value.__notes__)
    for part in ("environment 2", "Faulty-v0", "episode 1", f"seed {seeds(envs, 2)[1]}", "step 3", "action"):
        assert part in note
    assert re.search(rf"action \S*{RAISE}\b", note)
    assert any(entry.name == "step" and entry.path.name == "faulty.py" for entry in caught.traceback)


def test_a_worker_that_raises_says_where(made: Any, recwarn: pytest.WarningsRecorder) -> None:
    envs = made("async", "disabled")
    play(envs, 2, (1, 2))
    with pytest.raises(RuntimeError, match="the simulator fell over") as caught:
        act(envs, 2, RAISE)
    said = "\n".join(getattr(caught.value, "__notes__", ()))
    for part in ("environment 2", "Faulty-v0", "episode 1", "reset seed", "step 3", "action"):
        assert part in said
    assert any("faulty.py" in str(warning.message) for warning in recwarn)  # the worker's own traceback


# Settings


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("CartPole-v2", "CartPole-v1"), ("cartpole-v1", "CartPole-v1"), ("LunarLandr-v3", "LunarLander-v3"),
     ("Pendulm-v1", "Pendulum-v1"), ("HalfCheeta-v5", "HalfCheetah-v5")],
)  # fmt: skip
def test_an_unknown_id_is_answered_with_the_nearest(asked: str, meant: str) -> None:
    with pytest.raises(ValueError, match="is not a registered Gymnasium environment") as caught:
        environments.make(Config(asked, 1), seed=1)
    assert repr(asked) in str(caught.value)
    assert meant in str(caught.value)


def test_an_id_like_no_other() -> None:
    with pytest.raises(ValueError, match=r"'qqqqqqqq' is not a registered Gymnasium environment$"):
        factory.register("qqqqqqqq")


def test_an_id_of_a_module_that_is_missing() -> None:
    with pytest.raises(ValueError, match=r"'nowhere\.at\.all:Id-v0'.*No module named 'nowhere'"):
        factory.register("nowhere.at.all:Id-v0")


@pytest.mark.parametrize(
    ("environment", "module", "said"),
    [("ALE/Pong-v5", "ale_py", r"pip install 'upslope\[atari\]'"), ("LunarLander-v3", "Box2D", "box2d"),
     ("HalfCheetah-v5", "mujoco", "mujoco")],
)  # fmt: skip
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, environment: str, module: str, said: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d") or "mujoco" in name]:
        if name != module:
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=said) as caught:
        environments.make(Config(environment, 1, "sync"), seed=1)
    assert environment in str(caught.value)


@pytest.mark.parametrize("observation", ["tuple", "text", "graph", "sequence", "dict of tuple"])
def test_observations_that_are_not_supported(tmp_path: Path, observation: str) -> None:
    space = faulty.SPACES[observation]
    with pytest.raises(ValueError, match=r"observation space .* is not supported; allowed: Box"):
        networks.encoder(space, 8)
    environment = Config("tests.control.faulty:Odd-v0", 2, "sync", kwargs={"observation": observation})
    with pytest.raises(ValueError, match=r"observation space .* is not supported"):
        ppo.train(small(environment, tmp_path / "run"))
    assert not (tmp_path / "run").exists(), "the next attempt would be told that the directory exists"


def test_pictures_that_are_too_small(tmp_path: Path) -> None:
    environment = Config("tests.control.faulty:Odd-v0", 2, "sync", kwargs={"observation": "small picture"})
    with pytest.raises(ValueError, match="smaller than 36 × 36 pixels"):
        ppo.train(small(environment, tmp_path / "run"))


@pytest.mark.parametrize("action", ["tuple", "text", "integers", "matrix of choices", "dict"])
def test_actions_that_are_not_supported(tmp_path: Path, action: str) -> None:
    environment = Config("tests.control.faulty:Odd-v0", 2, "sync", kwargs={"action": action})
    with pytest.raises(ValueError, match=r"(?s)action space .* is not supported; allowed: Discrete"):
        ppo.train(small(environment, tmp_path / "run"))
    assert not (tmp_path / "run").exists(), "the next attempt would be told that the directory exists"


def test_a_minibatch_larger_than_the_rollout() -> None:
    with pytest.raises(ValueError, match=re.escape("minibatch_size is 65")) as caught:
        PPO(environment=Config(num_envs=4), rollout_length=16, minibatch_size=65)
    assert "16" in str(caught.value)
    assert "4" in str(caught.value)
    assert "64 transitions" in str(caught.value)
    PPO(environment=Config(num_envs=4), rollout_length=16, minibatch_size=64)


@pytest.mark.parametrize(
    "changes",
    [{"gamma": 1.1}, {"gamma": math.nan}, {"gae_lambda": -0.1}, {"total_steps": 0}, {"rollout_length": 0},
     {"num_epochs": 0}, {"minibatch_size": 0}],
)  # fmt: skip
def test_settings_out_of_range(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} is .*, allowed: "):
        dataclasses.replace(presets.PPO_PRESETS["CartPole-v1"], **changes)


def test_modes_that_an_environment_lacks() -> None:
    with pytest.raises(ValueError, match="Pendulum-v1 has no vector entry point"):
        environments.make(Config("Pendulum-v1", 2, "native"), seed=1)
    with pytest.raises(ValueError, match=r"num_envs is 0, allowed: 1 or more"):
        Config("Pendulum-v1", 0)


# The disk


@pytest.mark.parametrize("small_disk", [192], indirect=True)
def test_a_disk_that_fills_up_during_a_run(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(PENDULUM, small_disk / "run", total_steps=64 * 6)
    save, saves = Run.save, 0

    def fill(self: Run, *arguments: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 3:
            with open(small_disk / "ballast", "wb", buffering=0) as ballast:
                try:
                    while True:
                        ballast.write(bytes(4096))
                except OSError as error:
                    assert error.errno == errno.ENOSPC  # noqa: PT017
        save(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", fill)
        with pytest.raises(OSError) as caught:
            ppo.train(config)
    assert caught.value.errno == errno.ENOSPC
    assert "checkpoint at step 192 was not written" in str(caught.value)
    assert "the last good one is kept" in str(caught.value)
    checkpoints = small_disk / "run" / "checkpoints"
    assert checkpoint.steps(checkpoints) == [64, 128]
    assert not list(checkpoints.glob(".partial-*"))
    (small_disk / "ballast").unlink()
    ppo.train(config, Run.resume(small_disk / "run", "ppo", config, config.total_steps))
    whole = small(PENDULUM, small_disk.parent / "whole", total_steps=64 * 6)
    ppo.train(whole)
    ends = [checkpoint.newest(path / "checkpoints") for path in (small_disk / "run", small_disk.parent / "whole")]
    assert ends[0] is not None
    assert ends[1] is not None
    assert checkpoint.fingerprint(ends[0].tensors) == checkpoint.fingerprint(ends[1].tensors)


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small(PENDULUM, tmp_path / "run")
    ppo.train(config)
    checkpoints = tmp_path / "run" / "checkpoints"
    (tmp_path / "run" / "summary.json").unlink()
    last = checkpoint.newest(checkpoints)
    assert last is not None
    payload = checkpoints / str(last.step) / "tensors.safetensors"
    payload.write_bytes(payload.read_bytes()[:-1] + b"?")
    with caplog.at_level(logging.WARNING):
        ppo.train(config, Run.resume(tmp_path / "run", "ppo", config, config.total_steps))
    assert any("damaged checkpoint, falling back" in record.getMessage() for record in caplog.records)
    again = checkpoint.newest(checkpoints)
    assert again is not None
    assert checkpoint.fingerprint(again.tensors) == checkpoint.fingerprint(last.tensors)


def test_a_nan_action_is_the_policys_fault() -> None:
    envs, _ = environments.make(Config("Pendulum-v1", 2, "sync"), 0)
    with pytest.raises(ValueError, match="the policy gave a NaN or infinite action for environment 1"):
        envs.step(np.array([[0.0], [math.nan]], np.float32))
    envs.close()


def test_fire_is_pressed_after_every_lost_life() -> None:
    """Also after an extra life: 3, 4, 3 lives."""
    import gymnasium as gym

    from upslope.control.atari import FireReset

    pressed: list[int] = []

    class Game(gym.Env):
        observation_space, action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(4)

        def reset(self, **_: Any) -> tuple[int, dict[str, Any]]:
            self.lives = iter([3, 4, 3, 3, 3])
            return 0, {}

        def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
            pressed.append(action)
            return 0, 0.0, False, False, {"lives": next(self.lives)}

    game = FireReset(Game())
    game.reset()
    for _ in range(3):
        game.step(2)
    assert pressed == [1, 2, 2, 1, 2]
