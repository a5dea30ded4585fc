"""A reward model that follows the policy (Shao et al. 2024, arXiv:2402.03300 alg 1; the outer loop of S3 alg 12).

A reward model knows the completions it was trained on. A policy that is taught by it moves away from them, to where
the model errs in its favour. So every few iterations a judge looks at the completions of the policy as it is, and the
reward model takes some gradient steps on these comparisons, mixed with a share of earlier ones.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from upslope.language import learner, models, prompts, reward_model, rewards
from upslope.language.learner import AdamW, State
from upslope.language.rollout import Rollout, Source
from upslope.runs import settings
from upslope.runs.randomness import generator

KEPT = 4096  # earlier comparisons


@dataclass(frozen=True)
class Refresh:
    """When, by whom and how the reward model is taught again."""

    interval: int = 0  # iterations from one refresh to the next; 0: the reward model stays as it is
    judge: str = "task"  # who compares the policy's completions: task, or FILE.py:FUNCTION
    steps: int = 20  # gradient steps of a refresh
    batch_size: int = 32  # comparisons per gradient step
    history: float = 0.1  # share of them from earlier refreshes
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        settings.within(self, 0, None, "interval")
        settings.within(self, 1, None, "steps", "batch_size")
        settings.within(self, 0, 1, "history")
        settings.positive(self, "learning_rate")


class Comparison(NamedTuple):
    """Token ids of the reward model's own, as it scores them; the judge prefers `chosen`."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Refresher:
    """The reward model in training, the comparisons since its last refresh, and earlier ones."""

    def __init__(self, config: Refresh, origin: Source, source: str, seed: int) -> None:
        """From a run's reward and where its prompts come from.

        Raises:
            ValueError: the reward is no reward model, or the judge is not there.
        """
        if not isinstance(origin.reward, rewards.ModelReward):
            raise ValueError(
                f"refresh.interval is {config.interval} and the reward no reward model; allowed: 0, or --reward with "
                "the directory of a reward model's run"
            )
        self.config, self.seed = config, seed
        self.scorer, self.model = origin.reward.scorer, origin.reward.model
        self.judge = rewards.resolve(config.judge, source, seed)
        self.own = reward_model.RewardModel(optimizer=AdamW(config.learning_rate), micro_batch_size=config.batch_size)
        self.state = State(self.scorer, self.own.optimizer.build(models.trainable(self.scorer).values()), 0, {})
        self.fresh: list[Comparison] = []
        self.past: deque[Comparison] = deque(maxlen=KEPT)

    def compare(self, data: Rollout, texts: list[str], size: int) -> None:
        """The judge's best and worst completion of every group; nothing of a group that it finds equal."""
        judged = torch.tensor(rewards.judge(self.judge, data.rows, texts, data.completions), dtype=torch.float64)
        for group, values in enumerate(judged.unflatten(0, (-1, size))):
            if values.max() > values.min():
                best, worst = group * size + int(values.argmax()), group * size + int(values.argmin())
                answers = [prompts.encode_completion(self.model, texts[i]) for i in (best, worst)]
                self.fresh.append(Comparison(prompts.encode(self.model, data.rows[best]["prompt"]), *answers))

    def refresh(self) -> dict[str, float]:
        """Teach the reward model; how often it agreed with the judge on the new comparisons before, and does now."""
        if not self.fresh:
            return {}
        before, random = self.agreement(self.fresh), generator(self.seed, "refresh", self.state.iteration)
        past, size = list(self.past), self.config.batch_size
        earlier = round(self.config.history * size) if past else 0
        for _ in range(self.config.steps):
            pick = lambda rows, n: [rows[i] for i in torch.randint(len(rows), (n,), generator=random).tolist()]  # noqa: E731
            drawn = pick(self.fresh, size - earlier) + (pick(past, earlier) if earlier else [])
            written, answers = [each.prompt for each in drawn], [[each.chosen, each.rejected] for each in drawn]
            reward_model.update(self.state, self.scorer, self.model, written, answers, self.own)
            self.state = self.state._replace(iteration=self.state.iteration + 1)
        numbers = {"agreement_before": before, "agreement": self.agreement(self.fresh)}
        self.past.extend(self.fresh)
        self.fresh = []
        return numbers

    def agreement(self, compared: list[Comparison]) -> float:
        """Share of comparisons in which the reward model has the higher reward for what the judge prefers."""
        score = lambda answers: reward_model.score(self.scorer, self.model, [c.prompt for c in compared], answers)  # noqa: E731
        better = score([c.chosen for c in compared]) > score([c.rejected for c in compared])
        return float(better.double().mean())

    def save(self, directory: Path) -> None:
        """The reward model as it is, as the directory of a run has it."""
        models.save(self.scorer.backbone, self.model.tokenizer, directory / models.MODEL, self.scorer.head)

    def pack(self) -> dict[str, Tensor]:
        """All of it as tensors."""
        tensors = learner.pack(self.state)
        for name, rows in (("fresh", self.fresh), ("past", list(self.past))):
            parts = [ids for row in rows for ids in row]
            tensors[f"{name}.ids"] = torch.tensor([i for ids in parts for i in ids], dtype=torch.int64)
            tensors[f"{name}.lengths"] = torch.tensor([len(ids) for ids in parts], dtype=torch.int64)
        return tensors

    def restore(self, saved: dict[str, Tensor]) -> None:
        """What `pack` gave."""
        self.state = learner.restored(self.state, saved)
        for name, rows in (("fresh", self.fresh), ("past", self.past)):
            parts = [ids.tolist() for ids in saved[f"{name}.ids"].split(saved[f"{name}.lengths"].tolist())]
            rows.extend(Comparison(*parts[i : i + 3]) for i in range(0, len(parts), 3))
