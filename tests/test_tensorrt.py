"""Files for TensorRT: what they compute in the reference, what they weigh, and that they have its flavour."""

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exporting import relative_error
from onnx import TensorProto, numpy_helper
from torch import nn
from trt_files import INT4, INT4_BLOCKS, INT4_LONG_BLOCKS, NETWORKS, OPSET, RUNTIME, Case, case, noise

from hirelc_deploy import graph
from hirelc_deploy.compress.grids import fitted, put_on
from hirelc_deploy.compress.simulate import simulated
from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters._calibrate import Histogram, Method, magnitude_of
from hirelc_deploy.policy import FP8, FP16, INT8, Compute, Precision

# Rounding in 32-bit floats over sums of a few hundred products.
FLOAT_TOLERANCE = 1e-5

# Eleven bits a value, through a handful of layers.
HALF_TOLERANCE = 2e-3

# Half a step in 127 at either side of each layer.
INT8_TOLERANCE = 0.03

# Half a step of a sixteenth at either side of each layer.
FP8_TOLERANCE = 0.15

TOLERANCE = {None: FLOAT_TOLERANCE, FP16: HALF_TOLERANCE, INT8: INT8_TOLERANCE, FP8: FP8_TOLERANCE}


def run(network: Case, data: bytes, folder: Path, examples: int | None = None) -> dict[str, np.ndarray]:
    path = folder / "model.onnx"
    path.write_bytes(data)
    return RUNTIME.load(path, threads=1).run({name: array[:examples] for name, array in network.inputs.items()})


def reference(model: nn.Module, network: Case, examples: int | None = None) -> dict[str, np.ndarray]:
    with torch.no_grad():
        outputs = graph.forward(model, {n: torch.from_numpy(array[:examples]) for n, array in network.inputs.items()})
    return {name: output.numpy() for name, output in outputs.items()}


@pytest.mark.parametrize("precision", [None, FP16, INT8, FP8], ids=str)
@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_file_is_the_model_at_every_batch_size(name: str, precision: Precision | None, tmp_path: Path) -> None:
    network = case(name)
    data = network.write(network.precisions(precision)).data
    for examples in (1, 3):
        found = run(network, data, tmp_path, examples)
        assert all(array.dtype == np.float32 for array in found.values())
        assert relative_error(found, reference(network.model, network, examples)) < TOLERANCE[precision]


def test_int4_in_long_blocks_has_half_the_scales() -> None:
    """The head has 128 inputs and 10 outputs: one block of 128 a row, or two of 64, and a scale of two bytes each."""
    network = case("residual")
    by_size = {each: network.write({"head": each}).layers["head"].bytes for each in (INT4_BLOCKS, INT4_LONG_BLOCKS)}
    assert by_size[INT4_LONG_BLOCKS] == 10 * 128 // 2 + 2 * 10
    assert by_size[INT4_BLOCKS] == by_size[INT4_LONG_BLOCKS] + 2 * 10


@pytest.mark.parametrize("precision", [INT4, INT4_BLOCKS], ids=str)
def test_int4_weights_are_the_decoded_values(precision: Precision, tmp_path: Path) -> None:
    network = case("words")
    precisions = network.precisions(precision, nn.Linear)
    exported = network.write(precisions)
    rounded = copy.deepcopy(network.model)
    put_on(rounded, precisions, fitted(network.model, precisions, {}, largest=127), largest=127)
    found = run(network, exported.data, tmp_path)
    assert relative_error(found, reference(rounded, network)) < HALF_TOLERANCE
    assert relative_error(found, reference(network.model, network)) > 5 * HALF_TOLERANCE
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load_from_string(exported.data).graph.initializer}
    assert {kinds[exported.layers[name].tensor] for name in precisions} == {TensorProto.INT4}
    # 64 inputs: half a byte a weight, and scales of two bytes, one a channel and block
    assert exported.layers["inner"].bytes == 64 * 64 // 2 + 2 * 64


@pytest.mark.parametrize("precision", [None, FP16, INT8, FP8, INT4], ids=str)
@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_size_is_told_before_a_file_is_written(name: str, precision: Precision | None) -> None:
    network = case(name)
    precisions = network.precisions(precision)
    shapes = {key: tuple(tensor.shape) for key, tensor in network.model.state_dict().items()}
    told = len(RUNTIME.foreseen(network.graph, shapes, precisions, ir_version=10, metadata={"tool": "x"}))
    assert told == len(network.write(precisions, metadata={"tool": "x"}).data)


def test_fp8_computes_what_fine_tuning_simulates(tmp_path: Path) -> None:
    network = case("attention")
    precisions = network.precisions(FP8, nn.Linear)
    exported = network.write(precisions)
    grids = fitted(network.model, precisions, {}, largest=127)
    with simulated(network.model, precisions, grids, largest=127, is_symmetric=True) as simulation:
        simulation.calibrate([{name: torch.from_numpy(array) for name, array in network.inputs.items()}])
        expected = reference(network.model, network)
    found = run(network, exported.data, tmp_path)
    # a value that lies between two numbers of FP8 can be rounded to the other one: a step is a sixteenth
    assert relative_error(found, expected) < FP8_TOLERANCE / 10
    assert relative_error(found, reference(network.model, network)) > 2 * relative_error(found, expected)
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load_from_string(exported.data).graph.initializer}
    assert {kinds[exported.layers[name].tensor] for name in precisions} == {TensorProto.FLOAT8E4M3FN}
    # a byte a weight, and a scale of two bytes a channel
    rows, columns = network.model.get_submodule("head").get_parameter("weight").shape
    assert exported.layers["head"].bytes == rows * columns + 2 * rows


def test_a_tensor_that_layers_read_in_int8_and_in_fp8_has_both_grids(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"whole": nn.Linear(8, 6), "real": nn.Linear(8, 6), "halves": nn.Linear(8, 6)})
    model.forward = lambda x: model["whole"](x) + model["real"](x) + model["halves"](x)  # type: ignore[method-assign]
    inputs = {"x": noise(8)}
    network = Case(model.eval(), inputs, RUNTIME.float_graph(model, inputs, opset=OPSET))
    exported = network.write({"whole": INT8, "real": FP8, "halves": FP16})
    file = onnx.load_from_string(exported.data).graph
    zeros = {tensor.name: tensor.data_type for tensor in file.initializer}
    quantised = [node for node in file.node if node.op_type == "QuantizeLinear"]
    assert sorted(zeros[node.input[2]] for node in quantised) == [TensorProto.INT8, TensorProto.FLOAT8E4M3FN]
    assert len({node.input[0] for node in quantised}) == 1
    assert relative_error(run(network, exported.data, tmp_path), reference(model, network)) < FP8_TOLERANCE


def test_layers_can_stay_in_fp32_among_halves(tmp_path: Path) -> None:
    network = case("residual")
    precisions = network.precisions(FP16) | dict.fromkeys(["first"], INT8)
    del precisions["second"], precisions["head"]
    exported = network.write(precisions)
    file = onnx.load_from_string(exported.data)
    kinds = {tensor.name: tensor.data_type for tensor in file.graph.initializer}
    assert kinds[exported.layers["second"].tensor] == kinds[exported.layers["head"].tensor] == TensorProto.FLOAT
    assert kinds[exported.layers["stem"].tensor] == TensorProto.FLOAT16
    assert relative_error(run(network, exported.data, tmp_path), reference(network.model, network)) < INT8_TOLERANCE


def test_a_file_has_the_flavour_of_tensorrt() -> None:
    network = case("residual")
    file = network.file(network.precisions(INT8)).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in file.initializer}
    producer = {name: node for node in file.node for name in node.output}
    for node in file.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert constants[node.input[1]].dtype == np.float16
            assert len(node.input) == 2 or (constants[node.input[2]] == 0 and constants[node.input[2]].dtype == np.int8)
        if node.op_type in ("Conv", "Gemm"):
            activation, weight, bias = (producer.get(name) for name in node.input)
            assert activation is not None
            assert activation.op_type == "DequantizeLinear"
            assert weight is not None
            assert constants[weight.input[0]].dtype == np.int8
            assert bias is None
            assert constants[node.input[2]].dtype == np.float16
    additions = [node for node in file.node if node.op_type == "Add"]
    assert len(additions) == 2
    for node in additions:
        assert [producer[name].op_type for name in node.input] == ["DequantizeLinear"] * 2


def test_an_addition_that_rounds_badly_reads_floats() -> None:
    network = case("residual")
    precisions = network.precisions(INT8)
    name = "Add of second, stem"
    floats = {name: Compute.FP16}
    assert name in RUNTIME.rounding_errors(network.graph, precisions, [network.inputs]).between
    seen = RUNTIME.observe(network.graph, precisions, [network.inputs], floats=floats)
    grids = fitted(network.model, precisions, {}, largest=127)
    exported = RUNTIME.write(network.graph, precisions, grids, seen=seen, floats=floats, ir_version=10)
    file = onnx.load_from_string(exported.data).graph
    producer = {out: node.op_type for node in file.node for out in node.output}
    first, second = ([producer[x] for x in node.input] for node in file.node if node.op_type == "Add")
    assert "DequantizeLinear" not in first
    assert second == ["DequantizeLinear"] * 2


def test_a_residual_stream_of_tokens_stays_in_halves() -> None:
    """Quantised, it ruins a transformer, and no integer kernel reads it."""
    network = case("attention")
    file = network.file(network.precisions(INT8)).graph
    producer = {out: node for node in file.node for out in node.output}
    constants = {tensor.name for tensor in file.initializer}
    streams = [node for node in file.node if node.op_type == "Add" and not constants & set(node.input)]
    assert streams
    assert all(producer[x].op_type != "DequantizeLinear" for node in streams for x in node.input if x in producer)


def test_groups_that_do_not_divide_a_row_are_refused_by_name() -> None:
    network = case("attention")
    with pytest.raises(UserError, match=r"head is stored in groups of 64, and has 8 inputs"):
        network.write(network.precisions(INT4_BLOCKS, nn.Linear))


def test_a_symmetric_range_holds_what_its_method_says() -> None:
    values = np.append(np.random.default_rng(0).normal(size=100_000), -20).astype(np.float32)
    histogram = Histogram()
    histogram.add(values)
    found = {method: magnitude_of(histogram, method) for method in Method}
    assert found[Method.MIN_MAX] == 20.0
    assert 3.0 < found[Method.PERCENTILE] < 5.0

    def error(magnitude: float) -> float:
        step = magnitude / 127
        return float(np.mean((values - np.clip(np.rint(values / step), -128, 127) * step) ** 2))

    # candidates are 4 % apart
    assert error(found[Method.MSE]) <= 1.01 * min(map(error, np.linspace(3, 20, 50)))


def test_a_range_of_zeros_has_a_grid() -> None:
    histogram = Histogram()
    histogram.add(np.zeros(8, np.float32))
    assert [magnitude_of(histogram, method) for method in Method] == [0.0] * len(Method)
