"""Losses and gradients of SFT, reward models, DPO, IPO and GRPO in float64: by hand, by enumeration, however split."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.language import nets
from upslope.language import batching, dpo, grpo, learner, models, presets, reinforce, reward_model, rollout, sft
from upslope.language.dpo import DPO
from upslope.language.generation import Sampling
from upslope.language.grpo import GRPO
from upslope.language.learner import AdamW
from upslope.language.models import Model
from upslope.language.reinforce import REINFORCE
from upslope.language.reward_model import RewardModel
from upslope.language.rollout import Rollout
from upslope.language.sft import SFT
from upslope.runs import run as runs

PROMPTS = [[2, 3], [3], [2, 2, 3], [3, 2], [2]]
ANSWERS = [[2, 3, 1], [1], [3, 3, 1], [2, 1], [3, 2, 1]]
OTHERS = [[3, 1], [2, 1], [1], [3, 3, 1], [2, 1]]


def gradient(network: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def plain_log_prob(network: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """Σ log π of a completion through Transformers' logits, one example, differentiable."""
    ids = torch.tensor([prompt + completion])
    logp = network(ids).logits[0].log_softmax(-1)
    return sum(logp[t - 1, ids[0, t]] for t in range(len(prompt), ids.shape[1]))  # type: ignore[return-value]


def exact_gradient(network: Any, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, [p for p in network.parameters() if p.requires_grad])
    return torch.cat([g.flatten() for g in found])


def ascended(model: Model, trained: torch.nn.Module, config: Any, step: Any) -> Tensor:
    """The gradient that an update leaves, the weights unmoved by a rate of almost 0."""
    small = dataclasses.replace(config, optimizer=AdamW(learning_rate=1e-300, max_grad_norm=None))
    state = learner.State(trained, small.optimizer.build(models.trainable(trained).values()), 0, {})
    step(state, small)
    return -gradient(trained)


def test_sft_by_hand() -> None:
    """- Σ log π / tokens, its gradient, and both however the batch is split, packed or padded: 1e-10."""
    model = nets.tabular()
    expected = sum(plain_log_prob(model.network, p, c) for p, c in zip(PROMPTS, ANSWERS, strict=True)) / 12
    exact = exact_gradient(model.network, expected)
    for changes in (
        {},
        {"micro_batch_tokens": 6},
        {"packing_length": 8},
        {"packing_length": 8, "micro_batch_tokens": 8},
    ):
        config = SFT(batch_size=5, **changes)
        parts, total = sft.batches(model, PROMPTS, ANSWERS, config)
        assert total == 12
        found: list[dict] = []
        ours = ascended(
            model, model.network, config,
            lambda state, small, parts=parts: found.append(sft.update(state, model, parts, 12, small)),
        )  # fmt: skip
        assert found[0]["objective"] == pytest.approx(float(expected), rel=1e-10)
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("loss", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0)])
def test_dpo_by_hand(loss: Any, smoothing: float) -> None:
    """-(1-e) log σ(m) - e log σ(-m), or (h - 1/2β)², m = βh, h the difference of log-ratios; split or not."""
    model, reference = nets.tabular(0), nets.tabular(1)
    h = torch.stack([
        plain_log_prob(model.network, p, a) - plain_log_prob(model.network, p, b)
        - plain_log_prob(reference.network, p, a).detach() + plain_log_prob(reference.network, p, b).detach()
        for p, a, b in zip(PROMPTS, ANSWERS, OTHERS, strict=True)
    ])  # fmt: skip
    m = 0.3 * h
    each = (h - 1 / 0.6).square() if loss == "ipo" else (
        -(1 - smoothing) * (1 / (1 + (-m).exp())).log() - smoothing * (1 / (1 + m.exp())).log()
    )  # fmt: skip
    exact = exact_gradient(model.network, -each.mean())
    data = (PROMPTS, ANSWERS, OTHERS)
    logp_ref = dpo.reference_log_probs(reference, data, DPO())
    for size in (5, 2, 1):
        config = DPO(beta=0.3, loss=loss, label_smoothing=smoothing, batch_size=5, micro_batch_size=size)
        found: list[dict] = []
        ours = ascended(
            model, model.network, config,
            lambda state, small: found.append(dpo.update(state, model, list(range(5)), data, logp_ref, small)),
        )  # fmt: skip
        assert found[0]["loss"] == pytest.approx(float(each.mean()), rel=1e-10)
        assert found[0]["margin"] == pytest.approx(float(m.mean()), rel=1e-9)
        assert found[0]["accuracy"] == float((m > 0).double().mean())
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


def scorer() -> tuple[models.Scorer, Model]:
    model = nets.tabular()
    made = models.Scorer(model.network, 8, 0.5).double()
    model.network.get_output_embeddings().requires_grad_(False)
    return made, model


def test_a_pairwise_and_a_k_way_reward_loss_by_hand() -> None:
    """The mean over prompts of the mean over pairs of log(1 + exp(r_worse - r_better)); three and two completions."""
    made, model = scorer()
    answers = [[[2, 1], [3, 1], [1]], [[3, 3, 1], [2, 1]], [[1], [2, 2, 1]]]
    rewards = [
        [made(batching.pad([p], [a], 0))[0, -1] for a in several]
        for p, several in zip(PROMPTS[:3], answers, strict=True)
    ]
    losses = [
        torch.stack([(1 + (b - a).exp()).log() for a, b in itertools.combinations(several, 2)]).mean()
        for several in rewards
    ]
    expected = torch.stack(losses).mean()
    named = [p for p in made.parameters() if p.requires_grad]
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(-expected, named)])
    for size in (3, 1):
        config = RewardModel(batch_size=3, micro_batch_size=size)
        found: list[dict] = []
        ours = ascended(
            model, made, config,
            lambda state, small: found.append(reward_model.update(state, made, model, PROMPTS[:3], answers, small)),
        )  # fmt: skip
        assert found[0]["loss"] == pytest.approx(float(expected), rel=1e-10)
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


def test_rewards_are_shifted_to_mean_zero() -> None:
    made, model = scorer()
    answers = [[[2, 1], [3, 1], [1]], [[3, 3, 1], [2, 1]]]
    before = reward_model.score(made, model, PROMPTS[:1] * 3 + PROMPTS[1:2] * 2, answers[0] + answers[1])
    reward_model.centre(made, model, PROMPTS[:2], answers)
    after = reward_model.score(made, model, PROMPTS[:1] * 3 + PROMPTS[1:2] * 2, answers[0] + answers[1])
    assert float(after.mean()) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(after, before - before.mean(), rtol=0, atol=1e-12)


def test_rows_without_comparisons_are_refused() -> None:
    with pytest.raises(ValueError, match="row 0 has columns 'prompt', 'chosen'; allowed: 'chosen' and 'rejected'"):
        reward_model.rank([{"prompt": "a", "chosen": "b"}])
    assert reward_model.rank([{"completions": ["a", "b", "c"]}]) == [["a", "b", "c"]]


# GRPO on a language whose 15 completions can be written down. A group of two: all 225 pairs, each with its probability.

PROMPT = [2, 3]


def rewards_of() -> np.ndarray:
    """A known reward of every completion."""
    return np.array([sum(3 - t for t in c) + 0.5 * len(c) ** 2 + 0.1 * c[0] for c in nets.COMPLETIONS])


def pairs(model: Model) -> tuple[Rollout, Tensor]:
    """Every group of two completions as one rollout, and the probability of each."""
    chosen = list(itertools.product(range(15), repeat=2))
    flat = [nets.COMPLETIONS[i] for pair in chosen for i in pair]
    with torch.no_grad():
        logp = torch.stack([plain_log_prob(model.network, PROMPT, c) for c in nets.COMPLETIONS])
    probability = torch.stack([(logp[i] + logp[j]).exp() for i, j in chosen])
    response = torch.zeros(len(flat), nets.LENGTH, dtype=torch.bool)
    for row, completion in zip(response, flat, strict=True):
        row[: len(completion)] = True
    rewards = np.array([[rewards_of()[i], rewards_of()[j]] for i, j in chosen])
    data = Rollout(
        [{"prompt": "23"}] * len(flat), [PROMPT] * len(flat), flat, response, torch.tensor([c[-1] == 1 for c in flat]),
        torch.zeros(response.shape, dtype=torch.float64), torch.tensor(rewards).flatten(), {},
    )  # fmt: skip
    behaved = rollout.log_probs(model.network, data, model, GRPO(group_size=2))
    return data._replace(logp_behavior=behaved), probability


def expected_gradient(model: Model, data: Rollout, given: grpo.Estimates, p: Tensor, config: GRPO) -> Tensor:
    """E over groups of the gradient of the objective of one group: the objective is linear in Ψ where ρ is 1."""
    weight = p.repeat_interleave(2).unsqueeze(1)
    weighted = given._replace(psi=given.psi * weight)
    total = torch.zeros(())
    for batch in rollout.batches(data, list(range(len(data.completions))), model, config.micro_batch_tokens):
        total = total + grpo.objective(model.network, batch, weighted, grpo.Whole(1, 2), config)[0]
    return exact_gradient(model.network, total)


def exact_policy_gradient(model: Model, weights: np.ndarray) -> Tensor:
    """Σ_y p(y) w(y) ∇ log p(y) by Transformers' logits."""
    total = torch.zeros(())
    for completion, weight in zip(nets.COMPLETIONS, weights, strict=True):
        logp = plain_log_prob(model.network, PROMPT, completion)
        total = total + logp.detach().exp() * weight * logp
    return exact_gradient(model.network, total)


@pytest.mark.parametrize("surrogate", ["clip", "cispo", "log-prob"])
def test_without_scaling_the_gradient_is_the_exact_one_times_one_minus_one_over_g(surrogate: Any) -> None:
    """Dr. GRPO and GPG: E[gradient] = (1 - 1/G)/L ∇E[r], G = 2, L = 3: the group's mean includes each one itself."""
    model = nets.tabular()
    data, p = pairs(model)
    config = GRPO(
        group_size=2, scale="none", surrogate=surrogate, reduction="fixed-length", sampling=Sampling(nets.LENGTH)
    )
    given = grpo.estimate(data, rollout.Source(model, [], [], None), None, config)  # type: ignore[arg-type]
    ours = expected_gradient(model, data, given, p, config)
    exact = exact_policy_gradient(model, rewards_of())
    torch.testing.assert_close(ours, exact * (1 - 1 / 2) / nets.LENGTH, rtol=1e-8, atol=1e-12)


def test_grpos_own_scaling_is_biased_as_stated() -> None:
    """Divided by the group's std and by each length: E[gradient] weighs y by E_y'[Ψ(y, y')] / |y|, computed apart."""
    model = nets.tabular()
    data, p = pairs(model)
    config = GRPO(group_size=2, scale="group", reduction="sequence", sampling=Sampling(nets.LENGTH))
    given = grpo.estimate(data, rollout.Source(model, [], [], None), None, config)  # type: ignore[arg-type]
    ours = expected_gradient(model, data, given, p, config)
    one = np.exp([float(plain_log_prob(model.network, PROMPT, c).detach()) for c in nets.COMPLETIONS])
    r = rewards_of()
    weights = np.zeros(15)
    for i, j in itertools.product(range(15), repeat=2):
        std = abs(r[i] - r[j]) / math.sqrt(2)
        weights[i] += one[j] * (r[i] - r[j]) / 2 / (std + 1e-4) / len(nets.COMPLETIONS[i])
    exact = exact_policy_gradient(model, weights)
    torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-12)
    unbiased = exact_policy_gradient(model, r)
    assert float(torch.cosine_similarity(ours, unbiased, 0)) < 0.999


def test_process_rewards_by_hand() -> None:
    """S4 A.3.3. Two completions, steps that end at tokens 1, 3 and 2, 4, rewards 1, 0 and 1, 2: their mean is 1, their
    std (ddof 1) √(2/3). Normalised to 0, -c, 0, c with c = √1.5; a token gets the sum of the steps that end at it or
    later. The second group is judged at one token only: there is nothing to compare, Ψ is 0."""
    response = torch.ones(4, 5, dtype=torch.bool)
    steps = [[(1, 1.0), (3, 0.0)], [(2, 1.0), (4, 2.0)], [(0, 5.0)], []]
    reward = torch.tensor([1.0, 3.0, 5.0, 0.0], dtype=torch.float64)
    zero = torch.zeros(4, 5, dtype=torch.float64)
    data = Rollout([{}] * 4, [[2]] * 4, [[2] * 5] * 4, response, response[:, 0], zero, reward, {}, steps)
    c = math.sqrt(1.5)
    expected = np.array([[-c, -c, -c, -c, 0], [c, c, c, c, c], [0] * 5, [0] * 5])
    config = GRPO(group_size=2, credit="process")
    model = nets.tabular()
    given = grpo.estimate(data, rollout.Source(model, [], [], None), None, config)  # type: ignore[arg-type]
    np.testing.assert_allclose(given.psi, expected, atol=2e-4)  # the 1e-4 beside the std
    turned = rollout.pick(data, [1, 0])
    np.testing.assert_allclose(rollout.process_relative(turned, 2), expected[[1, 0]], atol=2e-4)
    joined = rollout.join([rollout.pick(data, [0, 1]), rollout.pick(data, [2, 3])])
    np.testing.assert_allclose(rollout.process_relative(joined, 2), expected, atol=2e-4)


def test_the_process_gradient_is_the_enumerated_one() -> None:
    """Every token a step with a known reward: E[gradient] is Σ p(y) Ψ_t ∇ log π(y_t|·) over all groups, with Ψ computed
    apart: each step's reward normalised over both completions' steps, summed from the token on."""
    model = nets.tabular()
    data, p = pairs(model)
    judged = [[(t, float(token - 1 + t)) for t, token in enumerate(c)] for c in data.completions]
    data = data._replace(steps=judged)
    config = GRPO(group_size=2, credit="process", reduction="fixed-length", sampling=Sampling(nets.LENGTH))
    given = grpo.estimate(data, rollout.Source(model, [], [], None), None, config)  # type: ignore[arg-type]
    ours = expected_gradient(model, data, given, p, config)
    total = torch.zeros(())
    for k, probability in enumerate(p.tolist()):
        both = [np.array([r for _, r in judged[2 * k + i]]) for i in range(2)]
        steps = np.concatenate(both)
        for i in range(2):
            scaled = (both[i] - steps.mean()) / (steps.std(ddof=1) + 1e-4)
            completion = data.completions[2 * k + i]
            logits = model.network(torch.tensor([PROMPT + completion])).logits[0].log_softmax(-1)
            for t, token in enumerate(completion):
                total = total + probability * scaled[t:].sum() * logits[len(PROMPT) + t - 1, token]
    torch.testing.assert_close(ours, exact_gradient(model.network, total) / 2 / nets.LENGTH, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_what_each_kl_in_the_loss_does(estimator: Any) -> None:
    """Per token, on data of π: k1 gives 0, k2 ∇KL[π, π_ref] of the tokens met, k3 ∇KL[π_ref, π] of them."""
    model, other = nets.tabular(0), nets.tabular(1)
    data, p = pairs(model)
    config = GRPO(
        group_size=2, kl_coef=0.7, kl_estimator=estimator, reduction="fixed-length", sampling=Sampling(nets.LENGTH)
    )
    source = rollout.Source(model, [], [], None)  # type: ignore[arg-type]
    given = grpo.estimate(data, source, other.network, config)
    assert given.logp_ref is not None
    total = torch.zeros(())
    for batch in rollout.batches(data, list(range(450)), model, 4096):
        for place in batch.rows:  # each alone: the probability of its group multiplies it
            one = rollout.batches(data, [place], model, 4096)[0]
            value = grpo.objective(
                model.network, one, given._replace(psi=torch.zeros_like(given.psi)), grpo.Whole(1, 2), config
            )[0]
            total = total + p[place // 2] * value
    ours = exact_gradient(model.network, total)
    exact = token_kl_gradient(model, other, estimator)
    torch.testing.assert_close(ours, -0.7 * exact / nets.LENGTH, rtol=1e-7, atol=1e-11)


def token_kl_gradient(model: Model, other: Model, estimator: str) -> Tensor:
    """Σ over the places that π reaches of the gradient of the next token's divergence, the places' weights fixed."""
    total = torch.zeros(())
    places: list[list[int]] = [[*words] for n in range(nets.LENGTH) for words in itertools.product((2, 3), repeat=n)]
    for words in places:
        with torch.no_grad():
            reach = plain_log_prob(model.network, PROMPT, words).exp() if words else torch.ones(())
        ids = torch.tensor([PROMPT + words])
        q = model.network(ids).logits[0, -1, 1:].log_softmax(-1)
        ref = other.network(ids).logits[0, -1, 1:].log_softmax(-1).detach()
        if estimator == "k2":
            total = total + reach * (q.exp() * (q - ref)).sum()
        elif estimator == "k3":
            total = total + reach * (ref.exp() * (ref - q)).sum()
        else:
            total = total + 0 * q.sum()
    return exact_gradient(model.network, total)


@pytest.mark.parametrize("variant", [*presets.GRPO_PRESETS, "four steps"])
def test_the_gradient_does_not_depend_on_the_split(variant: str) -> None:
    """Whole, in buckets, and one completion at a time: 1e-10 in float64."""
    model, other = nets.tabular(0), nets.tabular(1)
    choices: dict[str, Any] = {"kl_coef": 0.1, "num_epochs": 1, "minibatches": 1, "truncated": "mask"}
    choices |= presets.GRPO_PRESETS.get(variant, {}) | {"overlong_buffer": 0, "dynamic_sampling": 0}
    gradients = []
    for tokens in (4096, 24, 1):
        config = GRPO(
            **choices, group_size=4, batch_size=3, micro_batch_tokens=tokens, sampling=Sampling(nets.LENGTH),
            run=runs.Config(seed=3),
        )  # fmt: skip
        rows = [{"prompt": "x", "answer": "y"}] * 3
        origin = rollout.Source(
            model, rows, PROMPTS[:3], lambda completion_ids, **_: [float(sum(c)) for c in completion_ids]
        )
        data = rollout.collect(origin, config, 0, 3)
        given = grpo.estimate(data, origin, other.network, config)
        # π_old is not quite π: ratios are not 1
        moved = data.logp_behavior + 0.1 * torch.sin(
            torch.arange(data.logp_behavior.numel()).view_as(data.logp_behavior)
        )
        given = given._replace(logp_old=moved.double() * data.response)
        gradients.append(ascended(
            model, model.network, config,
            lambda state, small, data=data, given=given, origin=origin: grpo.update(state, origin, data, given, small),
        ))  # fmt: skip
    assert float(gradients[0].abs().max()) > 1e-6
    for other_gradient in gradients[1:]:
        torch.testing.assert_close(other_gradient, gradients[0], rtol=1e-9, atol=1e-10)


def test_the_first_pass_is_the_old_policy() -> None:
    """Three passes of one step: the first leaves log π_old for the others; without it no ratio would be clipped."""
    model = nets.tabular(0)
    start = {name: value.clone() for name, value in model.network.state_dict().items()}
    config = GRPO(
        group_size=4, batch_size=3, micro_batch_tokens=24, num_epochs=3, clip_low=0.01, clip_high=0.01,
        sampling=Sampling(nets.LENGTH), optimizer=AdamW(0.02),
    )  # fmt: skip
    rows = [{"prompt": "x", "answer": "y"}] * 3
    origin = rollout.Source(
        model, rows, PROMPTS[:3], lambda completion_ids, **_: [float(sum(c)) for c in completion_ids]
    )
    data = rollout.collect(origin, config, 0, 3)
    given = grpo.estimate(data, origin, None, config)
    assert given.logp_old is None

    def after(config: GRPO, given: grpo.Estimates, times: int = 1) -> Tensor:
        model.network.load_state_dict(start)
        state = learner.State(
            model.network, config.optimizer.build(models.trainable(model.network).values()), 0, {}
        )  # fmt: skip
        for _ in range(times):
            grpo.update(state, origin, data, given, config)
        return torch.cat([p.detach().flatten().clone() for p in model.network.parameters()])

    known = given._replace(logp_old=rollout.log_probs(model.network, data, model, config))
    found = after(config, given)
    torch.testing.assert_close(found, after(config, known), rtol=0, atol=1e-6)
    forgetful = after(dataclasses.replace(config, num_epochs=1), given, times=3)
    assert float((found - forgetful).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("baseline", "factor"), [("none", 1.0), ("moving-average", 1.0), ("leave-one-out", 1.0), ("group-mean", 0.5)]
)
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_reinforce_climbs_the_exact_gradient(baseline: Any, factor: float, kl_coef: float) -> None:
    """E[gradient] = ∇(E[r] - β KL[π, π_ref]), for a mean that includes each one itself times 1 - 1/G."""
    model, other = nets.tabular(0), nets.tabular(1)
    data, p = pairs(model)
    config = REINFORCE(group_size=2, baseline=baseline, kl_coef=kl_coef, sampling=Sampling(nets.LENGTH))
    state = learner.State(model.network, None, 0, {"mean": 1.7, "weight": 0.5})  # type: ignore[arg-type]
    psi, remembered = reinforce.estimate(data, state, model, other.network, config)
    weighted = psi * p.repeat_interleave(2).unsqueeze(1)
    total = torch.zeros(())
    for batch in rollout.batches(data, list(range(450)), model, 4096):
        total = total + reinforce.objective(model.network, batch, weighted, 2, config)[0]
    ours = exact_gradient(model.network, total)
    logp, logp_ref = (
        torch.stack([plain_log_prob(each.network, PROMPT, c) for c in nets.COMPLETIONS]) for each in (model, other)
    )
    value = (logp.exp() * (torch.tensor(rewards_of()) - kl_coef * (logp - logp_ref.detach()))).sum()
    torch.testing.assert_close(ours, factor * exact_gradient(model.network, value), rtol=1e-8, atol=1e-11)
    reward = data.reward - kl_coef * (logp - logp_ref).detach()[[nets.COMPLETIONS.index(c) for c in data.completions]]
    # decay 0.9 from a mean of 1.7 with weight 0.5: weight 0.9 · 0.5 + 0.1 = 0.55
    assert remembered["weight"] == pytest.approx(0.55)
    assert remembered["mean"] == pytest.approx(1.7 + 0.1 / 0.55 * (float(reward.mean()) - 1.7), rel=1e-9)


def test_reinforce_plus_plus_whitens_the_batch() -> None:
    model = nets.tabular()
    data, _ = pairs(model)
    state = learner.State(model.network, None, 0, {})  # type: ignore[arg-type]
    psi, _ = reinforce.estimate(data, state, model, None, REINFORCE(group_size=2, baseline="whiten"))
    r = data.reward.numpy()
    expected = (r - r.mean()) / (r.std(ddof=1) + 1e-8)
    np.testing.assert_allclose(psi[:, 0], expected, rtol=1e-10)


def test_grpo_with_one_step_is_reinforce_with_its_psi() -> None:
    """With ρ = 1 the clipped ratio's gradient is the score's: equal but for the mean over tokens, a constant."""
    model = nets.tabular()
    data, _ = pairs(model)
    given = grpo.estimate(data, rollout.Source(model, [], [], None), None, GRPO(group_size=2))  # type: ignore[arg-type]
    gradients = []
    for name in ("grpo", "reinforce"):
        total = torch.zeros(())
        for batch in rollout.batches(data, list(range(450)), model, 4096):
            if name == "grpo":
                value = grpo.objective(model.network, batch, given, grpo.Whole(7, 450), GRPO(group_size=2))[0]
            else:
                value = reinforce.objective(model.network, batch, given.psi, 7, REINFORCE())[0]
            total = total + value
        gradients.append(exact_gradient(model.network, total))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)
