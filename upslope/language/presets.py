"""Named methods as rows of choices: what GRPO's descendants divide by, clip and average; REINFORCE's baselines."""

from typing import Any

GRPO_PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"reduction": "sequence", "kl_coef": 0.04},  # Shao et al. 2024, arXiv:2402.03300
    "gpg": {"scale": "none", "surrogate": "log-prob"},  # Chu et al. 2025, arXiv:2504.02546
    "dr-grpo": {"scale": "none", "reduction": "fixed-length"},  # Liu et al. 2025, arXiv:2503.20783
    "dapo": {  # Yu et al. 2025, arXiv:2503.14476
        "clip_high": 0.28, "reduction": "token", "dynamic_sampling": 3, "overlong_buffer": 4,
    },
    "gspo": {  # Zheng et al. 2025, arXiv:2507.18071
        "ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "reduction": "sequence",
    },
    "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.28},  # MiniMax 2025, arXiv:2506.13585
}  # fmt: skip

REINFORCE_PRESETS: dict[str, dict[str, Any]] = {
    "rloo": {"baseline": "leave-one-out"},  # Ahmadian et al. 2024, arXiv:2402.14740
    "reinforce++": {"baseline": "whiten"},  # Hu 2025, arXiv:2501.03262, one completion or several a prompt
}

PPO_PRESETS: dict[str, dict[str, Any]] = {
    "vapo": {  # Yue et al. 2025, arXiv:2504.05118
        "length_adaptive": 0.05, "critic_lambda": 1.0, "critic_warmup": 50, "clip_high": 0.28, "kl_coef": 0.0,
        "nll_coef": 0.1, "clip_value": None,
    },
    "open-reasoner-zero": {  # Hu et al. 2025, arXiv:2503.24290
        "gamma": 1.0, "gae_lambda": 1.0, "kl_coef": 0.0, "num_epochs": 1, "clip_value": None,
    },
}  # fmt: skip

VARIANTS = {"grpo": GRPO_PRESETS, "lm-reinforce": REINFORCE_PRESETS, "lm-ppo": PPO_PRESETS}
