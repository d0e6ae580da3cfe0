"""What TensorRT's parser would refuse in a file, found before a device is asked, by layer and with the way out.

The rules are those of TensorRT 10's ONNX parser (onnx-tensorrt 10.1, and TensorRT-RTX 1.7 as far as it was tried):
every zero point is zero, activations have one scale, weights one a channel of their outputs or blocks of their inputs,
and the only quantised constants are weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from hirelc_deploy.errors import UserError

Q, DQ = "QuantizeLinear", "DequantizeLinear"

WEIGHT_INPUT = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}
"""At which input an operator may read a quantised constant."""

OF_LAYERS = {*WEIGHT_INPUT, "Gather"}
"""What a layer's weight is read by at last."""

BIAS_INPUT = 2

LAYOUT = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast"}
"""What a float constant may go through on its way to a layer: the parser folds it."""

OPERATORS = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil Celu
Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace DequantizeLinear Div
Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm
GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization GRU HardSigmoid
HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log
LogSoftmax Loop LRN LSTM LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul
Neg NonMaxSuppression NonZero Not OneHot Or Pad Pow PRelu QuantizeLinear RandomNormal RandomNormalLike RandomUniform
RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RNN RoiAlign Round Scan ScatterElements
ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt
Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
"""
"""Operators of ONNX's own domain that TensorRT 10's table names."""

SUPPORTED = frozenset(OPERATORS.split())

DECODES = {"BitShift", "BitwiseAnd", "BitwiseOr"}
"""What packed weights are unpacked by."""

INTEGER_KERNELS = {"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul"}

PACKED_FIX = "TensorRT takes int8, int4 and fp16 weights as they are: write the file with a target whose runtime it is"


def lint(
    model: onnx.ModelProto,
    *,
    opset: int | None = None,
    int4_in_pairs: bool = False,
    layers: Mapping[str, str] | None = None,
) -> None:
    """Raises UserError for the first thing that TensorRT would refuse.

    `opset` is the newest that the target's version reads, and `int4_in_pairs` says whether that packs INT4 weights in
    pairs along their last axis; `layers` says in which tensor each layer's weight lies.
    """
    file = _File(model.graph, layers or {})
    rules = (*RULES, _int4_pairs) if int4_in_pairs else RULES
    for check in (_domains(model, opset), *(rule(file) for rule in rules)):
        for found in check:
            raise UserError(found.what, fix=found.fix)


def where_in(model: onnx.ModelProto, layers: Mapping[str, str], number: int) -> str:
    """The node with this number in words: its layer, or the nearest one."""
    return _File(model.graph, layers).where(model.graph.node[number])


@dataclass(frozen=True)
class Found:
    """Something that would be refused."""

    what: str
    fix: str


class _File:
    """A graph whose values can be followed, and named by layers."""

    def __init__(self, graph: onnx.GraphProto, layers: Mapping[str, str]) -> None:
        self.graph = graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.constants |= {
            node.output[0]: attribute.t
            for node in graph.node
            if node.op_type == "Constant"
            for attribute in node.attribute
            if attribute.name == "value"
        }
        self.producer = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in graph.node:
            for index, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, index))
        self.layer_of: dict[str, str] = {}
        """By what a node writes: the layer that it computes, or decodes the weight of."""
        for layer, tensor in layers.items():
            self._claim(layer, tensor)
            self._claim_sources(layer, tensor)

    def _claim(self, layer: str, name: str) -> None:
        for reader, _ in self.readers.get(name, []):
            if self.layer_of.setdefault(reader.output[0], layer) == layer and reader.op_type not in OF_LAYERS:
                self._claim(layer, reader.output[0])

    def _claim_sources(self, layer: str, name: str) -> None:
        """What a weight is decoded by, where it is."""
        node = self.producer.get(name)
        if node is not None and self.layer_of.setdefault(node.output[0], layer) == layer:
            for read in node.input:
                self._claim_sources(layer, read)

    def where(self, node: onnx.NodeProto) -> str:
        """A node in words: its layer, or the nearest layer that it comes from or leads to, or what it writes."""
        own = self.layer_of.get(node.output[0])
        if own is None and node.op_type in (Q, DQ):
            own = self._nearest(node, lambda each: self._next(each) if each.op_type in (Q, DQ) else [])
        if own is not None:
            return own
        for words, further in (("behind", self._previous), ("before", self._next)):
            layer = self._nearest(node, further)
            if layer is not None:
                return f"{node.op_type} {words} {layer}"
        return f"{node.op_type} that writes {node.output[0]!r}"

    def _previous(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        return [self.producer[name] for name in node.input if name in self.producer]

    def _next(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        return [reader for name in node.output for reader, _ in self.readers.get(name, [])]

    def _nearest(
        self, node: onnx.NodeProto, further: Callable[[onnx.NodeProto], Sequence[onnx.NodeProto]]
    ) -> str | None:
        pending, done = [node], {node.output[0]}
        while pending:
            each = pending.pop(0)
            if each.output[0] in self.layer_of:
                return self.layer_of[each.output[0]]
            new = [other for other in further(each) if other.output[0] not in done]
            done.update(other.output[0] for other in new)
            pending += new
        return None

    def of_type(self, *kinds: str) -> Iterator[onnx.NodeProto]:
        return (node for node in self.graph.node if node.op_type in kinds)

    def array(self, name: str) -> np.ndarray | None:
        """A constant's values."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def comes_from_constants(self, name: str) -> bool:
        """Whether nothing of it depends on what the graph is given."""
        if name in self.constants or not name:
            return True
        node = self.producer.get(name)
        return node is not None and all(self.comes_from_constants(x) for x in node.input)


def _domains(model: onnx.ModelProto, opset: int | None) -> Iterator[Found]:
    for entry in model.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            used = next((node.op_type for node in model.graph.node if node.domain == entry.domain), None)
            if used is not None:
                yield Found(
                    f"the file uses {entry.domain}.{used}, an operator of another runtime",
                    "write the file with a target whose runtime is tensorrt",
                )
        elif opset is not None and entry.version > opset:
            yield Found(
                f"the file is of opset {entry.version}, and the target's TensorRT reads up to {opset}",
                "write it for this target, or name a newer runtime in a target of your own",
            )


def _operators(file: _File) -> Iterator[Found]:
    for node in file.graph.node:
        if node.op_type in SUPPORTED:
            continue
        where = file.where(node)
        if node.op_type in DECODES:
            yield Found(f"{where}: its weights are packed ({node.op_type})", PACKED_FIX)
        elif node.op_type in INTEGER_KERNELS:
            yield Found(f"{where}: TensorRT has no {node.op_type}", "quantise with Q/DQ: compute=int8")
        else:
            yield Found(
                f"{where}: TensorRT has no {node.op_type}",
                "write that part of the model with other operations of PyTorch",
            )


def _packed_weights(file: _File) -> Iterator[Found]:
    for node in file.of_type(*WEIGHT_INPUT):
        name = node.input[WEIGHT_INPUT[node.op_type]]
        while (producer := file.producer.get(name)) is not None and producer.op_type in LAYOUT:
            name = producer.input[0]
        codes = file.constants.get(name)
        is_codes = codes is not None and codes.data_type in (onnx.TensorProto.UINT8, onnx.TensorProto.UINT16)
        is_decoded = producer is not None and producer.op_type != DQ and file.comes_from_constants(name)
        if is_codes or is_decoded:
            yield Found(
                f"{file.where(node)}: its weight is computed from constants when the file is loaded", PACKED_FIX
            )


def _kernel_shapes(file: _File) -> Iterator[Found]:
    """Of a convolution whose weight is no constant itself, TensorRT 10.1's parser reads the shape from there alone."""
    for node in file.of_type("Conv"):
        is_said = any(attribute.name == "kernel_shape" for attribute in node.attribute)
        if node.input[1] not in file.constants and not is_said:
            yield Found(
                f"{file.where(node)}: its weight is dequantised, and kernel_shape is missing", "write kernel_shape"
            )


def _quantised_constants(file: _File) -> Iterator[Found]:
    """A bias is told from other constants, since it is what another runtime's files have."""
    for node in file.of_type(DQ):
        source = node.input[0]
        if source in file.producer and file.producer[source].op_type == Q:
            source = file.producer[source].input[0]
        if source not in file.constants:
            continue
        for reader, index in _through_layout(file, node.output[0]):
            if index == BIAS_INPUT and reader.op_type in WEIGHT_INPUT:
                yield Found(
                    f"{file.where(reader)}: its bias is quantised",
                    "leave the bias in floats: TensorRT scales it itself",
                )
            elif WEIGHT_INPUT.get(reader.op_type) != index:
                yield Found(
                    f"{file.where(reader)}: it reads a quantised constant that is no weight",
                    "leave every constant but the weights of convolutions and Linear layers in floats",
                )


def _zero_points(file: _File) -> Iterator[Found]:
    for node in file.of_type(Q, DQ):
        zero = file.array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if len(node.input) > 2 and node.input[2] and zero is None:
            yield Found(f"{file.where(node)}: its zero point is computed", "store it: TensorRT wants a constant 0")
        elif zero is not None and np.any(zero.astype(np.int64)):
            yield Found(
                f"{file.where(node)}: a zero point is {int(zero.astype(np.int64).ravel()[0])}",
                "quantise symmetrically: TensorRT's grids have zero points of 0",
            )
        elif _type_of(file, node) == onnx.TensorProto.UINT8:
            yield Found(
                f"{file.where(node)}: it is quantised to uint8",
                "give QuantizeLinear an int8 zero point of 0: TensorRT's grids are int8",
            )


def _type_of(file: _File, node: onnx.NodeProto) -> int:
    """The element type that a Q writes or a DQ reads, 0 where the file does not say."""
    if len(node.input) > 2 and node.input[2]:
        return file.constants[node.input[2]].data_type
    if node.op_type == DQ:
        return file.constants[node.input[0]].data_type if node.input[0] in file.constants else 0
    wanted = [attribute.i for attribute in node.attribute if attribute.name == "output_dtype" and attribute.i]
    return wanted[0] if wanted else onnx.TensorProto.UINT8


def _scales(file: _File) -> Iterator[Found]:
    for node in file.of_type(Q, DQ):
        scale = file.array(node.input[1])
        where = file.where(node)
        if scale is None:
            yield Found(f"{where}: its scale is computed", "store it: TensorRT wants constant scales")
        elif not np.all(np.isfinite(scale)) or not np.all(scale.astype(np.float32) > 0):
            yield Found(
                f"{where}: a scale is not positive and finite", "calibrate again on data that the layer reacts to"
            )
        elif scale.size > 1:
            yield from _axis(file, node, scale, where)


def _axis(file: _File, node: onnx.NodeProto, scale: np.ndarray, where: str) -> Iterator[Found]:
    """Several scales: of a weight alone, along its outputs, or in blocks of its inputs."""
    tensor = file.constants.get(node.input[0])
    if tensor is None:
        yield Found(
            f"{where}: an activation has {scale.size} scales", "give it one: TensorRT quantises activations whole"
        )
        return
    shape, axis = tuple(tensor.dims), _attribute(node, "axis", 1) % max(len(tensor.dims), 1)
    if scale.ndim == len(shape) and scale.ndim > 1:
        size = shape[axis] // scale.shape[axis] if scale.shape[axis] else 0
        expected = tuple(side // size if a == axis and size else side for a, side in enumerate(shape))
        if not size or shape[axis] % size or scale.shape != expected:
            yield Found(
                f"{where}: scales {scale.shape} do not divide a weight {shape} into blocks", "use blocks of 64 or 128"
            )
        return
    for reader, index in _through_layout(file, node.output[0]):
        wanted = _output_axis(reader, len(shape))
        if WEIGHT_INPUT.get(reader.op_type) == index and (axis != wanted or scale.shape != (shape[wanted],)):
            yield Found(
                f"{where}: {scale.size} scales lie along axis {axis} of a weight {shape}",
                f"scale it by output channel: axis {wanted}, {shape[wanted]} scales",
            )


def _output_axis(reader: onnx.NodeProto, rank: int) -> int:
    if reader.op_type == "Gemm":
        return 0 if _attribute(reader, "transB", 0) else 1
    return {"MatMul": rank - 1, "ConvTranspose": 1}.get(reader.op_type, 0)


def _int4_pairs(file: _File) -> Iterator[Found]:
    for node in file.of_type(DQ):
        tensor = file.constants.get(node.input[0])
        if tensor is not None and tensor.data_type == onnx.TensorProto.INT4 and tensor.dims[-1] % 2:
            yield Found(
                f"{file.where(node)}: INT4 weights of {tuple(tensor.dims)} have an odd last axis",
                "this TensorRT packs them in pairs along it: leave the layer in fp16 or int8",
            )


def _through_layout(file: _File, name: str) -> Iterator[tuple[onnx.NodeProto, int]]:
    """What reads a value, by way of operators that only change its layout."""
    for reader, index in file.readers.get(name, []):
        if reader.op_type in LAYOUT:
            yield from _through_layout(file, reader.output[0])
        else:
            yield reader, index


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


RULES = (_operators, _packed_weights, _kernel_shapes, _quantised_constants, _zero_points, _scales)
"""In this order: what is found first explains what would be found next."""
