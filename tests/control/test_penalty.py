"""PPO's KL penalty: the objective by hand, its gradient at π_old, both rules, and what β does to a step."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.control.test_ppo import QUIET, first_batch, small
from upslope.control import environments, learner, optimizers, penalty, ppo
from upslope.runs import metrics
from upslope.runs.run import Run

SYNC = environments.Config("CartPole-v1", 4, "sync")  # no reset rows


def test_the_objective_by_hand_in_numpy() -> None:
    """ρΨ - β k3 with k3 = ρ - 1 - log ρ, whose mean over actions of π_old is KL[π_old || π_θ]; no clip anywhere."""
    config = small(
        "CartPole-v1", environment=SYNC, kl_penalty=penalty.Config(coef=3.0), value_coef=0.0, entropy_coef=0.0
    )  # fmt: skip
    state, net, batch = first_batch(config)
    shaken = state.theta + 0.3 * torch.randn(state.theta.shape, generator=torch.Generator().manual_seed(0))
    total, part = ppo.objective(shaken, net, batch, config, beta=2.0)
    change = (part.logp - batch.logp_old).detach().double().numpy()
    psi = batch.psi.double().numpy()
    psi = (psi - psi.mean()) / (psi.std(ddof=1) + 1e-8)
    assert (np.exp(change) > 1.2).any()
    expected = (np.exp(change) * psi - 2.0 * (np.exp(change) - 1 - change)).mean()
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_the_estimated_kl_has_the_exact_ones_gradient() -> None:
    """Summed over all actions with π_old's weights, k3's value and gradient are those of the exact KL[π_old || π_θ]."""
    old = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    logits = torch.tensor([0.1, -0.4, 0.9], dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(-1)
    each = penalty.surrogate(logp, old, torch.zeros(3, dtype=torch.float64), beta=1.0)
    estimate = -(old.exp() * each).sum()
    exact = (old.exp() * (old - logp)).sum()
    torch.testing.assert_close(estimate, exact)
    (one,) = torch.autograd.grad(estimate, logits, retain_graph=True)
    (other,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("rule", "kl", "factor"),
    [
        ("modular-rl", 0.0131, 1.5), ("modular-rl", 0.0129, 1.0), ("modular-rl", 0.0069, 1 / 1.5),
        ("paper", 0.0151, 2.0), ("paper", 0.0149, 1.0), ("paper", 0.0066, 0.5),
        ("lecture", 0.0151, 1.5), ("lecture", 0.0067, 1.0), ("lecture", 0.0066, 1 / 1.5),
        ("fixed", 9.0, 1.0),
    ],
)  # fmt: skip
def test_rules(rule: str, kl: float, factor: float) -> None:
    config = penalty.Config(coef=0.4, rule=rule, target=0.01)  # type: ignore[arg-type]
    assert penalty.adapted(config, 0.8, kl)["kl_coef"] == pytest.approx(0.8 * factor)


def test_without_a_penalty_nothing_is_remembered() -> None:
    assert penalty.adapted(penalty.Config(), 0.0, 1.0) == {}


def test_a_larger_beta_moves_the_policy_less() -> None:
    moved = []
    for coef in (0.1, 10.0, 1000.0):
        config = small(
            "CartPole-v1", kl_penalty=penalty.Config(coef=coef), num_epochs=20, optimizer=optimizers.Adam(2e-3),
            anneal_learning_rate=False, value_coef=0.0, entropy_coef=0.0,
        )  # fmt: skip
        state, net, batch = first_batch(config)
        moved.append(ppo.update(state, net, batch, config)[2]["kl"])
    assert moved[0] > 2 * moved[1] > 4 * moved[2]


def test_beta_follows_its_target_and_is_resumed(tmp_path: Path) -> None:
    """A target far above what updates reach halves β every iteration; a resumed run goes on from where β was."""
    config = small(
        "CartPole-v1", environment=SYNC, kl_penalty=penalty.Config(1.0, "paper", target=10.0), total_steps=640,
        run=replace(QUIET, run_dir=tmp_path / "run", checkpoint_seconds=0.0),
    )  # fmt: skip
    ppo.train(config)
    assert [row["kl_coef"] for row in metrics.read(tmp_path / "run")] == [0.5**i for i in range(1, 6)]
    longer = replace(config, total_steps=768)
    (tmp_path / "run" / "summary.json").unlink()
    session = Run.resume(tmp_path / "run", "ppo", longer, longer.total_steps)
    state, _ = learner.start(longer, session)
    assert state.remembered == {"kl_coef": 0.5**5}
    state.world.envs.close()


@pytest.mark.parametrize("rule", ["fixed", "modular-rl", "paper", "lecture"])
def test_learns_cartpole(rule: str) -> None:
    config = replace(
        ppo.PPO(), kl_penalty=penalty.Config(coef=1.0, rule=rule, target=0.01), total_steps=30_000, entropy_coef=0.0,  # type: ignore
        anneal_learning_rate=False, optimizer=optimizers.Adam(1e-3), run=QUIET,
    )  # fmt: skip
    assert ppo.train(config).evaluate(20).summary()["mean_return"] >= 100


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"coef is -1.0, allowed: 0 or more"):
        penalty.Config(coef=-1.0)
    with pytest.raises(ValueError, match=r"target is 0.0, allowed"):
        penalty.Config(target=0.0)
    with pytest.raises(ValueError, match=r"kl_penalty.rule 'paper' needs kl_penalty.coef above 0"):
        penalty.Config(rule="paper")
