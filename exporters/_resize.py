"""A float graph with the shapes that pruning will leave: what a file will weigh is told from it."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from hirelc_deploy.exporters._float import FloatGraph
from hirelc_deploy.exporters._graph import weight_of
from hirelc_deploy.exporters._qdq import output_axis


def with_shapes(graph: FloatGraph, shapes: Mapping[str, tuple[int, ...]]) -> FloatGraph:
    """A copy whose initializers have the shapes that they will have, and no values worth reading."""
    small = graph.copy()
    initializers = small.model.graph.initializers
    layer_of = small.layer_of
    wanted = {name: shapes[name] for name in initializers if name in shapes and name not in layer_of}
    for node in small.model.graph:
        weight = weight_of(node)
        if weight is None or weight.name not in layer_of:
            continue
        assert weight.name is not None
        shape = shapes[f"{layer_of[weight.name]}.weight"]
        is_transposed = output_axis(node) == 1 and node.op_type != "ConvTranspose"
        wanted[weight.name] = shape[::-1] if is_transposed else shape
        bias = node.inputs[2] if node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.inputs) > 2 else None
        if bias is not None and bias.name in initializers:
            assert bias.name is not None
            is_transposed = node.op_type == "ConvTranspose"
            wanted[bias.name] = (shape[1] * node.attributes.get_int("group", 1) if is_transposed else shape[0],)
        if node.op_type == "Conv" and node.attributes.get_int("group", 1) > 1 and shape[1] == 1:
            _set_groups(node, shape[0])
    for name, shape in wanted.items():
        value = initializers[name]
        assert value.const_value is not None
        dtype = value.const_value.dtype.numpy()
        value.const_value = ir.Tensor(np.zeros(shape, dtype), name=name)
        value.shape = ir.Shape(shape)
    return small


def _set_groups(node: ir.Node, groups: int) -> None:
    """A depthwise convolution has as many groups as channels; one group is the default and is not written."""
    node.attributes.pop("group", None)
    if groups > 1:
        node.attributes.add(ir.AttrInt64("group", groups))
