"""Every function of core refuses what is wrong, with an error that names the argument.

One table of good calls; each argument is then spoiled in turn. A new public function without a row fails a test.
"""

import importlib
import inspect
import math
import pkgutil

import jaxtyping
import pytest
import torch

import upslope.core
from upslope.core import (
    _checks,
    advantages,
    baselines,
    divergences,
    exploration,
    importance,
    kronecker,
    preferences,
    reductions,
    returns,
    surrogates,
    trust_region,
    values,
)

pytestmark = pytest.mark.usefixtures("as_users_see_it")

X = torch.tensor([[0.5, -0.25, 0.75], [0.1, 0.2, -0.3]])
UNIT = torch.tensor([[1.0, 1.0, 0.5], [0.5, 1.0, 1.0]])
FLAGS = torch.tensor([[False, True, False], [False, False, True]])
MASK = ~FLAGS
ROW = X[0]
Q = torch.rand(2, 3, 4)
ONE = torch.ones(3)
ALONG = {"rewards": X, "next_values": X, "discounts": UNIT, "continues": UNIT}
WEIGHTED = {"logp": X, "logp_behavior": -X, "rewards": X, "discounts": UNIT, "continues": UNIT}
PAIR = {"logp_chosen": X, "logp_rejected": -X, "logp_ref_chosen": X, "logp_ref_rejected": X, "beta": 0.1}
CLIPS = {"clip_low": 0.2, "clip_high": 0.2}
BOUNDARY = {"terminated": FLAGS, "truncated": FLAGS, "gamma": 0.9, "lam": 0.9}
KL = trust_region.ppo_paper(0.01)
ZIEGLER = trust_region.ProportionalKL(1.0, 6.0, 100.0)
EYE = torch.eye(3)


def mean_square(old, new):
    return (new - old).square().mean()


def evaluate(x):
    return x.sum(), 0.0


GOOD = {
    returns.boundaries: BOUNDARY,
    returns.lambda_return: {"rewards": X, "next_values": X, "discounts": UNIT, "traces": UNIT},
    returns.return_to_go: ALONG,
    returns.n_step_return: {**ALONG, "n": 2},
    returns.total_return: ALONG,
    returns.elapsed_discount: {"discounts": UNIT, "continues": UNIT},
    returns.episode_start: {"continues": UNIT},
    advantages.advantage: {"q": X, "values": X},
    advantages.td_residual: {"rewards": X, "values": X, "next_values": X, "discounts": UNIT},
    advantages.gae: {"rewards": X, "values": X, "next_values": X, "discounts": UNIT, "traces": UNIT},
    advantages.k_step: {**ALONG, "values": X, "k": 2},
    advantages.baselined_return: {**ALONG, "baseline": X},
    advantages.vtrace: {
        **{"rewards": X, "values": X, "next_values": X, "discounts": UNIT, "traces": UNIT, "ratios": UNIT},
        **{"rho_bar": 1.0, "c_bar": 1.0},
    },
    advantages.group_relative: {"rewards": X, "ddof": 1, "eps": 1e-4},
    advantages.leave_one_out: {"rewards": X},
    advantages.process_relative: {
        **{"step_rewards": X, "step_ends": torch.tensor([[0, 1, 3], [1, 2, -1]]), "length": 4, "ddof": 1, "eps": 1e-4}
    },
    advantages.whiten: {"values": X, "mask": MASK, "eps": 1e-8},
    advantages.length_adaptive_lambda: {"lengths": torch.tensor([3.0]), "alpha": 0.05},
    baselines.constant: {"episode_returns": ROW},
    baselines.moving_average: {"state": baselines.MovingAverage(), "episode_returns": ROW, "decay": 0.9},
    baselines.time_dependent: {"returns_to_go": X, "mask": MASK},
    baselines.minimum_variance: {"scores": X.T, "episode_returns": ROW},
    baselines.scores: {"log_prob": lambda theta, x: (theta * x).sum(), "theta": ROW, "*": X},
    importance.trajectory: WEIGHTED,
    importance.causal: WEIGHTED,
    importance.simplified_causal: WEIGHTED,
    importance.first_order: {"logp": X, "logp_behavior": -X, "q": X},
    importance.truncated: {"logp": X, "logp_behavior": -X, "cap": 1.0},
    importance.effective_sample_size: {"log_weights": X},
    surrogates.log_prob: {"logp": X, "psi": X},
    surrogates.ratio: {"logp": X, "logp_old": -X, "psi": X},
    surrogates.clipped: {"ratios": UNIT, "psi": X, **CLIPS},
    surrogates.clipped_ratio: {"logp": X, "logp_old": -X, "psi": X, **CLIPS},
    surrogates.dual_clip: {"logp": X, "logp_old": -X, "psi": X, **CLIPS, "clip_dual": 3.0},
    surrogates.cispo: {"logp": X, "logp_old": -X, "psi": X, **CLIPS},
    surrogates.decoupled: {"logp": X, "logp_old": -X, "logp_behavior": X, "psi": X, **CLIPS, "cap": 2.0},
    surrogates.sequence_ratio: {"logp": X, "logp_old": -X, "mask": MASK, "log_clamp": 20.0},
    surrogates.kl_penalised: {"surrogate": X, "kl": X, "beta": 0.1},
    surrogates.entropy_bonus: {"surrogate": X, "entropy": X, "coef": 0.1},
    surrogates.clip_fraction: {"logp": X, "logp_old": -X, **CLIPS, "mask": MASK},
    divergences.k1: {"logp_q": X, "logp_p": -X},
    divergences.k2: {"logp_q": X, "logp_p": -X},
    divergences.k3: {"logp_q": X, "logp_p": -X},
    divergences.reverse_k3: {"logp_q": X, "logp_p": -X},
    divergences.categorical_kl: {"logits_q": X, "logits_p": -X},
    divergences.gaussian_kl: {"mean_q": X, "log_std_q": X, "mean_p": -X, "log_std_p": -X},
    values.squared_error: {"values": X, "targets": -X},
    values.huber: {"values": X, "targets": -X, "threshold": 1.0},
    values.clipped_squared_error: {"values": X, "old_values": X, "targets": -X, "clip": 0.2},
    values.proximal: {"parameters": ROW, "anchor": ONE, "kappa": 0.1},
    values.td_target: {"rewards": X, "next_values": X, "discounts": UNIT},
    values.q_target: {"rewards": X, "next_q": Q, "discounts": UNIT},
    values.double_q_target: {"rewards": X, "next_q_online": Q, "next_q_target": Q, "discounts": UNIT},
    values.expected_target: {"rewards": X, "next_q": Q, "next_probs": Q, "discounts": UNIT},
    values.soft_value: {"q1": X, "q2": X, "logp": X, "alpha": 0.2},
    values.soft_target: {**{"rewards": X, "next_q1": X, "next_q2": X, "next_logp": X, "alpha": 0.2, "discounts": UNIT}},
    values.softmax_value: {"q": X, "alpha": 0.2},
    values.soft_q_target: {"rewards": X, "next_q": Q, "alpha": 0.2, "discounts": UNIT},
    values.action_value: {"q": Q, "actions": torch.tensor([[0, 1, 2], [3, 0, 1]])},
    values.dueling: {"values": X, "advantages": Q},
    values.polyak: {"target": X, "online": -X, "tau": 0.1},
    trust_region.fisher_operator: {"outputs": lambda x: x, "kl": mean_square, "theta": ROW, "damping": 0.1},
    trust_region.fisher_vector_product: {
        **{"outputs": lambda x: x, "kl": mean_square, "theta": ROW, "vector": ONE, "damping": 0.1}
    },
    trust_region.conjugate_gradient: {"product": lambda v: v, "b": ROW, "iterations": 3, "tolerance": 1e-6},
    trust_region.natural_gradient: {"product": lambda v: v, "gradient": ROW, "iterations": 3, "tolerance": 1e-6},
    trust_region.natural_step: {"product": lambda v: v, "gradient": ROW, "delta": 0.01, "iterations": 3},
    trust_region.linear_quadratic_step: {"product": lambda v: v, "gradient": ROW, "beta": 1.0, "iterations": 3},
    trust_region.line_search: {
        **{"evaluate": evaluate, "theta": ROW, "step": ONE, "expected": 1.0, "delta": 0.1},
        **{"shrink": 0.5, "max_backtracks": 3, "accept_ratio": 0.1},
    },
    trust_region.modular_rl: {"target": 0.01, "coef": 1.0},
    trust_region.ppo_paper: {"target": 0.01, "coef": 1.0},
    trust_region.lecture: {"target": 0.01, "coef": 1.0},
    trust_region.adapt: {"state": KL, "kl": 0.01},
    trust_region.adapt_proportionally: {"state": ZIEGLER, "kl": 0.01, "samples": 5},
    kronecker.factors: {"x": X, "g": X},
    kronecker.average: {"old": kronecker.Factors(EYE, EYE), "new": kronecker.Factors(EYE, EYE), "decay": 0.9},
    kronecker.inverses: {"layer": kronecker.Factors(EYE, EYE), "damping": 0.1},
    kronecker.precondition: {"gradient": EYE, "inverse": kronecker.Factors(EYE, EYE)},
    kronecker.step_scale: {"squared_norm": 1.0, "learning_rate": 0.1, "kl_clip": 0.01},
    preferences.bradley_terry: {"chosen": X, "rejected": -X},
    preferences.preference_probability: {"chosen": X, "rejected": -X},
    preferences.ranking: {"rewards": X},
    preferences.implicit_reward: {"logp": X, "logp_ref": -X, "beta": 0.1},
    preferences.dpo: {**PAIR, "label_smoothing": 0.1},
    preferences.ipo: PAIR,
    preferences.tilted: {"logp_ref": X, "rewards": X, "beta": 0.1},
    preferences.centred: {"rewards": X, "reference_rewards": ROW},
    reductions.token_mean: {"x": X, "mask": MASK, "total": 3},
    reductions.sequence_mean: {"x": X, "mask": MASK, "total": 3},
    reductions.fixed_length_mean: {"x": X, "mask": MASK, "length": 3, "total": 3},
    exploration.linear_schedule: {"step": 1, "start": 1.0, "end": 0.1, "duration": 5},
    exploration.exponential_schedule: {"step": 1, "start": 1.0, "end": 0.1, "duration": 5},
    exploration.robbins_monro: {"step": 1, "scale": 1.0, "offset": 1.0, "power": 1.0},
    exploration.epsilon_greedy: {
        **{"q": Q, "epsilon": 0.1, "uniform": UNIT, "random_actions": torch.zeros(2, 3, dtype=torch.long)}
    },
    exploration.noisy_linear: {
        **{"x": X, "weight": EYE, "weight_scale": EYE, "bias": ONE, "bias_scale": ONE},
        **{"weight_noise": EYE, "bias_noise": ONE},
    },
    exploration.factorised_noise: {"input_noise": ROW, "output_noise": ROW},
    exploration.ornstein_uhlenbeck: {"state": ROW, "noise": ROW, "pull": 0.15, "std": 0.1, "dt": 0.01},
}
OTHERS = {"distributions", "statistics"}  # rooms with tests of their own


def call(f, **given):
    """f(**given), where "*" is what follows the arguments in order."""
    if "*" in given:
        rest = given.pop("*")
        return f(*given.values(), rest)
    return f(**given)


def name_of(f):
    return f"{f.__module__.rsplit('.', 1)[1]}.{f.__name__}"


def rows(*kinds):
    """(function, argument) for every argument of the given kind in the table."""
    found = []
    for f, call in GOOD.items():
        for name, value in call.items():
            kind = "tensor" if isinstance(value, torch.Tensor) and value.is_floating_point() else None
            kind = "flags" if isinstance(value, torch.Tensor) and value.dtype == torch.bool else kind
            kind = "number" if isinstance(value, (int, float)) else kind
            if kind in kinds and name != "*":
                found.append(pytest.param(f, name, id=f"{name_of(f)}-{name}"))
    return found


def test_the_table_is_complete():
    public = set()
    for module in pkgutil.iter_modules(upslope.core.__path__):
        if module.name.startswith("_") or module.name in OTHERS:
            continue
        room = importlib.import_module(f"upslope.core.{module.name}")
        own = inspect.getmembers(room, lambda x: inspect.isfunction(x) and x.__module__ == room.__name__)
        public |= {f for name, f in own if not name.startswith("_")}
    assert public == set(GOOD)


@pytest.mark.parametrize("f", GOOD, ids=name_of)
def test_good_calls_are_accepted_in_both_precisions(f):
    call(f, **GOOD[f])
    if any(isinstance(v, tuple) for v in GOOD[f].values()):
        return
    double = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in GOOD[f].items()}
    leaves = torch.utils._pytree.tree_leaves(call(f, **double))
    if f is not returns.boundaries:
        assert all(x.dtype == torch.float64 for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point())


@pytest.mark.parametrize("f", GOOD, ids=name_of)
def test_every_function_documents_itself(f):
    """Source, an example that is run, and what it raises; the equation is for a reader to judge."""
    text = inspect.getdoc(f)
    assert ">>>" in text
    assert "Source" in text or "Source" in inspect.getdoc(inspect.getmodule(f)) or f in UNSOURCED
    assert "Raises" in text or "raises" in text or f in UNSOURCED
    signature = inspect.signature(f)
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty


UNSOURCED = {returns.episode_start, trust_region.modular_rl, trust_region.ppo_paper, trust_region.lecture}

# A lone tensor, or one whose shape is free, has no wrong shape.
FREE = {
    ("advantages.length_adaptive_lambda", "lengths"),
    ("baselines.moving_average", "episode_returns"),
    ("preferences.centred", "rewards"),
}
LONE = {
    *("baselines.constant", "baselines.scores", "preferences.ranking", "preferences.centred", "values.softmax_value"),
    *("advantages.group_relative", "advantages.leave_one_out", "importance.effective_sample_size"),
    *("returns.episode_start", "trust_region.fisher_operator", "exploration.factorised_noise"),
    *("trust_region.conjugate_gradient", "trust_region.natural_gradient", "trust_region.natural_step"),
    "trust_region.linear_quadratic_step",
}


@pytest.mark.parametrize(("f", "name"), rows("tensor"))
def test_wrong_shapes(f, name):
    value = GOOD[f][name]
    if (name_of(f), name) in FREE:
        pytest.skip("any shape is right")
    # The number of actions, inputs or parameters is free: spoil the samples there.
    axis = 0 if value.ndim == 3 or f in (kronecker.factors, baselines.minimum_variance) else -1
    wrong = value.new_tensor(0.5) if name_of(f) in LONE else torch.cat([value, value.narrow(axis, 0, 1)], axis)
    with pytest.raises(ValueError, match=r"shape|axes|inputs|samples") as caught:
        call(f, **{**GOOD[f], name: wrong})
    assert not isinstance(caught.value, jaxtyping.TypeCheckError)
    assert any(given in str(caught.value) for given in (*GOOD[f], "b must"))


def stacked(value, times):
    """The same call twice as many rows: arguments along a new first axis, the second a changed copy."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point():
        return torch.stack([value * scale for scale in times])
    return torch.stack([value.flip(-1) if scale != 1 else value for scale in times])


ALONE = {"kronecker", "trust_region", "baselines", "reductions"}  # vectors, matrices, or a sum over all axes
ALL_AXES = {
    *("advantages.whiten", "advantages.process_relative", "surrogates.clip_fraction", "values.proximal"),
    *("preferences.centred", "exploration.noisy_linear", "exploration.factorised_noise"),
    *("exploration.linear_schedule", "exploration.exponential_schedule", "exploration.robbins_monro"),
}


@pytest.mark.parametrize(
    "f", [f for f in GOOD if name_of(f) not in ALL_AXES and name_of(f).split(".")[0] not in ALONE], ids=name_of
)
def test_every_other_axis_is_batch(f):
    """Stacked calls give the stacked results, with axes before time (or actions, or group), and with none."""
    scales, leaves = (1.0, 0.5), torch.utils._pytree.tree_leaves
    whole = f(**{k: stacked(v, scales) for k, v in GOOD[f].items()})
    for i in range(2):
        part = f(**{k: stacked(v, scales)[i] if isinstance(v, torch.Tensor) else v for k, v in GOOD[f].items()})
        for one, all_ in zip(leaves(part), leaves(whole), strict=True):
            torch.testing.assert_close(all_[i], one)
    if f is returns.boundaries or f is advantages.length_adaptive_lambda:
        return
    row = f(**{k: v[0] if isinstance(v, torch.Tensor) else v for k, v in GOOD[f].items()})
    full = f(**GOOD[f])
    for one, all_ in zip(leaves(row), leaves(full), strict=True):
        torch.testing.assert_close(all_[0], one)


ELEMENTWISE = [
    *(advantages.advantage, importance.first_order, importance.truncated, values.squared_error, values.huber),
    *(values.clipped_squared_error, values.td_target, values.soft_value, values.soft_target, values.polyak),
    *(surrogates.log_prob, surrogates.ratio, surrogates.clipped, surrogates.clipped_ratio, surrogates.dual_clip),
    *(surrogates.cispo, surrogates.decoupled, surrogates.kl_penalised, surrogates.entropy_bonus),
    *(divergences.k1, divergences.k2, divergences.k3, divergences.reverse_k3, preferences.bradley_terry),
    *(preferences.preference_probability, preferences.implicit_reward, preferences.dpo, preferences.ipo),
]


@pytest.mark.parametrize("f", ELEMENTWISE, ids=name_of)
def test_elementwise_functions_take_single_numbers(f):
    one = f(**{k: v[1, 2] if isinstance(v, torch.Tensor) else v for k, v in GOOD[f].items()})
    torch.testing.assert_close(one, f(**GOOD[f])[1, 2])


def test_other_functions_take_single_numbers_where_they_can():
    scalar = torch.tensor(0.5)
    assert reductions.token_mean(scalar) == 0.5
    assert advantages.whiten(torch.tensor([1.0, 1.0])).tolist() == [0.0, 0.0]
    assert baselines.moving_average(baselines.MovingAverage(), scalar, 0.9).mean == 0.5
    assert surrogates.clip_fraction(scalar, scalar, 0.2, 0.2) == 0.0
    assert preferences.centred(scalar, ROW) == 0.5 - ROW.mean()
    assert values.q_target(scalar, Q[0, 0], scalar) == 0.5 + 0.5 * Q[0, 0].max()
    assert values.dueling(scalar, torch.tensor([1.0, 3.0])).tolist() == [-0.5, 1.5]
    assert values.soft_q_target(scalar, Q[0, 0], 0, scalar) == 0.5 + 0.5 * Q[0, 0].max()
    assert exploration.epsilon_greedy(Q[0, 0], 0.0, scalar, torch.tensor(0)) == Q[0, 0].argmax()
    assert torch.equal(surrogates.sequence_ratio(X[0], X[0]), torch.tensor(1.0))


# Documented defaults: leaving one out is giving it.
DEFAULTS = {
    advantages.vtrace: {"rho_bar": 1.0, "c_bar": 1.0},
    advantages.group_relative: {"scale": "group", "ddof": 1, "eps": 1e-4},
    advantages.process_relative: {"ddof": 1, "eps": 1e-4},
    advantages.whiten: {"mask": None, "shift_mean": True, "eps": 1e-8},
    advantages.length_adaptive_lambda: {"alpha": 0.05},
    baselines.time_dependent: {"mask": None},
    baselines.minimum_variance: {"per_parameter": False},
    surrogates.clipped: CLIPS,
    surrogates.clipped_ratio: CLIPS,
    surrogates.dual_clip: {**CLIPS, "clip_dual": 3.0},
    surrogates.cispo: {"clip_low": 1.0, "clip_high": 0.2},
    surrogates.decoupled: {**CLIPS, "cap": 2.0},
    surrogates.sequence_ratio: {"mask": None, "length_normalised": False, "log_clamp": 20.0},
    surrogates.clip_fraction: {"mask": None},
    values.huber: {"threshold": 1.0},
    trust_region.fisher_operator: {"damping": 0.0},
    trust_region.fisher_vector_product: {"damping": 0.0},
    trust_region.conjugate_gradient: {"iterations": 10, "tolerance": 1e-10},
    trust_region.natural_gradient: {"iterations": 10, "tolerance": 1e-10},
    trust_region.natural_step: {"iterations": 10},
    trust_region.linear_quadratic_step: {"iterations": 10},
    trust_region.line_search: {"shrink": 0.5, "max_backtracks": 10, "accept_ratio": 0.1},
    trust_region.modular_rl: {"coef": 1.0},
    trust_region.ppo_paper: {"coef": 1.0},
    trust_region.lecture: {"coef": 1.0},
    kronecker.factors: {"bias": True},
    preferences.dpo: {"label_smoothing": 0.0},
    exploration.robbins_monro: {"scale": 1.0, "offset": 1.0, "power": 1.0},
    reductions.token_mean: {"mask": None, "total": None},
    reductions.sequence_mean: {"mask": None, "total": None},
    reductions.fixed_length_mean: {"total": None},
    returns.boundaries: {"dtype": torch.float32},
}
# Arguments that make every default felt.
HARD = torch.diag(torch.logspace(0, 6, 40, dtype=torch.float64))
FELT = {
    "ratios": torch.tensor([[3.0, 0.1, 1.1], [9.0, 0.01, 0.9]]),
    "logp": torch.tensor([[1.2, -2.0, 0.1], [2.2, -5.0, -0.1]]),
    "logp_old": torch.zeros(2, 3),
    "logp_behavior": torch.tensor([[-3.0, 0.5, 0.1], [2.2, 0.5, -0.1]]),
    "psi": torch.tensor([[-1.0, 1.0, -0.1], [1.0, -1.0, 0.1]]),
    "product": lambda v: HARD @ v,
    "b": torch.ones(40, dtype=torch.float64),
    "gradient": torch.ones(40, dtype=torch.float64),
    "lengths": torch.tensor([30.0, 300.0]),
    "targets": torch.tensor([[5.0, -5.0, 0.1], [1.5, 2.5, -0.1]]),
    "evaluate": lambda x: (0.1 * x.sum() if x.sum() < 0.9 else -x.sum(), 0.0),
    "theta": torch.zeros(1),
    "step": torch.ones(1),
    "vector": torch.ones(1),
}


@pytest.mark.parametrize(
    ("f", "name"), [pytest.param(f, n, id=f"{name_of(f)}-{n}") for f in DEFAULTS for n in DEFAULTS[f]]
)
def test_defaults_are_the_documented_ones(f, name):
    given = {k: FELT.get(k, v) for k, v in GOOD[f].items() if k not in DEFAULTS[f] and k != "*"}
    if f is trust_region.line_search:
        given |= {"step": ONE[:1]}
    left_out, in_full = f(**given), f(**given, **{name: DEFAULTS[f][name]})
    if f is trust_region.fisher_operator:
        left_out, in_full = left_out(given["theta"] + 1), in_full(given["theta"] + 1)
    for one, other in zip(*(torch.utils._pytree.tree_leaves(x) for x in (left_out, in_full)), strict=True):
        assert one == other if not isinstance(one, torch.Tensor) else torch.equal(one, other)


@pytest.mark.parametrize(("f", "name"), rows("tensor"))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity(f, name, bad):
    """Where the discount is not 0 and the mask selects, no NaN gets through; infinite ratios neither."""
    if (name_of(f), name) in {*NOT_CHECKED} or name_of(f) in NO_VALUES:
        pytest.skip("documented: its values are not read, or may be anything")
    value = GOOD[f][name].clone()
    value[(0,) * value.ndim] = bad
    wanted = DERIVED.get((name_of(f), name), f"{name} must be finite, got {bad}")
    with pytest.raises(ValueError, match=wanted):
        call(f, **{**GOOD[f], name: value})


# Where the message names an argument of the function that does the work.
DERIVED = {
    **{(f"{f}", "continues"): "traces must be finite" for f in ("returns.return_to_go", "returns.total_return")},
    **{(f"importance.{f}", "continues"): "traces must be finite" for f in ("trajectory", "simplified_causal")},
    ("advantages.baselined_return", "continues"): "traces must be finite",
    **{(f"values.{f}", "next_q"): "next_values must be finite" for f in ("q_target", "expected_target")},
    ("values.expected_target", "next_probs"): "next_values must be finite",
    ("values.soft_q_target", "next_q"): "q must be finite",
    **{("values.soft_target", f"next_{x}"): f"{x} must be finite" for x in ("q1", "q2", "logp")},
    **{(f"trust_region.natural_{x}", "gradient"): "b must be finite" for x in ("gradient", "step")},
    ("trust_region.linear_quadratic_step", "gradient"): "b must be finite",
    ("preferences.ranking", "rewards"): "chosen must be finite",
    **{(f"preferences.{f}", f"logp_{x}"): "logp must be" for f in ("dpo", "ipo") for x in ("chosen", "rejected")},
    **{(f"preferences.{f}", f"logp_ref_{x}"): "logp_ref must" for f in ("dpo", "ipo") for x in ("chosen", "rejected")},
}
NO_VALUES = {
    "returns.episode_start",
    "advantages.length_adaptive_lambda",
    "trust_region.fisher_operator",
    "trust_region.fisher_vector_product",
    "trust_region.line_search",  # NaN is simply not accepted
    "kronecker.precondition",
    "surrogates.clip_fraction",  # a diagnostic
    "values.action_value",
}
NOT_CHECKED = [
    ("baselines.scores", "theta"),
    ("exploration.epsilon_greedy", "uniform"),
    ("returns.boundaries", "lam"),
]

# number -> values that must be refused
NEGATIVE = [-0.1, math.nan, math.inf]


@pytest.mark.parametrize(("f", "name"), rows("number"))
@pytest.mark.parametrize("bad", NEGATIVE)
def test_negative_nan_and_infinite_coefficients(f, name, bad):
    if f is exploration.linear_schedule and name in ("start", "end") and bad == -0.1:
        pytest.skip("a schedule may go through zero")
    if f is trust_region.adapt_proportionally and name == "kl" and bad == -0.1:
        pytest.skip("an estimate may be negative")
    with pytest.raises(ValueError, match=name):
        f(**{**GOOD[f], name: bad})


ZERO_REFUSED = {
    *(
        "n",
        "k",
        "length",
        "duration",
        "iterations",
        "alpha_of_length",
        "cap",
        "log_clamp",
        "threshold",
        "delta",
        "beta",
    ),
    *("damping", "learning_rate", "kl_clip", "target", "scale", "offset", "shrink", "total"),
}


@pytest.mark.parametrize(("f", "name"), [p for p in rows("number") if p.values[1] in ZERO_REFUSED])
def test_zero_where_zero_means_nothing(f, name):
    allowed = {"surrogates.kl_penalised", "trust_region.fisher_operator", "trust_region.fisher_vector_product"}
    if name_of(f) in allowed:
        f(**{**GOOD[f], name: 0.0})
    else:
        with pytest.raises(ValueError, match=name):
            f(**{**GOOD[f], name: 0})


AT_MOST_ONE = {"gamma", "lam", "decay", "tau", "epsilon", "accept_ratio", "ddof", "label_smoothing", "power", "shrink"}


@pytest.mark.parametrize(("f", "name"), [p for p in rows("number") if p.values[1] in AT_MOST_ONE])
def test_above_one(f, name):
    with pytest.raises(ValueError, match=name):
        f(**{**GOOD[f], name: 2 if name == "ddof" else 1.01})


@pytest.mark.parametrize(("f", "name"), rows("flags"))
def test_masks(f, name):
    good = {k: v for k, v in GOOD[f].items() if k != "total"}
    f(**good)
    with pytest.raises(ValueError, match=f"{name} must be boolean"):
        f(**{**good, name: good[name].float()})
    with pytest.raises(ValueError, match=f"{name}|truncated"):
        f(**{**good, name: good[name][:1]})
    if name == "mask" and f is not surrogates.sequence_ratio:
        with pytest.raises(ValueError, match=r"mask must select at least one|at least 2 elements"):
            f(**{**good, name: torch.zeros_like(good[name])})


@pytest.mark.parametrize(("f", "name"), rows("tensor"))
def test_integers_are_refused(f, name):
    if f is advantages.length_adaptive_lambda:
        pytest.skip("lengths may be integers")
    if name_of(f) in {"kronecker.precondition", "values.action_value", "returns.episode_start"}:
        pytest.skip("any dtype works")
    with pytest.raises(ValueError, match="floating point"):
        call(f, **{**GOOD[f], name: GOOD[f][name].long()})


def refused(match, f, **changes):
    with pytest.raises(ValueError, match=match):
        f(**{**GOOD[f], **changes})


def test_what_else_is_refused():
    refused("groups of at least 2", advantages.group_relative, rewards=X[:, :1])
    refused("groups of at least 2", advantages.leave_one_out, rewards=X[:, :1])
    line = {"step_rewards": ROW, "step_ends": torch.tensor([0, 1, 2])}
    refused("at least 2 axes", advantages.process_relative, **line)
    refused("at least 2 axes", baselines.time_dependent, returns_to_go=ROW, mask=None)
    refused("at least 2 axes", baselines.minimum_variance, scores=ROW, episode_returns=torch.tensor(1.0))
    refused("values must be finite, got nan", advantages.whiten, values=X * math.nan, mask=None)
    refused("scale must be one of 'group', 'batch', 'none', got 'std'", advantages.group_relative, scale="std")
    ends = torch.tensor([[0, 1, 3], [1, 2, -1]])
    refused(r"step_ends must be in \[-1, 3\), got -1 to 3", advantages.process_relative, length=3)
    refused(r"step_ends must be in", advantages.process_relative, step_ends=ends - 1)
    refused(r"int64 of step_rewards' shape \[2, 3\]", advantages.process_relative, step_ends=ends.float())
    refused("int64", advantages.process_relative, step_ends=ends[:, :2])
    refused("at least 2 steps", advantages.process_relative, step_ends=torch.full((2, 3), -1))
    refused(
        "at least 2 elements that count, got 1",
        advantages.whiten,
        mask=torch.tensor([[True, False, False], [False] * 3]),
    )
    refused("at least 2 elements that count, got 1", advantages.whiten, values=X[:1, :1], mask=None)
    refused("decay", baselines.moving_average, decay=1.0)
    refused("decay must be below 1", baselines.moving_average, decay=1)
    for f in (baselines.constant, baselines.moving_average):
        refused("at least one return", f, episode_returns=torch.zeros(0))
    refused("at least one return", baselines.time_dependent, returns_to_go=X[:0], mask=None)
    refused("at least one return", baselines.minimum_variance, scores=X[:0], episode_returns=torch.zeros(0))
    refused("at least one sample", importance.effective_sample_size, log_weights=torch.zeros(2, 0))
    names = "rewards, next_values, discounts, continues must have one shape"
    refused(names, returns.return_to_go, continues=X[:, :2])
    wide = {"logp": torch.ones(2, 4), "logp_behavior": torch.ones(2, 4)}
    for f in (importance.trajectory, importance.causal, importance.simplified_causal):
        refused("logp, logp_behavior, rewards.* must have one shape", f, **wide)
    for f in (importance.trajectory, importance.simplified_causal):
        refused("although rewards are: it overflows", f, logp=400 * torch.ones(2, 3))
    refused("weights must be finite, got inf", importance.causal, logp=400 * torch.ones(2, 3))
    refused("overflows torch.float32", surrogates.ratio, logp=100 * torch.ones(2, 3))
    for f in (divergences.k3, divergences.reverse_k3):
        refused("although logp_q, logp_p are: it overflows", f, logp_p=100 * torch.ones(2, 3))
    refused("clip_dual must be above 1", surrogates.dual_clip, clip_dual=1.0)
    refused("at least 2 completions", preferences.ranking, rewards=X[:, :1])
    refused("at least one reward", preferences.centred, reference_rewards=torch.zeros(0))
    refused("label_smoothing", preferences.dpo, label_smoothing=0.6)
    refused("at least one element", reductions.token_mean, x=torch.zeros(0), mask=None, total=None)
    refused("at least one element", reductions.fixed_length_mean, x=torch.zeros(2, 0), mask=None, total=None)
    refused(r"actions must be int64 of shape \[2, 3\]", values.action_value, actions=torch.zeros(2, 3))
    refused(r"actions must be int64", values.action_value, actions=torch.zeros(3, dtype=torch.long))
    refused("random_actions must be int64", exploration.epsilon_greedy, random_actions=torch.zeros(2, 3))
    refused("random_actions", exploration.epsilon_greedy, random_actions=torch.zeros(3, dtype=torch.long))
    refused(r"power must be in \(0.5, 1\]", exploration.robbins_monro, power=0.5)
    refused("step must not be negative", exploration.linear_schedule, step=-1)
    refused(r"shrink must be in \(0, 1\), got 1", trust_region.line_search, shrink=1.0)
    refused("n must be a whole number of at least 1, got 1.5", returns.n_step_return, n=1.5)
    refused("x must have 3 inputs", exploration.noisy_linear, x=torch.ones(2, 2))
    wide = {"x": torch.ones(2, 4), "weight": torch.ones(3, 4)}
    refused("weight, weight_scale, weight_noise must have one shape", exploration.noisy_linear, **wide)
    refused("at least 2 axes", kronecker.factors, x=ROW)
    refused("at least 2 axes", kronecker.factors, g=ROW)
    refused("same samples", kronecker.factors, g=X[:1])
    refused("same samples, at least one", kronecker.factors, x=X[:0], g=X[:0])
    refused(r"gradient must have shape \[3, 3\]", kronecker.precondition, gradient=torch.ones(3, 2))
    refused("logits_p must be finite", divergences.categorical_kl, logits_p=torch.tensor([[0.0, -math.inf, 0.0]] * 2))
    refused("limit", trust_region.adapt_proportionally, state=ZIEGLER._replace(limit=0.0))
    for name in ("coef", "target", "horizon"):
        refused(name, trust_region.adapt_proportionally, state=ZIEGLER._replace(**{name: 0.0}))
    with pytest.raises(ValueError, match="vector"):
        trust_region.fisher_operator(lambda x: x, mean_square, ROW)(torch.ones(2))


def test_errors_say_where():
    bad = X.clone()
    bad[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"rewards must be finite, got nan at index \(1, 2\)"):
        advantages.gae(bad, X, X, UNIT, UNIT)
    with pytest.raises(ValueError, match=r"psi must be finite, got nan"):
        surrogates.clipped_ratio(X, X, bad)
    with pytest.raises(ValueError, match=r"got rewards float32\[2, 3\], values float32\[3\]"):
        advantages.td_residual(X, ROW, X, UNIT)
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], got 1.5"):
        returns.boundaries(FLAGS, FLAGS, 1.5, 1.0)
    with pytest.raises(ValueError, match=r"eps must be at least 0 and finite, got -1"):
        advantages.whiten(X, eps=-1)


def test_a_sum_that_overflows_is_no_error_if_every_element_is_finite():
    """The cheap check sums; only the precise one that follows may refuse."""
    large = torch.full((3,), 3e38)
    assert advantages.advantage(large, torch.zeros(3)).tolist() == large.tolist()


def test_masked_elements_may_be_anything():
    spoiled = X.masked_fill(~MASK, math.nan)
    for reduce in (reductions.token_mean, reductions.sequence_mean):
        assert reduce(spoiled, MASK) == reduce(X, MASK)
    assert torch.equal(advantages.whiten(spoiled, MASK), advantages.whiten(X, MASK))
    assert torch.equal(
        surrogates.sequence_ratio(spoiled, X, MASK), surrogates.sequence_ratio(X.masked_fill(~MASK, 7.0), X, MASK)
    )


def test_clip_of_mixed_bounds():
    x = torch.tensor([-2.0, 0.5, 3.0])
    for low, high in ((0, 1), (0.0, torch.tensor(1.0)), (torch.tensor(0), 1.0), (torch.tensor(0.0), torch.tensor(1.0))):
        assert _checks.clip(x, low, high).tolist() == [0.0, 0.5, 1.0]
    double = _checks.clip(x.double(), 0.1, torch.tensor(1.1, dtype=torch.float64))
    assert double.tolist() == [0.1, 0.5, 1.1]
    assert _checks.clip(x, 0.1, torch.tensor(1.1, dtype=torch.float64)).dtype == torch.float32
