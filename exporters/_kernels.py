"""Single kernels as ONNX Runtime executes them, each a file of its own that can be timed.

A layer in a file of its own runs between the borders of that file: its inputs are brought into blocks of channels, or
to integers, and its outputs back.  In a network its neighbours have done that.  So a session optimises the small file,
and the one node that is the layer is cut out of what it made of it; a file of that node alone, which no session
optimises further, takes the time of the kernel and nothing else.
"""

import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hirelc_deploy.cost.kernel import BORDERS, Kernel, Operand, number_of
from hirelc_deploy.exporters import _sessions
from hirelc_deploy.exporters._base import KernelFile, NoKernelError, Optimise, Request, Shapes
from hirelc_deploy.exporters._plan import MOVES
from hirelc_deploy.policy import Compute

DOMAINS = {"": 18, "com.microsoft": 1, "com.microsoft.nchwc": 1}
IR_VERSION = 8

ALIGNED = 4
"""Channels that a session brings into blocks are a multiple of it."""

POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
"""Operators that have a kernel for blocks of channels, which they run in behind a convolution."""

AROUND = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Transpose", "Cast", "Relu"} | {
    "ReorderInput",
    "ReorderOutput",
}
"""What a session puts around a layer."""


@dataclass(frozen=True)
class Cut:
    """Nodes that follow one another, their constants, and what they read at run time."""

    nodes: Sequence[onnx.NodeProto]
    constants: Sequence[onnx.TensorProto]
    read: Mapping[str, np.ndarray]

    def file(self, copies: int) -> KernelFile:
        """The nodes so many times over, each on the same inputs; only the first one's result leaves the file.

        A session executes nodes whose results nobody reads as well, since it optimises nothing.
        """
        shared = {*self.read, *(tensor.name for tensor in self.constants), ""}
        every = []
        for number in range(copies):
            for node in self.nodes:
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                copy.name = f"{node.op_type}{number}"
                for names in (copy.input, copy.output):
                    for i, name in enumerate(names):
                        names[i] = name if name in shared else f"{name}.{number}"
                every.append(copy)
        outputs = [onnx.ValueInfoProto(name=f"{self.nodes[-1].output[0]}.0")]
        data = _model(every, self.constants, self.read, outputs).SerializeToString()
        return KernelFile(data, self.read, copies)


def kernel_steps(kernel: Kernel, *, seed: int = 0) -> Generator[Request, Any, Cut]:
    """Make the kernel's file for a device.  Raises NoKernelError if its sessions have no such kernel."""
    random = np.random.default_rng(seed)
    if kernel.op in BORDERS:
        return (yield from _border(kernel, random))
    if kernel.compute is Compute.FP32 and kernel.weight is None and kernel.op not in POOLS:
        node, constants, read = _float_node(kernel, random)
        cut = Cut([node], constants, read)
        file = cut.file(1)  # of all operators that there are: some read what a kernel's text does not tell
        yield Shapes(file.data, (f"{node.output[0]}.0",), file.inputs)
        return cut
    if kernel.op in MOVES - {"MaxPool"}:  # the same operator on bytes
        node, constants, read = _float_node(kernel, random)
        return Cut([node], constants, {name: _like((x.shape, "uint8"), random) for name, x in read.items()})
    return (yield from _cut_out(kernel, random))


def answer(request: Request) -> Any:
    """What a session on this machine makes of a file, or what its values are like."""
    try:
        if isinstance(request, Optimise):
            return _optimised(request.data)
        session = _sessions.in_memory(request.data, _sessions.options(1, _sessions.Level.ORT_DISABLE_ALL))
        present = {each.name for each in session.get_inputs()}
        given = {name: array for name, array in request.inputs.items() if name in present}
        arrays = session.run(list(request.names), given)
    except Exception as error:  # whatever the session says of it
        raise NoKernelError(str(error).splitlines()[0]) from error
    return {name: (array.shape, str(array.dtype)) for name, array in zip(request.names, arrays, strict=True)}


def _optimised(data: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        options = _sessions.options(threads=1)
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        _sessions.in_memory(data, options)
        return Path(options.optimized_model_filepath).read_bytes()


class KernelSession:
    """A file with kernels, ready to run on what it reads."""

    def __init__(self, file: KernelFile, *, threads: int) -> None:
        self._session = _sessions.in_memory(file.data, _sessions.options(threads, _sessions.Level.ORT_DISABLE_ALL))
        self._inputs = dict(file.inputs)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The file's own inputs are read, whatever is given: sessions with different ones run side by side."""
        self._session.run(None, self._inputs)
        return {}


# -- the three ways to a node --------------------------------------------------------------------------------


def _border(kernel: Kernel, random: np.random.Generator) -> Generator[Request, Any, Cut]:
    """From one way of holding a tensor to another; integer images lie with their channels last."""
    shape = kernel.operands[0].shape
    is_image = len(shape) == 4
    scale, zero = _tensor("scale", 0.05, np.float32), _tensor("zero", 3, np.uint8)
    floats = {"x": random.standard_normal(shape).astype(np.float32)}
    match kernel.op:
        case "QuantizeLinear":
            nodes = [_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])]
            if is_image:
                nodes.append(_node("Transpose", ["y"], ["z"], perm=[0, 2, 3, 1]))
            return Cut(nodes, [scale, zero], floats)
        case "DequantizeLinear":
            nodes = [_node("DequantizeLinear", ["z" if is_image else "x", "scale", "zero"], ["y"])]
            integers = random.integers(0, 256, shape).astype(np.uint8)
            if is_image:
                nodes.insert(0, _node("Transpose", ["x"], ["z"], perm=[0, 3, 1, 2]))
                integers = np.ascontiguousarray(integers.transpose(0, 2, 3, 1))
            return Cut(nodes, [scale, zero], {"x": integers})
    # blocks are filled up
    whole = {"x": np.resize(floats["x"], (shape[0], ceil(shape[1] / ALIGNED) * ALIGNED, *shape[2:]))}
    into = _node("ReorderInput", ["x"], ["y"], domain="com.microsoft.nchwc", channels_last=0)
    if kernel.op == "ReorderInput":
        return Cut([into], [], whole)
    model = _model([into], [], whole, [onnx.ValueInfoProto(name="y")])
    shapes = yield Shapes(model.SerializeToString(), ("y",), whole)
    back = _node("ReorderOutput", ["x"], ["y"], domain="com.microsoft.nchwc", channels_last=0, channels=shape[1])
    return Cut([back], [], {"x": _like(shapes["y"], random)})


def _cut_out(kernel: Kernel, random: np.random.Generator) -> Generator[Request, Any, Cut]:
    """What a session makes of the operator between its borders."""
    node, constants, read = _float_node(kernel, random)
    nodes = [node]
    if kernel.op in POOLS and kernel.compute is Compute.FP32 and len(kernel.operands[0].shape) == 4:
        nodes, constants = _behind_a_convolution(node, kernel.operands[0].shape, constants)
    elif kernel.compute is not Compute.FP32:
        nodes, constants = _in_integers(kernel, node, constants)
    model = _model(nodes, constants, read, [onnx.ValueInfoProto(name=name) for name in nodes[-1].output])
    for output in model.graph.output:
        output.type.tensor_type.elem_type = TensorProto.FLOAT
    optimised = onnx.load_from_string((yield Optimise(model.SerializeToString())))
    found = [each for each in optimised.graph.node if each.op_type not in AROUND]
    if kernel.op in POOLS:
        found = found[-1:]
    if len(found) != 1:
        raise NoKernelError(f"{kernel} becomes {', '.join(each.op_type for each in optimised.graph.node)}")
    main = found[0]
    known = {tensor.name: tensor for tensor in optimised.graph.initializer}
    wanted = [name for name in dict.fromkeys(main.input) if name and name not in known]
    shapes = {name: (read[name].shape, str(read[name].dtype)) for name in wanted if name in read}
    if computed := tuple(name for name in wanted if name not in read):
        shapes |= yield Shapes(_with_outputs(optimised, computed), computed, read)
    values = {name: _like(shapes[name], random) for name in wanted}
    if kernel.compute is Compute.INT8 and all(value.dtype != np.uint8 for value in values.values()):
        raise NoKernelError(f"{kernel} stays in float")
    names = {name: f"x{i}" for i, name in enumerate(wanted)}
    cut = onnx.NodeProto()
    cut.CopyFrom(main)
    for i, name in enumerate(cut.input):
        cut.input[i] = names.get(name, name)
    if kernel.compute is Compute.INT8 and kernel.op in POOLS and len(kernel.operands[0].shape) == 4:
        values = {name: np.ascontiguousarray(value.transpose(0, 2, 3, 1)) for name, value in values.items()}
        _with_channels_last(cut)
    del cut.output[1:]
    cut.output[0] = "y"
    constants = [known[name] for name in dict.fromkeys(main.input) if name in known]
    return Cut([cut], constants, {names[name]: value for name, value in values.items()})


def _with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> bytes:
    """The model with these values as its outputs."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return probe.SerializeToString()


def _like(kind: tuple[Sequence[int], str], random: np.random.Generator) -> np.ndarray:
    """Values of a shape and a type."""
    shape, dtype = kind
    if np.issubdtype(np.dtype(dtype), np.floating):
        return random.standard_normal(shape).astype(dtype)
    return random.integers(0, 128, shape).astype(dtype)


def _with_channels_last(pool: onnx.NodeProto) -> None:
    """The kernel that a session takes between integer convolutions, whose images lie so."""
    without = ("channels_last", "storage_order")
    kept = [attribute for attribute in pool.attribute if attribute.name not in without]
    if pool.op_type == "MaxPool":
        pool.op_type, pool.domain = "NhwcMaxPool", "com.microsoft"
    else:
        kept.append(helper.make_attribute("channels_last", 1))
    del pool.attribute[:]
    pool.attribute.extend(kept)


# -- pieces --------------------------------------------------------------------------------------------------


def _float_node(
    kernel: Kernel, random: np.random.Generator
) -> tuple[onnx.NodeProto, list[onnx.TensorProto], dict[str, np.ndarray]]:
    names, constants, read = [], [], {}
    for i, operand in enumerate(kernel.operands):
        if operand.values == ():
            names.append("")
            continue
        name = f"{operand.role}{i}"
        names.append(name)
        if operand.role == "x":
            read[name] = _read(kernel.op, i, operand.shape, random)
        else:
            constants.append(numpy_helper.from_array(_constant(operand, random), name))
    outputs = ["y"] if kernel.op != "Split" else [f"y#{i}" for i in range(_outputs_of_split(kernel))]
    return _node(kernel.op, names, outputs, **_attributes(kernel.attributes)), constants, read


READS_INTEGERS = {("Gather", 1), ("GatherElements", 1), ("GatherND", 1)}
READS_FLAGS = {("Where", 0), ("Not", 0), ("And", 0), ("And", 1), ("Or", 0), ("Or", 1)}
"""Operators that read something else than floats, and at which input."""


def _read(op: str, index: int, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """What an operator reads at run time."""
    if (op, index) in READS_INTEGERS:
        return np.zeros(shape, np.int64)  # a position that every tensor has
    if (op, index) in READS_FLAGS:
        return random.integers(0, 2, shape).astype(bool)
    return random.standard_normal(shape).astype(np.float32)


def _outputs_of_split(kernel: Kernel) -> int:
    values = kernel.operands[1].values if len(kernel.operands) > 1 else None
    return len(values) if values else int(_attributes(kernel.attributes).get("num_outputs", 2))  # type: ignore[call-overload]


def _constant(operand: Operand, random: np.random.Generator) -> np.ndarray:
    if operand.values is None:
        return 0.1 * random.standard_normal(operand.shape).astype(np.float32)
    is_whole = all(isinstance(value, int) for value in operand.values)
    array = np.array(operand.values, np.int64 if is_whole else np.float32)
    return array.reshape(operand.shape) if operand.shape else array


def _attributes(text: str) -> dict[str, object]:
    return {name: _attribute(value) for name, _, value in (part.partition("=") for part in text.split())}


def _attribute(text: str) -> object:
    parts = [_number_or_word(part) for part in text.rstrip(",").split(",")]
    if any(isinstance(part, str) for part in parts):
        return text
    return parts if "," in text else parts[0]


def _number_or_word(text: str) -> float | int | str:
    try:
        return number_of(text)
    except ValueError:
        return text


def _behind_a_convolution(
    node: onnx.NodeProto, shape: tuple[int, ...], constants: list[onnx.TensorProto]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    weight = numpy_helper.from_array(np.ones((shape[1], 1, 1, 1), np.float32), "before")
    name = node.input[0]
    before = _node("Conv", [name, "before"], ["behind"], group=shape[1])
    node.input[0] = "behind"
    return [before, node], [*constants, weight]


def _in_integers(
    kernel: Kernel, node: onnx.NodeProto, constants: list[onnx.TensorProto]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The operator between Q and DQ, as the exporter writes it (`_qdq`)."""
    if kernel.compute is Compute.INT8_DYNAMIC:
        return _dynamic(kernel, node, constants)
    nodes: list[onnx.NodeProto] = []
    kept = [
        _tensor("scale", 0.05, np.float32),
        _tensor("zero", 0, np.uint8),
        _tensor("zero#w", 0, np.int8),
        _tensor("zero#b", 0, np.int32),
    ]
    constant = {tensor.name: tensor for tensor in constants}
    for i, name in enumerate(node.input):
        if name not in constant:
            nodes.append(_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}#q"]))
            nodes.append(_node("DequantizeLinear", [f"{name}#q", "scale", "zero"], [f"{name}#dq"]))
        elif kernel.weight is not None and i == 1:
            nodes += _integer_weight(kernel, name, numpy_helper.to_array(constant[name]), kept)
        elif kernel.weight is not None and i == 2:
            size = len(numpy_helper.to_array(constant[name]))
            kept += [
                _tensor(f"{name}#q", np.zeros(size), np.int32),
                _tensor(f"{name}#scale", np.full(size, 5e-4), np.float32),
                _tensor(f"{name}#zero", np.zeros(size), np.int32),
            ]
            nodes.append(
                _node("DequantizeLinear", [f"{name}#q", f"{name}#scale", f"{name}#zero"], [f"{name}#dq"], axis=0)
            )
        else:
            kept.append(constant[name])
            continue
        node.input[i] = f"{name}#dq"
    nodes.append(node)
    if kernel.op not in ("Gemm", "MatMul"):  # a Linear writes floats
        node.output[0] = "y#float"
        nodes.append(_node("QuantizeLinear", ["y#float", "scale", "zero"], ["y#q"]))
        nodes.append(_node("DequantizeLinear", ["y#q", "scale", "zero"], ["y"]))
    return nodes, kept


def _integer_weight(
    kernel: Kernel, name: str, weight: np.ndarray, kept: list[onnx.TensorProto]
) -> list[onnx.NodeProto]:
    axis = 1 if kernel.reads_first else 0
    integers = np.clip(np.round(weight / 0.01), -63, 63).astype(np.int8)
    size = integers.shape[axis]
    kept += [
        numpy_helper.from_array(integers, f"{name}#q"),
        _tensor(f"{name}#scale", np.full(size, 0.01), np.float32),
        _tensor(f"{name}#zero", np.zeros(size), np.int8),
    ]
    inputs = [f"{name}#q", f"{name}#scale", f"{name}#zero"]
    return [_node("DequantizeLinear", inputs, [f"{name}#dq"], axis=axis)]


def _dynamic(
    kernel: Kernel, node: onnx.NodeProto, constants: list[onnx.TensorProto]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """A Linear whose input is quantised anew at every run, in the form that becomes one kernel."""
    constant = {tensor.name: tensor for tensor in constants}
    weight = numpy_helper.to_array(constant[node.input[1]])
    weight = weight if kernel.reads_first else weight.T
    kept = [
        numpy_helper.from_array(np.ascontiguousarray(np.clip(np.round(weight / 0.01), -63, 63).astype(np.int8)), "w#q"),
        _tensor("w#scale", np.full(weight.shape[1], 0.01), np.float32),
        _tensor("w#zero", np.zeros(weight.shape[1]), np.int8),
    ]
    x = node.input[0]
    nodes = [
        _node("DynamicQuantizeLinear", [x], ["xq", "xs", "xz"]),
        _node("MatMulInteger", ["xq", "w#q", "xz", "w#zero"], ["product"]),
        _node("Cast", ["product"], ["floats"], to=TensorProto.FLOAT),
        _node("Mul", ["xs", "w#scale"], ["both"]),
        _node("Mul", ["floats", "both"], ["scaled"]),
    ]
    if len(node.input) > 2:
        kept.append(constant[node.input[2]])
        nodes.append(_node("Add", ["scaled", node.input[2]], ["y"]))
    else:
        nodes[-1].output[0] = "y"
    return nodes, kept


def _tensor(name: str, values: Any, dtype: type[np.generic]) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, dtype), name)


def _node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), list(outputs), **attributes)


def _model(
    nodes: Sequence[onnx.NodeProto],
    constants: Sequence[onnx.TensorProto],
    read: Mapping[str, np.ndarray],
    outputs: Sequence[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in read.items()
    ]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(nodes, "kernel", inputs, outputs, [c for c in constants if c.name in used])
    imports = [helper.make_opsetid(domain, version) for domain, version in DOMAINS.items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)


NOTHING = Cut([_node("Identity", ["x"], ["y"])], [], {"x": np.zeros(1, np.float32)})
"""What a session costs by itself."""
