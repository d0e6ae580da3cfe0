"""From a checkpoint to a folder for a device with TensorRT that is not here: what is told, and what is not promised."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from exporting import digits, policy_of, trained_digit_net, write_policy

from hirelc_deploy import costing, pipeline, trainer, verification
from hirelc_deploy.choices import search_space
from hirelc_deploy.config import ExportSettings
from hirelc_deploy.errors import ExitStatus, UserError
from hirelc_deploy.exporters import _trt_build
from hirelc_deploy.graph import trace
from hirelc_deploy.policy import FP16, FP32, INT8, Compute, PerGroup, Policy
from hirelc_deploy.profiles import load_target
from hirelc_deploy.verify import judge

TARGET = """
name = "board"
description = "a board with TensorRT"
kind = "gpu"
basis = "estimate"
channel_multiple = 4
threads = 1
batch = 1

[gpu]
compute_capability = "8.7"
software = "JetPack 6.2 (TensorRT 10.3)"
int4_in_pairs = true

[estimate]
gmacs_per_s = { fp32 = 1000.0, fp16 = 4000.0, int8 = 8000.0 }
gb_per_s = 200.0
floor_us = 5.0
channel_tile = 32
error_pct = 30.0
sources = ["a data sheet"]

[runtime]
name = "tensorrt"
min_version = "10.3"
opset = 21
ir_version = 10

[computes]
Conv2d = ["fp32", "fp16", "int8"]
Linear = ["fp32", "fp16", "int8"]

[precisions]
Conv2d = ["int8/channel->int8"]
Linear = ["int8/channel->int8", "int4/group64->fp16", "int4/group128->fp16", "int4/channel->fp16"]

[weights]
int8_bits = { vnni = 8, otherwise = 8 }

[timing]
warmup_rounds = 1
min_seconds = 0.05
"""


@pytest.fixture(autouse=True)
def _no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the default environment; builds have tests of their own."""
    monkeypatch.setattr(_trt_build, "_trt", lambda: None)
    return


@pytest.fixture
def board(tmp_path: Path) -> str:
    path = tmp_path / "board.toml"
    path.write_text(TARGET, encoding="utf-8")
    return str(path)


def export(folder: Path, target: str, **settings: Any) -> verification.Outcome:
    given = {"model": "in memory", "data": "digits", "epochs": 0, "target": target, "out": folder / "out", **settings}
    return pipeline.export(ExportSettings(**given), model=trained_digit_net(), task=digits())


def test_an_export_without_the_device_is_unverified_and_says_what_rests_on_what(board: str, tmp_path: Path) -> None:
    outcome = export(tmp_path, board, recipe="compute=int8", max_size_bytes=20_000, max_drop=5.0)
    manifest = outcome.manifest
    assert (manifest.verdict, outcome.status) == ("unverified", ExitStatus.UNVERIFIED)
    basis = manifest.measured.basis
    assert (basis.size, basis.accuracy, basis.latency) == ("estimate", "simulated", "estimate")
    assert manifest.error.size_pct == 0
    assert manifest.measured.memory_bytes is None
    assert all(layer.runs_as is None for layer in manifest.layers)
    assert manifest.runtime.name == "tensorrt"
    assert "simulat" in manifest.runtime.version
    assert any("simulation of JetPack 6.2 (TensorRT 10.3)" in note for note in manifest.notes_on_measurement)
    halves = manifest.baseline_fp16
    assert halves is not None
    assert halves.size_bytes == (outcome.folder / "baseline_fp16.onnx").stat().st_size < manifest.baseline.size_bytes
    assert halves.accuracy == pytest.approx(manifest.baseline.accuracy, abs=0.5)
    assert halves.latency_ms is not None
    limits = {check.name: check.ok for check in manifest.checks}
    assert limits["size_bytes"] is None
    assert limits["drop"] is None
    file = onnx.load(outcome.folder / "model.onnx")
    assert (file.opset_import[0].version, file.ir_version) == (21, 10)
    assert {layer.compute for layer in manifest.layers} == {"int8"}


def test_estimates_may_be_allowed_but_a_limit_that_is_missed_is_missed(board: str, tmp_path: Path) -> None:
    allowed = export(tmp_path / "a", board, recipe="compute=fp16", max_drop=5.0, allow_estimates=True)
    assert (allowed.manifest.verdict, allowed.status) == ("unverified", ExitStatus.OK)
    missed = export(tmp_path / "b", board, recipe="compute=fp16", max_size_bytes=1000, allow_estimates=True)
    assert (missed.manifest.verdict, missed.status) == ("fail", ExitStatus.BUDGET_MISSED)


def test_measuring_again_and_the_gate_keep_what_is_told(board: str, tmp_path: Path) -> None:
    first = export(tmp_path, board, recipe="compute=fp16", max_drop=5.0)
    again = verification.verify(first.folder, task=digits())
    assert again.manifest.measured.basis == first.manifest.measured.basis
    assert again.manifest.baseline_fp16 == first.manifest.baseline_fp16
    assert again.manifest.measured.latency_ms == first.manifest.measured.latency_ms
    assert (again.status, again.manifest.verdict) == (ExitStatus.UNVERIFIED, "unverified")
    gated = judge.gate(first.folder, None, allow_estimates=False)
    assert (gated.word, gated.status) == ("unverified", ExitStatus.UNVERIFIED)


def test_what_a_recipe_cannot_have_is_in_halves(board: str, tmp_path: Path) -> None:
    outcome = export(tmp_path, board, recipe="storage=int4,compute=fp16")
    policy = policy_of(outcome)
    assert {name for name, precision in policy.precisions.items() if precision == FP16} == {
        *("stem", "conv1", "conv2", "down")
    }
    assert str(policy.precisions["head"]) == "int4/channel->fp16"


def test_the_search_space_is_what_the_profile_says(board: str) -> None:
    target = load_target(board)
    space = search_space(trace(trained_digit_net(), digits().example), target)
    assert space.layers["conv1"] == (FP32, FP16, INT8)
    # 24 inputs are no whole group of 64
    assert [str(each) for each in space.layers["head"]] == [
        "fp32/tensor->fp32",
        "fp16/tensor->fp16",
        "int8/channel->int8",
        "int4/channel->fp16",
    ]
    assert not any(
        isinstance(each.storage.granularity, PerGroup) for choices in space.layers.values() for each in choices
    )


def test_a_board_with_fp8_multiplies_in_it_and_convolves_in_halves(board: str, tmp_path: Path) -> None:
    with_fp8 = TARGET.replace('"8.7"', '"8.9"').replace("int8 = 8000.0", "int8 = 8000.0, fp8 = 4000.0")
    with_fp8 = with_fp8.replace('Linear = ["fp32", "fp16", "int8"]', 'Linear = ["fp32", "fp16", "int8", "fp8"]')
    with_fp8 = with_fp8.replace('Linear = ["int8/channel->int8"', 'Linear = ["int8/channel->int8", "fp8/channel->fp8"')
    Path(board).write_text(with_fp8, encoding="utf-8")
    outcome = export(tmp_path, board, recipe="compute=fp8", max_drop=5.0)
    manifest = outcome.manifest
    assert outcome.status is ExitStatus.UNVERIFIED
    assert manifest.measured.size_bytes == manifest.predicted.size_bytes
    assert abs(manifest.measured.drop_points or 0.0) < 2.0
    assert {(layer.name, layer.storage, layer.compute) for layer in manifest.layers if layer.name == "head"} == {
        ("head", "fp8/channel", "fp8")
    }
    assert {layer.compute for layer in manifest.layers if layer.name != "head"} == {"fp16"}
    # what was decided can be built again
    policy = outcome.folder / "policy.json"
    assert export(tmp_path / "again", board, policy=policy).manifest.measured.size_bytes == manifest.measured.size_bytes


def test_a_packed_format_is_refused_by_what_there_is(board: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no layer of this network can be") as refused:
        export(tmp_path, board, recipe="storage=codebook3,compute=fp32")
    assert "int4/channel" in refused.value.fix
    dynamic = Policy({"head": INT8.__class__(INT8.storage, Compute.INT8_DYNAMIC)}, {})
    with pytest.raises(UserError, match="which board cannot"):
        export(tmp_path, board, policy=write_policy(tmp_path / "policy.json", dynamic))


def test_a_search_chooses_among_what_the_board_holds(
    board: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costing, "SIZE_SAMPLES", 24)
    monkeypatch.setattr(trainer, "RECOVERY_EXAMPLES", 128)
    outcome = export(tmp_path, board, search="evolution", evaluations=3, epochs=1, max_drop=50.0)
    manifest = outcome.manifest
    assert outcome.status is ExitStatus.UNVERIFIED
    assert manifest.search.method == "evolution"
    assert manifest.measured.size_bytes == manifest.predicted.size_bytes
    stored = {(layer.storage, layer.compute) for layer in manifest.layers}
    in_halves = {("int4/group64", "fp16"), ("int4/channel", "fp16"), ("fp16/tensor", "fp16")}
    assert stored <= {("fp32/tensor", "fp32"), ("int8/channel", "int8"), *in_halves}


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('"int8/channel->int8", "int4', '"int8/chanel->int8", "int4', "'chanel' is no granularity"),
        ('"int8/channel->int8", "int4', '"int8/channel->int9", "int4', "is no precision"),
        ('Linear = ["fp32", "fp16", "int8"]', 'Linear = ["fp32", "fp16"]', "computes.Linear lacks int8"),
        ('compute_capability = "8.7"', 'compute_capability = "87"', "gpu.compute_capability"),
        ("int4_in_pairs", "int4_in_pair", "unknown key 'gpu.int4_in_pair'"),
        (
            'Linear = ["fp32", "fp16", "int8"]',
            'Linear = ["fp32", "fp16", "int8", "fp8"]',
            "Linear computes in fp8, which compute capability 8.7 does not",
        ),
    ],
)
def test_a_profile_that_says_nonsense_is_refused(board: str, old: str, new: str, what: str) -> None:
    path = Path(board)
    assert old in TARGET
    path.write_text(TARGET.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        load_target(board)
    assert what in refused.value.what


def test_pruned_and_quantised_the_size_is_told_exactly(board: str, tmp_path: Path) -> None:
    outcome = export(tmp_path, board, recipe="keep=50%,compute=int8")
    assert outcome.manifest.error.size_pct == 0
    assert any(layer.kept < layer.of for layer in outcome.manifest.layers)
    assert json.loads((outcome.folder / "policy.json").read_text())["keep"]
