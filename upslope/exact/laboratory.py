"""The estimator laboratory: bias and variance of policy-gradient estimators, exact where trajectories can be listed.

On a small problem with a horizon every trajectory can be listed with its probability, so the mean and the covariance of
any estimator ĝ(τ) = Σ_t Ψ_t ∇log π(a_t|s_t) are finite sums: no sampling, no error bars. Elsewhere, or where `samples`
are asked for, trajectories are drawn and everything comes with its 95% interval (`measurement.estimate`), against the
same exact ∇J. What depends on a whole batch (a baseline fitted on it) is measured by Monte Carlo in any case.

Each study returns tables (what is printed) and curves (what is drawn). The formulas measured are those of
`upslope.core`; none is written a second time here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from upslope.core import advantages, baselines, importance, returns
from upslope.exact.mdp import MDP
from upslope.exact.measurement import (
    Row,
    Setting,
    another,
    describe,
    discounted,
    estimate,
    following,
    measure,
    setting,
)
from upslope.exact.policy_gradient import log_probs, score_products, score_table, trajectory_gradients


class Table(NamedTuple):
    """A title and rows of named cells; every row has the same names."""

    title: str
    rows: list[Row]


class Study(NamedTuple):
    """What an experiment found: tables to read, named arrays to draw, and a line that says what to see.

    `samples`: trajectories drawn for it; None where it is exact.
    """

    name: str
    lesson: str
    tables: tuple[Table, ...]
    curves: Mapping[str, np.ndarray]
    samples: int | None = None

    @property
    def method(self) -> str:
        return "exact" if self.samples is None else f"Monte Carlo, n = {self.samples:,}, 95% intervals"


# ---- Ψ -------------------------------------------------------------------------------------------------------------


def psi_table(case: Setting) -> dict[str, Float[Tensor, "N T"]]:
    """The six Ψ_t of S4 table 2.2 with true values, each with the factor γ^t that makes it unbiased for J."""
    rewards, zero = case.data.rewards, torch.zeros_like(case.data.rewards)
    to_go = returns.return_to_go(rewards, zero, case.discounts, case.continues)
    elapsed = returns.elapsed_discount(case.discounts, case.continues)
    return {
        "total return": returns.total_return(rewards, zero, case.discounts, case.continues),
        "return to go": elapsed * to_go,
        "return to go − V(s)": elapsed * (to_go - case.values),
        "Q(s, a)": elapsed * case.q,
        "advantage A(s, a)": elapsed * advantages.advantage(case.q, case.values),
        "TD residual": elapsed * advantages.td_residual(rewards, case.values, case.next_values, case.discounts),
    }


def variance_study(mdp: MDP, seed: int = 0, samples: int | None = None) -> Study:
    """The six Ψ_t of S4 table 2.2: all unbiased, with very different variances."""
    case = setting(mdp, seed, samples=samples)
    psis = psi_table(case)
    rows = [measure(case, name, psi) for name, psi in psis.items()]
    curves = {"by_step": _share_by_step(case, list(psis.values())), "gradient": case.gradient.numpy()}
    lesson = "Every Ψ has the same mean, ∇J; what remains is how many trajectories that costs."
    how = "enumerated" if case.samples is None else "drawn"
    table = Table(f"Ψ of S4 table 2.2: {len(case.weights):,} trajectories {how}", rows)
    return Study("variance", lesson, (table,), curves, case.samples)


def _share_by_step(case: Setting, psis: Sequence[Float[Tensor, "N T"]]) -> Float[np.ndarray, "psis T"]:
    """Total variance of the term of each step alone, relative to |∇J|²: E[Ψ²‖∇log π‖²] − ‖E[Ψ ∇log π]‖²."""
    here = case.data.states[:, :-1]
    sizes = score_table(case.policy, case.theta).square().sum(-1)[here, case.data.actions] * case.data.valid
    states, actions = case.mdp.num_states, case.mdp.num_actions
    found = []
    for psi in psis:
        totals = psi.new_zeros(psi.shape[1], states * actions)
        weighted = (case.weights[:, None] * psi * case.data.valid).T.contiguous()
        totals.scatter_add_(1, (here * actions + case.data.actions).T, weighted)
        means = score_products(case.policy, case.theta, totals.view(-1, states, actions))
        found.append(case.weights @ (psi.square() * sizes) - means.square().sum(-1))
    return (torch.stack(found).clamp(min=0.0) / case.gradient.square().sum()).numpy()


def bias_study(mdp: MDP, seed: int = 0, samples: int | None = None) -> Study:
    """Where bias comes from: a dropped γ^t, a smaller γ, a wrong critic with λ < 1, the behaviour's states."""
    case = setting(mdp, seed, samples=samples)
    short = discounted(case, 0.7 * mdp.gamma)
    rewards, zero = case.data.rewards, torch.zeros_like(case.data.rewards)
    to_go = returns.return_to_go(rewards, zero, case.discounts, case.continues)
    elapsed = returns.elapsed_discount(case.discounts, case.continues)
    wrong = _critic_error(case, seed, size=0.5)
    rows = [
        measure(case, "γᵗ · return to go", elapsed * to_go),
        measure(case, "return to go, γᵗ dropped", to_go),
        measure(
            case,
            "return to go with 0.7 γ",
            returns.elapsed_discount(short.discounts, short.continues)
            * returns.return_to_go(rewards, zero, short.discounts, short.continues),
        ),
        measure(case, "γᵗ · TD residual, true V", elapsed * _gae(case, 0.0, case.values, case.next_values)),
        measure(case, "γᵗ · TD residual, wrong V", elapsed * _gae(case, 0.0, *wrong)),
        measure(case, "γᵗ · GAE λ = 0.9, wrong V", elapsed * _gae(case, 0.9, *wrong)),
        measure(case, "γᵗ · GAE λ = 1, wrong V", elapsed * _gae(case, 1.0, *wrong)),
        measure(case, "γᵗ · (return to go − wrong V)", elapsed * (to_go - wrong[0])),
        measure(case, "γᵗ · wrong Q", elapsed * (case.q + wrong[0] - case.values + _action_error(case, seed))),
    ]
    lesson = "A wrong baseline costs nothing; bootstrapping from a wrong critic, or another γ, does."
    table = Table("bias of common shortcuts against the exact ∇J", rows)
    return Study("bias", lesson, (table,), {}, case.samples)


def gae_study(
    mdp: MDP,
    seed: int = 0,
    critic_error: float = 0.5,
    batch: int = 64,
    gammas: Sequence[float] | None = None,
    samples: int | None = None,
) -> Study:
    """GAE(γ, λ) with an imperfect critic against the undiscounted gradient (S4 2.3; Schulman et al. 2016).

    Args:
        critic_error: standard deviation of the critic's error, relative to that of the true values.
        batch: trajectories that are averaged, for the mean squared error bias² + variance/batch.
    """
    lambdas = np.linspace(0.0, 1.0, 21)
    grid = np.array(gammas if gammas is not None else (0.5, 0.7, 0.8, 0.9, 0.95, 1.0))
    truth = setting(mdp.replace(gamma=1.0), seed, samples=samples)
    scale = float(truth.gradient.norm()) ** 2
    bias, variance = np.zeros((len(grid), len(lambdas))), np.zeros((len(grid), len(lambdas)))
    rows: list[Row] = []
    for i, gamma in enumerate(grid):
        case = discounted(truth, float(gamma))
        values = _critic_error(case, seed, critic_error)

        def draws(lam: float, case: Setting = case, values: tuple[Tensor, Tensor] = values) -> Tensor:
            return trajectory_gradients(case.data, case.policy, case.theta, _gae(case, lam, *values))

        for j, lam in enumerate(lambdas):
            found = estimate(case, draws(float(lam)), intervals=False)
            bias[i, j], variance[i, j] = found.bias**2 / scale, found.variance / scale
        error = bias[i] + variance[i] / batch
        j = int(error.argmin())
        row: Row = {"γ": float(gamma), "best λ": float(lambdas[j]), "error at best λ": float(error[j]) ** 0.5}
        if case.samples is not None:
            found = estimate(case, draws(float(lambdas[j])), confidence=0.975)  # both at once hold with 95%
            row["from"] = ((found.bias_low**2 + found.variance_low / batch) / scale) ** 0.5
            row["to"] = ((found.bias_high**2 + found.variance_high / batch) / scale) ** 0.5
        rows.append(row | {"at λ = 0": float(error[0]) ** 0.5, "at λ = 1": float(error[-1]) ** 0.5})
    lesson = "A small λ trusts the critic (bias), a large one the sampled rewards (variance); the best is between."
    title = f"root mean squared error / |∇J|, {batch} trajectories, critic error {critic_error:g} std of V"
    curves = {
        "gammas": grid,
        "lambdas": lambdas,
        "bias": bias,
        "variance": variance,
        "error": bias + variance / batch,
        "batch": np.array(batch),
    }
    return Study("gae", lesson, (Table(title, rows),), curves, truth.samples)


def _gae(case: Setting, lam: float, values: Tensor, next_values: Tensor) -> Float[Tensor, "N T"]:
    return advantages.gae(case.data.rewards, values, next_values, case.discounts, lam * case.continues)


def _critic_error(case: Setting, seed: int, size: float) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
    """(V̂(s_t), V̂(s_{t+1})) of a critic whose error is a fixed number per state, of `size` standard deviations of V."""
    noise = torch.randn(case.mdp.num_states, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    offset = size * float(case.known.values[0].std()) * noise
    here, after = offset[case.data.states[:, :-1]], offset[case.data.states[:, 1:]]
    return case.values + here, torch.where(case.data.terminated, 0.0, case.next_values + after)


def _action_error(case: Setting, seed: int) -> Float[Tensor, "N T"]:
    shape = (case.mdp.num_states, case.mdp.num_actions)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)
    return 0.5 * float(case.known.values[0].std()) * noise[case.data.states[:, :-1], case.data.actions]


# ---- baselines -----------------------------------------------------------------------------------------------------


def baseline_study(mdp: MDP, seed: int = 0, batch: int = 8, batches: int = 40_000, samples: int | None = None) -> Study:
    """Every baseline of S3 7.4.2 and S4 2.2.4: the fixed ones exactly, those fitted on their own batch by Monte Carlo.

    Args:
        batch: trajectories in a batch for the fitted ones; variances are per trajectory (batch × that of the mean).
        batches: Monte-Carlo repetitions; of a sample, the batches that it splits into.
    """
    case = setting(mdp, seed, samples=samples)
    rewards, zero = case.data.rewards, torch.zeros_like(case.data.rewards)
    whole = returns.total_return(rewards, zero, case.discounts, case.continues)
    elapsed = returns.elapsed_discount(case.discounts, case.continues)
    to_go = elapsed * returns.return_to_go(rewards, zero, case.discounts, case.continues)
    scores = trajectory_gradients(case.data, case.policy, case.theta, torch.ones_like(rewards))
    mean, best, each, by_time = _fixed_baselines(another(case, seed + 5))  # fitted on trajectories of their own
    rows = [
        measure(case, "none (total return)", whole),
        measure(case, "mean return E[R]", whole - mean),
        measure(case, "minimum variance, scalar", whole - best),
        describe(case, "minimum variance, per parameter", scores * (whole[:, :1] - each)),
        measure(case, "return to go, none", to_go),
        measure(case, "return to go − b(t)", to_go - by_time),
        measure(case, "return to go − V(s)", to_go - elapsed * case.values),
    ]
    fixed = Table("fixed baselines" if case.samples else "fixed baselines, exact", rows)
    return Study(
        "baselines",
        "Baselines that know the batch's own actions shrink the gradient by 1 − 1/N; leave-one-out does not.",
        (fixed, _fitted(case, whole[:, 0], scores, seed, batch, batches)),
        {"batch": np.array(batch)},
        case.samples,
    )


def _fixed_baselines(case: Setting) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E[R], the best scalar, the best per parameter, and the mean return to go of each step."""
    rewards, zero = case.data.rewards, torch.zeros_like(case.data.rewards)
    whole = returns.total_return(rewards, zero, case.discounts, case.continues)[:, 0]
    elapsed = returns.elapsed_discount(case.discounts, case.continues)
    to_go = elapsed * returns.return_to_go(rewards, zero, case.discounts, case.continues)
    scores = trajectory_gradients(case.data, case.policy, case.theta, torch.ones_like(rewards))
    root = case.weights.sqrt()  # minimum_variance takes equal weights: give each trajectory its share through its score
    best = baselines.minimum_variance(root[:, None] * scores, whole)
    each = baselines.minimum_variance(root[:, None] * scores, whole, per_parameter=True)
    by_time = (case.weights @ (to_go * case.data.valid)) / (case.weights @ case.data.valid.double()).clamp(min=1e-300)
    return case.weights @ whole, best, each, by_time


def _fitted(case: Setting, gains: Tensor, scores: Tensor, seed: int, batch: int, batches: int) -> Table:
    """Baselines computed from the batch that they correct; 95% intervals of the projection on ∇J."""
    if case.samples is None:
        generator = torch.Generator().manual_seed(seed)
        index = torch.multinomial(case.weights, batch * batches, replacement=True, generator=generator)
    else:
        batches = case.samples // batch
        index = torch.arange(batches * batch)
    index = index.view(batches, batch)
    gain, score = gains[index], scores[index]
    psi = {
        "own batch's mean": gain - gain.mean(dim=1, keepdim=True),
        "leave-one-out": advantages.leave_one_out(gain),
        "group relative, scale none": advantages.group_relative(gain, scale="none"),
        "group relative, / std": advantages.group_relative(gain, scale="group"),
        "own batch's minimum variance": gain
        - torch.func.vmap(lambda s, g: baselines.minimum_variance(s, g))(score, gain)[:, None],
    }
    rows: list[Row] = []
    direction, size = case.gradient / case.gradient.norm(), float(case.gradient.norm())
    for name, weight in psi.items():
        draws = torch.einsum("bn,bnd->bd", weight, score) / batch
        along = draws @ direction / size
        half = 1.96 * float(along.std()) / batches**0.5
        mean = draws.mean(dim=0)
        rows.append(
            {
                "estimator": name,
                "projection on ∇J": float(along.mean()),
                "± 95%": half,
                "cosine": float(torch.cosine_similarity(mean, case.gradient, dim=0)),
                "std / |∇J|": (batch * float((draws - mean).square().sum(dim=1).mean())) ** 0.5 / size,
            }
        )
    title = f"fitted on their own batch of {batch}: Monte Carlo over {batches:,} batches (1 − 1/N = {1 - 1 / batch:g})"
    return Table(title, rows)


# ---- importance weights --------------------------------------------------------------------------------------------


def importance_study(
    mdp: MDP,
    seed: int = 0,
    distances: Sequence[float] = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0),
    samples: int | None = None,
) -> Study:
    """The off-policy forms of S4 2.9–2.13 as the behaviour policy moves away: bias, variance, effective sample size."""
    case = setting(mdp, seed, samples=samples)
    direction = torch.randn(len(case.theta), generator=torch.Generator().manual_seed(seed + 3), dtype=torch.float64)
    direction = direction / direction.norm()
    log_target, own = case.policy(case.theta), log_probs(case.data, case.policy(case.theta)).sum(-1)
    rows: list[Row] = []
    for number, distance in enumerate(distances):
        other = following(case, case.theta + distance * direction, seed + 6 + number)
        log_behavior = case.policy(other.theta)
        logp, logp_behavior = log_probs(other.data, log_target), log_probs(other.data, log_behavior)
        rewards, zero = other.data.rewards, torch.zeros_like(other.data.rewards)
        elapsed = returns.elapsed_discount(other.discounts, other.continues)
        known = (logp, logp_behavior, rewards, other.discounts, other.continues)
        forms = {
            "trajectory (2.9)": importance.trajectory(*known),
            "causal (2.10)": elapsed * importance.causal(*known),
            "simplified causal (2.11)": elapsed * importance.simplified_causal(*known),
            "first order (2.13), Q of μ": elapsed * importance.first_order(logp, logp_behavior, other.q),
            "no weights": elapsed * returns.return_to_go(rewards, zero, other.discounts, other.continues),
        }
        ratio = (logp - logp_behavior).sum(-1).exp()
        share = float((other.weights @ ratio) ** 2 / (other.weights @ ratio.square()))
        divergence = float(case.weights @ (own - log_probs(case.data, log_behavior).sum(-1)))
        seen = other._replace(theta=case.theta, gradient=case.gradient)  # μ's trajectories, π's gradient
        for name, psi in forms.items():
            row = measure(seen, name, psi)
            extra: Row = {"|θ − θ_μ|": distance, "KL(π‖μ) of τ, nats": divergence, "ESS / N": share}
            rows.append({"estimator": name, **extra, **{k: v for k, v in row.items() if k != "estimator"}})
    lesson = "Unbiased forms pay in variance what biased ones pay in bias; both grow with the distance."
    shape = (len(distances), len(rows) // len(distances))
    keys = {"bias": "bias / |∇J|", "std": "std / |∇J|", "distance": "|θ − θ_μ|", "ess": "ESS / N"}
    curves = {key: np.array([row[name] for row in rows], float).reshape(shape) for key, name in keys.items()}
    return Study(
        "importance",
        lesson,
        (Table("off-policy forms" if case.samples else "off-policy forms, exact", rows),),
        curves,
        case.samples,
    )
