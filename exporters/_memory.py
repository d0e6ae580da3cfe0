"""What ONNX Runtime needs of memory and of time to load a file, told from the file."""

from math import prod

import onnx

from hirelc_deploy.cost.load import LoadLaw
from hirelc_deploy.cost.memory import MemoryLaw

KEPT = {"QuantizeLinear", "DequantizeLinear"}
"""Operators that a session does not fold where their inputs are constants, since kernels take them along."""


def decoded_bytes(data: bytes) -> int:
    """Of everything that is computed from constants when a session loads a file: it stays until the session is made."""
    proto = onnx.load_from_string(data)
    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    sizes = {value.name: _bytes_of(value.type.tensor_type) for value in (*graph.value_info, *graph.output)}
    constant = {tensor.name for tensor in graph.initializer}
    found = 0
    for node in graph.node:
        if node.input and all(not name or name in constant for name in node.input):
            constant.update(node.output)
            if node.op_type not in KEPT:
                found += sum(sizes.get(name, 0) for name in node.output)
    return found


def nodes(data: bytes) -> int:
    """Of a file."""
    return len(onnx.load_from_string(data).graph.node)


def _bytes_of(tensor: onnx.TypeProto.Tensor) -> int:
    elements = prod(dim.dim_value for dim in tensor.shape.dim)
    return elements * onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize


LAW = MemoryLaw(
    runtime_bytes=12.14e6,
    per_file_byte=3.193,
    per_decoded_byte=1.065,
    per_activation_byte=3.482,
    decoded_bytes=decoded_bytes,
)
"""Fitted by benchmarks/memory_prediction.py; onnxruntime 1.32 on x86-64, one thread."""

LOAD_LAW = LoadLaw(
    per_node=0.505,
    per_file_byte=6.53e-6,
    per_decoded_byte=5.24e-6,
    decoded_bytes=decoded_bytes,
    nodes=nodes,
)
"""Fitted by the same."""
