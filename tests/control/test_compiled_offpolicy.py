"""Gradient steps of the off-policy algorithms as programs: equal to the eager ones, and resumed to the bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from upslope.control import (
    action_noise,
    actors,
    ahead,
    ddpg,
    dqn,
    environments,
    normalization,
    offpolicy,
    offpolicy_program,
    qnetworks,
    sac,
    soft_q,
    td3,
)
from upslope.control.offpolicy import State
from upslope.runs import checkpoint
from upslope.runs import run as runs
from upslope.runs.run import Run

pytestmark = pytest.mark.slow
SMALL = {"total_steps": 60, "learning_starts": 20, "replay_capacity": 200, "batch_size": 16}
STOCHASTIC, CRITICS = actors.Stochastic(hidden=(16, 16)), actors.Config(hidden=(16, 16))
GRIDS = environments.Config("CartPole-v1", 2, "sync")
LONE = environments.Config("CartPole-v1", 1, "sync", autoreset="next-step")
ROUGH = replace(STOCHASTIC, state_dependent_noise=True)
WANDERING = action_noise.Config("ornstein-uhlenbeck", std=0.5)
NORMALIZED = normalization.Config(observation=True)
PENDULUM = environments.Config("Pendulum-v1", 2, "sync")
CONFIGS: dict[str, tuple[Any, Any]] = {
    "sac": (sac, sac.SAC(PENDULUM, STOCHASTIC, anneal_learning_rate=True, **SMALL)),  # type: ignore[arg-type]
    "sac with V": (sac, sac.SAC(PENDULUM, ROUGH, value_network=True, learn_alpha=False, **SMALL)),  # type: ignore[arg-type]
    "td3": (td3, td3.TD3(PENDULUM, CRITICS, **SMALL)),  # type: ignore[arg-type]
    "ddpg": (ddpg, ddpg.DDPG(PENDULUM, CRITICS, noise=WANDERING, **SMALL)),  # type: ignore[arg-type]
    "soft-q": (
        soft_q,
        soft_q.SoftQ(GRIDS, qnetworks.Boltzmann((16,)), NORMALIZED, train_interval=1, target_interval=10, **SMALL),  # type: ignore[arg-type]
    ),
    "dqn, a step at a time": (
        dqn,
        dqn.DQN(LONE, qnetworks.Config((16,)), train_interval=1, gradient_steps=None, target_interval=10, **SMALL),  # type: ignore[arg-type]
    ),
    "dqn": (
        dqn,
        dqn.DQN(
            GRIDS, qnetworks.Config((16,), dueling=True, noisy="factorised"), n_step=2, double=True,
            priority_exponent=0.6, target_interval=10, **SMALL,  # type: ignore[arg-type]
        ),
    ),
}  # fmt: skip


def trained(module: Any, config: Any, compile: bool, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Everything that a run of this kind ends with, and what an eager one would do next."""
    ends: list[dict[str, torch.Tensor]] = []
    choices: list[offpolicy.Choose] = []

    def finish(session: Run, state: State, net: Any, config: Any) -> None:
        ends.append(offpolicy.pack(state))
        if not compile:
            world = state.world
            seen = offpolicy.sight(world, world.observation, config)
            ends[0]["action"] = choices[0](state, seen, 0).detach()

    def choosing(act: offpolicy.Act, behaviour: offpolicy.Behaviour, original: Any = offpolicy.choosing) -> Any:
        choices.append(original(act, behaviour))
        return choices[0]

    with monkeypatch.context() as patch:
        patch.setattr(offpolicy, "finish", finish)
        patch.setattr(offpolicy, "choosing", choosing)
        module.train(replace(config, run=runs.Config(quiet=True, compile=compile)))
    return ends[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_and_eager_runs_agree(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And a compiled run is resumed to the bit."""
    module, config = CONFIGS[name]
    eager, compiled = (trained(module, config, compile, monkeypatch) for compile in (False, True))
    assert ("action" in compiled) == (config.train_interval == 1)
    assert eager.keys() - {"action"} == compiled.keys() - {"action"}
    moved = [key for key in compiled if key.startswith(("theta", "others", "optimizers", "action"))]
    for key in moved:
        torch.testing.assert_close(compiled[key], eager[key], rtol=1e-4, atol=1e-5, msg=lambda text: f"{key}: {text}")
    start = trained(module, replace(config, total_steps=20), False, monkeypatch)
    assert not torch.allclose(start["theta"], eager["theta"], atol=1e-3)  # there was something to agree on
    is_resumed_to_the_bit(module, config, monkeypatch, tmp_path)


def is_resumed_to_the_bit(module: Any, config: Any, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """By the programs that there are already, which are found and not made again."""
    algorithm = {soft_q: "soft-q"}.get(module, module.__name__.rpartition(".")[-1])

    def run(name: str) -> Any:
        return replace(config, total_steps=80, run=runs.Config(run_dir=directory / name, quiet=True, compile=True))

    def report(session: Run, state: State, net: Any, *given: Any) -> None:
        if state.step >= 50:
            offpolicy._save(session, state, net)
            raise InterruptedError

    monkeypatch.setattr(ahead, "_make", None)
    module.train(run("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(offpolicy, "report", report)
        with pytest.raises(InterruptedError):
            module.train(run("cut"))
    module.train(run("cut"), Run.resume(directory / "cut", algorithm, run("cut"), 80))
    ends = [checkpoint.newest(directory / name / "checkpoints") for name in ("whole", "cut")]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].tensors.keys() == ends[1].tensors.keys()
    for key, part in ends[0].tensors.items():
        assert torch.equal(part, ends[1].tensors[key]), key


def test_a_gradient_that_is_not_finite_stops_a_compiled_run() -> None:
    config = CONFIGS["ddpg"][1]
    with Run("ddpg", replace(config, run=runs.Config(quiet=True)), 1) as session:
        state, nets = ddpg.begin(config, session)
        state = offpolicy.collect(lambda state, observation, t: torch.zeros(2, 1), state, config, 20)
        state = offpolicy.advance(state, 0)
        state.replay.reward[:] = torch.nan
        drawn = offpolicy.draw(state, config, offpolicy.chances(config).at(0)[0])
        step = offpolicy_program.compiled(ddpg.learn, nets, config)
        with pytest.raises(ValueError, match="grad_norm is nan"):
            step(state, nets, drawn, None, config)
