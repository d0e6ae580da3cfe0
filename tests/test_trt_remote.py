"""An artifact measured on a device with TensorRT: over a loopback sshd (`test_remote`), with a stand-in for trtexec.

The stand-in (`trtexec_stand_in.py`) is written after NVIDIA's documentation; nothing here was recorded on a device.
"""

import json
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from exporting import digits, trained_digit_net
from test_remote import CUTTING, Device, sshd  # noqa: F401 - a fixture
from trt_files import INT4, RUNTIME, case

from hirelc_deploy import cli, pipeline
from hirelc_deploy.config import ExportSettings
from hirelc_deploy.errors import ExitStatus, UserError
from hirelc_deploy.exporters import _trt_build
from hirelc_deploy.exporters._trt_exec import failure_of, inferences_per_s, outputs_of, runs_as, times_of, version_of
from hirelc_deploy.policy import INT8
from hirelc_deploy.verify import accuracy, manifest as manifests, remote
from hirelc_deploy.verify.power import Power, drawn
from hirelc_deploy.verify.remote import ATTEMPTS, SSH_VARIABLE

STAND_IN = Path(__file__).with_name("trtexec_stand_in.py")


@pytest.fixture
def device(sshd: Device, monkeypatch: pytest.MonkeyPatch) -> Device:  # noqa: F811
    monkeypatch.setenv(SSH_VARIABLE, shlex.join(sshd.ssh))
    monkeypatch.setattr(remote, "PAUSE_S", 0.0)
    return sshd


@pytest.fixture
def trtexec(tmp_path: Path) -> Path:
    """The command on the device."""
    shutil.copy(STAND_IN, tmp_path / "stand_in.py")
    command = tmp_path / "trtexec"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "stand_in.py"} "$@"\n')
    command.chmod(0o755)
    return command


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "out"
    settings = ExportSettings(
        model="in memory", data="digits", epochs=0, out=out, target="jetson-orin", recipe="compute=int8", max_drop=5.0
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_trt_build, "_trt", lambda: None)
        pipeline.export(settings, model=trained_digit_net(), task=digits())
    return out


@pytest.fixture
def artifact(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "artifact"))


def verify(artifact: Path, trtexec: Path | str, *arguments: str) -> int:
    return cli.main(["verify", str(artifact), "--host", "device", "--host-trtexec", str(trtexec), *arguments])


def test_an_artifact_is_built_timed_scored_and_read_back_on_the_device(
    device: Device, artifact: Path, trtexec: Path
) -> None:
    before = manifests.read(artifact)
    assert verify(artifact, trtexec) == ExitStatus.OK
    after = manifests.read(artifact)
    assert after.verdict == "pass"
    assert (after.runtime.name, after.runtime.version) == ("tensorrt", "10.3.0")
    basis = after.measured.basis
    assert {basis.size, basis.accuracy, basis.latency} == {"measured"}
    # the engine takes the file's place, and the file stays beside it
    assert after.artifact == manifests.Artifact.of(artifact / "model.engine")
    assert (artifact / "model.onnx").exists()
    assert after.measured.size_bytes == after.artifact.size_bytes
    assert [layer.runs_as for layer in after.layers] == ["int8"] * len(after.layers)
    assert after.measured.latency_ms is not None
    assert after.measured.latency_ms.p50 == pytest.approx(0.5225)
    assert after.measured.speedup == pytest.approx(3.0)
    assert after.baseline_fp16 is not None
    assert after.baseline_fp16.latency_ms is not None
    assert after.baseline_fp16.latency_ms.p50 == pytest.approx(0.836)
    # the stand-in computes what the reference computes
    assert after.measured.accuracy == pytest.approx(before.measured.accuracy, abs=0.5)
    assert after.baseline.accuracy == before.baseline.accuracy
    assert any("the GPU alone takes 0.418 ms" in note for note in after.notes_on_measurement)
    assert not any("simulation" in note for note in after.notes_on_measurement), "it was one before"
    assert after.built_from == before.artifact
    assert after.environment.packages == {"tensorrt": "10.3.0"}
    assert not list(device.folder.glob("tmp.*")), "the folder on the device is left behind"
    assert after.measured.energy_mj is None, "there is no tegrastats"


TEGRASTATS = """#!/bin/sh
trap 'echo ended > {ended}; exit' TERM
echo "$@" > {asked}
for watts in 4 4 10 10 10; do
  for _ in 1 2 3 4 5 6 7 8 9 10; do
    echo "11-28-2026 09:00:00 RAM 2/7MB CPU [1%@1510] gpu@47C VDD_IN ${{watts}}000mW/5000mW VDD_SOC 900mW/900mW"
  done
done
while :; do sleep 0.01; done
"""
"""Four watts for two seconds, ten for three; like NVIDIA's documentation, not recorded on a device."""


def test_energy_is_what_the_board_draws_for_each_inference(
    device: Device, artifact: Path, trtexec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, asked = tmp_path / "ended", tmp_path / "asked"
    command = device.folder / "bin" / "tegrastats"
    command.parent.mkdir(exist_ok=True)
    command.write_text(TEGRASTATS.format(ended=ended, asked=asked))
    command.chmod(0o755)
    try:
        assert verify(artifact, trtexec) == ExitStatus.OK
    finally:
        command.unlink()
    after = manifests.read(artifact)
    assert asked.read_text().split() == ["--interval", "100"]
    assert ended.exists(), "it would run on for ever"
    # 10 W at 2000, 1250 and 666.7 inferences a second
    assert after.measured.energy_mj == pytest.approx(5.0)
    assert after.baseline_fp16 is not None
    assert after.baseline_fp16.energy_mj == pytest.approx(8.0)
    assert after.baseline.energy_mj == pytest.approx(15.0)
    assert any(
        note.startswith("energy: the board draws 10 W") and "VDD_IN" in note for note in after.notes_on_measurement
    )
    shown = capsys.readouterr().out
    assert "energy" in shown
    assert "5.00 mJ" in shown


def test_an_export_ends_on_the_device_where_it_has_one(
    device: Device, trtexec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_trt_build, "_trt", lambda: None)
    settings = ExportSettings(
        model="in memory",
        data="digits",
        epochs=0,
        out=tmp_path / "out",
        target="jetson-orin",
        recipe="compute=int8",
        max_drop=5.0,
        host="device",
        host_trtexec=str(trtexec),
    )
    outcome = pipeline.export(settings, model=trained_digit_net(), task=digits())
    assert (outcome.manifest.verdict, outcome.status) == ("pass", ExitStatus.OK)
    assert outcome.manifest.artifact.path == "model.engine"
    assert outcome.manifest.measured.basis.latency == "measured"


def test_an_export_for_a_device_that_is_not_there_does_not_begin(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SSH_VARIABLE, shlex.join([*device.ssh, "-p", "1"]))
    out = tmp_path / "out"
    settings = ExportSettings(model="in memory", data="digits", target="jetson-orin", host="device", out=out)
    with pytest.raises(UserError, match="device"):
        pipeline.export(settings, model=trained_digit_net(), task=digits())
    with pytest.raises(UserError, match="device"):
        pipeline.export(replace(settings, target="host"), model=trained_digit_net(), task=digits())
    assert not out.exists()


def test_an_engine_runs_nowhere_else(tmp_path: Path) -> None:
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"")
    with pytest.raises(UserError, match="runs on the device that built it and nowhere else") as refused:
        RUNTIME.load(engine, threads=1)
    assert "--host user@device" in refused.value.fix


def test_a_connection_that_is_cut_is_taken_up_again(
    device: Device, artifact: Path, trtexec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper, count = tmp_path / "cutting.py", tmp_path / "count"
    wrapper.write_text(CUTTING.format(count=str(count), cut={3, 6, 7}, ssh=device.ssh))
    monkeypatch.setenv(SSH_VARIABLE, f"{sys.executable} {wrapper}")
    assert verify(artifact, trtexec) == ExitStatus.OK
    assert manifests.read(artifact).verdict == "pass"


def test_a_device_that_stays_away_leaves_the_artifact_as_it_was(
    device: Device,
    artifact: Path,
    trtexec: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (artifact / "manifest.json").read_bytes()
    wrapper, count = tmp_path / "cutting.py", tmp_path / "count"
    wrapper.write_text(CUTTING.format(count=str(count), cut=set(range(4, 99)), ssh=device.ssh))
    monkeypatch.setenv(SSH_VARIABLE, f"{sys.executable} {wrapper}")
    assert verify(artifact, trtexec) == ExitStatus.USER_ERROR
    assert f"failed {ATTEMPTS} times" in capsys.readouterr().err
    assert (artifact / "manifest.json").read_bytes() == before


def test_an_engine_that_was_measured_stays_until_another_is(
    device: Device, artifact: Path, trtexec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify(artifact, trtexec) == ExitStatus.OK
    before = [(artifact / name).read_bytes() for name in ("model.engine", "manifest.json")]
    stand_in = trtexec.with_name("stand_in.py")
    stand_in.write_text(stand_in.read_text().replace("stand-in engine", "another stand-in engine"))

    def cut(*_: object) -> None:
        raise UserError("the connection to device failed", fix="is the device on?")

    monkeypatch.setattr(accuracy, "compare", cut)
    assert verify(artifact, trtexec) == ExitStatus.USER_ERROR
    assert [(artifact / name).read_bytes() for name in ("model.engine", "manifest.json")] == before


@pytest.mark.parametrize(
    ("fault", "message", "fix"),
    [
        ("full", "it has no room left", "free some"),
        ("old", "device has TensorRT 8.5.2, and the target begins with 10.3", "install a newer JetPack"),
        ("refuses", "node_of_k: unsupported int8 convolution", "TensorRT"),
    ],
)
def test_what_goes_wrong_on_the_device_is_one_message(
    fault: str,
    message: str,
    fix: str,
    device: Device,
    artifact: Path,
    trtexec: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (artifact / "manifest.json").read_bytes()
    trtexec.with_name("fault").write_text(fault)
    assert verify(artifact, trtexec) == ExitStatus.USER_ERROR
    error = capsys.readouterr().err
    assert message in error
    assert fix in error
    assert (artifact / "manifest.json").read_bytes() == before


def test_a_device_without_trtexec_is_told(device: Device, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(artifact, "no-such-trtexec") == ExitStatus.USER_ERROR
    error = capsys.readouterr().err
    assert "device has no no-such-trtexec" in error
    assert "--host-trtexec" in error


# -- what trtexec writes -------------------------------------------------------------------------------------


def test_what_trtexec_says_is_read() -> None:
    assert version_of("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] [b26] # trtexec") == "10.3.0"
    assert version_of("[TensorRT v8502]") == "8.5.2"
    times = times_of(json.dumps([{"latencyMs": 1.0, "computeMs": 0.5}, {"latencyMs": 3.0, "computeMs": 1.5}]))
    assert np.median(times.end_to_end_ms) == 2.0
    assert np.median(times.gpu_ms) == 1.0
    found = outputs_of(json.dumps([{"name": "y", "dimensions": "2x3", "values": list(range(6))}]))
    assert found["y"].shape == (2, 3)
    for read, text in ((times_of, "[{}]"), (outputs_of, '[{"name": "y"}]'), (times_of, "not JSON")):
        with pytest.raises(UserError, match="cannot be read"):
            read(text)
    with pytest.raises(UserError, match="does not say which TensorRT"):
        version_of("nothing")
    assert failure_of("") == ("nothing was printed", "is the target's TensorRT the device's?")


def test_power_is_that_of_the_whole_module() -> None:
    nano = "RAM 2448/7620MB VDD_IN 5012mW/4980mW VDD_CPU_GPU_CV 720mW/720mW VDD_SOC 1440mW/1440mW"
    agx = "GR3D_FREQ 0% VDD_GPU_SOC 3000mW/3000mW VDD_CPU_CV 1000mW/999mW VIN_SYS_5V0 4000mW/4000mW VDDQ 5mW/5mW"
    assert drawn(nano, 3) == Power(5.012, ("VDD_IN",))
    assert drawn(agx, 3) == Power(8.0, ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))
    assert drawn(f"{nano}\nVDD_IN 9000mW/7000mW", 0.1) == Power(9.0, ("VDD_IN",))
    assert drawn("RAM 2448/7620MB VDD_SOC 1440mW/1440mW", 3) is None
    assert inferences_per_s("[I] Throughput: 1046.27 qps") == 1046.27
    assert inferences_per_s("nothing") is None


def test_what_a_layer_runs_as_is_read_by_the_names_of_its_operators() -> None:
    network = case("residual")
    exported = network.write(network.precisions(INT8) | {"head": INT4})
    model = onnx.load_from_string(exported.data)
    by_layer = {layer: f"node_of_{name}" for layer, name in _outputs_by_layer(model, exported.tensors).items()}
    fused = f"{by_layer['first']} + {by_layer['second']}"
    layers = [
        {"Name": fused, "Inputs": [{"Format/Datatype": "Int8 NC/32HW32"}]},
        {
            "Name": "x",
            "Metadata": f"[ONNX Layer: {by_layer['head']}]",
            "Inputs": [{"Format/Datatype": "Half row major"}],
        },
        {"Name": by_layer["down"], "Inputs": [{"Format/Datatype": "Float row major"}]},
        {"Name": f"{by_layer['down']}2", "Inputs": [{"Format/Datatype": "Int8"}]},  # another name that begins alike
        {"Name": f"reformat {by_layer['stem']}", "LayerType": "Reformat", "Inputs": [{"Format/Datatype": "Float"}]},
    ]
    found = runs_as(json.dumps({"Layers": layers}), model, exported.tensors)
    assert (found["first"], found["second"], found["head"], found["down"]) == ("int8", "int8", "fp16", "fp32")
    assert found["stem"] is None
    assert found["side"] is None


def _outputs_by_layer(model: onnx.ModelProto, tensors: dict[str, str]) -> dict[str, str]:
    """What the operator behind each weight's DequantizeLinear writes."""
    decoded = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    reader = {name: node.output[0] for node in model.graph.node for name in node.input}
    return {layer: reader[decoded[tensor]] for layer, tensor in tensors.items()}
