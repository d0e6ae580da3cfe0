"""Files for ONNX Runtime: what they compute, what they run as, what they weigh, and what is not in them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import pytest
import torch
from exporting import hasten, relative_error
from torch import Tensor, nn
from transformers import SwinConfig, SwinForImageClassification
from written_networks import (
    EXAMPLES,
    LARGEST,
    LAYERS,
    NETWORKS,
    RUNTIME,
    Case,
    Residual,
    build,
    case_of,
    floats,
    reference,
    write,
)

from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters._calibrate import Range
from hirelc_deploy.exporters._plan import plan
from hirelc_deploy.exporters._tidy import tidy
from hirelc_deploy.exporters.onnxruntime import optimised
from hirelc_deploy.policy import INT8, Compute, PerChannel, PerGroup, PerTensor, Precision, Storage

hasten()

INT8_STORED = Precision(Storage("int", 8, PerChannel()), Compute.FP32)
INT8_PER_TENSOR = Precision(Storage("int", 8, PerTensor()), Compute.INT8)
COARSE = [
    Precision(Storage(name, bits, granularity), compute)
    for name, bits, granularity in (
        ("int", 2, PerChannel()),
        ("int", 3, PerGroup(16)),
        ("float", 5, PerTensor()),
        ("log", 4, PerChannel()),
        ("codebook", 3, PerTensor()),
        ("vector", 2, PerChannel()),
    )
    for compute in (Compute.INT8, Compute.FP32)
]
"""A precision of every format."""
COARSE_IN_FLOATS = [precision for precision in COARSE if precision.compute is Compute.FP32]

# Rounding in 32-bit floats over sums of a few hundred products.
FLOAT_TOLERANCE = 1e-5

# Input, weight and output are each off by half a step in 255; small layers average little of it away.
INT8_TOLERANCE = 0.03


def is_layer(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() > 1


@pytest.mark.parametrize("case", [*LAYERS, *NETWORKS])
def test_the_fp32_file_is_the_model_at_every_batch_size(case: str, tmp_path: Path) -> None:
    network = case_of(case)
    model, inputs = network.model, network.inputs
    exported, path = write(network, None, tmp_path)
    session = RUNTIME.load(path, threads=1)
    for examples in (1, 3, EXAMPLES):
        some = {name: array[:examples] for name, array in inputs.items()}
        assert relative_error(session.run(some), reference(model, some)) < FLOAT_TOLERANCE
    runs_as = RUNTIME.runs_as(path, exported.tensors, threads=1)
    assert runs_as.keys() == {name for name, module in model.named_modules() if is_layer(module)}
    assert set(runs_as.values()) == {"fp32"}


def test_views_of_what_attention_returns_are_written(tmp_path: Path) -> None:
    """Swin's hold for the fused kernel's layout alone: PyTorch's exporter refuses it as it stands."""
    small = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1], num_heads=[2], window_size=4)
    torch.manual_seed(0)
    model, images = SwinForImageClassification(small).eval(), {"pixel_values": floats(3, 16, 16)}

    written = RUNTIME.write(RUNTIME.float_graph(model, images, opset=18), {})

    path = tmp_path / "model.onnx"
    path.write_bytes(written.data)
    session = RUNTIME.load(path, threads=1)
    for examples in (1, EXAMPLES):
        some = {name: array[:examples] for name, array in images.items()}
        assert relative_error(session.run(some), reference(model, some)) < FLOAT_TOLERANCE


@pytest.mark.parametrize("precision", [INT8, INT8_PER_TENSOR], ids=str)
@pytest.mark.parametrize("case", list(LAYERS))
def test_an_int8_layer_runs_in_integers_and_is_nearly_right(case: str, precision: Precision, tmp_path: Path) -> None:
    network = case_of(case)
    model, inputs = network.model, network.inputs
    exported, path = write(network, precision, tmp_path)
    assert RUNTIME.runs_as(path, exported.tensors, threads=1) == {"0": "int8"}
    assert relative_error(RUNTIME.load(path, threads=1).run(inputs), reference(model, inputs)) < INT8_TOLERANCE


@pytest.mark.parametrize("case", list(LAYERS))
def test_weights_stored_in_int8_and_computed_in_fp32_are_the_decoded_values(case: str, tmp_path: Path) -> None:
    """The same bits as an fp32 file with those values, as the same kernel: decoding is folded when a session loads."""
    network = case_of(case)
    model, inputs = network.model, network.inputs
    exported, path = write(network, INT8_STORED, tmp_path)
    assert RUNTIME.runs_as(path, exported.tensors, threads=1) == {"0": "fp32"}
    found = RUNTIME.load(path, threads=1).run(inputs)
    assert relative_error(found, reference(network.rounded({"0": INT8_STORED}), inputs)) < FLOAT_TOLERANCE
    assert FLOAT_TOLERANCE < relative_error(found, reference(model, inputs)) < INT8_TOLERANCE


DYNAMIC = Precision(Storage("int", 8, PerChannel()), Compute.INT8_DYNAMIC)


@pytest.mark.parametrize("case", ["linear", "linear without bias", "linear on 3-D", "text", "two inputs", "attention"])
def test_activations_can_be_quantised_at_every_run(case: str, tmp_path: Path) -> None:
    network = case_of(case)
    able = tuple(name for name, module in network.model.named_modules() if isinstance(module, nn.Linear))
    exported, path = write(network, DYNAMIC, tmp_path, only=able)
    runs_as = RUNTIME.runs_as(path, exported.tensors, threads=1)
    assert able
    assert {name for name, compute in runs_as.items() if compute == "int8_dynamic"} == set(able)
    session = RUNTIME.load(path, threads=1)
    for examples in (1, 3, EXAMPLES):
        some = {name: array[:examples] for name, array in network.inputs.items()}
        assert relative_error(session.run(some), reference(network.model, some)) < INT8_TOLERANCE
    read = [node.input[0] for node in onnx.load(path).graph.node if node.op_type == "DynamicQuantizeLinear"]
    assert len(read) == len(set(read))  # once a tensor, however many layers read it
    assert case != "attention" or len(read) < len(able)


@pytest.mark.parametrize("precision", COARSE_IN_FLOATS, ids=str)
@pytest.mark.parametrize("case", list(NETWORKS))
def test_a_network_computes_with_the_weights_that_were_put_on_their_grids(
    case: str, precision: Precision, tmp_path: Path
) -> None:
    """Whatever the exporter makes of it: a norm that it folded now, say, would leave weights that are on no grid."""
    network = case_of(case)
    precisions = {name: precision for name, module in network.model.named_modules() if is_layer(module)}
    exported, path = write(network, precision, tmp_path, only=tuple(precisions))
    assert set(RUNTIME.runs_as(path, exported.tensors, threads=1).values()) == {"fp32"}
    found = RUNTIME.load(path, threads=1).run(network.inputs)
    assert relative_error(found, reference(network.rounded(precisions), network.inputs)) < FLOAT_TOLERANCE


@pytest.mark.parametrize("case", list(NETWORKS))
def test_an_int8_network_runs_in_integers_wherever_it_can(case: str, tmp_path: Path) -> None:
    network = case_of(case)
    model, inputs = network.model, network.inputs
    exported, path = write(network, INT8, tmp_path)
    runs_as = RUNTIME.runs_as(path, exported.tensors, threads=1)
    for name, compute in runs_as.items():
        floats_only = isinstance(model.get_submodule(name), (nn.Embedding, nn.ConvTranspose2d, nn.Conv3d))
        assert compute == ("fp32" if floats_only else "int8"), name
    assert relative_error(RUNTIME.load(path, threads=1).run(inputs), reference(model, inputs)) < INT8_TOLERANCE


def test_between_integer_layers_nothing_goes_back_to_float(tmp_path: Path) -> None:
    """The residual sum and the pooling have integer kernels: one quantisation at the entry, none behind it."""
    _, path = write(case_of("residual"), INT8, tmp_path)
    operators = optimised_operators(path)
    assert operators.count("QuantizeLinear") == 1
    assert "QLinearAdd" in operators
    assert "QLinearGlobalAveragePool" in operators
    assert not {"Relu", "Add", "Conv", "Gemm"} & set(operators)


@pytest.mark.parametrize("only", [("stem.0",), ("conv1.0",), ("conv2.0", "head"), ("stem.0", "conv2.0")])
def test_int8_and_fp32_layers_mix_freely(only: tuple[str, ...], tmp_path: Path) -> None:
    residual = case_of("residual")
    model, inputs = residual.model, residual.inputs
    exported, path = write(residual, INT8, tmp_path, only=only)
    runs_as = RUNTIME.runs_as(path, exported.tensors, threads=1)
    assert runs_as == {name: "int8" if name in only else "fp32" for name in runs_as}
    assert relative_error(RUNTIME.load(path, threads=1).run(inputs), reference(model, inputs)) < INT8_TOLERANCE


def test_an_fp32_layer_between_int8_ones_keeps_its_float_weights(tmp_path: Path) -> None:
    """Between two int8 layers ONNX Runtime would round them to int8 by itself, with one scale a tensor.

    Beside one huge weight, here on a channel that is always zero, that rounding leaves nothing of the others.
    """
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
    with torch.no_grad():
        first.weight[0], first.bias[0] = 0.0, 0.0  # type: ignore[index]
        second.weight[0, 0, 0, 0] = 1e3
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    inputs = {"x": floats(3, 6, 6)}
    exported, path = write(Case.of(model, inputs), INT8, tmp_path, only=("0", "4"))
    assert RUNTIME.runs_as(path, exported.tensors, threads=1) == {"0": "int8", "2": "fp32", "4": "int8"}
    assert relative_error(RUNTIME.load(path, threads=1).run(inputs), reference(model, inputs)) < INT8_TOLERANCE


SHARING = {
    "large tied embedding": ("tokens", "head"),
    "large tied embedding, on 2-D": ("tokens", "head"),
    "tied, on 2-D and 3-D": ("first", "second"),
}
"""Layers that read one weight, one as it is and the other transposed or by another operator."""

LITTLE = 3300
"""Bytes of the rest of a file, nodes and names: less than a weight's."""


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *(("large tied embedding", each) for each in (None, INT8_STORED, *COARSE_IN_FLOATS)),
        *(("large tied embedding, on 2-D", each) for each in (None, INT8_STORED, *COARSE_IN_FLOATS)),
        *(("tied, on 2-D and 3-D", each) for each in (None, INT8, INT8_STORED, DYNAMIC, *COARSE)),
    ],
    ids=str,
)
def test_a_weight_that_two_layers_read_lies_once_in_the_file(
    name: str, precision: Precision | None, tmp_path: Path
) -> None:
    """A session transposes it when it loads."""
    case, both = case_of(name), SHARING[name]
    written, path = write(case, precision, tmp_path, only=both)
    sizes = sorted(written.layers[layer].bytes for layer in both)
    assert sizes[0] == 0
    assert LITTLE < sizes[1] < len(written.data) < sizes[1] + LITTLE

    computed = "fp32" if precision is None else precision.compute.value
    runs_as = RUNTIME.runs_as(path, written.tensors, threads=1)
    assert {runs_as[layer] for layer in both} == {computed}
    precisions = {} if precision is None else dict.fromkeys(both, precision)
    found = RUNTIME.load(path, threads=1).run(case.inputs)
    tolerance = FLOAT_TOLERANCE if computed == "fp32" else INT8_TOLERANCE
    assert relative_error(found, reference(case.rounded(precisions), case.inputs)) < tolerance
    shapes = {key: tuple(tensor.shape) for key, tensor in case.folded.state_dict().items()}
    assert len(RUNTIME.foreseen(case.graph, shapes, precisions)) == len(written.data)


@pytest.mark.parametrize("name", ["large tied embedding", "large tied embedding, on 2-D"])
@pytest.mark.parametrize("compute", [Compute.INT8, Compute.INT8_DYNAMIC])
@pytest.mark.parametrize("stored", [INT8_STORED, *COARSE_IN_FLOATS], ids=str)
def test_a_weight_lies_once_if_only_its_head_computes_in_integers(
    name: str, stored: Precision, compute: Compute, tmp_path: Path
) -> None:
    """No embedding has an integer kernel."""
    case = case_of(name)
    precisions = {"tokens": stored, "head": replace(stored, compute=compute)}
    seen = RUNTIME.observe(case.graph, precisions, [case.inputs])
    written = RUNTIME.write(case.graph, precisions, case.grids(precisions), seen=seen, largest=LARGEST)
    sizes = sorted(written.layers[layer].bytes for layer in precisions)
    assert sizes[0] == 0
    assert sizes[1] < len(written.data) < sizes[1] + LITTLE

    path = tmp_path / "model.onnx"
    path.write_bytes(written.data)
    runs_as = RUNTIME.runs_as(path, written.tensors, threads=1)
    assert (runs_as["tokens"], runs_as["head"]) == ("fp32", compute)
    found = RUNTIME.load(path, threads=1).run(case.inputs)
    assert relative_error(found, reference(case.rounded(precisions), case.inputs)) < INT8_TOLERANCE
    shapes = {key: tuple(tensor.shape) for key, tensor in case.folded.state_dict().items()}
    assert len(RUNTIME.foreseen(case.graph, shapes, precisions)) == len(written.data)


def test_a_weight_that_is_shared_and_stored_twice_is_written_twice(tmp_path: Path) -> None:
    """A policy that stores both in their own way."""
    case = case_of("large tied embedding")
    precisions = {"head": INT8_STORED}
    written = RUNTIME.write(case.graph, precisions, case.grids(precisions))
    assert written.layers["tokens"].bytes > 2 * written.layers["head"].bytes > 0


def test_a_tensor_has_one_quantisation_however_many_read_it(tmp_path: Path) -> None:
    _, path = write(case_of("residual"), INT8, tmp_path)
    sources = [node.input[0] for node in onnx.load(path).graph.node if node.op_type == "QuantizeLinear"]
    assert len(sources) == len(set(sources))


def test_a_float_layer_reads_the_float_tensor_that_an_int8_layer_quantises(tmp_path: Path) -> None:
    """Rounding an input for one reader must not reach the others."""
    held = plan(case_of("linear, relu and norm").graph, {"3": INT8}).tensors
    assert len(held) == 1
    assert not any(tensor.from_integers for tensor in held.values())


class Coder(nn.Module):
    """A Linear layer that the next one reads and whoever uses the network as well."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.mean = nn.Linear(16, 32), nn.Linear(32, 8)
        self.decode, self.out = nn.Linear(8, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.mean(torch.relu(self.code(x)))
        return self.out(torch.relu(self.decode(mean))), mean


def test_a_product_that_is_read_in_integers_and_in_floats_runs_in_integers(tmp_path: Path) -> None:
    """Where only one of the readers reads integers, ONNX Runtime makes no integer kernel of the product."""
    torch.manual_seed(0)
    model, inputs = Coder().eval(), {"x": floats(16)}
    exported, path = write(Case.of(model, inputs), INT8, tmp_path)
    assert set(RUNTIME.runs_as(path, exported.tensors, threads=1).values()) == {"int8"}
    found, wanted = RUNTIME.load(path, threads=1).run(inputs), reference(model, inputs)
    assert found.keys() == wanted.keys()
    assert relative_error(found, wanted) < INT8_TOLERANCE


def test_what_holds_its_weight_in_no_layer_is_written_as_it_is(tmp_path: Path) -> None:
    """EmbeddingBag becomes a loop, in whose body an Identity is not nothing."""
    model = nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 4)).eval()
    inputs = {"tokens": np.random.default_rng(0).integers(0, 20, (EXAMPLES, 7))}
    path = tmp_path / "model.onnx"
    path.write_bytes(RUNTIME.write(RUNTIME.float_graph(model, inputs, opset=18), {}).data)
    assert relative_error(RUNTIME.load(path, threads=1).run(inputs), reference(model, inputs)) < FLOAT_TOLERANCE


def test_a_reshape_to_the_shape_that_is_there_is_dropped_and_no_other() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 8, opset_import: ["" : 18]>
        network (float[N, 3, 4] x) => (float[N, 4, 3] y)
        <int64[3] same = {-1, 3, 4}, int64[3] other = {-1, 4, 3}, int64[3] fixed = {2, 4, 3}>
        {
            a = Relu(x)
            b = Reshape(a, same)
            c = Reshape(b, other)
            d = Relu(c)
            y = Reshape(d, fixed)
        }
    """)
    passes.ShapeInferencePass()(model)
    tidy(model)
    left = [(node.op_type, node.inputs[-1].name) for node in model.graph]
    assert left == [("Relu", "x"), ("Reshape", "other"), ("Relu", "c"), ("Reshape", "fixed")]


def test_an_output_is_not_called_like_an_input() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x + 1}

    with pytest.raises(UserError, match="an input and an output that are called x"):
        RUNTIME.float_graph(Same().eval(), {"x": floats(4)}, opset=18)


@pytest.mark.parametrize("case", [*LAYERS, *NETWORKS])
@pytest.mark.parametrize("precision", [None, INT8, INT8_STORED, *COARSE], ids=str)
def test_the_size_of_a_file_is_known_before_it_is_written(
    case: str, precision: Precision | None, tmp_path: Path
) -> None:
    network = case_of(case)
    exported, _ = write(network, precision, tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.model.state_dict().items()}
    precisions = {} if precision is None else dict.fromkeys(network.able, precision)
    predicted = len(RUNTIME.foreseen(network.graph, shapes, precisions))
    assert predicted == len(exported.data)


def test_the_size_of_a_narrower_depthwise_layer_is_known() -> None:
    """Its number of groups shrinks with its channels, and takes fewer digits; a single group is not written at all."""

    def network(channels: int) -> nn.Module:
        depthwise = nn.Conv2d(channels, channels, 3, groups=channels)
        return nn.Sequential(nn.Conv2d(3, channels, 1), depthwise, nn.Conv2d(channels, 4, 1))

    inputs = {"x": floats(3, 4, 4)}
    wide = RUNTIME.float_graph(network(160), inputs, opset=18)
    for channels in (120, 1):
        narrow = network(channels)
        written = RUNTIME.write(RUNTIME.float_graph(narrow, inputs, opset=18), {})
        shapes = {name: tuple(tensor.shape) for name, tensor in narrow.state_dict().items()}
        assert len(RUNTIME.foreseen(wide, shapes, {})) == len(written.data)


def test_a_file_is_for_old_runtimes_and_says_nothing_about_this_machine() -> None:
    metadata = {"target": "host", "tool": "hirelc-deploy 1.2.3"}
    data = RUNTIME.write(case_of("residual").graph, {}, metadata=metadata).data
    proto = onnx.load_from_string(data)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)]
    assert proto.ir_version == 8
    assert {entry.key: entry.value for entry in proto.metadata_props} == metadata
    assert str(Path(__file__).parent).encode() not in data
    assert not proto.graph.value_info
    assert not any(node.name or node.doc_string or node.metadata_props for node in proto.graph.node)
    assert [value.name for value in proto.graph.input] == ["x"]
    assert [value.name for value in proto.graph.output] == ["output"]
    onnx.checker.check_model(proto, full_check=True)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    residual = case_of("residual")
    again = Case.of(residual.model, residual.inputs)
    assert write(residual, INT8, tmp_path)[0].data == write(again, INT8, tmp_path)[0].data


def test_gates_between_integer_layers_have_integer_kernels(tmp_path: Path) -> None:
    network = case_of("gated")
    _, path = write(network, INT8, tmp_path)
    operators = optimised_operators(path)
    assert operators.count("QLinearSigmoid") == 3
    assert operators.count("QLinearMul") == 3
    assert operators.count("QLinearLeakyRelu") == 1
    assert "DequantizeLinear" not in operators[:-1]
    found = RUNTIME.load(path, threads=1).run(network.inputs)
    assert relative_error(found, reference(network.model, network.inputs)) < INT8_TOLERANCE


ADD_OF_RESIDUAL = "Add of conv2.0, stem.0"


def test_what_is_computed_between_integer_layers_can_stay_in_float(tmp_path: Path) -> None:
    residual = case_of("residual")
    precisions = dict.fromkeys(residual.able, INT8)
    assert ADD_OF_RESIDUAL in {held.computed_by for held in plan(residual.graph, precisions).tensors.values()}
    operators = []
    for kept in ({}, {ADD_OF_RESIDUAL: Compute.FP32}):
        seen = RUNTIME.observe(residual.graph, precisions, [residual.inputs], floats=kept)
        exported = RUNTIME.write(
            residual.graph, precisions, residual.grids(precisions), seen=seen, floats=kept, largest=LARGEST
        )
        path = tmp_path / "model.onnx"
        path.write_bytes(exported.data)
        shapes = {name: tuple(tensor.shape) for name, tensor in residual.folded.state_dict().items()}
        predicted = len(RUNTIME.foreseen(residual.graph, shapes, precisions, floats=kept))
        assert predicted == len(exported.data)
        assert set(RUNTIME.runs_as(path, exported.tensors, threads=1).values()) == {"int8"}
        found = RUNTIME.load(path, threads=1).run(residual.inputs)
        assert relative_error(found, reference(residual.model, residual.inputs)) < INT8_TOLERANCE
        operators.append(optimised_operators(path))
    in_integers, in_floats = operators
    assert "QLinearAdd" in in_integers
    assert "QLinearAdd" not in in_floats
    assert "Add" in in_floats


def test_a_tensor_that_rounds_badly_is_told_from_those_that_do_not() -> None:
    """One channel of a residual stream is a thousand times as large as the others, and the next layer ignores it."""
    model = build(Residual)
    with torch.no_grad():
        model.stem[1].weight[0], model.stem[1].bias[0] = 0.0, 3000.0
        model.conv1[0].weight[:, 0] = 0.0
        model.head.weight[:, 0] = 0.0
    inputs = NETWORKS["residual"][1]
    case = Case.of(model, inputs)
    found = RUNTIME.rounding_errors(case.graph, dict.fromkeys(case.able, INT8), [inputs])
    assert found.between.keys() == {ADD_OF_RESIDUAL, "GlobalAveragePool of conv2.0, stem.0"}
    assert found.between[ADD_OF_RESIDUAL] > 0.1
    assert found.inputs.keys() == set(case.able)
    assert found.inputs["conv1.0"] > 0.1
    assert found.inputs["stem.0"] < 1e-3


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("size", [1e-6, 1e-9, 1e-20])
def test_a_tensor_that_is_all_but_zero_leaves_the_bias_behind_it_whole(
    size: float, pooled: bool, tmp_path: Path
) -> None:
    """In steps of its own span the bias would not fit into int32; ONNX Runtime refuses to pool such a tensor."""
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 1)
    with torch.no_grad():
        first.weight *= size
        last.bias += 0.5
    between = nn.AdaptiveAvgPool2d(1) if pooled else nn.Identity()
    case = Case.of(nn.Sequential(first, nn.ReLU(), between, last, nn.Flatten()).eval(), {"x": floats(3, 8, 8)})

    _, path = write(case, INT8, tmp_path)

    session = RUNTIME.load(path, threads=1)
    assert relative_error(session.run(case.inputs), reference(case.model, case.inputs)) < 0.01


def test_seven_bit_weights_stay_within_63() -> None:
    """Where 8-bit products saturate, the target says so, and no code may be larger than what cannot."""
    residual = case_of("residual")
    precisions = dict.fromkeys(residual.able, INT8)
    grids = residual.grids(precisions)
    seen = RUNTIME.observe(residual.graph, precisions, [residual.inputs])
    exported = RUNTIME.write(residual.graph, precisions, grids, seen=seen, largest=LARGEST)
    proto = onnx.load_from_string(exported.data)
    codes = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    for layer, tensor in exported.tensors.items():
        assert np.abs(codes[tensor].astype(int)).max() == LARGEST, layer


def test_a_range_holds_zero_and_its_grid_spans_it() -> None:
    scale, zero = Range(-1.0, 3.0).grid(nonnegative=False)
    assert (scale * (0 - float(zero)), scale * (255 - float(zero))) == pytest.approx((-1.0, 3.0), abs=float(scale) / 2)
    assert Range(0.5, 3.0).grid(nonnegative=True)[1] == 0
    scale, zero = Range(0.0, 0.0).grid(nonnegative=False)
    assert scale > 0
    assert zero == 0


def optimised_operators(path: Path) -> list[str]:
    """The operators that a session runs."""
    return [node.op_type for node in optimised(path, threads=1).node]
