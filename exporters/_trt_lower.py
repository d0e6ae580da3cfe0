"""What TensorRT makes of a network, about, for any policy: kernels, and what brings tensors from one type to another.

No engine is asked, so these are the rules of its documentation alone: a layer takes along the operators behind it that
work value by value, and the QuantizeLinear behind those; such operators without a layer are one kernel; an attention's
Softmax is part of the product before it; reshaping and transposing are free.  The estimates of `profiles/` are fitted
through these rules, which are as coarse as the estimates are.
"""

from collections.abc import Collection

import onnx_ir as ir

from hirelc_deploy.cost.network import Condition
from hirelc_deploy.exporters._graph import name_of
from hirelc_deploy.exporters._lower import Lowering
from hirelc_deploy.exporters._plan import computed_by
from hirelc_deploy.policy import CALIBRATED, Compute

POINTWISE = {"Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "HardSwish", "Gelu", "Elu", "Erf"} | {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Sqrt",
    "Exp",
    "Neg",
    "Cast",
    "Where",
}
"""Operators that work value by value: they become part of the kernel before them."""

FREE = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Shape", "Dropout"}
"""Operators that only say how a tensor is to be read: the kernels around them do."""

TAKES_ALONG = {"MatMul"}
"""Operators without weights that do on the way out what layers do."""


class TensorRtLowering(Lowering):
    """The rules of the module's head."""

    def states_of(self, node: ir.Node) -> None:
        """Channels alone: what a tensor is held in follows from the layers around it."""
        layer = self.layer(node)
        for output in node.outputs:
            self.channels[output] = self.writes[layer] if layer else self._channels_through(node, self.read_by(node))

    def kernels_of(self, node: ir.Node) -> None:
        layer = self.layer(node)
        if layer is not None:
            for compute in self.computes[layer]:
                self.term(node, compute, (Condition(layer, frozenset({compute})),), layer)
            return
        read = [x for x in node.inputs if x is not None and not x.is_initializer() and x not in self.constant]
        if not read or node.op_type in FREE or self._is_about_shapes(node) or self._is_taken_along(node):
            return
        if self.floats.get(computed_by(node, self.names)) is Compute.FP32:
            self.term(node, Compute.FP32, ())
            return
        near = next((found for x in read if (found := self._layer_before(x)) is not None), None)
        able = () if near is None else self.computes[near]
        if near is None or Compute.FP16 not in able:
            self.term(node, Compute.FP32, ())
            return
        self.term(node, Compute.FP32, (Condition(near, frozenset({Compute.FP32})),))
        self.term(node, Compute.FP16, (Condition(near, frozenset(able) - {Compute.FP32}),))

    def borders_of(self, value: ir.Value) -> None:
        """A QuantizeLinear of its own where no layer before can take it along, and a Cast beside layers in fp32."""
        readers = [layer for use in value.uses() if (layer := self.layer(use.node)) is not None]
        in_8_bits = [layer for layer in readers if CALIBRATED & set(self.computes[layer])]
        before = self._layer_before(value, through=POINTWISE | FREE)
        if in_8_bits:
            wanted = self.state(
                f"quantised {name_of(value)}",
                "any",
                [Condition(layer, CALIBRATED & set(self.computes[layer])) for layer in in_8_bits],
            )
            self.border("QuantizeLinear", value, wanted, None if before is None else self._is_not_in_8_bits(before))

    def _is_not_in_8_bits(self, layer: str) -> Condition:
        return Condition(layer, frozenset(self.computes[layer]) - CALIBRATED)

    def _is_taken_along(self, node: ir.Node) -> bool:
        """Whether the kernel before it does its work on the way, and that of all others that read the same tensor."""
        if node.op_type not in POINTWISE | {"Softmax"}:
            return False
        for x in node.inputs:
            producer = None if x is None else x.producer()
            if x is None or producer is None or x.is_graph_output():
                continue
            together = node.op_type == "Softmax" or all(use.node.op_type in POINTWISE for use in x.uses())
            if together and (self.layer(producer) is not None or producer.op_type in POINTWISE | TAKES_ALONG):
                return True
        return False

    def _layer_before(self, value: ir.Value, through: Collection[str] | None = None) -> str | None:
        """The nearest layer that a tensor comes from, by way of any operators or those of `through` alone."""
        pending, done = [value], {value}
        while pending:
            node = pending.pop(0).producer()
            if node is None:
                continue
            layer = self.layer(node)
            if layer is not None:
                return layer
            if through is None or node.op_type in through:
                new = [x for x in node.inputs if x is not None and x not in done]
                pending += new
                done.update(new)
        return None
