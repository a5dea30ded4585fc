"""A reward model that follows the policy: what is compared, what is learned, what is kept."""

import random
from pathlib import Path

import pytest
import torch

from upslope.language import models, prompts, rewards
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
    assert (prompts.decode(refresher.model, pair.chosen), prompts.decode(refresher.model, pair.rejected)) == (
        "aei",
        "bcd",
    )


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


@pytest.mark.parametrize("history", [0.0, 0.25, 1.0])
def test_the_share_of_earlier_comparisons(monkeypatch: pytest.MonkeyPatch, history: float) -> None:
    """Of every batch; in the first refresh there are none."""
    from upslope.language import reward_model

    seen: list[list[list[list[int]]]] = []
    monkeypatch.setattr(reward_model, "update", lambda *arguments: seen.append(arguments[4]) or {})
    refresher = made(Refresh(1, steps=2, batch_size=8, history=history))
    for texts, shares in ((["aaa", "bbb"], 0.0), (["eee", "ddd"], history)):
        refresher.compare(rollout_of(refresher, texts), texts, 2)
        seen.clear()
        refresher.refresh()
        earlier = prompts.encode_completion(refresher.model, "aaa")
        expected = 0 if texts[0] == "aaa" else round(8 * shares)
        for answers in seen:
            assert len(answers) == 8
            if texts[0] == "eee":
                assert sum(pair[0] == earlier for pair in answers) == expected


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
