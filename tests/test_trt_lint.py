"""A file that TensorRT would refuse is refused before, with the layer and the way out: broken in every way there is."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from trt_files import INT4, OPSET, case

from hirelc_deploy.compress.grids import fitted
from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters import load_runtime
from hirelc_deploy.exporters._trt_lint import lint
from hirelc_deploy.policy import INT8, Compute, Precision

Break = Callable[[onnx.ModelProto, dict[str, str]], None]
BREAKS: dict[str, tuple[Break, str, str]] = {}


def breaks(what: str, fix: str) -> Callable[[Break], Break]:
    def named(function: Break) -> Break:
        BREAKS[function.__name__] = (function, what, fix)
        return function

    return named


def good(precision: Precision = INT8) -> tuple[onnx.ModelProto, dict[str, str]]:
    network = case("residual")
    exported = network.write(network.precisions(precision))
    return onnx.load_from_string(exported.data), exported.tensors


def constant(model: onnx.ModelProto, name: str, array: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def replaced(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    tensor = next(each for each in model.graph.initializer if each.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def array_of(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(each for each in model.graph.initializer if each.name == name))


def node_of(model: onnx.ModelProto, layers: dict[str, str], layer: str) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """The layer's DequantizeLinear, and the operator that reads it."""
    decode = next(node for node in model.graph.node if layers[layer] in node.input)
    return decode, next(node for node in model.graph.node if decode.output[0] in node.input)


def quantise_of(model: onnx.ModelProto, reader: onnx.NodeProto) -> onnx.NodeProto:
    """The QuantizeLinear before what an operator reads."""
    decode = next(node for node in model.graph.node if reader.input[0] in node.output)
    return next(node for node in model.graph.node if decode.input[0] in node.output)


@breaks("first: its bias is quantised", "leave the bias in floats")
def quantised_bias(model: onnx.ModelProto, layers: dict[str, str]) -> None:
    """As ONNX Runtime's tools write it."""
    _, conv = node_of(model, layers, "first")
    codes, scale = constant(model, "codes", np.ones(16, np.int32)), constant(model, "step", np.ones(16, np.float16))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", [codes, scale], ["bias"], axis=0))
    conv.input[2] = "bias"


@breaks("Add behind stem: it reads a quantised constant", "leave every constant but the weights")
def quantised_constant(model: onnx.ModelProto, layers: dict[str, str]) -> None:
    codes, scale = constant(model, "codes", np.ones(1, np.int8)), constant(model, "step", np.array(1, np.float16))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", [codes, scale], ["stray"]))
    next(node for node in model.graph.node if node.op_type == "Add").input[1] = "stray"


@breaks("second: its weights are packed (BitShift)", "as they are")
def packed_weights(model: onnx.ModelProto, layers: dict[str, str]) -> None:
    decode, _ = node_of(model, layers, "second")
    codes, bits = constant(model, "packed", np.ones((16, 16, 3, 3), np.uint8)), constant(model, "bits", np.uint8(4))
    model.graph.node.insert(0, helper.make_node("BitShift", [codes, bits], [layers["second"] + "#"], direction="RIGHT"))
    decode.input[0] = layers["second"] = layers["second"] + "#"


@breaks("first: its weight is computed from constants", "as they are")
def decoded_weights(model: onnx.ModelProto, layers: dict[str, str]) -> None:
    _, conv = node_of(model, layers, "first")
    scale = constant(model, "step", np.array(0.01, np.float16))
    model.graph.node.insert(0, helper.make_node("Mul", ["float", scale], ["weight"]))
    model.graph.node.insert(0, helper.make_node("Cast", [layers["first"]], ["float"], to=TensorProto.FLOAT16))
    conv.input[1] = "weight"


@breaks("first: its weight is dequantised, and kernel_shape is missing", "write kernel_shape")
def no_kernel_shape(model: onnx.ModelProto, layers: dict[str, str]) -> None:
    _, conv = node_of(model, layers, "first")
    del conv.attribute[[attribute.name for attribute in conv.attribute].index("kernel_shape")]


@breaks("down: a zero point is 3", "quantise symmetrically")
def zero_point(model: onnx.ModelProto, layers: dict[str, str]) -> None:
    _, conv = node_of(model, layers, "down")
    quantise_of(model, conv).input[2] = constant(model, "three", np.array(3, np.int8))


@breaks("down: it is quantised to uint8", "int8 zero point of 0")
def unsigned_activations(model: onnx.ModelProto, layers: dict[str, str]) -> None:
    _, conv = node_of(model, layers, "down")
    quantise_of(model, conv).input[2] = constant(model, "zero", np.array(0, np.uint8))


@breaks("down: it is quantised to uint8", "int8 zero point of 0")
def no_zero_point(model: onnx.ModelProto, layers: dict[str, str]) -> None:
    """Then it is uint8 by default."""
    _, conv = node_of(model, layers, "down")
    del quantise_of(model, conv).input[2]


@breaks("stem: an activation has 3 scales", "quantises activations whole")
def activation_by_channel(model: onnx.ModelProto, layers: dict[str, str]) -> None:
    _, conv = node_of(model, layers, "stem")
    quantise_of(model, conv).input[1] = constant(model, "three", np.ones(3, np.float16))


@breaks("first: 16 scales lie along axis 1 of a weight (16, 16, 3, 3)", "axis 0, 16 scales")
def wrong_axis(model: onnx.ModelProto, layers: dict[str, str]) -> None:
    decode, _ = node_of(model, layers, "first")
    del decode.attribute[:]  # 1 is the default


@breaks("down: a scale is not positive", "calibrate again")
def scale_of_zero(model: onnx.ModelProto, layers: dict[str, str]) -> None:
    decode, _ = node_of(model, layers, "down")
    replaced(model, decode.input[1], np.zeros_like(array_of(model, decode.input[1])))


@breaks("first: its scale is computed", "store it")
def computed_scale(model: onnx.ModelProto, layers: dict[str, str]) -> None:
    decode, _ = node_of(model, layers, "first")
    model.graph.node.insert(0, helper.make_node("Identity", [decode.input[1]], ["step"]))
    decode.input[1] = "step"


@breaks("BitCount behind", "other operations of PyTorch")
def unknown_operator(model: onnx.ModelProto, layers: dict[str, str]) -> None:
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "BitCount"


@breaks("TensorRT has no DynamicQuantizeLinear", "compute=int8")
def dynamic_quantisation(model: onnx.ModelProto, layers: dict[str, str]) -> None:
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "DynamicQuantizeLinear"


@breaks("com.microsoft.QGemm, an operator of another runtime", "whose runtime is tensorrt")
def other_domain(model: onnx.ModelProto, layers: dict[str, str]) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    node = next(node for node in model.graph.node if node.op_type == "Gemm")
    node.op_type, node.domain = "QGemm", "com.microsoft"


@breaks("opset 22, and the target's TensorRT reads up to 21", "newer runtime")
def newer_opset(model: onnx.ModelProto, layers: dict[str, str]) -> None:
    model.opset_import[0].version = OPSET + 1


@pytest.mark.parametrize("precision", [INT8, INT4, None], ids=str)
def test_what_is_written_passes(precision: Precision | None) -> None:
    for name in ("residual", "words", "attention"):
        network = case(name)
        exported = network.write(network.precisions(precision))
        lint(onnx.load_from_string(exported.data), opset=OPSET, layers=exported.tensors)


@pytest.mark.parametrize("name", list(BREAKS))
def test_a_broken_file_is_refused_with_the_layer_and_the_fix(name: str) -> None:
    model, layers = good()
    function, what, fix = BREAKS[name]
    function(model, layers)
    with pytest.raises(UserError) as refused:
        lint(model, opset=OPSET, layers=layers)
    assert what in refused.value.what
    assert fix in refused.value.fix


def test_int4_in_pairs_wants_an_even_last_axis() -> None:
    model, layers = good(INT4)
    lint(model, layers=layers)  # TensorRT-RTX 1.7 takes kernels of 3 x 3
    with pytest.raises(UserError, match=r"INT4 weights of \(16, 3, 3, 3\) have an odd last axis") as refused:
        lint(model, int4_in_pairs=True, layers=layers)
    assert refused.value.what.startswith("stem:")


@pytest.mark.parametrize("compute", [Compute.INT8, Compute.FP32])
def test_files_of_another_runtime_are_refused(compute: Compute) -> None:
    """ONNX Runtime's flavour: uint8 activations and quantised biases, or packed weights."""
    runtime, network = load_runtime("onnxruntime"), case("residual")
    precision = Precision(INT4.storage, compute)
    precisions = network.precisions(precision)
    seen = runtime.observe(network.graph, precisions, [network.inputs])
    grids = fitted(network.model, precisions, {}, largest=127)
    exported = runtime.write(network.graph, precisions, grids, seen=seen, ir_version=10)
    with pytest.raises(UserError):
        lint(onnx.load_from_string(exported.data), layers=exported.tensors)
