"""What the numbers of a run mean, and which of them should worry."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from upslope.report.records import Row, finite, names, series


class Meaning(NamedTuple):
    """How to read one number: its name for people, its unit, one sentence, and lines to judge it by."""

    title: str
    unit: str
    text: str
    guides: tuple[float, ...] = ()


CLIP_LIMIT = 0.4  # share of ratios outside the clip range
KL_LIMIT = 0.05  # nats
COLLAPSED = 0.05  # share of the first entropy

MEANINGS: Mapping[str, Meaning] = {
    "episode_return": Meaning("Return", "reward", "Mean undiscounted return of the last 100 training episodes."),
    "episode_length": Meaning("Episode length", "steps", "Mean length of the last 100 training episodes."),
    "kl": Meaning(
        "KL[old‖new]",
        "nats",
        "How far an update moves the policy: above 0.02–0.05 the steps are large, near 0 nothing is learnt.",
        (KL_LIMIT,),
    ),
    "clip_fraction": Meaning(
        "Clip fraction",
        "share",
        "Share of ratios π/π_old outside the clip range: 0.05–0.3 is usual, and above 0.4 most of the later epochs are "
        "wasted.",
        (CLIP_LIMIT,),
    ),
    "entropy": Meaning(
        "Entropy",
        "nats",
        "Randomness left in the policy: it should fall slowly, for a sudden fall towards 0 ends exploration. The "
        "entropy of continuous actions may be negative.",
    ),
    "surrogate": Meaning(
        "Surrogate",
        "whitened Ψ",
        "The objective that is ascended. It is relative to the policy before the update, so it shows the size of a "
        "step, not progress.",
    ),
    "value_error": Meaning(
        "Value error", "return²", "Error of the critic on its targets; it may well grow while returns grow."
    ),
    "explained_variance": Meaning(
        "Explained variance",
        "share",
        "1 − Var[target − V] / Var[target]: 1 is a perfect critic, 0 is as good as a constant, and below 0 is worse "
        "than one.",
        (0.0,),
    ),
    "grad_norm": Meaning("Gradient norm", "‖g‖", "Euclidean norm of the gradient before it is clipped."),
    "learning_rate": Meaning("Learning rate", "", "Step size of the optimiser, after its schedule."),
    "steps_per_second": Meaning("Speed", "steps/s", "Environment steps per second, updates included."),
    "episodes": Meaning("Episodes", "count", "Episodes finished since the start."),
}


def meaning(name: str) -> Meaning:
    """The meaning of a number; one that the table does not know is called by its name.

    >>> meaning("kl").unit
    'nats'
    >>> meaning("reward_margin").title
    'Reward margin'
    """
    return MEANINGS.get(name, Meaning(name.replace("_", " ").capitalize(), "", ""))


def ordered(found: Sequence[str]) -> tuple[str, ...]:
    """Known numbers in the table's order, then the others."""
    return (*(name for name in MEANINGS if name in found), *(name for name in found if name not in MEANINGS))


def warnings(metrics: Sequence[Row]) -> tuple[str, ...]:
    """What in these numbers should worry, each as a sentence with its cause and a way out.

    "Lately" is the last tenth of the points of a number, at least 5 of them: the first updates are no cause for worry.

    >>> warnings([{"step": float(step), "clip_fraction": 0.6} for step in range(10)])
    ('Clip fraction is lately 0.60, above 0.4: lower the learning rate or the number of epochs.',)
    """
    found = [*not_finite(metrics)]
    lately = {name: recent(metrics, name) for name in names(metrics)}
    if lately.get("clip_fraction", 0) > CLIP_LIMIT:
        found.append(
            f"Clip fraction is lately {lately['clip_fraction']:.2f}, above {CLIP_LIMIT}: "
            "lower the learning rate or the number of epochs."
        )
    if lately.get("kl", 0) > KL_LIMIT:
        found.append(
            f"KL[old‖new] is lately {lately['kl']:.3f} nats, above {KL_LIMIT}: the steps are large; "
            "lower the learning rate, or stop the epochs at a KL target."
        )
    if lately.get("explained_variance", 0) < 0:
        found.append(
            f"Explained variance is lately {lately['explained_variance']:.2f}: the critic is worse than a constant; "
            "normalise rewards, or train it longer on each rollout."
        )
    return (*found, *collapsed_entropy(metrics), *fallen_return(metrics))


def recent(metrics: Sequence[Row], name: str) -> float:
    """Mean of the last tenth of a number's finite points, at least 5; with fewer NaN, which no comparison flags."""
    values = finite(series(metrics, name)).values
    return float(values[-max(5, len(values) // 10) :].mean()) if len(values) >= 5 else float("nan")


def not_finite(metrics: Sequence[Row]) -> list[str]:
    found = []
    for name in names(metrics):
        steps, values = series(metrics, name)
        broken = np.flatnonzero(~np.isfinite(values))
        if len(broken):
            found.append(
                f"{meaning(name).title} is {values[broken[0]]:g} at step {steps[broken[0]]:,.0f} "
                f"({len(broken)} of {len(values)} points): nothing after it can be trusted."
            )
    return found


def collapsed_entropy(metrics: Sequence[Row]) -> list[str]:
    values = finite(series(metrics, "entropy")).values
    # A negative entropy belongs to continuous actions, where no value means that exploration has ended.
    if len(values) < 5 or values.min() < 0 or recent(metrics, "entropy") >= COLLAPSED * values[0]:
        return []
    return [
        f"Entropy fell from {values[0]:.2f} to {recent(metrics, 'entropy'):.3f} nats: the policy hardly explores any "
        "more; if the return is not where it should be, raise the entropy bonus or lower the learning rate."
    ]


def fallen_return(metrics: Sequence[Row]) -> list[str]:
    steps, values = finite(series(metrics, "episode_return"))
    if len(values) == 0:
        counted = "episodes" in names(metrics)
        return ["No episode has finished yet, so there is no return to show."] if counted else []
    best = int(values.argmax())
    if values[best] - values[-1] <= 0.5 * (values[best] - values[0]):
        return []
    return [
        f"The return was {values[best]:.1f} at step {steps[best]:,.0f} and is now {values[-1]:.1f}: more than half of "
        "what was learnt is lost; evaluate the checkpoint nearest to the best step."
    ]
