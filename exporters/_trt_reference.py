"""A file for TensorRT as ONNX Runtime has to read it in order to compute with halves.

On x86 ONNX Runtime has no kernels for fp16: it computes such nodes in fp32 and rounds nothing between them, so that a
network which overflows in halves would look whole.  Here every value that is a half in the file is rounded to one, and
read back in fp32 by what computes with it.
"""

import onnx
import onnx_ir as ir

from hirelc_deploy.exporters._graph import name_of
from hirelc_deploy.exporters._trt_half import TYPE_ATTRIBUTES, read_through

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


def in_fp32(model: onnx.ModelProto) -> bytes:
    """The file, with each half rounded and held in fp32.  Its inputs and outputs are no halves."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    halves = {each.name for each in inferred.value_info if each.type.tensor_type.elem_type == HALF}
    rounded = ir.from_proto(model)
    graph = rounded.graph
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == HALF:
            value.const_value = ir.Tensor(tensor.numpy().astype("float32"), name=value.name)
            value.type = ir.TensorType(FLOAT)
    for node in list(graph):
        for output in node.outputs:
            if name_of(output) in halves:
                # a node that makes halves of something else goes on doing so
                read_through(graph, output, [FLOAT] if _makes_halves(node) else [HALF, FLOAT])
    return ir.to_proto(rounded).SerializeToString()


def _makes_halves(node: ir.Node) -> bool:
    """Whatever it reads."""
    if any(node.attributes.get_int(name, -1) == int(HALF) for name in TYPE_ATTRIBUTES):
        return True
    filling = node.attributes.get("value")  # of Constant and ConstantOfShape
    return filling is not None and filling.as_tensor().dtype == HALF
