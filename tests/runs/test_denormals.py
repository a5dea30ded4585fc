"""Denormal numbers are zero while a run trains, and only then."""

from pathlib import Path

import pytest
import torch

from tests.runs.test_run import settings
from upslope.control import optimizers
from upslope.runs import denormals
from upslope.runs.run import Run

SMALL = 1e-40  # float32's smallest number with all its digits is 1.2e-38


def product() -> float:
    return float(torch.tensor(SMALL) * 1)


def mean_of_a_gradient_that_stays_zero(steps: int) -> float:
    theta = torch.zeros(1)
    adam = optimizers.Adam(1e-3)
    memory = adam.start(theta)
    for step in range(steps):
        _, memory = adam.ascend(theta, memory, torch.zeros(1) if step else torch.ones(1), 1e-3)
    return float(memory.memory[0])


def test_they_are_zero_in_a_run_and_not_after_it(tmp_path: Path) -> None:
    assert product() > 0
    with Run("ppo", settings(tmp_path / "run"), 1):
        assert product() == 0
    assert product() > 0


def test_they_come_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Run("ppo", settings(None), 1):
        raise KeyError
    assert product() > 0


def test_who_had_them_flushed_keeps_them_so() -> None:
    torch.set_flush_denormal(True)
    try:
        with denormals.flushed():
            assert product() == 0
        assert product() == 0
    finally:
        torch.set_flush_denormal(False)


def test_numbers_with_all_their_digits_stay() -> None:
    tiny = torch.tensor(torch.finfo(torch.float32).tiny)
    with denormals.flushed():
        assert float(tiny * 1) == float(tiny)


def test_without_it_adams_mean_of_nothing_stays_denormal_for_ever() -> None:
    assert 0 < mean_of_a_gradient_that_stays_zero(3000) < torch.finfo(torch.float32).tiny
    with denormals.flushed():
        assert mean_of_a_gradient_that_stays_zero(3000) == 0
