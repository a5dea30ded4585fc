"""The estimator laboratory: exact bias and variance of policy-gradient estimators, where enumeration is possible.

On a small problem with a horizon every trajectory can be listed with its probability, so the mean and the covariance of
any estimator ĝ(τ) = Σ_t Ψ_t ∇log π(a_t|s_t) are finite sums: no sampling, no error bars. What depends on a whole batch
(a baseline fitted on it) is measured by Monte Carlo with a 95% confidence interval.

Each study returns tables (what is printed) and curves (what is drawn). The formulas measured are those of
`upslope.core`; none is written a second time here. "Variance" is total: the trace of the covariance, for one
trajectory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from upslope.core import advantages, baselines, importance, returns
from upslope.exact import zoo
from upslope.exact.mdp import MDP
from upslope.exact.policy_gradient import (
    Evaluation,
    Policy,
    Trajectories,
    enumerate_trajectories,
    evaluate,
    exact_policy_gradient,
    log_probs,
    moments,
    probabilities,
    softmax_table,
    trajectory_gradients,
)

Row = dict[str, str | float]


class Table(NamedTuple):
    """A title and rows of named cells; every row has the same names."""

    title: str
    rows: list[Row]


class Study(NamedTuple):
    """What an experiment found: tables to read, named arrays to draw, and a line that says what to see."""

    name: str
    lesson: str
    tables: tuple[Table, ...]
    curves: Mapping[str, np.ndarray]


class Setting(NamedTuple):
    """A problem, a policy, all its trajectories, and everything true about them that an estimator may need."""

    mdp: MDP
    policy: Policy
    theta: Float[Tensor, " d"]
    data: Trajectories
    weights: Float[Tensor, " N"]
    known: Evaluation
    values: Float[Tensor, "N T"]
    next_values: Float[Tensor, "N T"]
    q: Float[Tensor, "N T"]
    discounts: Float[Tensor, "N T"]
    continues: Float[Tensor, "N T"]
    gradient: Float[Tensor, " d"]


def small_problem(seed: int = 0, gamma: float = 0.9, horizon: int = 6) -> MDP:
    """A random problem of 4 states, 2 actions, 2 successors each: at most 4^horizon trajectories from its one start."""
    mdp = zoo.random_mdp(np.random.default_rng(seed), states=4, actions=2, successors=2, gamma=gamma)
    return mdp.replace(initial=np.eye(4)[0], horizon=horizon)


def setting(mdp: MDP, seed: int = 0, spread: float = 0.5, gamma: float | None = None) -> Setting:
    """A softmax policy with parameters N(0, spread²) on a problem with a horizon, and all its trajectories.

    Args:
        gamma: discount that the *estimators* use, for values and returns; the objective keeps the problem's own.

    Raises:
        ValueError: the problem has no horizon, or too many trajectories.

    >>> case = setting(small_problem(horizon=3))
    >>> case.weights.sum(), len(case.weights) <= 4**3
    (tensor(1.0000, dtype=torch.float64), True)
    """
    if mdp.horizon is None:
        raise ValueError("horizon: the laboratory lists all trajectories, so the problem needs one (--horizon)")
    _refuse_too_many(mdp, mdp.horizon)
    policy = softmax_table(mdp.num_states, mdp.num_actions)
    generator = torch.Generator().manual_seed(seed)
    theta = spread * torch.randn(mdp.num_states * mdp.num_actions, generator=generator, dtype=torch.float64)
    data = enumerate_trajectories(mdp)
    return _setting(mdp, policy, theta, data, mdp.gamma if gamma is None else gamma)


def _refuse_too_many(mdp: MDP, horizon: int, most: int = 1_000_000, cells: int = 200_000_000) -> None:
    """Counts the trajectories before listing them, and the table that listing them needs."""
    ways = (mdp.dense_transition > 0.0).sum(axis=1).astype(float)
    ways[mdp.terminal] = np.eye(mdp.num_states)[mdp.terminal]
    count = (np.asarray(mdp.initial) > 0.0).astype(float)
    for _ in range(horizon):
        table = count.sum() * mdp.num_actions * mdp.num_states
        count = count @ ways
        if count.sum() > most or table > cells:
            raise ValueError(
                f"horizon: {horizon} steps have too many trajectories to list (more than {most:,}, or a table of more "
                f"than {cells:,} numbers); take a shorter horizon or a smaller problem"
            )


def _setting(mdp: MDP, policy: Policy, theta: Tensor, data: Trajectories, gamma: float) -> Setting:
    known = evaluate(mdp.replace(gamma=gamma), policy(theta).exp())
    steps = torch.arange(data.actions.shape[1])
    here, after = data.states[:, :-1], data.states[:, 1:]
    discounts, continues = returns.boundaries(data.terminated, data.truncated, gamma, 1.0, dtype=torch.float64)
    return Setting(
        mdp,
        policy,
        theta,
        data,
        probabilities(data, policy(theta)),
        known,
        known.values[steps, here],
        known.values[steps + 1, after],
        known.q[steps, here, data.actions],
        discounts,
        continues,
        exact_policy_gradient(mdp, policy, theta),
    )


def measure(case: Setting, name: str, psi: Float[Tensor, "N T"], weights: Float[Tensor, " N"] | None = None) -> Row:
    """Exact bias and variance of Σ_t Ψ_t ∇log π(a_t|s_t), relative to the true gradient."""
    draws = trajectory_gradients(case.data, case.policy, case.theta, psi)
    found = moments(case.weights if weights is None else weights, draws)
    return _row(name, found.mean, found.variance, case.gradient)


def _row(name: str, mean: Tensor, variance: Tensor | float, truth: Tensor) -> Row:
    size = float(truth.norm())
    return {
        "estimator": name,
        "bias / |∇J|": float((mean - truth).norm()) / size,
        "cosine": float(torch.cosine_similarity(mean, truth, dim=0)),
        "std / |∇J|": float(variance) ** 0.5 / size,
        "trajectories for std = |∇J|": float(variance) / size**2,
    }


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


def variance_study(mdp: MDP, seed: int = 0) -> Study:
    """The six Ψ_t of S4 table 2.2: all unbiased, with very different variances."""
    case = setting(mdp, seed)
    rows = [measure(case, name, psi) for name, psi in psi_table(case).items()]
    spread = [_share_by_step(case, psi) for psi in psi_table(case).values()]
    lesson = "Every Ψ has the same mean, ∇J; what remains is how many trajectories that costs."
    table = Table(f"Ψ of S4 table 2.2: {len(case.weights):,} trajectories enumerated", rows)
    return Study("variance", lesson, (table,), {"by_step": np.array(spread), "gradient": case.gradient.numpy()})


def _share_by_step(case: Setting, psi: Float[Tensor, "N T"]) -> np.ndarray:
    """Total variance of the term of each step alone, relative to |∇J|²."""
    steps = torch.eye(psi.shape[1], dtype=psi.dtype)
    draws = (trajectory_gradients(case.data, case.policy, case.theta, psi * step) for step in steps)
    scale = float(case.gradient.norm()) ** 2
    return np.array([float(moments(case.weights, draw).variance) / scale for draw in draws])


def bias_study(mdp: MDP, seed: int = 0) -> Study:
    """Where bias comes from: a dropped γ^t, a smaller γ, a wrong critic with λ < 1, the behaviour's states."""
    case = setting(mdp, seed)
    short = setting(mdp, seed, gamma=0.7 * mdp.gamma)
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
    return Study("bias", lesson, (table,), {})


def gae_study(
    mdp: MDP, seed: int = 0, critic_error: float = 0.5, batch: int = 64, gammas: Sequence[float] | None = None
) -> Study:
    """GAE(γ, λ) with an imperfect critic against the undiscounted gradient (S4 2.3; Schulman et al. 2016).

    Args:
        critic_error: standard deviation of the critic's error, relative to that of the true values.
        batch: trajectories that are averaged, for the mean squared error bias² + variance/batch.
    """
    lambdas = np.linspace(0.0, 1.0, 21)
    grid = np.array(gammas if gammas is not None else (0.5, 0.7, 0.8, 0.9, 0.95, 1.0))
    truth = mdp.replace(gamma=1.0)
    bias, variance = np.zeros((len(grid), len(lambdas))), np.zeros((len(grid), len(lambdas)))
    for i, gamma in enumerate(grid):
        case = setting(truth, seed, gamma=float(gamma))
        scale = float(case.gradient.norm()) ** 2
        values = _critic_error(case, seed, critic_error)
        for j, lam in enumerate(lambdas):
            draws = trajectory_gradients(case.data, case.policy, case.theta, _gae(case, float(lam), *values))
            found = moments(case.weights, draws)
            bias[i, j] = float((found.mean - case.gradient).square().sum()) / scale
            variance[i, j] = float(found.variance) / scale
    error = bias + variance / batch
    rows: list[Row] = []
    for i, gamma in enumerate(grid):
        j = int(error[i].argmin())
        row: Row = {"γ": float(gamma), "best λ": float(lambdas[j]), "error at best λ": float(error[i, j]) ** 0.5}
        rows.append(row | {"at λ = 0": float(error[i, 0]) ** 0.5, "at λ = 1": float(error[i, -1]) ** 0.5})
    lesson = "A small λ trusts the critic (bias), a large one the sampled rewards (variance); the best is between."
    title = f"root mean squared error / |∇J|, {batch} trajectories, critic error {critic_error:g} std of V"
    curves = {
        "gammas": grid,
        "lambdas": lambdas,
        "bias": bias,
        "variance": variance,
        "error": error,
        "batch": np.array(batch),
    }
    return Study("gae", lesson, (Table(title, rows),), curves)


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


def baseline_study(mdp: MDP, seed: int = 0, batch: int = 8, batches: int = 40_000) -> Study:
    """Every baseline of S3 7.4.2 and S4 2.2.4: the fixed ones exactly, those fitted on their own batch by Monte Carlo.

    Args:
        batch: trajectories in a batch for the fitted ones; variances are per trajectory (batch × that of the mean).
        batches: Monte-Carlo repetitions.
    """
    case = setting(mdp, seed)
    rewards, zero = case.data.rewards, torch.zeros_like(case.data.rewards)
    whole = returns.total_return(rewards, zero, case.discounts, case.continues)
    elapsed = returns.elapsed_discount(case.discounts, case.continues)
    to_go = elapsed * returns.return_to_go(rewards, zero, case.discounts, case.continues)
    scores = trajectory_gradients(case.data, case.policy, case.theta, torch.ones_like(rewards))
    root = case.weights.sqrt()  # minimum_variance takes equal weights: give each trajectory its share through its score
    mean = case.weights @ whole[:, 0]
    best = baselines.minimum_variance(root[:, None] * scores, whole[:, 0])
    each = baselines.minimum_variance(root[:, None] * scores, whole[:, 0], per_parameter=True)
    by_time = (case.weights @ (to_go * case.data.valid)) / (case.weights @ case.data.valid.double()).clamp(min=1e-300)
    rows = [
        measure(case, "none (total return)", whole),
        measure(case, "mean return E[R]", whole - mean),
        measure(case, "minimum variance, scalar", whole - best),
        _row("minimum variance, per parameter", *moments(case.weights, scores * (whole[:, :1] - each)), case.gradient),
        measure(case, "return to go, none", to_go),
        measure(case, "return to go − b(t)", to_go - by_time),
        measure(case, "return to go − V(s)", to_go - elapsed * case.values),
    ]
    exact = Table("fixed baselines, exact", rows)
    return Study(
        "baselines",
        "Baselines that know the batch's own actions shrink the gradient by 1 − 1/N; leave-one-out does not.",
        (exact, _fitted(case, whole[:, 0], scores, seed, batch, batches)),
        {"batch": np.array(batch)},
    )


def _fitted(case: Setting, gains: Tensor, scores: Tensor, seed: int, batch: int, batches: int) -> Table:
    """Baselines computed from the batch that they correct; 95% intervals of the projection on ∇J."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.multinomial(case.weights, batch * batches, replacement=True, generator=generator).view(batches, batch)
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


def importance_study(mdp: MDP, seed: int = 0, distances: Sequence[float] = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)) -> Study:
    """The off-policy forms of S4 2.9–2.13 as the behaviour policy moves away: bias, variance, effective sample size."""
    case = setting(mdp, seed)
    direction = torch.randn(len(case.theta), generator=torch.Generator().manual_seed(seed + 3), dtype=torch.float64)
    direction = direction / direction.norm()
    zero = torch.zeros_like(case.data.rewards)
    elapsed = returns.elapsed_discount(case.discounts, case.continues)
    logp = log_probs(case.data, case.policy(case.theta))
    rows: list[Row] = []
    for distance in distances:
        other = _setting(case.mdp, case.policy, case.theta + distance * direction, case.data, case.mdp.gamma)
        logp_behavior = log_probs(case.data, case.policy(other.theta))
        known = (logp, logp_behavior, case.data.rewards, case.discounts, case.continues)
        forms = {
            "trajectory (2.9)": importance.trajectory(*known),
            "causal (2.10)": elapsed * importance.causal(*known),
            "simplified causal (2.11)": elapsed * importance.simplified_causal(*known),
            "first order (2.13), Q of μ": elapsed * importance.first_order(logp, logp_behavior, other.q),
            "no weights": elapsed * returns.return_to_go(case.data.rewards, zero, case.discounts, case.continues),
        }
        share = float(1.0 / (other.weights @ (case.weights / other.weights).square()))
        divergence = float(case.weights @ (case.weights / other.weights).log())
        for name, psi in forms.items():
            row = measure(case, name, psi, other.weights)
            extra: Row = {"|θ − θ_μ|": distance, "KL(π‖μ) of τ, nats": divergence, "ESS / N": share}
            rows.append({"estimator": name, **extra, **{k: v for k, v in row.items() if k != "estimator"}})
    lesson = "Unbiased forms pay in variance what biased ones pay in bias; both grow with the distance."
    shape = (len(distances), len(rows) // len(distances))
    keys = {"bias": "bias / |∇J|", "std": "std / |∇J|", "distance": "|θ − θ_μ|", "ess": "ESS / N"}
    curves = {key: np.array([row[name] for row in rows], float).reshape(shape) for key, name in keys.items()}
    return Study("importance", lesson, (Table("off-policy forms, exact", rows),), curves)
