"""Ranges with which integer kernels of ONNX Runtime can compute.

A tensor that is all but zero (a branch that training has switched off, a network that was never trained) would get
steps so small that the int32 bias of the layer that reads it cannot reach its value, or that a pool refuses to run.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from hirelc_deploy.exporters._calibrate import LEVELS, Range
from hirelc_deploy.exporters._float import FloatGraph
from hirelc_deploy.exporters._graph import constant, name_of
from hirelc_deploy.exporters._plan import ACTIVATIONS, Plan
from hirelc_deploy.kernels._base import Grid

LARGEST_BIAS = 2.0**30
"""In steps of input scale times weight scale: half of what int32 holds."""

POOLED_LEAST, POOLED_MOST = 2.0**-7, 2.0**20
"""What GlobalAveragePool may give, in spans of what it reads.  Its kernel refuses a ratio of scales, read to given,
of 256 times its number of places or more, or below 2 ** -32 times that."""


def computable(
    graph: FloatGraph, plan: Plan, ranges: Mapping[str, Range], grids: Mapping[str, Grid]
) -> dict[str, Range]:
    """`ranges` of `plan.calibrated`, wider where kernels need it; `grids` by layer are those of the weights."""
    found = dict(ranges)
    layer_of = graph.layer_of
    nodes = [node for node in graph.model.graph if name_of(node.outputs[0]) in plan.integer_nodes]

    def widen(name: str, span: float) -> None:
        found[name] = found[name].spanning(span)

    for node in reversed(nodes):
        layer = next((layer_of[each.name] for each in node.inputs if each is not None and each.name in layer_of), None)
        if layer in grids and layer is not None and len(node.inputs) > 2:
            bias = constant(node.inputs[2])
            if bias is not None:
                scale = grids[layer]["scale"].numpy().ravel()
                widen(_source(plan, node.inputs[0]), LEVELS * float(np.max(np.abs(bias) / scale)) / LARGEST_BIAS)
        elif node.op_type == "GlobalAveragePool":
            widen(_source(plan, node.inputs[0]), found[_given(plan, node)].span / POOLED_MOST)
    for node in nodes:
        if node.op_type == "GlobalAveragePool":
            widen(_given(plan, node), found[_source(plan, node.inputs[0])].span * POOLED_LEAST)
    return found


def _source(plan: Plan, value: ir.Value | None) -> str:
    """The tensor whose range a held one has."""
    assert value is not None
    return plan.tensors[name_of(value)].source


def _given(plan: Plan, node: ir.Node) -> str:
    """The tensor whose range the node's output has: behind the activation that its kernel takes along."""

    def outputs() -> Iterator[ir.Value]:
        yield node.outputs[0]
        yield from (use.node.outputs[0] for use in node.outputs[0].uses() if use.node.op_type in ACTIVATIONS)

    return _source(plan, next(value for value in outputs() if name_of(value) in plan.tensors))
