"""The one recurrence behind return-to-go, lambda-return, GAE and V-trace: y_t = x_t + c_t y_{t+1}, y_T = 0.

Linear in T and short in operations: T = 32,768 takes about 150 of them, so that it runs fast eagerly and its compiled
graph stays small. `scan_loop` is the definition, one line; the tests hold the fast form to it.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

# Measured on one core (bench/scan.py).
BLOCK = 16  # steps that a block walks one by one, all blocks side by side: fastest of 16, 32, 64, 128
WALK = 32  # as many steps are walked without blocks
SOLVE = 2**13  # elements, and
MATRIX = 2**19  # matrix elements, up to which one triangular solve beats both


def scan_loop(c: Float[Tensor, "*batch time"], x: Float[Tensor, "*batch time"]) -> Float[Tensor, "*batch time"]:
    """The plain recurrence, step by step: the definition.

    >>> scan_loop(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([1.0, 2.0, 4.0]))
    tensor([3., 4., 4.])
    """
    y = torch.zeros_like(x[..., 0])
    steps = []
    for x_t, c_t in zip(reversed(x.unbind(-1)), reversed(c.unbind(-1)), strict=True):
        y = torch.addcmul(x_t, c_t, y)  # x_t + c_t y
        steps.append(y)
    return torch.stack(steps[::-1], -1)


def scan(c: Float[Tensor, "*batch time"], x: Float[Tensor, "*batch time"]) -> Float[Tensor, "*batch time"]:
    """y_t = x_t + c_t y_{t+1} with y_T = 0, last axis is time; c_{T-1} is never used.

    Small problems are one solve of the bidiagonal system (I - C S) y = x. Long ones are cut into blocks: inside a block
    y_t = a_t + p_t y_end is walked for all blocks at once, and the blocks' heads are the same recurrence, shorter.

    >>> scan(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([1.0, 2.0, 4.0]))
    tensor([3., 4., 4.])
    """
    time = x.shape[-1]
    if c.dtype != x.dtype:  # the solver would silently take the narrower one
        wider = torch.promote_types(c.dtype, x.dtype)
        c, x = c.to(wider), x.to(wider)
    if time <= 1:
        return x
    # Compiled, the solver would be a call out of the program, and the walk is fused.
    if not torch.compiler.is_compiling() and x.numel() <= SOLVE and x.numel() * time <= MATRIX:
        system = torch.diag_embed(-c[..., :-1], offset=1)
        return torch.linalg.solve_triangular(system, x.unsqueeze(-1), upper=True, unitriangular=True).squeeze(-1)
    if time <= WALK:
        return scan_loop(c, x)

    blocks = -(-time // BLOCK)
    missing = blocks * BLOCK - time
    steps = zip(
        *(pad(z, (0, missing)).unflatten(-1, (blocks, BLOCK)).movedim(-1, 0).contiguous().unbind(0) for z in (c, x)),
        strict=True,
    )
    walked: list[tuple[Tensor, Tensor]] = []
    for c_t, x_t in reversed(list(steps)):
        product, partial = walked[-1] if walked else (torch.ones_like(c_t), torch.zeros_like(x_t))
        walked.append((c_t * product, torch.addcmul(x_t, c_t, partial)))
    products, partials = (torch.stack(z[::-1], -1) for z in zip(*walked, strict=True))
    heads = scan(products[..., 0], partials[..., 0])
    after = pad(heads[..., 1:], (0, 1)).unsqueeze(-1)
    return torch.addcmul(partials, products, after).flatten(-2)[..., :time]


def scan_forward(c: Float[Tensor, "*batch time"], x: Float[Tensor, "*batch time"]) -> Float[Tensor, "*batch time"]:
    """y_t = x_t + c_t y_{t-1} with y_{-1} = 0: the same recurrence with time running forward; c_0 is never used.

    >>> scan_forward(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([4.0, 2.0, 1.0]))
    tensor([4., 4., 3.])
    """
    return scan(c.flip(-1), x.flip(-1)).flip(-1)
