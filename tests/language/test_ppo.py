"""PPO for language models: rewards, advantages and targets token by token by hand; exact gradients; splits; a run."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.language import nets
from tests.language.test_objectives import PROMPT, PROMPTS, exact_gradient, exact_policy_gradient, pairs, rewards_of
from upslope.language import learner, models, ppo, rollout
from upslope.language.generation import Sampling
from upslope.language.learner import AdamW
from upslope.language.models import Model, Scorer
from upslope.language.ppo import PPO
from upslope.language.rollout import Rollout
from upslope.runs import run as runs


def critic(seed: int = 2) -> Scorer:
    """A critic with an opinion, in float64."""
    torch.manual_seed(seed)
    return Scorer(nets.tabular(seed).network, 8, 0.7).double()


def settings(**changes: Any) -> PPO:
    config = PPO(sampling=Sampling(nets.LENGTH), whiten_advantages=False, kl_coef=0.3, run=runs.Config(seed=1))
    return dataclasses.replace(config, **changes)


def by_hand(data: Rollout, model: Model, other: Model, judge: Scorer, config: PPO, beta: float) -> tuple[Any, Any]:
    """Ψ and targets by loops over NumPy numbers, each value from a forward pass of its own."""
    psis, targets = [], []
    for prompt, completion, finished, reward in zip(
        data.prompts, data.completions, data.finished, data.reward.tolist(), strict=True
    ):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logp, logp_ref = (each.network(ids).logits[0].log_softmax(-1) for each in (model, other))
            everything = torch.ones_like(ids, dtype=torch.bool)
            value = judge(rollout.Sequences(ids, everything, everything, torch.arange(ids.shape[1])[None]))[0].numpy()
        first, count = len(prompt), len(completion)
        v = [value[first - 1 + t] for t in range(count + 1)]
        r = [-beta * float(logp[first - 1 + t, c] - logp_ref[first - 1 + t, c]) for t, c in enumerate(completion)]
        r[-1] += reward
        if bool(finished) or config.truncated != "bootstrap":
            v[count] = 0.0
        psi, running = np.zeros(count), 0.0
        lam = 1 - 1 / max(1.0, config.length_adaptive * count) if config.length_adaptive else config.gae_lambda
        for t in reversed(range(count)):
            running = r[t] + config.gamma * v[t + 1] - v[t] + config.gamma * lam * running
            psi[t] = running
        psis.append(psi)
        target, running = np.zeros(count), 0.0
        lam = lam if config.critic_lambda is None else config.critic_lambda
        for t in reversed(range(count)):
            running = r[t] + config.gamma * v[t + 1] - v[t] + config.gamma * lam * running
            target[t] = v[t] + running
        targets.append(target)
    return psis, targets


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"gae_lambda": 1.0}, {"gamma": 0.9, "gae_lambda": 0.0}, {"truncated": "bootstrap"}, {"kl_coef": 0.0},
        {"length_adaptive": 0.9, "critic_lambda": 1.0},
    ],
)  # fmt: skip
def test_every_token_by_hand(changes: dict[str, Any]) -> None:
    model, other, judge = nets.tabular(0), nets.tabular(1), critic()
    data, _ = pairs(model)
    data = rollout.pick(data, list(range(0, 450, 7)))
    config = settings(**changes)
    source = rollout.Source(model, [], [], None)  # type: ignore[arg-type]
    given = ppo.estimate(data, source, judge, other.network, config.kl_coef, config)
    psis, targets = by_hand(data, model, other, judge, config, config.kl_coef)
    for i, (psi, target) in enumerate(zip(psis, targets, strict=True)):
        np.testing.assert_allclose(given.psi[i, : len(psi)], psi, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(given.value_target[i, : len(psi)], target, rtol=1e-9, atol=1e-10)


def test_a_cut_completion_is_masked_where_that_is_asked_for() -> None:
    model, judge = nets.tabular(0), critic()
    data = rollout.pick(pairs(model)[0], list(range(30)))
    source = rollout.Source(model, [], [], None)  # type: ignore[arg-type]
    given = ppo.estimate(data, source, judge, None, 0.0, settings(truncated="mask", kl_coef=0.0))
    assert bool((given.counted.any(1) == data.finished).all())
    assert not bool(data.finished.all())


@pytest.mark.parametrize("lam", [1.0, 0.5, 0.0])
def test_with_one_step_the_gradient_is_exact_where_the_critic_is(lam: float) -> None:
    """λ = 1: any critic is a baseline, E[gradient] = ∇J. λ < 1 with another critic than V^π: biased, and it shows."""
    model, other, judge = nets.tabular(0), nets.tabular(1), critic()
    data, p = pairs(model)
    config = settings(gae_lambda=lam, value_coef=0.0, clip_value=None)
    source = rollout.Source(model, [], [], None)  # type: ignore[arg-type]
    given = ppo.estimate(data, source, judge, other.network, config.kl_coef, config)
    weighted = given._replace(psi=given.psi * p.repeat_interleave(2).unsqueeze(1))
    trained = nn.ModuleDict({"policy": model.network, "critic": judge})
    total = torch.zeros(())
    for batch in rollout.batches(data, list(range(450)), model, 4096):
        total = total + ppo.objective(trained, batch, weighted, 2, 1, config)[0]
    ours = exact_gradient(model.network, total)
    with torch.no_grad():
        logp, logp_ref = (
            rollout.log_probs(each.network, data, model, config).sum(1) for each in (model, other)
        )  # fmt: skip
    kl = {tuple(c): float(a - b) for c, a, b in zip(data.completions, logp, logp_ref, strict=True)}
    exact = exact_policy_gradient(model, rewards_of() - 0.3 * np.array([kl[tuple(c)] for c in nets.COMPLETIONS]))
    if lam == 1:
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-11)
    else:
        assert float((ours - exact).norm() / exact.norm()) > 0.05
    assert data.prompts[0] == PROMPT


def test_the_entropy_bonus_climbs_the_entropy_of_the_states_that_are_met() -> None:
    """E[gradient of the bonus] = Σ over prefixes of p(prefix) ∇H(π(·|prefix)), by enumeration of all prefixes."""
    model, judge = nets.tabular(0), critic()
    data, p = pairs(model)
    source = rollout.Source(model, [], [], None)  # type: ignore[arg-type]
    with_bonus, without = (
        ppo.estimate(data, source, judge, None, 0.0, settings(kl_coef=0.0, entropy_coef=c)) for c in (0.7, 0.0)
    )
    psi = (with_bonus.psi - without.psi) * p.repeat_interleave(2).unsqueeze(1)
    config, trained = (
        settings(value_coef=0.0, clip_value=None),
        nn.ModuleDict({"policy": model.network, "critic": judge}),
    )
    total = torch.zeros(())
    for batch in rollout.batches(data, list(range(450)), model, 4096):
        total = total + ppo.objective(trained, batch, without._replace(psi=psi), 2, 1, config)[0]
    ours = exact_gradient(model.network, total)
    expected = torch.zeros(())
    for count in range(nets.LENGTH):
        for prefix in itertools.product((2, 3), repeat=count):  # an ended completion has no further tokens
            logits = model.network(torch.tensor([PROMPT + list(prefix)])).logits[0].log_softmax(-1)
            reached = sum(float(logits[len(PROMPT) - 1 + t, token].detach()) for t, token in enumerate(prefix))
            expected = expected - math.exp(reached) * (logits[-1].exp() * logits[-1]).sum()
    torch.testing.assert_close(ours, 0.7 * exact_gradient(model.network, expected), rtol=1e-8, atol=1e-11)


def test_the_gradient_does_not_depend_on_the_split() -> None:
    """Policy, critic, likelihood of successes and pretraining text: 1e-10 in float64."""
    gradients = []
    for tokens in (4096, 24, 1):
        model, other, judge = nets.tabular(0), nets.tabular(1), critic()
        config = settings(
            batch_size=3, group_size=3, num_epochs=1, minibatches=1, micro_batch_tokens=tokens, ptx_coef=0.4,
            nll_coef=0.2, optimizer=AdamW(learning_rate=1e-300, max_grad_norm=None),
        )  # fmt: skip
        judged = lambda completion_ids, **_: [float(sum(c)) - 4 for c in completion_ids]  # noqa: E731
        origin = rollout.Source(model, [{"prompt": "x"}] * 3, PROMPTS[:3], judged)
        data = rollout.collect(origin, config, 0, 3)
        given = ppo.estimate(data, origin, judge, other.network, 0.3, config)
        given = given._replace(logp_old=given.logp_old + 0.1 * data.response)  # ratios are not 1
        trained = nn.ModuleDict({"policy": model.network, "critic": judge})
        state = learner.State(trained, config.optimizer.build(models.trainable(trained).values()), 0, {})
        ppo.update(state, origin, data, given, config, (PROMPTS, [[2, 1], [3, 1], [1], [2, 2, 1], [3, 3, 1]]))
        gradients.append(torch.cat([q.grad.flatten() for q in trained.parameters() if q.grad is not None]))
    assert float(gradients[0].abs().max()) > 1e-3
    for each in gradients[1:]:
        torch.testing.assert_close(each, gradients[0], rtol=1e-9, atol=1e-10)


def test_while_the_critic_warms_up_the_policy_stays() -> None:
    model, judge = nets.tabular(0), critic()
    config = settings(batch_size=2, num_epochs=1, minibatches=1, kl_coef=0.0, critic_warmup=1, nll_coef=0.1)
    origin = rollout.Source(
        model, [{"prompt": "x"}] * 2, PROMPTS[:2], lambda completions, **_: [1.0] * len(completions)
    )
    trained = nn.ModuleDict({"policy": model.network, "critic": judge})
    for iteration, moves in ((0, False), (1, True)):
        before = [q.detach().clone() for q in model.network.parameters()]
        value = [q.detach().clone() for q in judge.parameters()]
        state = learner.State(trained, config.optimizer.build(models.trainable(trained).values()), iteration, {})
        data = rollout.collect(origin, config, iteration, 2)
        ppo.update(state, origin, data, ppo.estimate(data, origin, judge, None, 0.0, config), config)
        assert any(not torch.equal(a, b) for a, b in zip(before, model.network.parameters(), strict=True)) == moves
        assert any(not torch.equal(a, b) for a, b in zip(value, judge.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kl_target": 1.0, "kl_coef": 0.0}, "kl_coef is 0.0, allowed with kl_target: above 0"),
        ({"minibatches": 65}, "minibatches is 65, allowed: at most 64"),
        ({"gae_lambda": 1.5}, "gae_lambda is 1.5"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PPO(**changes)
