"""Two real ranks under `torchrun`: one θ, one checkpoint, exact resume; and the collectives by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from upslope.runs import checkpoint, distributed, metrics
from upslope.runs.run import CHECKPOINTS

TRAIN = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from upslope.control import environments, normalization, ppo
from upslope.control.ppo import PPO
from upslope.runs import distributed, run as runs

directory, steps = Path(sys.argv[1]), int(sys.argv[2])
config = PPO(
    environment=environments.Config(sys.argv[3], 2, "sync"),
    normalize=normalization.Config(observation=True, reward=True),
    run=runs.Config(run_dir=directory, checkpoint_seconds=0, quiet=True),
    total_steps=512, rollout_length=32, num_epochs=2, minibatch_size=32, anneal_learning_rate=False,
)
session = runs.Run.resume(directory, "ppo", config, 512) if (directory / "config.json").exists() else None
agent = ppo.train(replace(config, total_steps=steps), session)
every = distributed.everyones(agent.theta)
assert all(torch.equal(every[0], theta) for theta in every), "the ranks disagree about theta"
mean = agent.normalizer.observation[""].mean
assert all(torch.equal(mean, other) for other in distributed.everyones(mean)), "the ranks disagree about the statistics"
distributed.leave()
"""


def torchrun(script: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [*command, str(script), *arguments], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_ranks_train_one_theta_and_resume_exactly(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    torchrun(script, str(whole), "512", "Pendulum-v1")
    torchrun(script, str(halves), "256", "Pendulum-v1")
    (halves / "summary.json").unlink()
    torchrun(script, str(halves), "512", "Pendulum-v1")
    ends = [checkpoint.newest(directory / CHECKPOINTS) for directory in (whole, halves)]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].step == ends[1].step == 512  # 2 ranks × 2 environments × 32 steps × 4 iterations
    worlds = [distributed.own("world", ends[0].tensors, rank) for rank in (0, 1)]
    assert not torch.equal(worlds[0]["environments.actions"], worlds[1]["environments.actions"])
    assert checkpoint.fingerprint(ends[0].tensors) == checkpoint.fingerprint(ends[1].tensors)
    assert [row["step"] for row in metrics.read(halves)] == [128, 256, 384, 512]


def test_alone_everything_is_the_identity() -> None:
    x = torch.tensor([1.0, 2.0])
    assert distributed.average_(x).tolist() == [1.0, 2.0]
    assert [part.tolist() for part in distributed.everyones(x)] == [[1.0, 2.0]]
    assert distributed.agreed(True)
    collected = distributed.collected("world", {"x": x})
    assert torch.equal(distributed.own("world", collected)["x"], x)
    with pytest.raises(ValueError, match="as many ranks"):
        distributed.own("world", collected, of_rank=3)
