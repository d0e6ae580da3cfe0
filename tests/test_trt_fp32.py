"""What fp16 does not hold: it is found, it stays in fp32, and the simulation would see it if it did not."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exporting import digits, relative_error, write_policy
from onnx import TensorProto, helper
from test_modelopt import REAL
from test_tensorrt_export import TARGET
from test_trt_build import needs_library
from torch import Tensor, nn
from trt_files import NETWORKS, OPSET, RUNTIME, Case, case, noise

from hirelc_deploy import graph, modelopt, pipeline
from hirelc_deploy.config import ExportSettings
from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters import _trt_build
from hirelc_deploy.exporters._trt_build import build
from hirelc_deploy.exporters._trt_fp32 import _culprits
from hirelc_deploy.exporters._trt_lint import lint
from hirelc_deploy.exporters._trt_reference import in_fp32
from hirelc_deploy.policy import FP16, INT8, Compute, Policy, Precision
from hirelc_deploy.verification import Outcome

BEARABLE = 1e-3


class RmsNorm(nn.Module):
    """Its mean square is beyond the largest half, what goes in and what comes out is not."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        large = 600 * self.inner(x)
        x = x + large / torch.sqrt(large.pow(2).mean(1, keepdim=True) + 1e-3)
        return self.head(x.mean((2, 3)))


class LargeLayer(nn.Module):
    """What one layer writes is beyond the largest half; the next makes it small again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.large, self.small, self.head = (nn.Linear(8, 8) for _ in range(4))
        with torch.no_grad():
            self.large.weight *= 1e6
            self.small.weight *= 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.small(torch.relu(self.large(torch.relu(self.stem(x)))))))


class Cancelling(nn.Module):
    """What is left of a difference of large numbers has few digits in halves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        moved = self.stem(x) + 4000.0
        return self.head(torch.tanh(moved - moved.mean(1, keepdim=True)))


class SmallConstant(nn.Module):
    """A constant that is nought in halves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.register_buffer("little", torch.tensor([1e-8]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(1e4 * (self.little * (1e4 * self.stem(x)))))


class Masked(nn.Module):
    """Attention that must not look at half of its places, whose mask is the largest float there is."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("hidden", torch.arange(6) >= 3)

    def forward(self, x: Tensor) -> Tensor:
        looks = self.query(x) @ self.key(x).transpose(1, 2)
        looks = looks.masked_fill(self.hidden, torch.finfo(torch.float32).min)
        return torch.softmax(looks, -1) @ self.value(x)


def made(build: Callable[[], nn.Module], inputs: Mapping[str, np.ndarray]) -> Case:
    torch.manual_seed(0)
    model = build().eval()
    return Case(model, dict(inputs), RUNTIME.float_graph(model, inputs, opset=OPSET))


RMS_NORM = (RmsNorm, {"x": noise(3, 8, 8)})
SQUARES = {"Pow of inner", "ReduceMean of inner", "Add of inner", "Sqrt of inner"}


def asked(network: Case) -> dict[str, str]:
    return RUNTIME.needing_fp32(network.graph, [network.inputs], bearable=BEARABLE)


def in_halves(network: Case, needing: Mapping[str, str] | None = None) -> bytes:
    """The file with every layer in fp16 that is not named, and so the operators."""
    layers = network.precisions(FP16)
    floats = {name: Compute.FP32 for name in needing or () if name not in layers}
    able = {name: precision for name, precision in layers.items() if name not in (needing or ())}
    exported = RUNTIME.write(network.graph, able, floats=floats, ir_version=10)
    shapes = {key: tuple(tensor.shape) for key, tensor in network.model.state_dict().items()}
    told = RUNTIME.foreseen(network.graph, shapes, able, floats=floats, ir_version=10)
    assert len(told) == len(exported.data)
    lint(onnx.load_from_string(exported.data))
    return exported.data


def simulated(network: Case, data: bytes, folder: Path) -> float:
    """How far the file is from the model, in the reference."""
    path = folder / "model.onnx"
    path.write_bytes(data)
    with torch.no_grad():
        outputs = graph.forward(network.model, {n: torch.from_numpy(a) for n, a in network.inputs.items()})
    found = RUNTIME.load(path, threads=1).run(network.inputs)
    if not all(np.isfinite(array).all() for array in found.values()):
        return np.inf
    return relative_error(found, {name: output.numpy() for name, output in outputs.items()})


# -- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(NETWORKS))
def test_an_ordinary_network_needs_no_fp32(name: str) -> None:
    assert asked(case(name)) == {}


def test_a_mask_needs_no_fp32(tmp_path: Path) -> None:
    network = made(Masked, {"x": noise(6, 8)})
    assert asked(network) == {}
    assert simulated(network, in_halves(network), tmp_path) < 2e-3


def test_values_beyond_the_largest_half_are_found_and_kept_in_fp32(tmp_path: Path) -> None:
    network = made(*RMS_NORM)
    found = asked(network)
    assert found.keys() == SQUARES
    assert "has values up to" in found["Pow of inner"]
    assert simulated(network, in_halves(network), tmp_path) > 0.1
    assert simulated(network, in_halves(network, found), tmp_path) < 2e-3


def test_layers_are_found_by_their_names(tmp_path: Path) -> None:
    network = made(LargeLayer, {"x": noise(8)})
    found = asked(network)
    assert found.keys() == {"large", "Relu of large", "small"}
    assert simulated(network, in_halves(network), tmp_path) == np.inf
    assert simulated(network, in_halves(network, found), tmp_path) < 2e-3


@pytest.mark.parametrize("kind", [Cancelling, SmallConstant])
def test_what_halves_round_too_coarsely_is_found(kind: type[nn.Module], tmp_path: Path) -> None:
    network = made(kind, {"x": noise(8)})
    found = asked(network)
    assert found
    assert all("changes the outputs by" in why for why in found.values())
    assert not found.keys() & {"stem", "head"}
    worse, better = (simulated(network, in_halves(network, each), tmp_path) for each in ({}, found))
    assert better < 5e-3 < worse


def test_examples_may_be_four_times_as_large() -> None:
    network = made(LargeLayer, {"x": noise(8)})
    with torch.no_grad():
        written = network.model.large(torch.relu(network.model.stem(torch.from_numpy(network.inputs["x"])))).abs().max()
    largest = float(np.finfo(np.float16).max)
    for times, needed in ((0.9 / 4, set()), (1.1 / 4, {"large", "Relu of large", "small"})):
        other = made(LargeLayer, network.inputs)
        with torch.no_grad():
            other.model.large.weight *= times * largest / written
            other.model.large.bias *= times * largest / written
            other.model.small.weight *= written / (times * largest)
        changed = Case(other.model, other.inputs, RUNTIME.float_graph(other.model, other.inputs, opset=OPSET))
        assert {name for name, why in asked(changed).items() if "values up to" in why} == needed


# -- what becomes of it ----------------------------------------------------------------------------------------------


def test_neighbours_in_fp32_have_no_casts_between_them() -> None:
    network = made(*RMS_NORM)
    operators = [node.op_type for node in onnx.load_from_string(in_halves(network, asked(network))).graph.node]
    start = operators.index("Pow")
    assert operators[start - 1 : start + 5] == ["Cast", "Pow", "ReduceMean", "Add", "Sqrt", "Cast"]


@needs_library
@pytest.mark.parametrize(("kind", "inputs"), [RMS_NORM, (LargeLayer, {"x": noise(8)})])
def test_what_stays_in_fp32_is_built(kind: type[nn.Module], inputs: dict[str, np.ndarray]) -> None:
    network = made(kind, inputs)
    assert len(build(in_halves(network, asked(network)), "8.6").data) > 10_000


def test_its_size_is_told_of_a_pruned_network() -> None:
    network = made(*RMS_NORM)
    shapes = {key: tuple(tensor.shape) for key, tensor in network.model.state_dict().items()}
    narrow = {"stem.weight": (8, 3, 3, 3), "stem.bias": (8,), "inner.weight": (8, 8, 3, 3), "inner.bias": (8,)}
    floats = dict.fromkeys(SQUARES, Compute.FP32)
    whole, pruned = (
        len(RUNTIME.foreseen(network.graph, each, network.precisions(FP16), floats=floats, ir_version=10))
        for each in (shapes, {**shapes, **narrow, "head.weight": (5, 8)})
    )
    fewer = 8 * 3 * 9 + 8 + 16 * 16 * 9 - 8 * 8 * 9 + 8 + 5 * 8
    assert whole - pruned == pytest.approx(2 * fewer, abs=16)  # and the lengths of what is shorter


def test_its_latency_is_told_in_fp32() -> None:
    network = made(*RMS_NORM)
    traced = graph.trace(network.model, network.inputs)
    computes = dict.fromkeys(network.precisions(FP16), (Compute.FP32, Compute.FP16))

    def computing(floats: Mapping[str, Compute]) -> dict[str, set[Compute]]:
        found = RUNTIME.network(network.graph, traced, computes, {}, batch=1, floats=floats)
        by_operator: dict[str, set[Compute]] = {}
        for term in found.terms:
            by_operator.setdefault(term.kernel.op, set()).add(term.kernel.compute)
        return by_operator

    assert computing({})["ReduceMean"] == {Compute.FP32, Compute.FP16}
    assert computing({"ReduceMean of inner": Compute.FP32})["ReduceMean"] == {Compute.FP32}


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_trt_build, "_trt", lambda: None)
    path = tmp_path / "board.toml"
    path.write_text(TARGET, encoding="utf-8")
    return str(path)


class LargeInside(nn.Module):
    """Digits, of which the middle layer writes more than a half holds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.large, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 10)
        with torch.no_grad():
            self.large.weight *= 1e6
            self.head.weight *= 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.large(torch.relu(self.stem(x)))).mean((2, 3)))


def exported(folder: Path, target: str, **settings: Any) -> Outcome:
    torch.manual_seed(0)
    given = {"model": "in memory", "data": "digits", "epochs": 0, "target": target, "out": folder / "out", **settings}
    return pipeline.export(ExportSettings(**given), model=LargeInside().eval(), task=digits())


def test_an_export_keeps_in_fp32_what_fp16_ruins_and_says_so(board: str, tmp_path: Path) -> None:
    manifest = exported(tmp_path, board, recipe="compute=fp16").manifest
    assert {layer.name: layer.compute for layer in manifest.layers} == {"stem": "fp16", "large": "fp32", "head": "fp32"}
    said = {note.split(" computes in fp32: ")[0] for note in manifest.notes if " computes in fp32: " in note}
    assert {"large", "head", "Relu of large"} <= said
    assert manifest.measured.drop_points == pytest.approx(0, abs=0.5)
    assert manifest.baseline_fp16 is not None
    assert manifest.baseline_fp16.accuracy == pytest.approx(manifest.baseline.accuracy, abs=0.5)
    assert manifest.error.size_pct == 0


def test_a_policy_of_the_users_own_is_built_as_it_is_and_warned_of(board: str, tmp_path: Path) -> None:
    policy = write_policy(tmp_path / "policy.json", Policy(dict.fromkeys(("stem", "large", "head"), FP16), {}))
    manifest = exported(tmp_path, board, policy=policy).manifest
    assert {layer.compute for layer in manifest.layers} == {"fp16"}
    warned = {note.split(" computes in fp16, and would be better off in fp32: ")[0] for note in manifest.notes}
    assert {"large", "head"} <= warned


# -- AutoCast --------------------------------------------------------------------------------------------------------


def test_an_advisers_word_is_taken_instead() -> None:
    network = made(*RMS_NORM)
    asked_with: list[tuple[bytes, Sequence[Any]]] = []

    def adviser(model: bytes, examples: Sequence[Any]) -> dict[str, str]:
        asked_with.append((model, examples))
        nodes = onnx.load_from_string(model).graph.node
        return {node.name: "it said so" for node in nodes if node.op_type in ("Sqrt", "Gemm")}

    found = RUNTIME.needing_fp32(network.graph, [network.inputs], bearable=BEARABLE, adviser=adviser)
    assert found == {"Sqrt of inner": "it said so", "head": "it said so"}
    ((model, examples),) = asked_with
    assert examples == [network.inputs]
    assert len({node.name for node in onnx.load_from_string(model).graph.node}) == len(network.graph.model.graph)


@pytest.mark.skipif(not REAL.exists(), reason="`make modelopt` makes its environment")
def test_autocast_keeps_what_overflows_in_fp32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(modelopt.VARIABLE, str(REAL))
    network = made(*RMS_NORM)
    found = RUNTIME.needing_fp32(network.graph, [network.inputs], bearable=BEARABLE, adviser=modelopt.kept_in_fp32)
    assert found.keys() >= SQUARES
    assert not found.keys() & {"stem", "head"}
    assert set(found.values()) == {"AutoCast keeps it there"}
    assert simulated(network, in_halves(network, found), tmp_path) < 2e-3


@pytest.mark.skipif(not REAL.exists(), reason="`make modelopt` makes its environment")
def test_an_export_can_go_by_autocast(monkeypatch: pytest.MonkeyPatch, board: str, tmp_path: Path) -> None:
    monkeypatch.setenv(modelopt.VARIABLE, str(REAL))
    manifest = exported(tmp_path, board, recipe="compute=fp16", fp16_check="autocast").manifest
    assert {layer.name: layer.compute for layer in manifest.layers} == {"stem": "fp16", "large": "fp32", "head": "fp32"}
    assert any(note == "large computes in fp32: AutoCast keeps it there" for note in manifest.notes)


def test_autocast_is_refused_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch, board: str, tmp_path: Path
) -> None:
    monkeypatch.setenv(modelopt.VARIABLE, "there is no such program")
    with pytest.raises(UserError, match="which is no program"):
        exported(tmp_path, board, recipe="compute=fp16", fp16_check="autocast")
    assert not (tmp_path / "out" / "run").exists()


def test_autocast_is_refused_for_a_target_without_fp16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(modelopt.VARIABLE, sys.executable)
    with pytest.raises(UserError, match="host computes nothing in fp16"):
        exported(tmp_path, "host", recipe="compute=int8", fp16_check="autocast")
    assert not (tmp_path / "out" / "run").exists()


def test_many_small_errors_are_found_until_the_rest_is_bearable() -> None:
    """By themselves all are bearable, together they are not; most comes from two of them."""
    errors = {"a": 0.6, "b": 0.1, "c": 0.7, "d": 0.1}
    found: dict[str, float] = {}
    limits = (1.0, 0.25)
    for limit in limits:
        found |= _culprits(lambda names: sum(errors[name] for name in names), list(errors), limit)
    assert found == {"a": 0.6, "c": 0.7}


# -- the reference ---------------------------------------------------------------------------------------------------


def in_fp16(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """x in fp32 -> a half h -> these nodes -> a half y -> z in fp32"""
    ends = (
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        *nodes,
        helper.make_node("Cast", ["y"], ["z"], to=TensorProto.FLOAT),
    )
    shaped = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xz"]
    made_of = helper.make_graph(ends, "halves", shaped[:1], shaped[1:])
    return helper.make_model(made_of, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def test_the_reference_rounds_every_half(tmp_path: Path) -> None:
    """ONNX Runtime left alone computes both additions in fp32, and gives back what went in."""
    path = tmp_path / "model.onnx"
    lifted = in_fp16(helper.make_node("Add", ["h", "h"], ["twice"]), helper.make_node("Sub", ["twice", "h"], ["y"]))
    path.write_bytes(lifted.SerializeToString())
    x = np.array([[40_000.0, 1.0, 1 + 2**-12]], np.float32)
    (found,) = RUNTIME.load(path, threads=1).run({"x": x}).values()
    assert found.tolist() == [[np.inf, 1.0, 1.0]]
    names = {node.op_type for node in onnx.load_from_string(in_fp32(lifted)).graph.node}
    assert names == {"Cast", "Add", "Sub"}


@pytest.mark.parametrize("precision", [FP16, INT8], ids=str)
def test_the_reference_has_no_node_that_computes_in_halves(precision: Precision) -> None:
    network = case("attention")
    model = onnx.load_from_string(in_fp32(network.file(network.precisions(precision))))
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    halves = {each.name for each in inferred.value_info if each.type.tensor_type.elem_type == TensorProto.FLOAT16}
    assert halves
    assert {node.op_type for node in inferred.node if halves & {*node.input, *node.output}} == {"Cast"}
