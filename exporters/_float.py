"""From a PyTorch model to a clean float ONNX graph in which every layer's weight can be found by name.

PyTorch's exporter writes it.  What is left to do is to fold constants (`_fold`), to bring inputs and outputs to the
names of the model's own, to drop what a deployed file does not need (`_tidy`), and to say where each layer's weight
lies.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters._fold import fold
from hirelc_deploy.exporters._graph import constant, name_of, weight_of
from hirelc_deploy.exporters._tidy import tidy
from hirelc_deploy.exporters._translations import read_once
from hirelc_deploy.graph import forward

WRAPPED = "wrapped"
"""Under this name the model lies in the module that is exported; it is taken off all names again."""

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


def float_graph(
    model: nn.Module, example: Mapping[str, np.ndarray], *, opset: int, unfolded: Collection[str] = ()
) -> FloatGraph:
    """Export `model` (in eval mode) with a free batch axis at the given opset.

    `example` holds one batch by input name; parameters that `unfolded` names are initializers of their own.  Raises
    UserError with the exporter's own words if the model cannot be exported.
    """
    inputs = {name: torch.as_tensor(np.asarray(array)) for name, array in example.items()}
    inputs = {name: _at_least(tensor, EXAMPLES_TRACED) for name, tensor in inputs.items()}
    with torch.no_grad():
        output_names = list(forward(model, inputs))
    with _quiet(), read_once():
        try:
            exported = _traced(_Flat(model, tuple(inputs)), tuple(inputs.values()), opset)
        except Exception as error:  # whatever the exporter raises is the model's own story
            raise UserError(
                f"the model cannot be written as ONNX: {_first_cause(error)}",
                fix="PyTorch's exporter needs a forward without data-dependent Python; see torch.onnx.export",
            ) from error
        fold(exported, unfolded={f"{WRAPPED}.{name}" for name in unfolded})
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
            optimize=False,  # `fold` does the same, but for one step
        )
        assert written is not None
        return written.model

    try:
        return program()
    except Exception:  # of whatever kind: where the detour fails as well, it is raised as it came
        with contextlib.suppress(Exception), sdpa_kernel(SDPBackend.MATH):
            return program()
        raise


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


def _has_weight(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() >= 2


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
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.fx.experimental.symbolic_shapes", "onnxscript")
    ]
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
