"""An artifact measured again, judged again and shown again, after its export."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from exporting import (
    digits,
    random_task,
)

from hirelc_deploy import verification
from hirelc_deploy.augment import augmented
from hirelc_deploy.cli import main
from hirelc_deploy.cpu import cpu_flags
from hirelc_deploy.errors import ExitStatus, UserError
from hirelc_deploy.profiles import load_target
from hirelc_deploy.verify import judge, manifest as manifests
from hirelc_deploy.verify.measure import Measurement


@pytest.fixture
def copied(artifact: verification.Outcome, tmp_path: Path) -> Path:
    """The same folder, to do anything to."""
    return Path(shutil.copytree(artifact.folder, tmp_path / "copied"))


def test_verify_measures_again_and_keeps_what_was_believed(copied: Path) -> None:
    before = manifests.read(copied)
    scored = {"accuracy": 1.0, "accuracy_search": 2.0}
    forged = before.model_copy(update={"measured": before.measured.model_copy(update=scored), "created": "long ago"})
    manifests.write(forged, copied)
    outcome = verification.verify(copied, task=digits())
    assert outcome.status == ExitStatus.OK
    assert manifests.read(copied) == outcome.manifest
    assert outcome.manifest.measured.accuracy == before.measured.accuracy
    assert outcome.manifest.measured.accuracy_search == before.measured.accuracy_search
    assert outcome.manifest.created != "long ago"
    for kept in ("predicted", "artifact", "layers", "budget", "search"):
        assert getattr(outcome.manifest, kept) == getattr(before, kept)


def test_verify_knows_data_whose_train_images_were_changed_at_random(copied: Path) -> None:
    """Its fingerprint has the changes in it, and the data is loaded without them."""
    augment = ("flip", "shift")
    before = manifests.read(copied)
    assert before.training is not None
    changed = {
        "training": before.training.model_copy(update={"augment": augment}),
        "task": before.task.model_copy(update={"sha256": augmented(digits(), augment).fingerprint()}),
    }
    manifests.write(before.model_copy(update=changed), copied)
    assert verification.verify(copied, data="digits").status == ExitStatus.OK
    assert verification.verify(copied, task=augmented(digits(), augment)).status == ExitStatus.OK
    with pytest.raises(UserError, match="not the data"):
        verification.verify(copied, task=augmented(digits(), ("flip",)))


@pytest.mark.parametrize(("is_here", "basis"), [(True, "measured"), (False, "estimate")])
def test_an_estimate_is_replaced_on_the_device_itself(
    copied: Path, monkeypatch: pytest.MonkeyPatch, is_here: bool, basis: str
) -> None:
    """The folder was copied there, and what is timed is the device's own."""
    before = manifests.read(copied)
    told = before.measured.basis.model_copy(update={"latency": "estimate"})
    forged = {"target": "raspberry-pi-5", "measured": before.measured.model_copy(update={"basis": told})}
    manifests.write(before.model_copy(update=forged), copied)
    flags = load_target("raspberry-pi-5").flags(cpu_flags()) if is_here else frozenset({"asimd"})
    monkeypatch.setattr(verification, "cpu_flags", lambda: flags)
    after = verification.verify(copied, task=digits())
    assert after.manifest.measured.basis.latency == basis
    assert (after.status == ExitStatus.UNVERIFIED) == (not is_here)
    earlier, later = (manifests.p50(each.measured.latency_ms) for each in (before, after.manifest))
    assert (later == earlier) == (not is_here)


def test_verify_measures_no_other_file(copied: Path) -> None:
    before = manifests.read(copied)
    shutil.copy(copied / "baseline.onnx", copied / "model.onnx")
    outcome = verification.verify(copied, task=digits())
    assert outcome.status == ExitStatus.BUDGET_MISSED
    assert manifests.read(copied).measured == before.measured


def test_verify_refuses_other_data_and_leaves_the_figures(copied: Path) -> None:
    before = (copied / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="not the data that this artifact was measured on"):
        verification.verify(copied, task=random_task(x=(1, 8, 8)))
    assert (copied / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("found", ["another", "none"])
def test_verify_measures_beside_no_other_original(copied: Path, found: str) -> None:
    before = (copied / "manifest.json").read_bytes()
    if found == "another":
        shutil.copy(copied / "model.onnx", copied / "baseline.onnx")
    else:
        (copied / "baseline.onnx").unlink()
    with pytest.raises(UserError, match=r"baseline\.onnx (is not the file|cannot be read)"):
        verification.verify(copied, task=digits())
    assert (copied / "manifest.json").read_bytes() == before


def test_verify_takes_data_from_where_it_lies_by_now(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copied)]) == ExitStatus.USER_ERROR  # exported from memory
    before = manifests.read(copied)
    assert main(["verify", str(copied), "--data", "digits"]) == ExitStatus.OK
    assert manifests.read(copied).measured.accuracy == before.measured.accuracy
    assert manifests.read(copied).task == before.task


def test_a_network_that_is_slower_is_noted_once_however_often_it_is_measured(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifests.read(copied)
    speedups = iter([0.5, 0.625, 1.5])

    def measure(*_: Any, **__: Any) -> Measurement:
        measured = manifest.measured.model_copy(update={"speedup": next(speedups), "rounds": None})
        runs_as = {record.name: record.runs_as for record in manifest.layers}
        return Measurement(baseline=manifest.baseline, measured=measured, runs_as=runs_as, clock="cpu", p50_ms=1.0)

    monkeypatch.setattr(verification, "measure", measure)
    lasting = tuple(note for note in manifest.notes if "slower" not in note)
    for speedup in ("0.5", "0.62"):
        notes = verification.verify(copied, task=digits()).manifest.notes
        assert notes[:-1] == lasting
        assert speedup in notes[-1]
    assert verification.verify(copied, task=digits()).manifest.notes == lasting


def test_gate_passes_as_exported_and_fails_when_one_byte_is_another(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gate", str(copied)]) == ExitStatus.OK
    assert judge.gate(copied, None, False).word == "pass"
    file = copied / "model.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    assert main(["gate", str(copied)]) == ExitStatus.BUDGET_MISSED
    assert "sha256" in capsys.readouterr().out
    verdict = judge.gate(copied, None, False)
    assert (verdict.status, verdict.word) == (ExitStatus.BUDGET_MISSED, "fail")


@pytest.mark.parametrize(
    ("limit", "name"), [("--max-size=1KB", "size_bytes"), ("--max-drop=-90", "drop"), ("--min-speedup=1e6", "speedup")]
)
def test_gate_holds_a_folder_to_stricter_limits(artifact: verification.Outcome, limit: str, name: str) -> None:
    before = (artifact.folder / "manifest.json").read_bytes()
    assert main(["gate", str(artifact.folder), limit]) == ExitStatus.BUDGET_MISSED
    assert (artifact.folder / "manifest.json").read_bytes() == before


def test_a_report_is_written_again_from_the_manifest(copied: Path) -> None:
    page = (copied / "report.html").read_bytes()
    (copied / "report.html").unlink()
    assert main(["report", str(copied)]) == ExitStatus.OK
    assert (copied / "report.html").read_bytes() == page
