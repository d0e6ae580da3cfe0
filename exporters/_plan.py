"""Which tensors of a graph turn to integers, told from the graph alone: so a file's size is known before calibration.

A layer that computes in int8 reads a quantised input; a convolution also writes a quantised output, without which
ONNX Runtime keeps it in float.  What lies between stays in integers where it has kernels for them.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from hirelc_deploy.exporters._float import FloatGraph
from hirelc_deploy.exporters._graph import constant, name_of
from hirelc_deploy.policy import Compute, Precision

MOVES = {"MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze"}
"""Operators whose outputs are some of their inputs: the grid stays the same."""

INTEGER = {"Add", "Mul", "Sigmoid", "LeakyRelu", "GlobalAveragePool", "AveragePool", "Concat"}
"""Operators with an integer kernel of their own, used where all that they read comes from integers."""

ACTIVATIONS = {"Relu", "Clip"}
"""What a kernel does on the way out: the tensor behind it is the one to quantise."""


@dataclass(frozen=True)
class Held:
    """One tensor that is held in uint8."""

    name: str
    nonnegative: bool
    """Its zero point is then 0, whatever the calibration saw."""
    from_integers: bool
    """An integer kernel writes it: there is no float original that a float reader could use instead."""
    same_grid_as: str | None = None
    """The tensor whose scale and zero point it shares."""
    computed_by: str | None = None
    """Where no layer writes it: what does, in words that hold for a pruned network as well."""
    read_by: tuple[str, ...] = ()
    """The int8 layers that read it."""

    @property
    def source(self) -> str:
        """The tensor whose scale and zero point it has: itself, where it shares none."""
        return self.same_grid_as or self.name


@dataclass(frozen=True)
class Plan:
    """The tensors to hold in uint8, in the order of the graph, and the nodes that read them as integers."""

    tensors: Mapping[str, Held]
    integer_nodes: frozenset[str]
    """By the name of their first output."""

    @property
    def calibrated(self) -> list[str]:
        """The tensors whose ranges have to be seen."""
        return [name for name, tensor in self.tensors.items() if tensor.same_grid_as is None]

    def readers(self, name: str) -> list[str]:
        """The int8 layers that read a tensor, or one that shares its grid."""
        alike = (tensor for tensor in self.tensors.values() if name in (tensor.name, tensor.same_grid_as))
        return [layer for tensor in alike for layer in tensor.read_by]


def plan(graph: FloatGraph, precisions: Mapping[str, Precision], *, floats: Collection[str] = ()) -> Plan:
    """Which tensors become uint8 so that every int8 layer of `precisions` has an integer kernel.

    What is named in `floats` is computed in float, though it could be in integers (`Held.computed_by`).
    """
    integer_weights = {
        weight: layer
        for layer, weight in graph.weights.items()
        if layer in precisions and precisions[layer].compute is Compute.INT8
    }
    planner = _Planner(graph.layer_of, frozenset(floats))
    for node in graph.model.graph:
        layer = next(
            (integer_weights[x.name] for x in node.inputs if x is not None and x.name in integer_weights), None
        )
        if layer is not None:
            planner.layer(node, layer)
        elif node.op_type in INTEGER | MOVES:
            planner.between(node)
    # a session makes an integer kernel of a product only if all that read it read the same: a product that an integer
    # layer reads is read in integers by everybody
    tensors = {
        name: dataclasses.replace(tensor, from_integers=tensor.from_integers or name in planner.integer_nodes)
        for name, tensor in planner.tensors.items()
    }
    return Plan(tensors, frozenset(planner.integer_nodes))


class _Planner:
    def __init__(self, layer_of: Mapping[str, str], floats: frozenset[str]) -> None:
        """`layer_of` gives the layer of each weight."""
        self.tensors: dict[str, Held] = {}
        self.integer_nodes: set[str] = set()
        self.layer_of = layer_of
        self.floats = floats

    def layer(self, node: ir.Node, name: str) -> None:
        """A layer that was decided to compute in int8."""
        x = node.inputs[0]
        assert x is not None
        self.hold(x, from_integers=False)
        held = self.tensors[name_of(x)]
        self.tensors[name_of(x)] = dataclasses.replace(held, read_by=(*held.read_by, name))
        self.integer_nodes.add(name_of(node.outputs[0]))
        if writes_integers(node):
            self.hold_output(node)

    def between(self, node: ir.Node) -> None:
        """An operator without weights: it stays in integers if all that it reads comes from integers."""
        read = [x for x in node.inputs if x is not None]
        if node.op_type in MOVES:
            read = read[:1]  # the others are shapes
        held = [self.tensors.get(name_of(x)) for x in read]
        first = held[0]
        if first is None or not all(tensor is not None and tensor.from_integers for tensor in held):
            return
        if node.op_type in MOVES:
            self.integer_nodes.add(name_of(node.outputs[0]))
            self.hold(node.outputs[0], from_integers=True, same_grid_as=first.source)
            return
        name = computed_by(node, self.layer_of)
        if name not in self.floats and not _counts_padding_beyond(node):
            self.integer_nodes.add(name_of(node.outputs[0]))
            self.hold_output(node, name)

    def hold_output(self, node: ir.Node, computed_by: str | None = None) -> None:
        """Hold what the node writes, behind the activation that its kernel takes along."""
        output = node.outputs[0]
        behind = activation_behind(node)
        if behind is not None:
            output = behind.outputs[0]
            self.integer_nodes.add(name_of(output))
        self.hold(output, from_integers=True, computed_by=computed_by)

    def hold(
        self,
        value: ir.Value,
        *,
        from_integers: bool,
        same_grid_as: str | None = None,
        computed_by: str | None = None,
    ) -> None:
        held = Held(name_of(value), _nonnegative(value), from_integers, same_grid_as, computed_by)
        self.tensors.setdefault(name_of(value), held)


def activation_behind(node: ir.Node) -> ir.Node | None:
    """The activation that alone reads what a node writes, where quantising behind it does what it does.

    Not a Clip that begins above nought: the lowest number of a grid that holds nought is no more than that.
    """
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output() or uses[0].node.op_type not in ACTIVATIONS:
        return None
    behind = uses[0].node
    return None if behind.op_type == "Clip" and _least_of(behind) > 0 else behind


def writes_integers(node: ir.Node) -> bool:
    """Whether an int8 layer's output is quantised whoever reads it: a convolution's, and that of a Gemm which one
    activation alone reads, since a session makes one kernel of both before it looks at what is quantised."""
    return node.op_type == "Conv" or (node.op_type == "Gemm" and activation_behind(node) is not None)


def _least_of(clip: ir.Node) -> float:
    """A Clip's lower bound."""
    low = constant(clip.inputs[1]) if len(clip.inputs) > 1 else None
    return -math.inf if low is None else float(low)


def computed_by(node: ir.Node, layer_of: Mapping[str, str]) -> str:
    """What to call an operator without weights, in words that hold for a pruned network as well.

    After the layers that it gets its values from, by way of operators without weights alone, or `inputs` where there is
    no layer before it; `layer_of` gives the layer of each weight.
    """
    found: set[str] = set()
    pending, done = [node], {node}
    while pending:
        for x in pending.pop().inputs:
            producer = None if x is None else x.producer()
            if x is None or producer is None:
                continue
            layers = {layer_of[name_of(y)] for y in producer.inputs if y is not None and name_of(y) in layer_of}
            found |= layers
            if not layers and producer not in done:
                done.add(producer)
                pending.append(producer)
    return f"{node.op_type} of {', '.join(sorted(found)) or 'inputs'}"


def _counts_padding_beyond(node: ir.Node) -> bool:
    """Whether a pool rounds its size up and counts padding: the integer kernel then divides by places that are not
    there."""
    attributes = node.attributes
    return (
        node.op_type == "AveragePool"
        and attributes.get_int("ceil_mode", 0) == 1
        and attributes.get_int("count_include_pad", 0) == 1
    )


def _nonnegative(value: ir.Value) -> bool:
    """Whether the operators before it say that no value can be below zero."""
    node = value.producer()
    if node is None:
        return False
    if node.op_type in ("Relu", "Sigmoid", "Softmax"):
        return True
    if node.op_type == "Clip":
        return _least_of(node) >= 0
    if node.op_type in (MOVES | INTEGER) - {"Add"}:
        read = node.inputs[:1] if node.op_type in MOVES else node.inputs
        return all(x is not None and _nonnegative(x) for x in read)
    return False
