"""What is replaced in compiled programs: tanh, and products by oneDNN; the same numbers."""

import pytest
import torch
from torch import Tensor

from upslope.control import ahead, compilation
from upslope.control.replacements import Replacements

if not torch.backends.mkldnn.is_available():
    pytest.skip("this PyTorch has no oneDNN", allow_module_level=True)


class Counting(Replacements):
    """Notes how many products a graph has after the pass."""

    def __init__(self) -> None:
        super().__init__(products=True)
        self.found: list[int] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        super().__call__(graph)
        self.found.append(sum(node.target is torch.ops.upslope.product.default for node in graph.nodes))
        assert not graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default)  # none with its bias

    def uuid(self) -> None:
        """None: the graph is not taken from the cache, where no pass would run."""


@pytest.mark.slow
def test_large_products_are_replaced_and_equal_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    counting = Counting()

    def step(x: Tensor, w: Tensor, bias: Tensor, g: Tensor, twin: Tensor, small: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.addmm(bias, x.tanh(), w.t()),  # a layer
            g @ w,  # its inputs' gradient
            (g + 1.0).t() @ x,  # its weights'
            torch.bmm(twin, (twin * 2.0).transpose(1, 2)),  # twin critics
            small @ small,
            torch.addmm(bias[:1], x, w.t()),  # a bias of one number for all columns
            (w @ w).t() @ w.t(),  # a product of a product
        )  # fmt: skip

    given = draw(96, 320), draw(320, 320), draw(320), draw(96, 320), draw(2, 256, 300), draw(64, 64)
    program = torch.compile(
        step, fullgraph=True, options={"cpp_wrapper": True, "post_grad_custom_post_pass": counting}
    )  # fmt: skip
    for ours, exact in zip(program(*given), step(*(part.double() for part in given)), strict=True):
        scale = float(exact.abs().max())
        assert float((ours - exact).abs().max()) < 1e-5 * scale
        assert ours.shape == exact.shape
    assert counting.found == [7]  # the bmm is two of them; the small and the one number's are none


@pytest.mark.slow
def test_a_compiled_gradient_step_is_the_same_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of a 256×256 network, its gradient against float64's."""
    monkeypatch.setattr(compilation, "onednn_pays", lambda: True)
    generator = torch.Generator().manual_seed(1)
    x, first, second = (torch.randn(shape, generator=generator) for shape in ((256, 256), (256, 256), (256, 256)))

    def loss(first: Tensor, second: Tensor, x: Tensor) -> Tensor:
        return ((x @ first / 16.0).tanh() @ second / 16.0).square().mean()

    def gradient(first: Tensor, second: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return torch.func.grad(loss, argnums=(0, 1))(first, second, x)

    ours = ahead.compiled(gradient, loops=False)(first, second, x)
    for part, exact in zip(ours, gradient(first.double(), second.double(), x.double()), strict=True):
        assert float((part - exact).abs().max()) < 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_where_they_pay(monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str, expected: bool) -> None:
    monkeypatch.setattr(compilation.Path, "read_text", lambda *_: f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(compilation.Path, "exists", lambda _: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert compilation.onednn_pays.__wrapped__() is expected


def test_tanh_and_its_derivative_are_float64s() -> None:
    """In the middle, where it is flat, and beyond; no tanh is left, and the derivative is taken of the result."""
    x = torch.cat([torch.linspace(-12.0, 12.0, 4001), torch.tensor([-1e30, 0.0, 1e-6, 1e30, torch.inf])])
    left: list[int] = []

    class Looking(Replacements):
        def __call__(self, graph: torch.fx.Graph) -> None:
            super().__call__(graph)
            left.append(sum(node.target is torch.ops.aten.tanh.default for node in graph.nodes))

        def uuid(self) -> None:
            """None: the graph is not taken from the cache."""

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(x), torch.func.grad(lambda x: torch.tanh(x).sum())(x)

    program = torch.compile(both, fullgraph=True, options={"post_grad_custom_post_pass": Looking(False)})
    bounds = (2e-7, 5e-7)  # of 1 - y²: twice y's, and its own rounding
    for ours, exact, bound in zip(program(x), both(x.double()), bounds, strict=True):
        assert float((ours - exact).abs().max()) < bound
    assert left == [0]


@pytest.mark.slow
def test_what_is_written_early_or_in_its_place_is_read_as_it_was() -> None:
    """An argument's old numbers where they are wanted, its new ones after; products that are also parts of vectors."""
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=random)  # noqa: E731

    def step(theta: Tensor, memory: Tensor, target: Tensor, slow: Tensor, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        parts, new = slow.view(16, 32), slow + 1.0
        moved, still = x @ new.view(16, 32), x @ parts  # the old numbers are read last
        slow.copy_(new)
        whole = theta[:512].view(16, 32)
        before, old = x @ whole, theta.clone()
        product = g.t() @ x
        gradient = torch.cat([product.reshape(512), g.sum(0), (g.t() @ g).reshape(1024)])
        square = (x.t() @ x).reshape(256)
        again = torch.cat([product.reshape(512), square[16:]])  # the one twice, the other not whole
        begun = torch.cat([g.sum(0), (x.t() @ x).reshape(256)[:16], x.sum(0), (g[:, :16].t() @ x).reshape(256)[:16]])
        memory.lerp_(gradient, 0.5)
        theta.add_(memory)
        target.lerp_(theta, 0.25)
        late = x @ old[:512].view(16, 32)
        after = x @ whole + theta[512:544]
        theta[:32].mul_(2.0)
        return {
            "moved": moved, "still": still, "before": before, "late": late, "after": after,
            "product": product * 1.0, "again": again, "begun": begun,
            "gradient": gradient.square().sum(), "last": theta[:512].view(16, 32).t() @ x.t(),
        }  # fmt: skip

    given = [draw(1568), draw(1568), draw(1568), draw(512), draw(8, 16), draw(8, 32)]
    exact = [part.double() for part in given]
    program = ahead.compiled(step, loops=False)
    for _ in range(2):
        ours, theirs = program(*given), step(*exact)
        for key, value in theirs.items():
            torch.testing.assert_close(
                ours[key].double(), value, rtol=1e-4, atol=1e-4, msg=lambda text, k=key: f"{k}: {text}"
            )
        for mine, other in zip(given, exact, strict=True):
            torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-4)
