"""Programs that are called past Dynamo: every argument where it belongs, what the function holds, nested arguments."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from upslope.control import ahead


@pytest.mark.slow
def test_arguments_go_where_they_belong() -> None:
    """Used in another order than given, one unused, one the function's own, all of one shape, a dict's in any order."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(3, generator=generator)

    def function(unused: Tensor, minuend: Tensor, seen: dict[str, Tensor], subtrahend: Tensor) -> Tensor:
        return seen["b"] * own + seen["a"] - subtrahend / (minuend.square() + 1.0)

    program = ahead.compiled(function)
    for turn in range(4):
        given = torch.randn(5, 3, generator=generator).unbind()
        seen = {"a": given[2], "b": given[3]} if turn % 2 else {"b": given[3], "a": given[2]}
        inputs = (given[0], given[1], seen, given[4])
        torch.testing.assert_close(program(*inputs), function(*inputs))


@pytest.mark.slow
def test_two_programs_of_one_function_are_apart() -> None:
    """A closure's two functions share their code; each keeps what it holds."""

    def scaled(by: Tensor) -> Callable[..., Tensor]:
        return ahead.compiled(lambda x: x.exp() * by)

    one, two, x = scaled(torch.tensor(1.0)), scaled(torch.tensor(2.0)), torch.arange(3.0)
    for _ in range(2):
        torch.testing.assert_close(one(x), x.exp())
        torch.testing.assert_close(two(x), 2.0 * x.exp())
