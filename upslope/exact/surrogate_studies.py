"""The laboratory's second room: estimators of KL (S4 2.1, figure 2.1) and the clipped surrogate (2.4.3, figure 2.2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from upslope.core import divergences, surrogates
from upslope.exact.laboratory import Study, Table
from upslope.exact.mdp import MDP
from upslope.exact.measurement import Row, random_policy
from upslope.exact.policy_gradient import evaluate, exact_policy_gradient, performance

KL_ESTIMATORS = {
    "k1 = −log r": divergences.k1,
    "k2 = (log r)²/2": divergences.k2,
    "k3 = (r − 1) − log r": divergences.k3,
}


def kl_study(seed: int = 0, shifts: Sequence[float] = (0.1, 1.0), samples: int = 100_000) -> Study:
    """k1, k2, k3 for KL[q, p], q = N(0, 1), p = N(shift, 1): exact moments by quadrature (S4 2.1; Schulman 2020).

    And the gradients that they give on a softmax policy, in the loss and in the reward: which divergence, if any, each
    of them really descends.
    """
    nodes, mass = np.polynomial.hermite_e.hermegauss(120)  # exact for polynomials of degree 239 under N(0, 1)
    x, weight = torch.from_numpy(nodes), torch.from_numpy(mass / mass.sum())
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(samples, generator=generator, dtype=torch.float64)
    rows: list[Row] = []
    for shift in shifts:
        truth = 0.5 * shift**2
        for name, estimator in KL_ESTIMATORS.items():
            value, sampled = (estimator(-0.5 * z**2, -0.5 * (z - shift) ** 2) for z in (x, drawn))
            mean = float(weight @ value)
            std = float(weight @ (value - mean) ** 2) ** 0.5
            half = 1.96 * float(sampled.std()) / samples**0.5 / truth
            row: Row = {"p": f"N({shift:g}, 1)", "estimator": name, "KL": truth, "bias / KL": mean / truth - 1.0}
            row |= {"std / KL": std / truth, "sampled bias / KL": float(sampled.mean()) / truth - 1.0, "± 95%": half}
            rows.append(row)
    ratio = np.exp(np.linspace(-2.5, 1.5, 201))
    logs = torch.from_numpy(np.log(ratio))
    curves = {"ratio": ratio} | {name: f(-logs, 0.0 * logs).numpy() for name, f in KL_ESTIMATORS.items()}
    lesson = "k3 is unbiased with k2's variance; but k1 in a loss has no gradient, and k3's is that of the other KL."
    tables = (Table(f"exact moments, q = N(0, 1); {samples:,} samples beside them", rows), _kl_gradients(seed))
    return Study("kl", lesson, tables, curves)


def _kl_gradients(seed: int, actions: int = 5) -> Table:
    generator = torch.Generator().manual_seed(seed)
    theta, reference = (torch.randn(actions, generator=generator, dtype=torch.float64) for _ in range(2))
    log_ref = reference.log_softmax(0)
    forward = torch.func.grad(lambda t: divergences.categorical_kl(t, reference))(theta)
    backward = torch.func.grad(lambda t: divergences.categorical_kl(reference, t))(theta)
    probs = theta.softmax(0)
    rows: list[Row] = []
    for name, estimator in KL_ESTIMATORS.items():
        value = estimator(theta.log_softmax(0), log_ref)
        for place in ("loss", "reward"):
            if place == "loss":
                found = torch.func.grad(lambda t, f=estimator: (probs * f(t.log_softmax(0), log_ref)).sum())(theta)
            else:
                found = torch.func.grad(lambda t, v=value: (probs * v * t.log_softmax(0)).sum())(theta)
            gaps = {
                "|g − ∇KL(π‖ref)|": float((found - forward).norm()),
                "|g − ∇KL(ref‖π)|": float((found - backward).norm()),
                "|g − difference|": float((found - forward + backward).norm()),
            }
            rows.append({"estimator": name.split(" ")[0], "in the": place, "|g|": float(found.norm()), **gaps})
    return Table("expected on-policy gradients, a softmax over 5 actions, exact", rows)


SLOPES = (2.0, 1.0, -1.0, -2.0)
SURROGATES = {"ratio": surrogates.ratio, "clip": surrogates.clipped_ratio, "dual clip": surrogates.dual_clip}


def clip_study(mdp: MDP, seed: int = 0, clip: float = 0.2, reach: float = 4.0) -> Study:
    """The clipped surrogate by ratio (S4 figure 2.2), and along the gradient of a real problem against the true J.

    Args:
        clip: ε on both sides.
        reach: length of the path θ + step·∇J/|∇J|.
    """
    ratio = np.linspace(0.0, 2.5, 251)
    logs = torch.from_numpy(np.log(np.maximum(ratio, 1e-12)))
    curves = {"ratio": ratio, "clip": np.array(clip)}
    for slope in SLOPES:
        psi = torch.full_like(logs, slope)
        curves[f"plain {slope:+g}"] = surrogates.ratio(logs, 0.0 * logs, psi).numpy()
        curves[f"clipped {slope:+g}"] = surrogates.clipped_ratio(logs, 0.0 * logs, psi, clip, clip).numpy()
    path = _path(mdp, seed, clip, np.linspace(0.0, reach, 41))
    along: list[Row] = [{name: float(values[i]) for name, values in path.items()} for i in range(0, 41, 5)]
    lesson = "The ratio surrogate promises more than J gives; the clipped one stops paying once the policy has moved."
    slopes = Table(
        f"∂L/∂log π by ratio, ε = {clip:g}", [_slopes(value, clip) for value in (0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 4.0)]
    )
    tables = (slopes, Table("along ∇J, exact", along))
    return Study("clip", lesson, tables, curves | {f"path {name}": values for name, values in path.items()})


def _slopes(ratio: float, clip: float) -> Row:
    row: Row = {"ratio": ratio}
    for name, surrogate in SURROGATES.items():
        options = () if name == "ratio" else (clip, clip)
        for sign in (1.0, -1.0):

            def value(logp: Tensor, f=surrogate, rest=options, psi=sign) -> Tensor:  # type: ignore[no-untyped-def]
                return f(logp, torch.zeros_like(logp), torch.full_like(logp, psi), *rest).sum()

            row[f"{name}, Ψ = {sign:+g}"] = float(torch.func.grad(value)(torch.tensor([ratio]).double().log())[0])
    return row


def _path(mdp: MDP, seed: int, clip: float, steps: Float[np.ndarray, " n"]) -> dict[str, np.ndarray]:
    """J, both surrogates (plus J of the old policy) and the mean KL, exactly, at θ + step·∇J/|∇J|."""
    policy, origin = random_policy(mdp, seed)
    gradient, start = exact_policy_gradient(mdp, policy, origin), policy(origin)
    known = evaluate(mdp, start.exp())
    direction, gain, visits = gradient / gradient.norm(), known.advantages, known.visits
    weights = visits[..., None] * start.exp()
    base = float(performance(mdp, policy, origin))
    share = visits.sum(0) / visits.sum()
    found = []
    for step in steps:
        theta = origin + float(step) * direction
        now = policy(theta)
        args = (now.expand_as(gain), start.expand_as(gain), gain)
        plain = base + float((weights * surrogates.ratio(*args)).sum())
        clipped = base + float((weights * surrogates.clipped_ratio(*args, clip, clip)).sum())
        kl = float(share @ divergences.categorical_kl(start, now))
        found.append((float(step), float(performance(mdp, policy, theta)), plain, clipped, kl))
    names = ("step", "J", "ratio surrogate", "clipped surrogate", "KL(old‖new)")
    return dict(zip(names, np.array(found).T, strict=True))
