"""A reward model that follows the policy: what is compared, what is learned, what is kept."""

import random
from pathlib import Path

import pytest
import torch

from upslope.language import models, prompts, reward_model, rewards
from upslope.language.refresh import Refresh, Refresher
from upslope.language.rollout import Rollout, Source


def made(config: Refresh) -> Refresher:
    scorer, model = models.scorer(models.Config(id="tiny"), 0)
    return Refresher(config, Source(model, [], [], rewards.ModelReward(scorer, model)), "task:preferences", 0)


def rollout_of(refresher: Refresher, texts: list[str]) -> Rollout:
    """As if the policy had written these."""
    model = refresher.model
    written = [prompts.encode(model, "ab") for _ in texts]
    answers = [prompts.encode_completion(model, text) for text in texts]
    none = torch.zeros(len(texts), max(map(len, answers)))
    rows = [{"prompt": "ab"} for _ in texts]
    return Rollout(rows, written, answers, none > 0, none[:, 0] > 0, none, none[:, 0], {})


def letters(seed: int, groups: int, size: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(6)) for _ in range(groups * size)]


def test_of_a_group_the_best_and_the_worst_are_compared_and_of_equal_ones_nothing() -> None:
    """The task's judge counts vowels."""
    refresher, texts = made(Refresh(1)), ["abc", "aei", "bcd", "abe", "xyz", "bcd", "zzz", "fgh"]
    refresher.compare(rollout_of(refresher, texts), texts, 4)
    (pair,) = refresher.fresh
    texts = [prompts.decode(refresher.model, ids) for ids in pair]
    assert texts == ["ab", "aei", "bcd"]


def test_what_is_compared_is_read_as_what_is_scored() -> None:
    """In the reward model's tokens, with its end: the policy's may be others, and be cut before the end."""
    refresher, texts = made(Refresh(1)), ["aei", "bcd"]
    data = rollout_of(refresher, texts)._replace(prompts=[[7], [7]], completions=[[8, 9], [9]])
    refresher.compare(data, texts, 2)
    model = refresher.model
    scored = (prompts.encode(model, "ab"), *(prompts.encode_completion(model, text) for text in texts))
    assert refresher.fresh == [scored]


def test_it_comes_to_agree_with_the_judge_on_what_it_has_not_seen() -> None:
    """From a head that knows nothing to nine of ten held-out comparisons."""
    refresher, texts = made(Refresh(1, steps=60, learning_rate=1e-3)), letters(0, 64, 4)
    refresher.compare(rollout_of(refresher, texts), texts, 4)
    other = made(Refresh(1))
    texts = letters(1, 64, 4)
    other.compare(rollout_of(other, texts), texts, 4)
    before, numbers = refresher.agreement(other.fresh), refresher.refresh()
    assert before < 0.8
    assert refresher.agreement(other.fresh) > 0.9
    assert numbers["agreement"] > numbers["agreement_before"]
    assert not refresher.fresh
    assert len(refresher.past) > 32
    assert refresher.refresh() == {}  # nothing new: nothing is learned


@pytest.mark.parametrize(("history", "expected"), [(0.0, 0), (0.25, 2), (1.0, 8)])
def test_the_share_of_earlier_comparisons(monkeypatch: pytest.MonkeyPatch, history: float, expected: int) -> None:
    """Of every batch of 8."""
    seen: list[list[list[list[int]]]] = []
    monkeypatch.setattr(reward_model, "update", lambda *arguments: seen.append(arguments[4]) or {})
    refresher = made(Refresh(1, steps=2, batch_size=8, history=history))
    for texts in (["aaa", "bbb"], ["eee", "ddd"]):
        refresher.compare(rollout_of(refresher, texts), texts, 2)
        refresher.refresh()
    earlier = prompts.encode_completion(refresher.model, "aaa")
    assert [sum(pair[0] == earlier for pair in answers) for answers in seen] == [8, 8, expected, expected]
    assert all(len(answers) == 8 for answers in seen)


def test_packed_and_restored_it_goes_on_to_the_same_bits() -> None:
    """Weights, moments, both lists and the counter that batches are drawn by."""
    one, texts = made(Refresh(1, steps=3)), letters(0, 8, 4)
    one.compare(rollout_of(one, texts), texts, 4)
    one.refresh()
    later = letters(2, 8, 4)
    one.compare(rollout_of(one, later), later, 4)
    saved = {name: tensor.detach().clone() for name, tensor in one.pack().items()}
    two = made(Refresh(1, steps=3))
    two.restore(saved)
    assert (one.fresh, one.past) == (two.fresh, two.past)
    assert one.refresh() == two.refresh()
    for mine, its in zip(one.scorer.parameters(), two.scorer.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_a_judge_that_fails_is_named(tmp_path: Path) -> None:
    """Before anything is compared."""
    (tmp_path / "judge.py").write_text(
        "def judge(prompts, completions, **_):\n    return [float('nan')] * len(prompts)\n"
    )
    refresher, texts = made(Refresh(1, judge=f"{tmp_path / 'judge.py'}:judge")), ["aaa", "bbb"]
    with pytest.raises(ValueError, match="'judge' returned nan for completion 0"):
        refresher.compare(rollout_of(refresher, texts), texts, 2)
    assert not refresher.fresh
