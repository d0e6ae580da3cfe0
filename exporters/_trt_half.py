"""A graph in halves: everything that was fp32 becomes fp16, but for layers that were decided to stay fp32.

TensorRT networks are strongly typed: a tensor has the type that the file gives it, and what two types meet in is a
Cast.  Inputs and outputs of the graph stay fp32, so that whoever calls the file need not know.
"""

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from hirelc_deploy.exporters._graph import name_of, replace

LARGEST_HALF = float(np.finfo(np.float16).max)
SMALLEST_HALF = float(np.finfo(np.float16).smallest_subnormal)

STAYS_FLOAT = {"Resize": (1, 2)}
"""Inputs that are fp32 whatever the operator computes in."""

TYPE_ATTRIBUTES = ("to", "dtype")
"""In which an operator such as Cast says what it writes."""

READS_INDICES = {"Gather"}
"""Operators of layers that read integers beside their weight."""


def to_halves(graph: ir.Graph, *, in_floats: Collection[ir.Node], no_floats: Collection[str] = ()) -> None:
    """Turn a graph to fp16, in place; the nodes `in_floats` go on computing in fp32, with Casts around them.

    `no_floats` names what such nodes read beside floats.
    """
    kept = {
        (node, index)
        for node in graph
        for index in range(len(node.inputs))
        if node in in_floats or index in STAYS_FLOAT.get(node.op_type, ())
    }
    for value in list(graph.initializers.values()):
        _initializer(graph, value, kept)
    for node in list(graph):
        if node in in_floats:
            _between_casts(graph, node, in_floats, no_floats)
            continue
        for name in TYPE_ATTRIBUTES:
            if node.attributes.get_int(name, -1) == int(ir.DataType.FLOAT):
                node.attributes.add(ir.AttrInt64(name, int(ir.DataType.FLOAT16)))
        if node.op_type == "ConstantOfShape":
            _filling(node)
    for value in graph.inputs:
        uses = [use for use in value.uses() if use.node not in in_floats]
        if value.dtype == ir.DataType.FLOAT and uses:
            in_half = cast(value, ir.DataType.FLOAT16)
            graph.insert_before(graph[0], [in_half])
            for use in uses:
                use.node.replace_input_with(use.idx, in_half.outputs[0])
    for value in list(graph.outputs):
        producer = value.producer()
        if value.dtype == ir.DataType.FLOAT and producer is not None and producer not in in_floats:
            in_float = cast(value, ir.DataType.FLOAT)
            graph.append(in_float)
            replace(value, in_float.outputs[0], except_in=in_float)
            _others_read_halves(value, in_float)


def half(array: np.ndarray) -> np.ndarray:
    """As fp16, cut off at its largest value: a mask of -3e38 stays a number."""
    return np.clip(array, -LARGEST_HALF, LARGEST_HALF).astype(np.float16)


def half_scale(array: np.ndarray) -> np.ndarray:
    """A scale as it will be in fp16, in fp32: positive, however small it was."""
    return np.maximum(half(array), np.float16(SMALLEST_HALF)).astype(np.float32)


def _initializer(graph: ir.Graph, value: ir.Value, kept: Collection[tuple[ir.Node, int]]) -> None:
    """An fp32 constant for its readers in fp32, an fp16 one for the others; both where there are both."""
    tensor = value.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return
    uses = list(value.uses())
    in_floats = [use for use in uses if (use.node, use.idx) in kept]
    if len(in_floats) == len(uses) and uses:
        return
    array = half(tensor.numpy())
    if not in_floats:
        value.const_value = ir.Tensor(array, name=value.name)
        value.type = ir.TensorType(ir.DataType.FLOAT16)  # copies of a graph share what `dtype` would change
        return
    name = f"{name_of(value)}#half"
    own = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
    graph.register_initializer(own)
    for use in uses:
        if use not in in_floats:
            use.node.replace_input_with(use.idx, own)


def _between_casts(graph: ir.Graph, node: ir.Node, in_floats: Collection[ir.Node], no_floats: Collection[str]) -> None:
    """Casts of what it reads from nodes in halves and of what they read from it; two nodes in fp32 need none."""
    for index, value in enumerate(node.inputs):
        producer = None if value is None else value.producer()
        if value is None or producer is None or producer in in_floats or value.name in no_floats:
            continue
        if node.op_type not in READS_INDICES or no_floats:
            before = cast(value, ir.DataType.FLOAT)
            graph.insert_before(node, [before])
            node.replace_input_with(index, before.outputs[0])
    for output in node.outputs:
        readers = [use for use in output.uses() if use.node not in in_floats]
        if readers and output.name not in no_floats:
            after = cast(output, ir.DataType.FLOAT16)
            graph.insert_after(node, [after])
            for use in readers:
                use.node.replace_input_with(use.idx, after.outputs[0])


def _others_read_halves(value: ir.Value, to_float: ir.Node) -> None:
    """A tensor that is an output of the graph and is read within it as well: there as it was before the Cast."""
    for use in list(to_float.outputs[0].uses()):
        use.node.replace_input_with(use.idx, value)


def _filling(node: ir.Node) -> None:
    """What ConstantOfShape fills a tensor with; without the attribute it is a zero in fp32."""
    given = node.attributes.get("value")
    array = np.zeros(1, np.float32) if given is None else given.as_tensor().numpy()
    if array.dtype == np.float32:
        node.attributes.add(ir.AttrTensor("value", ir.Tensor(half(array))))


def read_through(graph: ir.Graph, value: ir.Value, kinds: Sequence[ir.DataType]) -> None:
    """Let all nodes that read a value read it cast to these types, one after the other."""
    uses, last, steps = list(value.uses()), value, []
    for kind in kinds:
        steps.append(cast(last, kind))
        last = steps[-1].outputs[0]
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], steps)
    else:
        graph.insert_after(producer, steps)
    for use in uses:
        use.node.replace_input_with(use.idx, last)


def cast(value: ir.Value, to: ir.DataType) -> ir.Node:
    """A Cast of a value, not yet in a graph."""
    return ir.node("Cast", [value], {"to": int(to)})
