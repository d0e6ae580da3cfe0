"""Values of a float graph: what they hold, what they are called, who reads them."""

import numpy as np
import onnx_ir as ir


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value as an array if it is an initializer, else None."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def name_of(value: ir.Value) -> str:
    """Every value of a float graph has a name."""
    assert value.name is not None
    return value.name


def replace(old: ir.Value, new: ir.Value, *, except_in: ir.Node | None = None) -> None:
    """Let all that read `old` read `new`, the graph's outputs included; an output keeps its name.

    `except_in` is a node that goes on reading `old`.
    """
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}#before"
        new.name, new.type, new.shape = name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if except_in is not None:
        except_in.replace_input_with(0, old)


SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def has_body(node: ir.Node) -> bool:
    """Whether an operator holds a graph of its own, as If, Loop and Scan do."""
    return any(attribute.type in SUBGRAPHS for attribute in node.attributes.values())


WEIGHT_INPUT = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "Gather": 0}
"""At which input a layer's operator reads its weight."""


def weight_of(node: ir.Node) -> ir.Value | None:
    """The initializer that a node computes with, if it can be a layer's weight."""
    index = WEIGHT_INPUT.get(node.op_type)
    value = None if index is None else node.inputs[index]
    return value if value is not None and value.is_initializer() else None
