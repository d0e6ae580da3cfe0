"""Which tensors of a graph TensorRT has in 8 bits, told from the graph alone: so a file's size is known beforehand.

A layer that computes in int8 or FP8 reads a quantised input.  What lies between two such layers needs nothing:
TensorRT moves a QuantizeLinear up through operators that only move values, and fuses it into the layer before.  The one
exception is an addition of two branches: with one side in halves, the layers around it are brought from integers to
halves and back, and so both its sides are quantised.
"""

import dataclasses
from collections.abc import Collection, Mapping

import onnx_ir as ir

from hirelc_deploy.exporters._float import FloatGraph
from hirelc_deploy.exporters._graph import name_of, weight_of
from hirelc_deploy.exporters._plan import ACTIVATIONS, Held, Plan, computed_by
from hirelc_deploy.policy import CALIBRATED, Compute, Precision


def plan(graph: FloatGraph, precisions: Mapping[str, Precision], *, floats: Collection[str] = ()) -> Plan:
    """The tensors to quantise, and the nodes that read them so: layers in 8 bits, and additions behind int8
    convolutions.

    An addition that is named in `floats` (`Held.computed_by`) reads floats.
    """
    layer_of = graph.layer_of
    in_8_bits, integer = (weights_in(graph, precisions, computes) for computes in (CALIBRATED, {Compute.INT8}))
    tensors: dict[str, Held] = {}
    nodes: set[str] = set()

    def hold(value: ir.Value | None, *, computed_by: str | None = None, read_by: tuple[str, ...] = ()) -> None:
        assert value is not None
        held = tensors.get(name_of(value), Held(name_of(value), nonnegative=False, from_integers=False))
        tensors[held.name] = dataclasses.replace(
            held, computed_by=held.computed_by or computed_by, read_by=held.read_by + read_by
        )

    for node in graph.model.graph:
        weight = weight_of(node)
        if weight is not None and weight.name in in_8_bits:
            hold(node.inputs[0], read_by=(layer_of[name_of(weight)],))
        elif _adds_branches(node, integer) and (name := computed_by(node, layer_of)) not in floats:
            for value in node.inputs:
                hold(value, computed_by=name)
        else:
            continue
        nodes.add(name_of(node.outputs[0]))
    return Plan(tensors, frozenset(nodes))


def weights_in(graph: FloatGraph, precisions: Mapping[str, Precision], computes: Collection[Compute]) -> frozenset[str]:
    """The weights of the layers that compute in one of these."""
    return frozenset(
        weight
        for layer, weight in graph.weights.items()
        if layer in precisions and precisions[layer].compute in computes
    )


def _adds_branches(node: ir.Node, integer: Collection[str]) -> bool:
    """Whether it adds two tensors of which an int8 convolution computes at least one."""
    if node.op_type != "Add" or any(value is None or value.is_initializer() for value in node.inputs):
        return False
    return any(value is not None and _comes_from_a_convolution(value, integer) for value in node.inputs)


def _comes_from_a_convolution(value: ir.Value, integer: Collection[str]) -> bool:
    node = value.producer()
    while node is not None and node.op_type in ACTIVATIONS:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    weight = None if node is None else weight_of(node)
    return node is not None and node.op_type == "Conv" and weight is not None and weight.name in integer
