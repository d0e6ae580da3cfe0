"""Where fp16 is too little: the nodes of a float graph that have to compute in fp32, and why.

A half ends at 65504 and has eleven bits.  A tensor is too much for it where its values come near that end, or where
rounding it changes the outputs.  Whatever reads or writes such a tensor computes in fp32, layers included.

Nodes go by names that hold for a pruned network as well: that of the layer, or what an operator gets its values from.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from hirelc_deploy.exporters._base import Adviser, Arrays, Floats
from hirelc_deploy.exporters._float import FloatGraph
from hirelc_deploy.exporters._graph import constant, name_of, weight_of
from hirelc_deploy.exporters._observe import errors_of, values
from hirelc_deploy.exporters._plan import computed_by
from hirelc_deploy.exporters._trt_half import LARGEST_HALF, half, read_through
from hirelc_deploy.policy import Compute

HEADROOM = 4.0
"""How many times as large values may be on other examples than on those that were looked at."""

MASK = 1e30
"""What is larger hides a place from attention, and is as good cut off at the largest half."""

AT_ONCE = 8
"""Examples whose every tensor is in memory."""

STRICTER = 4.0
"""How much less each may change the outputs where what is bearable by itself is not together."""

ROUNDS = 8
"""Of asking more; then it is all of them."""

ABOUT_SHAPES = {"Shape", "Size"}
"""Operators that read no values."""


def needing_fp32(
    graph: FloatGraph, examples: Sequence[Arrays], *, bearable: float, adviser: Adviser | None = None
) -> dict[str, str]:
    """The layers and operators that fp16 ruins, and why, as `Runtime.needing_fp32` says."""
    return _advised(graph, examples, adviser) if adviser else _seen(graph, examples, bearable)


def nodes_in_fp32(graph: FloatGraph, floats: Floats) -> list[ir.Node]:
    """The operators between layers that are to compute so."""
    wanted = {name for name, compute in floats.items() if compute is Compute.FP32}
    if not wanted:
        return []
    layer_of = graph.layer_of
    return [node for node in graph.model.graph if weight_of(node) is None and computed_by(node, layer_of) in wanted]


def float_names(graph: FloatGraph) -> frozenset[str]:
    """Of all fp32 values: inputs, constants, and what nodes write."""
    proto = onnx.shape_inference.infer_shapes(ir.serde.serialize_model(graph.model)).graph
    kinds = {each.name: each.type.tensor_type.elem_type for each in (*proto.input, *proto.value_info, *proto.output)}
    kinds |= {each.name: each.data_type for each in proto.initializer}
    return frozenset(name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT)


# -- by what an adviser says -----------------------------------------------------------------------------------------


def _advised(graph: FloatGraph, examples: Sequence[Arrays], adviser: Adviser) -> dict[str, str]:
    named = graph.copy()
    for i, node in enumerate(named.model.graph):
        node.name = f"node{i}"
    asked = adviser(ir.serde.serialize_model(named.model).SerializeToString(), examples)
    names = {node: f"node{i}" for i, node in enumerate(graph.model.graph)}
    return _by_name(graph, {node: asked[name] for node, name in names.items() if name in asked})


# -- by what is seen on examples -------------------------------------------------------------------------------------


def _seen(graph: FloatGraph, examples: Sequence[Arrays], bearable: float) -> dict[str, str]:
    floats = float_names(graph)
    tensors = [name for name in _tensors(graph) if name in floats]
    why = _too_large(graph, tensors, examples)
    why |= _too_coarse(graph, [name for name in tensors if name not in why], examples, bearable)
    nodes: dict[ir.Node, str] = {}
    for node in graph.model.graph:
        touched = [name_of(x) for x in (*node.inputs, *node.outputs) if x is not None]
        reasons = [f"{name} {why[name]}" for name in touched if name in why]
        if reasons and node.op_type not in ABOUT_SHAPES:
            nodes[node] = reasons[0]
    return _by_name(graph, nodes)


def _tensors(graph: FloatGraph) -> list[str]:
    """Whatever a node reads or writes."""
    body = graph.model.graph
    read = [x for x in (*body.inputs, *body.initializers.values()) if x.uses()]
    return [name_of(x) for x in (*read, *(x for node in body for x in node.outputs))]


def _too_large(graph: FloatGraph, tensors: Sequence[str], examples: Sequence[Arrays]) -> dict[str, str]:
    """Constants apart: what they are is known, and a mask may be cut off."""
    seen = [name for name in tensors if name not in graph.model.graph.initializers]
    largest = dict.fromkeys(seen, 0.0)
    few = (_part(batch, start) for batch in examples for start in range(0, _size(batch), AT_ONCE))
    for batch in values(graph, seen, few):
        for name, array in batch.items():
            magnitude = np.abs(array)
            largest[name] = max(largest[name], float(np.max(magnitude, initial=0.0, where=magnitude < MASK)))
    return {name: f"has values up to {most:.3g}" for name, most in largest.items() if HEADROOM * most > LARGEST_HALF}


def _size(batch: Arrays) -> int:
    return len(next(iter(batch.values())))


def _part(batch: Arrays, start: int) -> Arrays:
    return {name: array[start : start + AT_ONCE] for name, array in batch.items()}


def _too_coarse(
    graph: FloatGraph, tensors: Sequence[str], examples: Sequence[Arrays], bearable: float
) -> dict[str, str]:
    """Those that must not be rounded so that the outputs bear it that all others are.

    Mostly there are none, which one look says.  A few are found by halving; if each by itself is bearable and all
    together are not, by asking more of each.
    """
    error = errors_of(graph, examples)
    found: dict[str, float] = {}

    def of(names: Sequence[str]) -> float:
        return error(_rounded(graph, names))

    others, rounds = list(tensors), 0
    while (together := of(others)) > bearable:
        limit = bearable / STRICTER**rounds
        found |= _culprits(of, others, limit) if rounds < ROUNDS else dict.fromkeys(others, together)
        others, rounds = [name for name in others if name not in found], rounds + 1
    return {name: f"in halves changes the outputs by {_percent(each)}" for name, each in found.items()}


def _culprits(of: Callable[[Sequence[str]], float], names: Sequence[str], limit: float) -> dict[str, float]:
    """The names that by themselves are beyond the limit, as far as they can be told by halving, and by how much."""
    if not names or (error := of(names)) <= limit:
        return {}
    if len(names) == 1:
        return {names[0]: error}
    middle = len(names) // 2
    return _culprits(of, names[:middle], limit) | _culprits(of, names[middle:], limit)


def _percent(error: float) -> str:
    return f"{100 * error:.2g} % of their variance" if np.isfinite(error) else "more than they are"


def _rounded(graph: FloatGraph, names: Collection[str]) -> FloatGraph:
    """A copy in which these tensors alone are rounded to halves, and computed with in fp32."""
    copied = graph.copy()
    body = copied.model.graph
    wanted = set(names)
    for name, value in body.initializers.items():
        array = constant(value)
        if name in wanted and array is not None:
            value.const_value = ir.Tensor(half(array).astype(np.float32), name=name)
    for value in [*body.inputs, *(value for node in body for value in node.outputs)]:
        if value.name in wanted and value.uses():
            read_through(body, value, [ir.DataType.FLOAT16, ir.DataType.FLOAT])
    return copied


# -- names -----------------------------------------------------------------------------------------------------------


def _by_name(graph: FloatGraph, nodes: Mapping[ir.Node, str]) -> dict[str, str]:
    """Of a layer all that share its weight."""
    layer_of = graph.layer_of
    found: dict[str, str] = {}
    for node, why in nodes.items():
        weight = weight_of(node)
        layers = [] if weight is None else [layer for layer, name in graph.weights.items() if name == weight.name]
        found |= dict.fromkeys(layers or [computed_by(node, layer_of)], why)
    return found
