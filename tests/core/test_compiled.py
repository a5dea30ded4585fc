"""Core under `torch.compile(fullgraph=True)` and `torch.func`: no graph break, no read of a value, the same numbers.

In a process of its own: the shape checker of the other tests is no part of what gets compiled.
"""

import subprocess
import sys
import textwrap

PROGRAM = """
import torch
from upslope.core import advantages, divergences, importance, reductions, returns, surrogates, values

torch.manual_seed(0)
logp, old, psi, v, target = (torch.randn(4, 40, dtype=torch.float64) / 4 for _ in range(5))
flags = torch.rand(4, 40) < 0.1, torch.rand(4, 40) < 0.1
mask = torch.rand(4, 40) < 0.8
clip = torch.tensor(0.2, dtype=torch.float64)


def update(logp, old, psi, v, target, mask, clip):
    discounts, traces = returns.boundaries(*flags, 0.99, 0.95, dtype=torch.float64)
    gae = advantages.gae(psi, v, target, discounts, traces)
    white = advantages.whiten(gae, mask) + advantages.whiten(gae)
    group = advantages.group_relative(psi) + advantages.leave_one_out(psi)
    n_step = returns.n_step_return(psi, target, discounts, traces, 3) + returns.elapsed_discount(discounts, traces)
    weights = importance.causal(logp, old, psi, discounts, traces) + importance.truncated(logp, old, 1.0)
    surrogate = surrogates.clipped_ratio(logp, old, white + group, clip, 0.2) + surrogates.dual_clip(logp, old, psi)
    surrogate = surrogates.entropy_bonus(surrogate, psi, 0.01) + surrogates.cispo(logp, old, psi)
    surrogate = surrogates.kl_penalised(surrogate, divergences.k3(old, logp), 0.1)
    sequence = surrogates.clipped(surrogates.sequence_ratio(logp, old, mask, True), psi[:, 0])
    errors = values.clipped_squared_error(v, target, n_step.detach(), clip) + values.huber(v, target)
    errors = errors + values.squared_error(v, values.td_target(psi, target, discounts))
    share = surrogates.clip_fraction(logp, old, 0.2, 0.2, mask)
    return (
        reductions.token_mean(surrogate + weights, mask)
        - reductions.sequence_mean(errors, mask)
        - reductions.fixed_length_mean(errors, mask, 40)
        + sequence.mean()
        + share
    )


inputs = (logp, old, psi, v, target, mask, clip)
eager = update(*inputs)
compiled = torch.compile(update, fullgraph=True, backend="aot_eager")(*inputs)
torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)

slope = torch.func.grad(update)(*inputs)
leaf = logp.clone().requires_grad_()
(wanted,) = torch.autograd.grad(update(leaf, *inputs[1:]), leaf)
torch.testing.assert_close(slope, wanted, rtol=1e-12, atol=1e-12)
both = torch.compile(lambda *x: torch.func.grad(update)(*x), fullgraph=True, backend="aot_eager")(*inputs)
torch.testing.assert_close(both, wanted, rtol=1e-12, atol=1e-12)

rows = torch.vmap(lambda *x: reductions.token_mean(surrogates.clipped_ratio(*x)))(logp, old, psi)
torch.testing.assert_close(rows, surrogates.clipped_ratio(logp, old, psi).mean(-1))
white = torch.vmap(advantages.whiten)(psi, mask)
torch.testing.assert_close(white[1], advantages.whiten(psi[1], mask[1]))
rows = torch.vmap(lambda *x: reductions.token_mean(surrogates.clipped_ratio(*x)))(logp * torch.nan, old, psi)
assert rows.isnan().all()  # under a transform NaN is the trainer's to see
print("the same")
"""


def test_compiled_and_transformed():
    program = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    result = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert result.stdout.strip().endswith("the same"), result.stderr[-3000:]


def test_methods_table_imports_no_torch():
    program = "import sys; import upslope.methods; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_shape_checker_finds_wrong_shapes():
    """The hook that tests/core installs does catch what signatures forbid."""
    program = """
import jaxtyping, torch
with jaxtyping.install_import_hook("upslope.core", "beartype.beartype"):
    from upslope.core import baselines, returns
integers = torch.zeros(3, dtype=torch.long)
for wrong in (lambda: returns.episode_start(integers), lambda: baselines.constant(torch.ones(2, 2))):
    try:
        wrong()
    except jaxtyping.TypeCheckError:
        print("caught")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["caught", "caught"], result.stderr[-2000:]
