"""Q/DQ in the flavour of TensorRT: symmetric int8 activations, weights stored as they are computed with, float biases.

What ONNX Runtime wants is another file: uint8 activations, quantised biases, codes that nodes decode.  Here a weight is
an int8 or int4 constant behind one DequantizeLinear, and nothing else is a quantised constant.

Written in fp32; `_trt_half` turns all that is not quantised to fp16 behind it, scales included.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters._base import Stored
from hirelc_deploy.exporters._calibrate import SIGNED_STEPS
from hirelc_deploy.exporters._float import FloatGraph, constant, name_of
from hirelc_deploy.exporters._plan import Plan
from hirelc_deploy.exporters._qdq import output_axis
from hirelc_deploy.exporters._trt_half import half_scale
from hirelc_deploy.kernels import load_format
from hirelc_deploy.kernels._base import Grid, Packed, largest_integer, rows_of
from hirelc_deploy.policy import Compute, PerGroup, Precision

INT4_BITS = 4

SMALLEST_SCALE = float(np.finfo(np.float16).tiny)
"""Of an activation: a smaller one would be a subnormal half, of few digits."""


def place(
    graph: FloatGraph,
    plan: Plan,
    magnitudes: Mapping[str, float],
    precisions: Mapping[str, Precision],
    grids: Mapping[str, Grid] | None,
    *,
    largest: int,
) -> dict[str, Stored]:
    """Write plan and precisions into the graph, in place; layers that are stored in floats stay as they are.

    `magnitudes` holds the largest value that the grid of each tensor of the plan has; `grids` is None for a file of
    which only the size is asked.  Returns, by layer, how its weights are stored; those in floats are left out.
    Raises UserError for a weight that has no form that TensorRT takes.
    """
    writer = _Writer(graph.model.graph)
    writer.activations(plan, magnitudes)
    layer_of = {weight: layer for layer, weight in reversed(list(graph.weights.items())) if layer in precisions}
    stored = {}
    for weight, layer in layer_of.items():
        if not precisions[layer].storage.is_float:
            grid = None if grids is None else grids[layer]
            stored[weight] = writer.weight(layer, weight, precisions[layer], grid, largest)
    return {layer: stored[weight] for layer, weight in graph.weights.items() if weight in stored}


def scale_of(magnitude: float) -> np.ndarray:
    """Of a symmetric int8 grid that holds it: a scalar, float32, exact in fp16."""
    step = magnitude / SIGNED_STEPS if magnitude > 0 else 1 / SIGNED_STEPS
    return half_scale(np.array(max(step, SMALLEST_SCALE), np.float32))


class _Writer:
    """Adds nodes and initializers to one graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.zero: ir.Value | None = None
        """The zero point that tells QuantizeLinear to write int8; one for all."""

    def activations(self, plan: Plan, magnitudes: Mapping[str, float]) -> None:
        values = {name_of(value): value for value in self.graph.inputs}
        values |= {name_of(value): value for node in self.graph for value in node.outputs}
        for name in plan.tensors:
            self.activation(values[name], scale_of(magnitudes[name]), plan)

    def activation(self, value: ir.Value, scale: np.ndarray, plan: Plan) -> None:
        """value -> Q -> DQ, for the nodes of the plan that read it."""
        if self.zero is None:
            self.zero = self.constant("zero", np.array(0, np.int8))
        uses = [use for use in value.uses() if use.node.outputs and name_of(use.node.outputs[0]) in plan.integer_nodes]
        step = self.constant("scale", scale)
        quantise = ir.node("QuantizeLinear", [value, step, self.zero])
        dequantise = ir.node("DequantizeLinear", [quantise.outputs[0], step])
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], [quantise, dequantise])
        else:
            self.graph.insert_after(producer, [quantise, dequantise])
        for use in uses:
            use.node.replace_input_with(use.idx, dequantise.outputs[0])

    def weight(self, layer: str, name: str, precision: Precision, grid: Grid | None, largest: int) -> Stored:
        """Store one weight as integers and let its readers read them through a DequantizeLinear."""
        value = self.graph.initializers[name]
        array = constant(value)
        assert array is not None
        uses = list(value.uses())
        axis = output_axis(uses[0].node)
        packed = _packed(array, axis, precision, grid, largest)
        if precision.compute is Compute.INT8:
            codes = _as_read(packed.integers, array.shape, axis)
            scale, attributes, encoding = packed.scale, {"axis": axis}, "int8"
        else:
            codes, scale, attributes = _int4(layer, packed, array.shape, axis, precision)
            size = attributes.get("block_size")
            encoding = "int4" if size is None else f"int4 in blocks of {size}"
        stored, step = self.constant("codes", codes), self.constant("scale", half_scale(scale))
        decode = ir.node("DequantizeLinear", [stored, step], attributes if scale.ndim else {})
        self.graph.insert_before(self.graph[0], [decode])
        for use in uses:
            use.node.replace_input_with(use.idx, decode.outputs[0])
            if use.node.op_type == "Conv":  # TensorRT 10 does not look at a weight that is no constant
                use.node.attributes.add(ir.AttrInt64s("kernel_shape", array.shape[2:]))
        code_bytes = (codes.size + 1) // 2 if codes.dtype == ml_dtypes.int4 else codes.nbytes
        return Stored(name_of(stored), encoding, code_bytes + np.dtype(np.float16).itemsize * scale.size)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        unique = f"{name}#{len(self.graph.initializers)}"
        kind = ir.DataType.INT4 if array.dtype == ml_dtypes.int4 else None
        tensor = ir.Tensor(np.array(array, order="C"), dtype=kind, name=unique)
        value = ir.Value(name=unique, const_value=tensor)
        self.graph.register_initializer(value)
        return value


def _packed(array: np.ndarray, axis: int, precision: Precision, grid: Grid | None, largest: int) -> Packed:
    numbers, storage = load_format(precision.storage.format), precision.storage
    rows = rows_of(torch.from_numpy(array.copy()), axis)
    if grid is None:
        return numbers.blank(len(rows), rows.shape[1], storage)
    return numbers.pack(rows, grid, storage, largest=largest_integer(precision.compute, largest))


def _int4(
    layer: str, packed: Packed, shape: tuple[int, ...], axis: int, precision: Precision
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Codes in the operator's shape, scales, and the attributes of the DequantizeLinear that reads them."""
    storage = precision.storage
    multiplier = packed.tables.get("multiplier")
    if multiplier is None:
        return _as_read(packed.integers, shape, axis).astype(ml_dtypes.int4), packed.scale, {"axis": axis}
    assert isinstance(storage.granularity, PerGroup)
    channels, columns = packed.integers.shape
    size, wanted = columns // multiplier.shape[1], storage.granularity.size
    if size != wanted:
        raise UserError(
            f"{layer} is stored in groups of {wanted}, and has {columns} inputs, which are no multiple of that",
            fix=f"keep a multiple of {wanted} channels before it, or store it as int4/channel",
        )
    groups = packed.integers.reshape(channels, -1, size)
    levels = groups // np.maximum(multiplier, 1)[:, :, None].astype(np.int16)
    scale = packed.scale[:, None] * multiplier  # (channels, groups)
    reduced = 1 - axis
    codes = _as_read(levels.reshape(channels, columns), shape, axis).astype(ml_dtypes.int4)
    return codes, scale if axis == 0 else scale.T, {"axis": reduced, "block_size": size}


def _as_read(rows: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """From rows, one output channel each, to the operator's shape."""
    rest = [size for a, size in enumerate(shape) if a != axis]
    return np.ascontiguousarray(np.moveaxis(rows.reshape(shape[axis], *rest), 0, axis))
