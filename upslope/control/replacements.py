"""Replaced in Inductor's graph, which is slow with them: tanh, biases, products by MKL on AMD, late writes.

tanh is 2 σ(2x) - 1, to 2e-7 of it: Sleef's takes seven times as long as the exponential in σ. It is replaced after
differentiation, so that its derivative is 1 - tanh² and needs nothing but the result.

A product with a bias is a product, and the bias is added where its result is used next: MKL wants the bias copied into
every row beforehand, which takes as long as a small product.

MKL keeps half of the vector width of an AMD processor with AVX-512 unused: 100 GFLOP/s of float32 where oneDNN reaches
210. Inductor asks MKL for every product and oneDNN only for products with frozen weights, so large products are
replaced in its graph. Small ones cost their call.

What a program writes into its arguments is written at the graph's end. A θ that is used after its step, as where the
program goes on to choose actions, would be written twice: it is written where it was computed.
"""

import functools
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

SMALLEST = 64 * 256 * 256  # rows × inner × columns of a product that oneDNN makes faster, its call included
MANY = 4  # products of one bmm that are called one by one
ALIASES = (  # views, some of which are not said to be any
    operator.getitem, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default,
    torch.ops.prims.convert_element_type.default,
)  # fmt: skip
_library = torch.library.Library("upslope", "DEF")


class Replacements(CustomGraphPass):
    """The pass over a graph: `tanh` and `addmm` of float32, `mm`, `addmm` and `bmm` of large matrices, `copy_`.

    Args:
        products: shall they become `upslope::product`?
    """

    def __init__(self, products: bool) -> None:
        self.products = products

    def __call__(self, graph: fx.Graph) -> None:
        aten = torch.ops.aten
        for node in [*graph.find_nodes(op="call_function", target=aten.tanh.default)]:
            if node.meta["val"].dtype == torch.float32:
                _logistic(graph, node, node.args[0])
        if self.products:
            self._multiply(graph)
        for node in [*graph.find_nodes(op="call_function", target=aten.addmm.default)]:
            kind = node.meta["val"]  # bfloat16 would be rounded twice
            if not node.kwargs and kind.dtype == torch.float32 and kind.device.type == "cpu":
                _after(graph, node, *node.args)
        for node in [*graph.find_nodes(op="call_function", target=aten.copy_.default)]:
            _early(graph, node)

    def _multiply(self, graph: fx.Graph) -> None:
        """Large products by oneDNN."""
        aten = torch.ops.aten
        for node in [*graph.find_nodes(op="call_function", target=aten.mm.default)]:
            _replace(graph, node, *node.args)
        for node in [*graph.find_nodes(op="call_function", target=aten.addmm.default)]:
            if not node.kwargs and node.args[0].meta["val"].shape == node.meta["val"].shape[1:]:  # no number for all
                bias, a, b = node.args
                _replace(graph, node, a, b, bias)
        for node in [*graph.find_nodes(op="call_function", target=aten.bmm.default)]:
            _unroll(graph, node, *node.args)

    def uuid(self) -> Any:
        """Part of the key that a program is kept under."""
        return get_hash_for_files((__file__,), str(self.products))


def _logistic(graph: fx.Graph, node: fx.Node, x: Any) -> None:
    """tanh x as 2 σ(2x) - 1."""
    aten = torch.ops.aten
    with graph.inserting_before(node):
        half = _call(graph, aten.sigmoid.default, _call(graph, aten.mul.Tensor, x, 2.0))
        _put(graph, node, _call(graph, aten.sub.Tensor, _call(graph, aten.mul.Tensor, half, 2.0), 1.0))


def _after(graph: fx.Graph, node: fx.Node, bias: Any, a: Any, b: Any) -> None:
    """The bias after the product."""
    aten = torch.ops.aten
    with graph.inserting_before(node):
        _put(graph, node, _call(graph, aten.add.Tensor, _call(graph, aten.mm.default, a, b), bias))


def _early(graph: fx.Graph, copy: fx.Node) -> None:
    """What is written into an argument is written where it was computed, and read from there by what comes later."""
    argument: Any
    value: Any
    argument, value, *_ = copy.args
    if argument.op != "placeholder" or not isinstance(value, fx.Node) or value.op == "placeholder":
        return
    here, there = value.meta["val"], argument.meta["val"]
    if (here.dtype, here.shape, here.stride()) != (there.dtype, there.shape, there.stride()):
        return
    place = {node: i for i, node in enumerate(graph.nodes)}
    after = max(_readers(argument, copy) | {value}, key=place.__getitem__)
    later = [user for user in value.users if place[user] > place[after] and user is not copy]
    if later and all(user.op == "call_function" for user in later):
        after.append(copy)
        for user in later:
            user.replace_input_with(value, copy)


def _readers(node: fx.Node, copy: fx.Node) -> set[fx.Node]:
    """What reads a node's memory, of views of it as well."""
    found: set[fx.Node] = set()
    for user in node.users:
        if user is not copy:
            view = user.target in ALIASES or getattr(user.target, "is_view", False)
            found |= {user} | (_readers(user, copy) if view else set())
    return found


def _large(left: Tensor, right: Tensor) -> bool:
    size = left.shape[-2] * left.shape[-1] * right.shape[-1]
    return left.dtype == torch.float32 and left.device.type == "cpu" and isinstance(size, int) and size >= SMALLEST


def _replace(graph: fx.Graph, node: fx.Node, a: Any, b: Any, bias: Any = None) -> None:
    if _large(a.meta["val"], b.meta["val"]):
        with graph.inserting_before(node):
            _put(graph, node, _product(graph, a, b, bias))


def _unroll(graph: fx.Graph, node: fx.Node, a: Any, b: Any) -> None:
    """A product for each of a few: twin critics."""
    count = a.meta["val"].shape[0]
    if _large(a.meta["val"], b.meta["val"]) and count <= MANY:
        with graph.inserting_before(node):
            aten = torch.ops.aten
            pairs = [[_call(graph, aten.select.int, whole, 0, i) for whole in (a, b)] for i in range(count)]
            rows = [_call(graph, aten.unsqueeze.default, _product(graph, *pair), 0) for pair in pairs]
            _put(graph, node, _call(graph, aten.cat.default, rows))


def _product(graph: fx.Graph, a: Any, b: Any, bias: Any = None) -> fx.Node:
    _lowering()
    return _call(
        graph, torch.ops.upslope.product.default, a, _call(graph, torch.ops.aten.permute.default, b, [1, 0]), bias
    )


def _call(graph: fx.Graph, target: Any, *arguments: Any) -> fx.Node:
    node = graph.call_function(target, arguments)
    node.meta["val"] = target(*fx.map_arg(arguments, lambda given: given.meta["val"]))
    return node


def _put(graph: fx.Graph, node: fx.Node, instead: fx.Node) -> None:
    node.replace_all_uses_with(instead)
    graph.erase_node(node)


_library.define("product(Tensor a, Tensor b, Tensor? bias) -> Tensor")


@torch.library.impl(_library, "product", "CPU")
def _multiply(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a bᵀ + bias."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


@torch.library.impl(_library, "product", "Meta")
def _shape(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0])


@functools.cache
def _lowering() -> None:
    """Tell Inductor how a product is called from C++: as it calls a linear layer with frozen weights."""
    from torch._inductor import ir, lowering
    from torch._inductor.mkldnn_ir import LinearUnary, _create_output_node

    @lowering.register_lowering(torch.ops.upslope.product.default, type_promotion_kind=None)
    def lower(a: Any, b: Any, bias: Any) -> Any:
        inputs = [LinearUnary.realize_input(part) for part in (a, b, bias) if part is not None]
        constants = ["none", [-1], ""] if bias is not None else [None, "none", [-1], ""]
        size = [a.get_size()[0], b.get_size()[0]]
        layout = ir.FixedLayout(device=a.get_device(), dtype=a.get_dtype(), size=size)
        return ir.TensorBox.create(
            _create_output_node(LinearUnary(layout=layout, inputs=inputs, constant_args=constants))
        )
