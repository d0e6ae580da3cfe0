"""What a user would lose: an artifact that misses a limit, or is not the one that was measured, and passes."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from hirelc_deploy import budget as budgets
from hirelc_deploy.budget import NOT_SLOWER, Budget, Check, Figures
from hirelc_deploy.cpu import RELEVANT_FLAGS
from hirelc_deploy.errors import ExitStatus, UserError
from hirelc_deploy.verify import junit, manifest
from hirelc_deploy.verify.environment import environment, model_name
from hirelc_deploy.verify.judge import (
    LOADS,
    RUNS_AS,
    SCORED,
    Verdict,
    gate,
    judge,
    loads,
    runs_as_check,
    unchanged,
    warnings,
)
from hirelc_deploy.verify.manifest import Artifact, LayerRecord, Manifest, Measured, PredictionError

MODEL = b"a model file"
LOADED = Check(LOADS, None, "loaded", True)


def measured(**changes: Any) -> Measured:
    data: dict[str, Any] = {
        "size_bytes": len(MODEL),
        "accuracy": 93.0,
        "accuracy_search": 93.4,
        "latency_ms": {"p50": 0.25, "p90": 0.3, "p99": 0.4},
        "compression": 30.0,
        "speedup": 8.0,
        "drop_points": 0.5,
        "drop_ci95": (0.1, 0.9),
        "agreement": 99.0,
        "basis": {"size": "measured", "accuracy": "measured", "latency": "measured"},
    }
    return Measured.model_validate(data | changes)


def estimated(**changes: Any) -> Measured:
    basis = {"size": "measured", "accuracy": "measured", "latency": "estimate"}
    return measured(latency_ms={"p50": 0.25}, basis=basis, **changes)


def layer(name: str = "conv1", **changes: Any) -> LayerRecord:
    data = {
        "name": name,
        "op": "Conv2d",
        "kept": 8,
        "of": 32,
        "storage": "int8/channel",
        "encoding": "int8",
        "compute": "int8",
        "weight_bytes": 72,
        "runs_as": "int8",
        "tensor": f"{name}.weight",
    }
    return LayerRecord.model_validate(data | changes)


def make(folder: Path, **changes: Any) -> Manifest:
    """An artifact folder with a model file and its manifest."""
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(MODEL)
    values: dict[str, Any] = {
        "tool_version": "0.1.0",
        "created": manifest.now(),
        "target": "host",
        "runtime": {"name": "onnxruntime", "version": "1.31.0"},
        "model": {"spec": "networks.py:wide", "checkpoint_sha256": "00" * 32},
        "task": {"spec": "digits", "sha256": "11" * 32, "test_examples": 360, "search_seen_in_training": True},
        "artifact": Artifact.of(folder / "model.onnx"),
        "baseline": {"size_bytes": 360, "accuracy": 93.5, "latency_ms": {"p50": 2.0, "p90": 2.2, "p99": 3.0}},
        "predicted": {"size_bytes": 12, "accuracy": 93.2, "latency_ms": 0.24},
        "measured": measured(),
        "error": {"size_pct": 0.0, "latency_pct": -4.0, "accuracy_points": -0.2},
        "layers": (layer(),),
        "search": {"method": "recipe", "evaluations": 12, "seconds": 61.5, "seed": 0, "order": ("prune", "quantize")},
        "budget": Budget(size_bytes=100, drop=1.0),
        "checks": (LOADED,),
        "verdict": "pass",
        "environment": environment(threads=1, batch=1, clock="cpu"),
    }
    made = Manifest.model_validate(values | changes)
    manifest.write(made, folder)
    return made


# budget


def test_limits_are_inclusive_and_speed_up_is_a_lower_one() -> None:
    limits: dict[str, Any] = {"latency_ms": 5.0, "speedup": 3.0, "size_bytes": 400, "memory_bytes": 800, "drop": 1.0}
    assert all(check.ok is True for check in budgets.judge(Budget(**limits), Figures(**limits)))
    for name, limit in limits.items():
        worse = limit * (0.999 if name == "speedup" else 1.001)
        checks = budgets.judge(Budget(**limits), dataclasses.replace(Figures(**limits), **{name: worse}))
        assert [check.name for check in checks if not check.ok] == [name]


def test_a_figure_that_is_not_known_or_no_number_meets_no_limit() -> None:
    (unknown,) = budgets.judge(Budget(drop=1.0), Figures())
    assert unknown == Check("drop", 1.0, None, None)
    (nan,) = budgets.judge(Budget(drop=1.0), Figures(drop=float("nan")))
    assert nan.ok is False
    assert not budgets.met(Budget(drop=1.0), Figures())


def test_a_budget_without_limits_asks_for_nothing() -> None:
    assert not Budget().given
    assert Budget(drop=0.0).given
    assert budgets.judge(Budget(), Figures()) == ()
    assert budgets.met(Budget(), Figures())


@pytest.mark.parametrize("limits", [{"latency_ms": 0.0}, {"size_bytes": -1}, {"drop": float("nan")}])
def test_a_limit_that_can_never_be_judged_is_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(limits))):
        Budget(**limits)


def test_slower_than_fp32_fails_with_a_latency_limit_unless_a_speed_up_is_demanded() -> None:
    slower = Figures(latency_ms=1.0, speedup=0.8)
    assert [c.name for c in budgets.judge(Budget(latency_ms=5.0), slower) if c.ok is False] == [NOT_SLOWER]
    assert budgets.met(Budget(latency_ms=5.0, speedup=0.5), slower)
    assert budgets.met(Budget(size_bytes=10), dataclasses.replace(slower, size_bytes=10))
    assert warnings(Budget(size_bytes=10), measured(speedup=0.8))
    assert not warnings(Budget(latency_ms=5.0), measured(speedup=0.8))  # there it is a check
    assert not warnings(Budget(), measured(speedup=1.1))


@pytest.mark.parametrize(
    ("limits", "figures", "over"),
    [
        ({"size_bytes": 100}, {"size_bytes": 100}, 0.0),
        ({"size_bytes": 100}, {"size_bytes": 200}, math.log(2)),
        ({"size_bytes": 100, "speedup": 3.0}, {"size_bytes": 200, "speedup": 1.5}, math.log(4)),
        ({"latency_ms": 5.0}, {"latency_ms": 4.0, "speedup": 0.5}, math.log(2)),
        ({"latency_ms": 5.0}, {"latency_ms": float("nan")}, math.inf),
        ({"memory_bytes": 100}, {}, 0.0),
        ({"drop": 0.5}, {"drop": 5.0}, 0.0),
    ],
)
def test_how_far_limits_are_missed_adds_up(limits, figures, over):
    assert budgets.excess(Budget(**limits), Figures(**figures)) == pytest.approx(over)


# verdict


@pytest.mark.parametrize(
    ("outcomes", "word", "status", "status_with_estimates"),
    [
        ((), "pass", ExitStatus.OK, ExitStatus.OK),
        ((True, True), "pass", ExitStatus.OK, ExitStatus.OK),
        ((True, None), "unverified", ExitStatus.UNVERIFIED, ExitStatus.OK),
        ((None, False), "fail", ExitStatus.BUDGET_MISSED, ExitStatus.BUDGET_MISSED),
    ],
)
def test_the_worst_check_decides(
    outcomes: tuple[bool | None, ...], word: str, status: ExitStatus, status_with_estimates: ExitStatus
) -> None:
    checks = tuple(Check(str(i), None, None, ok) for i, ok in enumerate(outcomes))
    assert Verdict(checks).word == word
    assert Verdict(checks).status == status
    assert Verdict(checks, allow_estimates=True).status == status_with_estimates


def test_an_estimate_never_passes_a_check_and_can_fail_one() -> None:
    within = judge(Budget(latency_ms=1.0), estimated(), [layer()], of_the_file=[])
    assert within.word == "unverified"
    assert {c.name for c in within.checks if c.ok is None} == {"latency_ms", NOT_SLOWER}
    beyond = judge(Budget(latency_ms=0.1), estimated(), [layer()], of_the_file=[], allow_estimates=True)
    assert beyond.status == ExitStatus.BUDGET_MISSED


def test_a_simulated_score_is_not_one_of_the_file() -> None:
    basis = {"size": "measured", "accuracy": "simulated", "latency": "measured"}
    verdict = judge(Budget(drop=1.0), measured(basis=basis), [layer()], of_the_file=[])
    assert {check.name for check in verdict.checks if check.ok is None} == {"drop", SCORED}


def test_memory_that_nobody_measured_is_unverified() -> None:
    assert judge(Budget(memory_bytes=10**9), measured(), [layer()], of_the_file=[]).word == "unverified"


@pytest.mark.parametrize(("limit", "word"), [(900, "pass"), (899, "fail")])
def test_memory_is_judged_by_its_peak(limit: int, word: str) -> None:
    verdict = judge(Budget(memory_bytes=limit), measured(memory_bytes=900, load_ms=3.0), [layer()], of_the_file=[])
    assert verdict.word == word


def test_memory_on_another_machine_passes_no_limit() -> None:
    verdict = judge(Budget(memory_bytes=900), estimated(memory_bytes=800), [layer()], of_the_file=[])
    assert verdict.word == "unverified"


def test_layers_that_run_otherwise_are_named() -> None:
    wrong = [layer(f"conv{i}", runs_as="fp32") for i in range(5)]
    check = runs_as_check([layer("stem"), *wrong, layer("head", runs_as=None)])
    assert check == Check(
        RUNS_AS,
        "all 7",
        "conv0 as fp32, not int8; conv1 as fp32, not int8; conv2 as fp32, not int8 and 2 more",
        False,
    )


def test_a_layer_that_cannot_be_read_is_unverified_and_one_that_is_gone_is_fine() -> None:
    unread = runs_as_check([layer("stem"), layer("head", runs_as=None)])
    assert (unread.ok, unread.measured) == (None, "head cannot be read")
    assert runs_as_check([layer("stem"), layer("branch", kept=0, runs_as=None, tensor=None)]).ok is True


def test_a_file_that_does_not_load_says_why(tmp_path: Path) -> None:
    class Broken:
        name, suffix = "broken", ".onnx"

        def load(self, path: Path, *, threads: int) -> Any:
            raise UserError("Unsupported model IR version: 99", fix="use an older one")

    check = loads(Broken(), tmp_path / "model.onnx", threads=1)  # type: ignore[arg-type]
    assert check == Check(LOADS, None, "Unsupported model IR version: 99", False)


# gate


def test_gate_passes_what_was_measured_and_met_its_budget(tmp_path: Path) -> None:
    make(tmp_path)
    verdict = gate(tmp_path, None, allow_estimates=False)
    assert (verdict.word, verdict.status) == ("pass", ExitStatus.OK)
    assert [check.name for check in verdict.checks][:3] == ["size_bytes", "drop", LOADS]


def test_limits_of_the_command_line_replace_those_of_the_manifest(tmp_path: Path) -> None:
    make(tmp_path)
    assert gate(tmp_path, Budget(drop=0.4), allow_estimates=False).status == ExitStatus.BUDGET_MISSED
    assert gate(tmp_path, Budget(), allow_estimates=False).status == ExitStatus.OK
    # those of other figures hold as they did
    verdict = gate(tmp_path, Budget(speedup=0.01), allow_estimates=False)
    assert {"size_bytes", "drop", "speedup"} <= {check.name for check in verdict.checks}


def test_one_changed_byte_fails_the_gate(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "model.onnx").write_bytes(MODEL[:-1] + b"E")
    verdict = gate(tmp_path, None, allow_estimates=True)
    assert verdict.status == ExitStatus.BUDGET_MISSED
    assert [check.name for check in verdict.checks if check.ok is False] == ["sha256"]


def test_the_size_limit_is_judged_on_the_file_that_is_there(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "model.onnx").write_bytes(MODEL * 100)
    failed = {check.name for check in gate(tmp_path, None, allow_estimates=False).checks if check.ok is False}
    assert failed == {"sha256", "size on disk", "size_bytes"}


def test_a_missing_model_file_fails_the_gate(tmp_path: Path) -> None:
    made = make(tmp_path)
    (tmp_path / "model.onnx").unlink()
    assert gate(tmp_path, None, allow_estimates=False).status == ExitStatus.BUDGET_MISSED
    assert unchanged(tmp_path, made.artifact)[0].measured == "model.onnx is missing"


def test_a_file_that_never_loaded_does_not_pass_the_gate(tmp_path: Path) -> None:
    make(tmp_path, checks=(Check(LOADS, None, "bad graph", False),), verdict="fail")
    assert gate(tmp_path, None, allow_estimates=False).status == ExitStatus.BUDGET_MISSED
    make(tmp_path, checks=(), verdict="pass")  # and striking the check out does not help
    assert gate(tmp_path, None, allow_estimates=False).status == ExitStatus.UNVERIFIED


# manifest


def test_a_manifest_comes_back_as_it_was_and_is_written_the_same_way_twice(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert manifest.read(tmp_path) == made
    written = (tmp_path / "manifest.json").read_text()
    manifest.write(manifest.read(tmp_path), tmp_path)
    assert (tmp_path / "manifest.json").read_text() == written
    data = json.loads(written)
    assert list(data) == sorted(data)
    assert data["schema"] == 1
    assert data["measured"]["latency_ms"] == {"p50": 0.25, "p90": 0.3, "p99": 0.4}


def test_the_figure_that_is_judged_is_the_figure_that_is_written() -> None:
    exact = 1.0000001  # of no measurement's precision
    assert measured(drop_points=exact).drop_points == 1.0
    assert measured(latency_ms={"p50": 0.123456789}).latency_ms.p50 == 0.123457  # type: ignore[union-attr]


def test_a_figure_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        measured(accuracy=float("nan"))


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("schema", 2, "schema 2"),
        ("measured", {"size_bytes": 1}, "measured.accuracy"),
        ("verdict", "fine", "verdict"),
        ("budget", {"max_size": 3}, "budget"),
        ("surprise", 1, "surprise"),
        ("artifact", {"path": "../other.onnx", "sha256": "", "size_bytes": 1}, "artifact.path"),
    ],
)
def test_an_edited_manifest_is_refused_by_the_entry(tmp_path: Path, entry: str, value: Any, message: str) -> None:
    make(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    with pytest.raises(UserError) as refused:
        manifest.read(tmp_path)
    assert message in refused.value.what


def test_no_manifest_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        manifest.read(tmp_path)


def test_prediction_against_measurement() -> None:
    predicted = manifest.Predicted(size_bytes=18, accuracy=93.0, latency_ms=None, speedup=3.0)
    seen = measured(speedup=4.0)
    error = PredictionError.between(predicted, seen)
    assert (error.size_pct, error.latency_pct, error.accuracy_points) == (50.0, None, -0.4)
    assert error.speedup_pct == -25.0
    assert PredictionError.between(predicted, measured(speedup=None)).speedup_pct is None


def test_the_environment_names_the_cpu_and_no_machine() -> None:
    found = environment(threads=2, batch=4, clock="wall")
    assert found.cpu
    assert set(found.flags) <= RELEVANT_FLAGS
    assert found.packages["python"]
    assert found.packages["numpy"]
    text = found.model_dump_json()
    assert os.uname().nodename not in text or len(os.uname().nodename) < 4
    assert str(Path.home()) not in text or len(str(Path.home())) < 4


def test_the_cpu_names_itself() -> None:
    assert model_name("processor\t: 0\nmodel name\t: Some CPU @ 2.0GHz\n") == "Some CPU @ 2.0GHz"
    assert model_name("processor\t: 0\nFeatures\t: asimd\n") is None


# for other people's tools

MIXED = Verdict(
    (
        Check("size_bytes", 400_000, 400_321, False),
        Check("speedup", 3.0, 8.04, True),
        Check(RUNS_AS, "all 7", "a|b\x1b[31m as fp32", None),
    )
)


def test_junit_has_a_case_a_check() -> None:
    root = ElementTree.fromstring(junit.junit(MIXED, suite="out"))
    assert {key: root.get(key) for key in ("tests", "failures", "errors")} == {
        "tests": "3",
        "failures": "1",
        "errors": "1",
    }
    failure = root.find("testcase[@name='size_bytes']/failure")
    assert failure is not None
    assert failure.get("message") == "400 KB (400321) where ≤ 400 KB is asked for: FAILED"
    passed = root.find("testcase[@name='speedup']")
    assert passed is not None
    assert len(passed) == 0


def test_junit_is_red_exactly_where_the_exit_status_is() -> None:
    unknown = (Check("latency_ms", 5.0, 4.0, None),)
    for allowed, kind in ((False, "error"), (True, "skipped")):
        root = ElementTree.fromstring(junit.junit(Verdict(unknown, allow_estimates=allowed), suite="out"))
        assert [child.tag for child in root[0]] == [kind]


def test_markdown_is_one_table() -> None:
    lines = junit.markdown(MIXED, title="out").splitlines()
    assert lines[0] == "### out: fail"
    assert "| speedup | ≥ 3.00 × | 8.04 × | ok |" in lines
    assert all(line.replace("\\|", "").count("|") == 5 for line in lines[2:])
