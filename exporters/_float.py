"""From a PyTorch model to a clean float ONNX graph in which every layer's weight can be found by name.

The exporter of PyTorch folds constants.  What is left to do is to bring inputs and outputs to the names of the model's
own, to drop what a deployed file does not need (stack traces with the paths of the machine, value_info, default
attributes), and to say where each layer's weight lies.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules import common as rules
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hirelc_deploy.errors import UserError
from hirelc_deploy.graph import forward

WRAPPED = "wrapped"
"""Under this name the model lies in the module that is exported; it is taken off all names again."""

FOLDING_ROUNDS = 2
"""A fold can make way for a rewriting and the other way round; more rounds changed nothing on any network tried."""

REWRITES = [
    rules.fuse_pad_into_conv_rule,
    rules.normalize_pad_format_conv_rule,
    rules.matmul_add_to_gemm_rule,
    rules.transpose_b_matmul_add_to_gemm_rule,
    rules.materialize_reshape_shape_rule,
    rules.reshape_reshape_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.no_op_cast_rule,
    rules.cast_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.mul_by_1_rule,
    rules.div_by_1_rule,
    rules.dropout_inference_rule,
    rules.dropout_zero_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.min_max_rule,
    rules.max_min_rule,
    rules.successive_clip_rule,
    rules.successive_clip_relu_rule,
    rules.successive_relu_clip_rule,
    rules.successive_relu_rule,
]
"""onnxscript's rules but for those that take out a bias of zeros, and those that fold BatchNorm.

What can be folded was folded before numbers were chosen; folded here, weights would no longer be on their grids.
"""

EXAMPLES_TRACED = 2
"""At one example PyTorch would take the batch axis for a constant 1."""


@dataclass(frozen=True)
class FloatGraph:
    """A float model and, for each layer that is in it, the name of the initializer with its weight."""

    model: ir.Model
    weights: Mapping[str, str]
    twins: Mapping[str, str] = field(default_factory=dict)
    """By the name of a weight that is another one as it is read elsewhere, since layers share it, that other's name:
    most often the same transposed."""

    @property
    def layer_of(self) -> dict[str, str]:
        """By the name of a weight, its layer; of several that share it the last."""
        return {weight: layer for layer, weight in self.weights.items()}

    def copy(self) -> "FloatGraph":
        """Independent of this one; tensors are shared, as they are never written to."""
        return FloatGraph(self.model.clone(), self.weights, self.twins)


class _Flat(nn.Module):
    """The model with inputs by position and outputs as a flat tuple, whatever its own look like."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.add_module(WRAPPED, model)
        self.names = names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        model = self.get_submodule(WRAPPED)
        return tuple(forward(model, dict(zip(self.names, inputs, strict=True))).values())


def float_graph(model: nn.Module, example: Mapping[str, np.ndarray], *, opset: int) -> FloatGraph:
    """Export `model` (in eval mode) with a free batch axis at the given opset.

    `example` holds one batch by input name.  Raises UserError with the exporter's own words if the model
    cannot be exported.
    """
    inputs = {name: torch.as_tensor(np.asarray(array)) for name, array in example.items()}
    inputs = {name: _at_least(tensor, EXAMPLES_TRACED) for name, tensor in inputs.items()}
    with torch.no_grad():
        output_names = list(forward(model, inputs))
    with _quiet():
        try:
            exported = _traced(_Flat(model, tuple(inputs)), tuple(inputs.values()), opset)
        except Exception as error:  # whatever the exporter raises is the model's own story
            raise UserError(
                f"the model cannot be written as ONNX: {_first_cause(error)}",
                fix="PyTorch's exporter needs a forward without data-dependent Python; see torch.onnx.export",
            ) from error
        _fold(exported)
    layers = {name: module for name, module in model.named_modules() if _has_weight(module)}
    initializers = exported.graph.initializers
    weights = {layer: initializers[name] for layer, name in _locate(exported.graph, layers).items()}
    tidy(exported)
    _name_ends(exported.graph, tuple(inputs), output_names)
    names = {layer: name_of(weight) for layer, weight in weights.items()}
    names = {layer: name for layer, name in names.items() if name in initializers}
    return FloatGraph(exported, names, _twins(exported.graph, {name: layers[layer] for layer, name in names.items()}))


def _twins(graph: ir.Graph, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Of weights that are one parameter's, each that holds it transposed, and one that does not; `layers` by weight."""
    as_it_is = {
        name: layer
        for name, layer in layers.items()
        if _equals(graph.initializers[name], layer.get_parameter("weight").detach().numpy())
    }
    whole = {id(layer.weight): name for name, layer in as_it_is.items()}
    return {
        name: whole[id(layer.weight)]
        for name, layer in layers.items()
        if name not in as_it_is and id(layer.weight) in whole and _holds(graph.initializers[name], layer)
    }


def apart(graph: FloatGraph, model: nn.Module) -> FloatGraph:
    """With a weight of their own for layers that read an embedding's as it is: they can compute in integers.

    It is the embedding's twin, so that a file holds one.
    """
    body = graph.model.graph
    embeddings = {weight for layer, weight in graph.weights.items() if _is_embedding(model, layer)}
    weights, twins = dict(graph.weights), dict(graph.twins)
    for layer, whole in graph.weights.items():
        if whole not in embeddings or _is_embedding(model, layer):
            continue
        name = f"{whole}#read"
        if name not in twins:
            value = ir.Value(name=name, const_value=body.initializers[whole].const_value)
            body.register_initializer(value)
            for use in tuple(body.initializers[whole].uses()):
                if use.node.op_type != "Gather":
                    use.node.replace_input_with(use.idx, value)
        weights[layer], twins[name] = name, whole
    return FloatGraph(graph.model, weights, twins)


def _is_embedding(model: nn.Module, layer: str) -> bool:
    return isinstance(model.get_submodule(layer), nn.Embedding)


def _traced(model: nn.Module, inputs: tuple[Tensor, ...], opset: int) -> ir.Model:
    """As PyTorch's exporter writes it; raises whatever that raises.

    Views that a model takes of what attention returns (Swin's) hold for the layout of the fused kernel in memory, and
    not for that of the operators which the exporter writes in its stead.  Attention is then traced as those operators;
    not always so, as the detour leaves a Reshape more in each attention.
    """

    def program() -> ir.Model:
        batch = torch.export.Dim("batch")
        written = torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            opset_version=opset,
            external_data=False,
            dynamic_shapes=(tuple({0: batch} for _ in inputs),),
            verbose=False,
            optimize=False,  # `_fold` does the same, but for one step
        )
        assert written is not None
        return written.model

    try:
        return program()
    except Exception:  # of whatever kind: where the detour fails as well, it is raised as it came
        with contextlib.suppress(Exception), sdpa_kernel(SDPBackend.MATH):
            return program()
        raise


def _fold(model: ir.Model) -> None:
    """What the exporter's own optimisation does, as far as it does not depend on values.

    Equal initializers stay apart and biases of zeros stay: fine-tuning changes both, and with them the size of a
    file that was told before; and a bias that two layers share could not be cut for one of them.
    """
    passes.InlinePass()(model)
    _fold_transposes_of_shared_weights(model.graph)
    for _ in range(FOLDING_ROUNDS):
        fold_constants(model)
        rewrite(model, REWRITES)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.OutputFixPass()(model)
    passes.NameFixPass()(model)


def _fold_transposes_of_shared_weights(graph: ir.Graph) -> None:
    """Give a Linear that shares a weight with an embedding one of its own, transposed.

    `fold_constants` leaves a Transpose of what others read as well as soon as it is larger than some thousand numbers,
    and a layer computes with an initializer.
    """
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        array = constant(weight) if weight is not None and weight.is_initializer() else None
        if array is None or weight is None or len(list(weight.uses())) < 2:
            continue
        (before,) = node.outputs
        array = array.transpose(node.attributes.get_ints("perm", None)).copy()
        tensor = ir.tensor(array)
        transposed = ir.Value(
            name=f"{before.name}#folded",
            const_value=tensor,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
        )
        graph.register_initializer(transposed)
        replace(before, transposed)
        graph.remove(node, safe=True)


def tidy(model: ir.Model) -> None:
    """Drop what no runtime reads: metadata, value_info, attributes at their defaults, dead nodes."""
    passes.ClearMetadataAndDocStringPass()(model)
    if not any(attribute.type in SUBGRAPHS for node in model.graph for attribute in node.attributes.values()):
        passes.IdentityEliminationPass()(model)  # takes them from the ends of subgraphs as well
        passes.OutputFixPass()(model)  # a tensor that is two outputs needs one
        passes.NameFixPass()(model)
    _drop_added_zeros(model.graph)
    _drop_neutral_norms(model.graph)
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


SUBGRAPHS = {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}


def _name_ends(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give inputs and outputs the names that the model has for them; what else is called so gets another.

    Raises UserError where an output is called like an input.
    """
    both = sorted({*inputs} & {*outputs})
    if both:
        raise UserError(
            f"the model has an input and an output that are called {both[0]}",
            fix="let forward return it under another name",
        )
    ends = [*graph.inputs, *graph.outputs]
    wanted = {*inputs, *outputs}
    inner = (*graph.initializers.values(), *(value for node in graph for value in node.outputs))
    for value in [*ends, *inner]:
        if value.name in wanted:
            value.name = f"{value.name}#inner"
    for value, name in zip(ends, [*inputs, *outputs], strict=True):
        value.name = name


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


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value as an array if it is an initializer, else None."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def name_of(value: ir.Value) -> str:
    """Every value of a float graph has a name."""
    assert value.name is not None
    return value.name


def _drop_added_zeros(graph: ir.Graph) -> None:
    """x + 0 is x: what is left of a residual branch that is gone."""
    for node in list(graph):
        if node.op_type != "Add":
            continue
        for zero, other in ((0, 1), (1, 0)):
            array = constant(node.inputs[zero])
            kept = node.inputs[other]
            if array is not None and array.size == 1 and array.ndim <= 1 and not array.any() and kept is not None:
                if kept.producer() is None and node.outputs[0].is_graph_output():
                    continue  # the graph would hand its input through
                replace(node.outputs[0], kept)
                graph.remove(node, safe=True)
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
            replace(node.outputs[0], x)
            graph.remove(node, safe=True)


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


def _has_weight(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() >= 2


WEIGHT_INPUT = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "Gather": 0}
"""At which input a layer's operator reads its weight."""


def weight_of(node: ir.Node) -> ir.Value | None:
    """The initializer that a node computes with, if it can be a layer's weight."""
    index = WEIGHT_INPUT.get(node.op_type)
    value = None if index is None else node.inputs[index]
    return value if value is not None and value.is_initializer() else None


def _locate(graph: ir.Graph, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layer name -> initializer name; layers that are not in the graph are left out.

    An initializer keeps the name of its parameter.  There are exceptions, told by the node's scope and by the
    values: a Linear on three-dimensional input, whose weight is transposed and folded into a constant, and an
    embedding that shares its weight with a Linear.
    """
    prefix = f"{WRAPPED}."
    for value in list(graph.initializers.values()):
        if value.name and value.name.startswith(prefix):
            value.name = value.name.removeprefix(prefix)
    found: dict[str, str] = {}
    for node in graph:
        weight = weight_of(node)
        if weight is None or weight.name is None or weight.name in found.values():
            continue
        fitting = {
            name: module
            for name, module in layers.items()
            if name not in found and isinstance(module, nn.Embedding) == (node.op_type == "Gather")
        }
        layer = _layer_of(node, weight, fitting)
        if layer is not None:
            found[layer] = weight.name
    for name, module in layers.items():  # layers that share a parameter share its initializer
        twin = next((other for other in found if layers[other].weight is module.weight), None)
        if name not in found and twin is not None:
            found[name] = found[twin]
    return found


def _layer_of(node: ir.Node, weight: ir.Value, layers: Mapping[str, nn.Module]) -> str | None:
    """The layer whose weight this is: by the initializer's name, by the node's scope, or the first of equal values."""
    assert weight.name is not None
    name = weight.name.removesuffix(".weight")
    if name in layers and weight.name.endswith(".weight"):
        return name
    scope = _scope(node)
    return next((layer for layer in [scope, *layers] if layer in layers and _holds(weight, layers[layer])), None)


def _holds(value: ir.Value, layer: nn.Module) -> bool:
    """Whether an initializer is a layer's weight, as it is or transposed."""
    weight = layer.get_parameter("weight").detach().numpy()
    return _equals(value, weight) or _equals(value, weight.T)


def _equals(value: ir.Value, wanted: np.ndarray) -> bool:
    array = constant(value)
    return array is not None and np.array_equal(array, wanted)


def _scope(node: ir.Node) -> str:
    """The module that a node came from, by the exporter's metadata."""
    text = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    scopes = [part.strip(" '\"") for part in text.strip("[]").split(",")]
    name = scopes[-2] if len(scopes) > 1 else ""
    return name.removeprefix(f"{WRAPPED}.")


def _at_least(tensor: Tensor, examples: int) -> Tensor:
    return tensor if len(tensor) >= examples else tensor[:1].repeat(examples, *[1] * (tensor.dim() - 1))


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warns of packages that are not needed: nothing that a user can act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
