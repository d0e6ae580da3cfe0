"""Q/DQ in the flavour of TensorRT: symmetric activations, weights stored as they are computed with, float biases.

What ONNX Runtime wants is another file: uint8 activations, quantised biases, codes that nodes decode.  Here a weight is
an int8, FP8 or int4 constant behind one DequantizeLinear, and nothing else is a quantised constant.

Written in fp32; `_trt_half` turns all that is not quantised to fp16 behind it, scales included.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters._base import Stored
from hirelc_deploy.exporters._calibrate import SIGNED_STEPS
from hirelc_deploy.exporters._float import FloatGraph
from hirelc_deploy.exporters._graph import constant, name_of, weight_of
from hirelc_deploy.exporters._plan import Plan
from hirelc_deploy.exporters._qdq import output_axis
from hirelc_deploy.exporters._trt_half import half_scale
from hirelc_deploy.exporters._trt_plan import weights_in
from hirelc_deploy.kernels import fp8, load_format
from hirelc_deploy.kernels._base import Grid, Packed, largest_integer, rows_of
from hirelc_deploy.policy import CALIBRATED, Compute, PerGroup, Precision

FP8_TYPE = np.dtype(ml_dtypes.float8_e4m3fn)

SMALLEST_SCALE = float(np.finfo(np.float16).tiny)
"""Of an activation: a smaller one would be a subnormal half, of few digits."""


@dataclass(frozen=True)
class Span:
    """What the values of a tensor span, about zero."""

    magnitude: float
    """The largest that an integer grid holds: what is beyond is cut off."""
    widest: float
    """The largest of all, which floats of 8 bits hold."""


def place(
    graph: FloatGraph,
    plan: Plan,
    spans: Mapping[str, Span],
    precisions: Mapping[str, Precision],
    grids: Mapping[str, Grid] | None,
    *,
    largest: int,
) -> dict[str, Stored]:
    """Write plan and precisions into the graph, in place; layers that are stored in floats stay as they are.

    `spans` holds what the grid of each tensor of the plan spans; `grids` is None for a file of which only the size is
    asked.  Returns, by layer, how its weights are stored; those in floats are left out.
    Raises UserError for a weight that has no form that TensorRT takes.
    """
    writer = _Writer(graph.model.graph, weights_in(graph, precisions, {Compute.FP8}))
    writer.activations(plan, spans)
    layer_of = {weight: layer for layer, weight in reversed(list(graph.weights.items())) if layer in precisions}
    stored = {}
    for weight, layer in layer_of.items():
        if not precisions[layer].storage.is_float:
            grid = None if grids is None else grids[layer]
            stored[weight] = writer.weight(layer, weight, precisions[layer], grid, largest)
    return {layer: stored[weight] for layer, weight in graph.weights.items() if weight in stored}


def scale_of(magnitude: float, largest: float = SIGNED_STEPS) -> np.ndarray:
    """Of a symmetric grid that ends with `largest` and holds the magnitude: a scalar, float32, exact in fp16."""
    step = magnitude / largest if magnitude > 0 else 1 / largest
    return half_scale(np.array(max(step, SMALLEST_SCALE), np.float32))


class _Writer:
    """Adds nodes and initializers to one graph."""

    def __init__(self, graph: ir.Graph, in_fp8: Collection[str]) -> None:
        """`in_fp8` are the weights of layers that compute so."""
        self.graph = graph
        self.in_fp8 = in_fp8
        self.zeros: dict[np.dtype[Any], ir.Value] = {}
        """The zero points that tell a QuantizeLinear what to write; one of each type for all."""

    def activations(self, plan: Plan, spans: Mapping[str, Span]) -> None:
        values = {name_of(value): value for value in self.graph.inputs}
        values |= {name_of(value): value for node in self.graph for value in node.outputs}
        for name in plan.tensors:
            read_by = [(use.node, use.idx) for use in values[name].uses()]
            uses = [(node, index) for node, index in read_by if name_of(node.outputs[0]) in plan.integer_nodes]
            in_fp8 = [(node, index) for node, index in uses if self.is_in_fp8(node)]
            in_integers = [use for use in uses if use not in in_fp8]
            self.activation(values[name], in_integers, scale_of(spans[name].magnitude), np.dtype(np.int8))
            self.activation(values[name], in_fp8, scale_of(spans[name].widest, fp8.LARGEST), FP8_TYPE)

    def is_in_fp8(self, node: ir.Node) -> bool:
        weight = weight_of(node)
        return weight is not None and weight.name in self.in_fp8

    def activation(
        self, value: ir.Value, uses: Sequence[tuple[ir.Node, int]], scale: np.ndarray, kind: "np.dtype[Any]"
    ) -> None:
        """value -> Q -> DQ, for the nodes that read it so, each with the number of that input."""
        if not uses:
            return
        if kind not in self.zeros:
            self.zeros[kind] = self.constant("zero", np.zeros((), kind))
        step = self.constant("scale", scale)
        quantise = ir.node("QuantizeLinear", [value, step, self.zeros[kind]])
        dequantise = ir.node("DequantizeLinear", [quantise.outputs[0], step])
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], [quantise, dequantise])
        else:
            self.graph.insert_after(producer, [quantise, dequantise])
        for node, index in uses:
            node.replace_input_with(index, dequantise.outputs[0])

    def weight(self, layer: str, name: str, precision: Precision, grid: Grid | None, largest: int) -> Stored:
        """Store one weight as integers and let its readers read them through a DequantizeLinear."""
        value = self.graph.initializers[name]
        array = constant(value)
        assert array is not None
        uses = list(value.uses())
        axis = output_axis(uses[0].node)
        packed = _packed(array, axis, precision, grid, largest)
        if precision.compute in CALIBRATED:
            codes = _as_read(packed.integers, array.shape, axis)
            if precision.compute is Compute.FP8:
                codes = codes.astype(FP8_TYPE)
            scale, attributes, encoding = packed.scale, {"axis": axis}, str(precision.compute)
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
