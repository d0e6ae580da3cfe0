"""Every kind of layer side by side in one float graph, each a model of its own, to be written in any number format.

Beside each file stands its twin: the same file with plain initializers of the decoded values in the place of codes.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from hirelc_deploy.compress.grids import fitted, output_axis, put_on
from hirelc_deploy.exporters import _weights, load_runtime
from hirelc_deploy.exporters._base import Exported
from hirelc_deploy.exporters._float import FloatGraph
from hirelc_deploy.exporters.onnxruntime import computes
from hirelc_deploy.kernels import _levels, format_names, load_format
from hirelc_deploy.kernels._base import INT8_MAX, Grid, Nodes, from_rows, rows_of
from hirelc_deploy.policy import Compute, PerGroup, Precision, Storage

RUNTIME = load_runtime("onnxruntime")
OPSET, IR_VERSION = 18, 8
EXAMPLES = 3
GROUP_SIZES = (4, 32)

DECODED = [name for name in format_names() if load_format(name).native != "fp8"]
"""The formats that a graph decodes when it is loaded; FP8 is computed with as it is stored."""

DECODING = {"BitShift", "BitwiseAnd", "BitwiseOr", "Cast", "Gather", "Slice", "Split", "Unsqueeze"}
"""Operators that decode weights, and that none of these layers needs for itself."""

CODES = {"BANK_BYTES": 0, "MEMBER_BYTES": -(1 << 40), "LARGE": 100}
"""Everything as codes, whatever that costs; weights with a hundred entries as large ones, the others together."""

TOGETHER = {**CODES, "LARGE": 1 << 40}
EACH_ALONE = {**CODES, "LARGE": 1}
PLAIN = {"BANK_BYTES": 1 << 40}


@contextmanager
def encoded(limits: Mapping[str, int]) -> Iterator[None]:
    """Weights are encoded by other limits than those of kernels/ and `exporters/_weights.py`."""
    with ExitStack() as stack:
        for name, limit in limits.items():
            read_in = [module for module in (_weights, _levels) if hasattr(module, name)]
            assert read_in, f"there is no limit {name} any more"
            for module in read_in:
                stack.enter_context(patch.object(module, name, limit))
        yield


def storages(name: str) -> Iterator[Storage]:
    """Every storage of a format."""
    numbers = load_format(name)
    for bits in numbers.bits:
        for kind in numbers.granularities:
            for granularity in [kind(size) for size in GROUP_SIZES] if kind is PerGroup else [kind()]:
                yield Storage(name, bits, granularity)


def precisions(name: str) -> list[Precision]:
    """Every storage of a format, in every compute that it can feed."""
    return [Precision(storage, compute) for storage in storages(name) for compute in sorted(load_format(name).computes)]


class SideBySide(nn.Module):
    """Each layer reads an input of its own; outputs have the names of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.strided = nn.Conv2d(4, 8, 2, stride=2, bias=False)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.signal = nn.Conv1d(3, 7, 5)
        self.transposed = nn.ConvTranspose2d(4, 6, 3)
        self.linear = nn.Linear(40, 17)
        self.unbiased = nn.Linear(24, 9, bias=False)
        self.sequence = nn.Linear(10, 3)
        self.unbiased_sequence = nn.Linear(8, 5, bias=False)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        return {name: layer(x) for (name, layer), x in zip(self.named_children(), inputs, strict=True)}


SHAPES: dict[str, tuple[int, ...]] = {
    "conv": (3, 6, 6),
    "strided": (4, 6, 6),
    "grouped": (4, 5, 5),
    "depthwise": (6, 5, 5),
    "signal": (3, 9),
    "transposed": (4, 3, 3),
    "linear": (40,),
    "unbiased": (24,),
    "sequence": (4, 10),
    "unbiased_sequence": (4, 8),
}
"""Of one example, by layer."""


@dataclass(frozen=True)
class Case:
    model: nn.Module
    inputs: dict[str, np.ndarray]
    graph: FloatGraph


@dataclass(frozen=True)
class Written:
    """A file, and what it should be equal to."""

    exported: Exported
    twin: bytes
    precisions: Mapping[str, Precision]
    model: nn.Module
    """In PyTorch, its weights on their grids."""


@dataclass(frozen=True)
class Ran:
    """What came of a file in a session."""

    outputs: dict[str, np.ndarray]
    optimised: onnx.GraphProto

    @property
    def operators(self) -> list[str]:
        return sorted(node.op_type for node in self.optimised.node)


@cache
def case() -> Case:
    """Exported once, as that takes seconds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SideBySide().eval()
    random = np.random.default_rng(0)
    inputs = {f"{name}_in": random.normal(size=(EXAMPLES, *shape)).astype(np.float32) for name, shape in SHAPES.items()}
    return Case(model, inputs, RUNTIME.float_graph(model, inputs, opset=OPSET))


def chosen(*precisions: Precision) -> dict[str, Precision]:
    """The precisions one after the other, over and over; in fp32 for layers that cannot compute in that way."""
    return {
        layer: precision
        if is_able(case().model.get_submodule(layer), precision.compute)
        else Precision(precision.storage, Compute.FP32)
        for layer, precision in zip(SHAPES, cycle(precisions), strict=False)
    }


def is_able(layer: nn.Module, compute: Compute) -> bool:
    """Whether such a layer has a kernel for it."""
    able = {Compute.INT8: (nn.Conv1d, nn.Conv2d, nn.Linear), Compute.INT8_DYNAMIC: nn.Linear}
    return compute not in able or isinstance(layer, able[compute])


@cache
def grids_of(storage: Storage) -> dict[str, Grid]:
    """By layer; the same in every compute, as the largest integer is."""
    return fitted(case().model, dict.fromkeys(SHAPES, Precision(storage, Compute.FP32)), {}, largest=INT8_MAX)


def write(precisions: Mapping[str, Precision]) -> Written:
    """The file and its twin, as weights are now encoded."""
    grids = {layer: grids_of(precision.storage)[layer] for layer, precision in precisions.items()}
    model = copy.deepcopy(case().model)
    put_on(model, precisions, grids, largest=INT8_MAX)
    graph = _with_weights(case().graph, model)
    exported = RUNTIME.write(graph, precisions, grids, seen=RUNTIME.observe(graph, precisions, [case().inputs]))
    decoded = {layer: _decoded(layer, precision, grids[layer], model) for layer, precision in precisions.items()}
    return Written(exported, _with_initializers(exported, precisions, decoded), precisions, model)


def run(data: bytes, folder: Path) -> Ran:
    """Outputs of a file, and the graph that ONNX Runtime makes of it."""
    options = _options()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, case().inputs), strict=True))
    return Ran(outputs, onnx.load(options.optimized_model_filepath).graph)


def runs_as(written: Written, ran: Ran) -> dict[str, str | None]:
    """By layer, what its kernel computes in."""
    return computes(onnx.load_from_string(written.exported.data).graph, ran.optimised, written.exported.tensors)


def left_to_decode(optimised: onnx.GraphProto) -> list[str]:
    """The nodes that decode weights at every run: any of the decoding, and whatever else reads a constant first."""
    constants = {tensor.name for tensor in optimised.initializer}
    return [
        f"{node.op_type}({', '.join(node.input)})"
        for node in optimised.node
        if node.op_type in DECODING or node.input[0] in constants
    ]


def evaluate(build: Callable[[Nodes], Sequence[ir.Value]]) -> list[np.ndarray]:
    """What ONNX Runtime makes of nodes without inputs; `build` appends them and returns the values asked for."""
    constants: list[ir.Value] = []

    def constant(array: np.ndarray) -> ir.Value:
        name = f"c{len(constants)}"
        constants.append(ir.Value(name=name, const_value=ir.Tensor(np.ascontiguousarray(array), name=name)))
        return constants[-1]

    nodes = Nodes(constant)
    outputs = [nodes.op("Identity", value) for value in build(nodes)]  # a constant cannot be an output itself
    graph = ir.Graph([], outputs, nodes=nodes.made, initializers=constants, opset_imports={"": OPSET}, name="g")
    data = ir.serde.serialize_model(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    return onnxruntime.InferenceSession(data, _options(), ["CPUExecutionProvider"]).run(None, {})


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _with_weights(graph: FloatGraph, model: nn.Module) -> FloatGraph:
    """The same graph with another model's weights."""
    changed = graph.copy()
    for layer, name in graph.weights.items():
        weight = model.get_submodule(layer).get_parameter("weight").detach().numpy()
        changed.model.graph.initializers[name].const_value = ir.Tensor(_as_read(layer, weight), name=name)
    return changed


def _as_read(layer: str, weight: np.ndarray) -> np.ndarray:
    """In the operator's shape: a MatMul reads the weight of a Linear transposed, and none of them is square."""
    shape = case().graph.model.graph.initializers[case().graph.weights[layer]].shape
    return np.ascontiguousarray(weight if weight.shape == shape else weight.T)


def _decoded(layer: str, precision: Precision, grid: Grid, on_grid: nn.Module) -> np.ndarray:
    """A layer's weight as it should be when a file is loaded: PyTorch's values for fp32 compute, otherwise integers."""
    if precision.compute is Compute.FP32:
        return _as_read(layer, on_grid.get_submodule(layer).get_parameter("weight").detach().numpy())
    module = case().model.get_submodule(layer)
    weight, axis = module.get_parameter("weight").detach(), output_axis(module)
    numbers = load_format(precision.storage.format)
    packed = numbers.pack(rows_of(weight, axis), grid, precision.storage, largest=INT8_MAX)
    integers = from_rows(torch.from_numpy(packed.integers), tuple(weight.shape), axis).numpy()
    if precision.compute is Compute.INT8_DYNAMIC:  # a product of integers has outputs last
        return np.ascontiguousarray(integers.T)
    return _as_read(layer, integers)


def _with_initializers(
    exported: Exported, precisions: Mapping[str, Precision], decoded: Mapping[str, np.ndarray]
) -> bytes:
    """The file without what decodes weights: their values are initializers under the names that they had."""
    model = onnx.load_from_string(exported.data)
    graph = model.graph
    for layer, tensor in exported.tensors.items():
        name = tensor
        if precisions[layer].compute is Compute.FP32:  # the product with the scale belongs to the decoding
            name = next(node.output[0] for node in graph.node if tensor in node.input)
        for node in graph.node:
            node.output[:] = [f"{output} unread" if output == name else output for output in node.output]
        for stored in [each for each in graph.initializer if each.name == name]:
            graph.initializer.remove(stored)
        graph.initializer.append(onnx.numpy_helper.from_array(decoded[layer], name))
    _drop_unread(graph)
    return model.SerializeToString()


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Take out nodes and initializers whose values nothing reads."""

    while True:
        read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
        unread = [node for node in graph.node if not read & set(node.output)]
        if not unread:
            break
        for node in unread:
            graph.node.remove(node)
    for stored in [each for each in graph.initializer if each.name not in read]:
        graph.initializer.remove(stored)
