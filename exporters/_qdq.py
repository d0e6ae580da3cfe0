"""Where a graph turns to integers and back: Q/DQ in the flavour of ONNX Runtime's CPU kernels.

A layer that computes in int8 reads a quantised input and has an int8 weight and an int32 bias; a convolution
also writes a quantised output, without which ONNX Runtime keeps it in float.  A tensor has one Q and one DQ,
however many read it.  Activations are uint8 with a zero point, weights int8 and symmetric.

Which tensors those are is decided in `_plan`; `place` writes the nodes once the ranges are known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace as replace_in
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from hirelc_deploy.exporters._base import Stored
from hirelc_deploy.exporters._calibrate import Range
from hirelc_deploy.exporters._float import FloatGraph
from hirelc_deploy.exporters._graph import constant, name_of, replace
from hirelc_deploy.exporters._plan import ACTIVATIONS, Held, Plan
from hirelc_deploy.exporters._weights import Decoded, Weight, decode
from hirelc_deploy.kernels import load_format
from hirelc_deploy.kernels._base import Grid, Packed, largest_integer, rows_of
from hirelc_deploy.policy import Compute, Precision

REQUANTISED = {"Conv", "ConvTranspose", "Gemm"}
"""Float layers whose weights ONNX Runtime rounds to int8 by itself if their input comes from DequantizeLinear."""


def rounded(graph: FloatGraph, name: str, scale: np.ndarray, zero: np.ndarray) -> FloatGraph:
    """A copy in which one tensor, no output of the graph, is put on a uint8 grid, and nothing else is changed."""
    copied = graph.copy()
    body = copied.model.graph
    value = next(v for v in (*body.inputs, *(v for node in body for v in node.outputs)) if v.name == name)
    grid = []
    for role, array in (("scale", scale), ("zero", zero)):
        grid.append(ir.Value(name=f"{name}#{role}", const_value=ir.Tensor(array, name=f"{name}#{role}")))
        body.register_initializer(grid[-1])
    uses = list(value.uses())
    _, dequantise = _through_integers(body, value, grid)
    for use in uses:
        use.node.replace_input_with(use.idx, dequantise.outputs[0])
    return copied


def place(
    graph: FloatGraph,
    plan: Plan,
    ranges: Mapping[str, Range],
    precisions: Mapping[str, Precision],
    grids: Mapping[str, Grid] | None,
    *,
    largest: int,
) -> dict[str, Stored]:
    """Write plan and precisions into the graph, in place; layers without a precision stay as they are.

    `ranges` holds what calibration saw for the tensors of `plan.calibrated`, `grids` the grid of every layer that is
    not stored in floats; None for a file of which only the size is asked.  `largest` bounds the integers of int8
    layers.  Returns, by layer, how its weights are stored.
    """
    writer = _Writer(graph, plan, ranges, largest)
    writer.activations()
    layer_of = {weight: layer for layer, weight in reversed(list(graph.weights.items())) if layer in precisions}
    chosen = {weight: precisions[layer] for weight, layer in layer_of.items() if not precisions[layer].storage.is_float}
    by_weight = None if grids is None else {weight: grids[layer_of[weight]] for weight in chosen}
    decoded = writer.weights(chosen, by_weight)
    transposed = writer.twins_in_floats(set(decoded))
    found = {weight: Stored(name_of(each.value), each.encoding, each.bytes) for weight, each in decoded.items()}
    found |= {weight: Stored(name_of(value), "fp32 values", 0) for weight, value in transposed.items()}
    return {
        layer: found.get(weight) or Stored(weight, "fp32 values", _bytes(writer.graph.initializers[weight]))
        for layer, weight in graph.weights.items()
    }


class _Writer:
    """Adds nodes and initializers to one graph."""

    def __init__(self, graph: FloatGraph, plan: Plan, ranges: Mapping[str, Range], largest: int) -> None:
        self.graph = graph.model.graph
        self.plan = plan
        self.integer_nodes = {node for node in self.graph if name_of(node.outputs[0]) in plan.integer_nodes}
        self.ranges = ranges
        self.largest = largest
        self.known: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self.twins = graph.twins
        self.scales: dict[int, ir.Value] = {}
        """By the identity of the codes that they belong to."""
        self.read_both_ways: set[int] = set()
        """Identities of codes that some operator reads as integers and another as floats."""
        self.grids: dict[str, tuple[ir.Value, ir.Value]] = {}
        self.input_scale: dict[ir.Node, ir.Value] = {}
        """Scale of what a node reads first, where that is held in uint8."""
        self.dynamic: dict[ir.Value, ir.Node] = {}
        """By tensor the node that quantises it anew at every run."""

    def activations(self) -> None:
        values = {name_of(value): value for value in self.graph.inputs}
        values |= {name_of(value): value for node in self.graph for value in node.outputs}
        for tensor in self.plan.tensors.values():
            self.activation(values[tensor.name], tensor)

    def activation(self, value: ir.Value, tensor: Held) -> None:
        """value -> Q -> DQ, for its integer readers; for every reader where it comes from an integer kernel."""
        source = self.plan.tensors[tensor.source]
        scale, zero = self.ranges[source.name].grid(nonnegative=source.nonnegative)
        if source.name not in self.grids:
            zero_value = self.shared(zero) if source.nonnegative else self.constant("zero", zero)
            self.grids[source.name] = (self.constant("scale", scale), zero_value)
        grid = self.grids[source.name]
        uses = [use for use in value.uses() if tensor.from_integers or use.node in self.integer_nodes]
        source_value = self.before_activation(value, tensor)
        quantise, dequantise = _through_integers(self.graph, source_value, grid)
        left_float = [use for use in uses if use.idx == 0 and self.must_stay_float(use.node)]
        for use in uses:
            use.node.replace_input_with(use.idx, dequantise.outputs[0])
            if use.idx == 0:
                self.input_scale[use.node] = grid[0]
        if left_float:
            shield = self.shield(dequantise, nonnegative=source.nonnegative)
            for use in left_float:
                use.node.replace_input_with(0, shield)
        if tensor.from_integers and value.is_graph_output():
            replace(value, dequantise.outputs[0], except_in=quantise if source_value is value else None)

    def must_stay_float(self, node: ir.Node) -> bool:
        """Whether ONNX Runtime would quantise a layer that was decided to compute in fp32."""
        return node.op_type in REQUANTISED and node not in self.integer_nodes

    def shield(self, dequantise: ir.Node, *, nonnegative: bool) -> ir.Value:
        """The same tensor behind an operator that changes nothing and that no optimisation takes out.

        Without it ONNX Runtime rounds the float weights of a layer that reads a DequantizeLinear to int8, with one
        scale a tensor (seen on 1.32, where the output is quantised as well): the file's accuracy would pay for it.
        """
        x = dequantise.outputs[0]
        unchanged = (
            ir.node("Relu", [x])
            if nonnegative
            else ir.node("Clip", [x, self.constant("lowest", np.array(np.finfo(np.float32).min))])
        )
        self.graph.insert_after(dequantise, [unchanged])
        return unchanged.outputs[0]

    def before_activation(self, value: ir.Value, tensor: Held) -> ir.Value:
        """What to quantise: the input of a Relu or Clip where quantising does the same.

        A grid that begins at zero cuts off what is below, and one that was calibrated behind a Clip ends within
        it.  ONNX Runtime makes an integer Add only of one that is quantised directly.
        """
        node = value.producer()
        if node is None or node not in self.integer_nodes or node.op_type not in ACTIVATIONS or not tensor.nonnegative:
            return value
        assert node.inputs[0] is not None
        return node.inputs[0]

    def weights(self, chosen: Mapping[str, Precision], grids: Mapping[str, Grid] | None) -> dict[str, Decoded]:
        """Store weights in their formats and decode them for the nodes that read them; initializer -> what it became.

        Without grids the file is only measured: codes and scales are zeros.  A weight's twin is made of it, if both are
        stored alike, whatever they compute in.
        """
        twins = {
            name: whole
            for name, whole in self.twins.items()
            if name in chosen and whole in chosen and chosen[name].storage == chosen[whole].storage
        }
        largest = {name: largest_integer(precision.compute, self.largest) for name, precision in chosen.items()}
        for name, whole in twins.items():
            largest[whole] = min(largest[whole], largest[name])
        weights = {
            name: self.as_read(name, precision, self.packed(name, precision, grids, largest[name]))
            for name, precision in chosen.items()
            if name not in twins
        }
        self.read_both_ways = {
            id(weights[whole].packed)
            for name, whole in twins.items()
            if (chosen[name].compute is Compute.FP32) is weights[whole].is_integer
        }
        nodes, decoded = decode(list(weights.values()), lambda array: self.constant("codes", array), self.shared)
        made, found = [*nodes], dict(zip(weights, decoded, strict=True))
        ends = {}
        for name, weight in weights.items():
            ends[name], added = self.connect(self.graph.initializers[name], weight, found[name])
            made += added
        for name, whole in twins.items():
            twin = self.as_read(name, chosen[name], weights[whole].packed)
            found[name], added = self.connect_twin(name, twin, weights[whole], found[whole], ends[whole])
            made += added
        self.graph.insert_before(self.graph[0], made)
        return found

    def connect_twin(
        self, name: str, twin: Weight, whole: Weight, decoded: Decoded, end: ir.Value
    ) -> tuple[Decoded, list[ir.Node]]:
        """A weight that is a whole one as others read it, made of what that is decoded into: no codes of its own.

        Where the operators of both read floats, of `end`, which is what those of the whole one read.
        """
        value = self.graph.initializers[name]
        are_floats = not twin.is_integer and not whole.is_integer
        read, made = end if are_floats else decoded.value, []
        if twin.is_integer is not whole.is_integer:
            kind = ir.DataType.INT8 if twin.is_integer else ir.DataType.FLOAT
            made.append(ir.node("Cast", [read], {"to": int(kind)}))
            read = made[-1].outputs[0]
        if twin.axis != whole.axis:
            made.append(ir.node("Transpose", [read]))
            read = made[-1].outputs[0]
        found = replace_in(decoded, value=read if made else decoded.value, bytes=0)
        if are_floats:
            ir.convenience.replace_all_uses_with(value, read)
            return found, made
        _, added = self.connect(value, twin, found)
        return found, made + added

    def twins_in_floats(self, stored: set[str]) -> dict[str, ir.Value]:
        """Make a weight's twin of that weight, where both stay in floats; by name what it became."""
        found: dict[str, ir.Value] = {}
        for name, whole in self.twins.items():
            if stored.isdisjoint({name, whole}):
                found[name] = self.graph.initializers[whole]
                if self.values(name)[1] != self.values(whole)[1]:
                    node = ir.node("Transpose", [found[name]])
                    self.graph.insert_before(self.graph[0], [node])
                    found[name] = node.outputs[0]
                ir.convenience.replace_all_uses_with(self.graph.initializers[name], found[name])
                del self.graph.initializers[name]
        return found

    def packed(self, name: str, precision: Precision, grids: Mapping[str, Grid] | None, largest: int) -> Packed:
        array, axis = self.values(name)
        numbers, storage = load_format(precision.storage.format), precision.storage
        rows = rows_of(torch.from_numpy(array.copy()), axis)
        if grids is None:
            return numbers.blank(len(rows), rows.shape[1], storage)
        return numbers.pack(rows, grids[name], storage, largest=largest)

    def as_read(self, name: str, precision: Precision, packed: Packed) -> Weight:
        """These codes in the shape in which the operator reads this weight that the file will have for it."""
        array, axis = self.values(name)
        shape = array.shape
        if precision.compute is Compute.INT8_DYNAMIC and axis == 0:  # MatMulInteger has outputs last
            shape, axis = shape[::-1], 1
        return Weight(shape, axis, precision, packed, shares=(precision.storage, precision.compute is Compute.FP32))

    def values(self, name: str) -> tuple[np.ndarray, int]:
        """A weight, and the axis of its output channels, by the operator that reads it."""
        value = self.graph.initializers[name]
        array = constant(value)
        assert array is not None
        return array, output_axis(next(iter(value.uses())).node)

    def scale(self, packed: Packed) -> ir.Value:
        """Of integers that operators read: once in the file, however many weights are made of these codes."""
        if id(packed) not in self.scales:
            self.scales[id(packed)] = self.constant("scale", packed.scale)
        return self.scales[id(packed)]

    def connect(self, value: ir.Value, weight: Weight, decoded: Decoded) -> tuple[ir.Value, list[ir.Node]]:
        """The last step of decoding, integers to values: what readers read, and the nodes that make it."""
        uses = list(value.uses())
        if weight.precision.compute is Compute.INT8_DYNAMIC:
            stored = self.scale(weight.packed)
            for use in uses:
                self.multiply_integers(use.node, decoded.value, stored)
            return decoded.value, []
        if weight.precision.compute is Compute.INT8:
            stored = self.scale(weight.packed)
            explicit = uses[0].node.op_type != "Conv"
            end = self.dequantise(decoded.value, stored, weight.axis, np.int8, explicit_zero=explicit)
            made = [end, *(node for use in uses for node in self.bias(use.node, stored))]
        else:
            stored, made = self.broadcast_scale(weight)
            end = ir.node("Mul", [decoded.value, stored])
            made.append(end)
        for use in uses:
            use.node.replace_input_with(use.idx, end.outputs[0])
        return end.outputs[0], made

    def broadcast_scale(self, weight: Weight) -> tuple[ir.Value, list[ir.Node]]:
        """A weight's scale in a shape that multiplies it, and the nodes that make it."""
        scale = weight.packed.scale
        shape = np.array([-1 if a == weight.axis and scale.ndim else 1 for a in range(len(weight.shape))])
        if id(weight.packed) not in self.read_both_ways:
            return self.constant("scale", scale.reshape(shape)), []
        shaped = ir.node("Reshape", [self.scale(weight.packed), self.shared(shape)])
        return shaped.outputs[0], [shaped]

    def multiply_integers(self, node: ir.Node, integers: ir.Value, scale: ir.Value) -> None:
        """Put a product of integers, its input quantised at every run, in the place of a Gemm or MatMul."""
        x = node.inputs[0]
        assert x is not None
        if x not in self.dynamic:
            self.dynamic[x] = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
            _insert_behind(self.graph, x, [self.dynamic[x]])
        codes, input_scale, zero = self.dynamic[x].outputs
        product = ir.node("MatMulInteger", [codes, integers, zero])
        as_float = ir.node("Cast", [product.outputs[0]], {"to": int(ir.DataType.FLOAT)})
        step = ir.node("Mul", [input_scale, scale])
        made = [product, as_float, step, ir.node("Mul", [as_float.outputs[0], step.outputs[0]])]
        if node.op_type == "Gemm" and len(node.inputs) > 2:
            made.append(ir.node("Add", [made[-1].outputs[0], node.inputs[2]]))
        self.graph.insert_before(node, made)
        replace(node.outputs[0], made[-1].outputs[0])
        self.graph.remove(node, safe=True)

    def bias(self, node: ir.Node, weight_scale: ir.Value) -> list[ir.Node]:
        """The bias of an integer kernel: int32 in steps of input scale times weight scale, multiplied at load."""
        value = node.inputs[2] if node.op_type in ("Conv", "Gemm") and len(node.inputs) > 2 else None
        array, by_channel = constant(value), constant(weight_scale)
        if value is None or array is None:
            return []
        assert by_channel is not None
        input_scale = self.input_scale[node]
        assert input_scale.const_value is not None
        steps = (input_scale.const_value.numpy() * by_channel).astype(np.float64)
        limits = np.iinfo(np.int32)
        with np.errstate(divide="ignore", invalid="ignore"):  # of a file that is only measured
            codes = np.nan_to_num(np.round(array.astype(np.float64) / steps))
        stored = self.constant(f"{value.name}_codes", np.clip(codes, limits.min, limits.max).astype(np.int32))
        product = ir.node("Mul", [input_scale, weight_scale])
        decode = self.dequantise(stored, product.outputs[0], 0, np.int32, explicit_zero=node.op_type != "Conv")
        node.replace_input_with(2, decode.outputs[0])
        return [product, decode]

    def dequantise(
        self, codes: ir.Value, scale: ir.Value, axis: int, kind: type[np.integer[Any]], *, explicit_zero: bool
    ) -> ir.Node:
        """DequantizeLinear of a constant.

        ONNX Runtime keeps a Gemm or MatMul in float unless the zero points are spelt out; a Conv does without.
        """
        inputs = [codes, scale]
        if explicit_zero:
            inputs.append(self.shared(np.zeros(self.scale_shape(scale), kind)))
        is_default_axis = axis == 1 or self.scale_shape(scale) == ()
        return ir.node("DequantizeLinear", inputs, {} if is_default_axis else {"axis": axis})

    def scale_shape(self, scale: ir.Value) -> tuple[int, ...]:
        """Of a scale that is stored, or is the product of a scalar and one that is."""
        node = scale.producer()
        array = constant(scale if node is None else node.inputs[1])
        assert array is not None
        return array.shape

    def shared(self, array: np.ndarray) -> ir.Value:
        """One initializer for all equal arrays whose values are no matter of training: shapes, shifts, zero points."""
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self.known:
            self.known[key] = self.constant("shared", array)
        return self.known[key]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        unique = f"{name}#{len(self.graph.initializers)}"
        value = ir.Value(name=unique, const_value=ir.Tensor(np.array(array, order="C"), name=unique))
        self.graph.register_initializer(value)
        return value


def _through_integers(graph: ir.Graph, value: ir.Value, grid: Sequence[ir.Value]) -> tuple[ir.Node, ir.Node]:
    """Q and DQ behind a value, on a grid of scale and zero point; nothing reads them yet."""
    quantise = ir.node("QuantizeLinear", [value, *grid])
    dequantise = ir.node("DequantizeLinear", [quantise.outputs[0], *grid])
    _insert_behind(graph, value, [quantise, dequantise])
    return quantise, dequantise


def _insert_behind(graph: ir.Graph, value: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """As early as the value is there."""
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)


def output_axis(reader: ir.Node) -> int:
    """The axis of output channels of a weight, by the operator that reads it."""
    if reader.op_type == "Gemm":
        return 0 if reader.attributes.get_int("transB", 0) else 1
    return 1 if reader.op_type in ("MatMul", "ConvTranspose") else 0


def _bytes(value: ir.Value) -> int:
    assert value.const_value is not None
    return value.const_value.nbytes
