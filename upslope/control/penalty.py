"""The KL penalty in place of the clip: maximise ρ Ψ - β KL[π_old || π_θ], β fixed or adaptive (S2 eq 18, S3 alg 10)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from upslope.core import divergences, surrogates, trust_region
from upslope.runs import settings

RULES = {"modular-rl": trust_region.modular_rl, "paper": trust_region.ppo_paper, "lecture": trust_region.lecture}


@dataclass(frozen=True)
class Config:
    """β and how it follows the KL of the last update; core/trust_region.py has the rules' thresholds."""

    coef: float = 0.0  # β at the start, reward units per nat; 0: no penalty
    rule: Literal["fixed", "modular-rl", "paper", "lecture"] = "fixed"
    target: float = 0.01  # nats per update

    def __post_init__(self) -> None:
        settings.within(self, 0, None, "coef")
        settings.positive(self, "target")
        if self.rule != "fixed" and not self.coef:
            raise ValueError(f"kl_penalty.rule {self.rule!r} needs kl_penalty.coef above 0, the first β")


def surrogate(
    logp: Float[Tensor, " B"], logp_old: Float[Tensor, " B"], psi: Float[Tensor, " B"], beta: float
) -> Float[Tensor, " B"]:
    """ρ Ψ - β KL[π_old || π_θ] per transition, the KL by k3: its samples come from π_old, so its gradient is unbiased.

    >>> import torch
    >>> zero = torch.zeros(1)
    >>> surrogate(zero, zero, torch.tensor([2.0]), beta=3.0)
    tensor([2.])
    """
    return surrogates.kl_penalised(surrogates.ratio(logp, logp_old, psi), divergences.k3(logp_old, logp), beta)


def adapted(config: Config, beta: float, kl: float) -> dict[str, float]:
    """The next iteration's β, as one of the update's numbers; nothing without a penalty.

    >>> adapted(Config(coef=1.0, rule="paper", target=0.01), beta=1.0, kl=0.02)
    {'kl_coef': 2.0}
    """
    if config.rule != "fixed":
        beta = trust_region.adapt(RULES[config.rule](config.target, beta), kl).coef
    return {"kl_coef": beta} if config.coef else {}


def remembered(numbers: Mapping[str, Any]) -> dict[str, float]:
    """What of an update's numbers the next one needs."""
    return {name: value for name, value in numbers.items() if name == "kl_coef"}
