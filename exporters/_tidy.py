"""What a deployed file does not need is dropped from a float graph.

Metadata (stack traces with the paths of the machine), value_info, attributes at their defaults, and operators that do
nothing any more.
"""

import onnx_ir as ir
import onnx_ir.passes.common as passes

from hirelc_deploy.exporters._graph import constant, has_body, replace


def tidy(model: ir.Model) -> None:
    """Drop what no runtime reads: metadata, value_info, attributes at their defaults, dead nodes."""
    passes.ClearMetadataAndDocStringPass()(model)
    if not any(map(has_body, model.graph)):
        passes.IdentityEliminationPass()(model)  # takes them from the ends of subgraphs as well
        passes.OutputFixPass()(model)  # a tensor that is two outputs needs one
        passes.NameFixPass()(model)
    _drop_added_zeros(model.graph)
    _drop_neutral_norms(model.graph)
    _drop_reshapes_to_the_same(model.graph)
    _pool_instead_of_mean(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    kept = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph:
        for name, attribute in list(node.attributes.items()):
            if isinstance(attribute, ir.Attr) and _is_default(node, attribute):
                del node.attributes[name]
        if node.op_type == "Conv":
            node.attributes.pop("kernel_shape", None)  # the weight says it
        if node.op_type == "AveragePool" and "pads" not in node.attributes:
            node.attributes.pop("count_include_pad", None)  # there is none to count
        for value in node.outputs:
            if value not in kept:
                value.type = value.shape = None
    model.producer_name = model.producer_version = model.doc_string = None
    model.graph.doc_string = None


DEFAULTS: dict[str, dict[str, object]] = {
    "Conv": {"auto_pad": "NOTSET", "group": 1},
    "MaxPool": {"auto_pad": "NOTSET", "ceil_mode": 0, "storage_order": 0},
    "AveragePool": {"auto_pad": "NOTSET", "ceil_mode": 0, "count_include_pad": 0},
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0},
    "Reshape": {"allowzero": 0},
    "ReduceMean": {"noop_with_empty_axes": 0, "keepdims": 1},
    "LayerNormalization": {"axis": -1, "stash_type": 1},
    "Softmax": {"axis": -1},
    "Shape": {"start": 0},
}
"""Attributes at these values say nothing that the operator's definition does not (opset 18)."""


UNIFORM_DEFAULTS = {"strides": 1, "dilations": 1, "pads": 0}
"""The same for attributes that have an entry a spatial axis."""


def _is_default(node: ir.Node, attribute: ir.Attr) -> bool:
    if node.op_type in ("Conv", "MaxPool", "AveragePool") and attribute.name in UNIFORM_DEFAULTS:
        return all(entry == UNIFORM_DEFAULTS[attribute.name] for entry in attribute.as_ints())
    defaults = DEFAULTS.get(node.op_type, {})
    return attribute.name in defaults and attribute.value == defaults[attribute.name]


def _leave_out(graph: ir.Graph, node: ir.Node, same: ir.Value) -> None:
    """Let what reads a node's result read a value that is the same, unless the graph would hand its input through."""
    if same.producer() is None and node.outputs[0].is_graph_output():
        return
    replace(node.outputs[0], same)
    graph.remove(node, safe=True)


def _drop_added_zeros(graph: ir.Graph) -> None:
    """x + 0 is x: what is left of a residual branch that is gone."""
    for node in list(graph):
        if node.op_type != "Add":
            continue
        for zero, other in ((0, 1), (1, 0)):
            array = constant(node.inputs[zero])
            kept = node.inputs[other]
            if array is not None and array.size == 1 and array.ndim <= 1 and not array.any() and kept is not None:
                _leave_out(graph, node, kept)
                break


def _drop_neutral_norms(graph: ir.Graph) -> None:
    """A BatchNormalization that changes nothing: what is left of one that was folded."""
    for node in list(graph):
        if node.op_type != "BatchNormalization" or node.attributes.get_float("epsilon", 1e-5) != 0:
            continue
        x, statistics = node.inputs[0], [constant(value) for value in node.inputs[1:5]]  # scale, shift, mean, variance
        is_neutral = all(
            array is not None and (array == wanted).all()
            for array, wanted in zip(statistics, (1, 0, 0, 1), strict=True)
        )
        if is_neutral and x is not None:
            _leave_out(graph, node, x)


def _drop_reshapes_to_the_same(graph: ir.Graph) -> None:
    """What the exporter writes of a view that changes nothing: behind an attention with one head left, say."""
    for node in list(graph):
        if node.op_type != "Reshape":
            continue
        x, target = node.inputs[0], constant(node.inputs[1])
        if x is None or x.shape is None or target is None or len(x.shape) != target.size:
            continue
        sizes = list(zip(x.shape, target.ravel().tolist(), strict=True))
        free = [size for size in x.shape if not isinstance(size, int)]
        is_same = all(wanted == (size if isinstance(size, int) else -1) for size, wanted in sizes)
        if len(free) <= 1 and is_same:
            _leave_out(graph, node, x)


def _pool_instead_of_mean(graph: ir.Graph) -> None:
    """ReduceMean over the places of an image becomes GlobalAveragePool, which has an integer kernel."""
    for node in list(graph):
        if node.op_type != "ReduceMean" or len(node.inputs) != 2:
            continue
        x, axes = node.inputs[0], constant(node.inputs[1])
        if x is None or x.shape is None or len(x.shape) != 4 or axes is None:
            continue
        if sorted(int(axis) % 4 for axis in axes.ravel()) != [2, 3]:
            continue
        keeps_axes = node.attributes.get_int("keepdims", 1) == 1
        pooled = ir.node("GlobalAveragePool", [x])
        added = [pooled] if keeps_axes else [pooled, ir.node("Flatten", [pooled.outputs[0]])]
        graph.insert_before(node, added)
        replace(node.outputs[0], added[-1].outputs[0])
        graph.remove(node, safe=True)
