"""An artifact measured by ONNX Runtime in another process: on a device over a loopback sshd, or by another provider.

OpenVINO is the real one, in an environment of its own.  No machine here has a GPU: what CUDA, TensorRT and TensorRT-RTX
are asked is seen by a stand-in, which runs files on the CPU and lets nothing pass that a real one would not see.
"""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from exporting import digits, trained_digit_net
from test_remote import Device, sshd  # noqa: F401 - a fixture

from hirelc_deploy import cli, pipeline
from hirelc_deploy.config import PROVIDERS, Elsewhere, ExportSettings
from hirelc_deploy.errors import ExitStatus, UserError
from hirelc_deploy.exporters import _trt_build
from hirelc_deploy.exporters._footprint import packed
from hirelc_deploy.verify import manifest as manifests, providers, remote
from hirelc_deploy.verify.remote import SSH_VARIABLE

OPENVINO = Path(__file__).parents[1] / ".venv-openvino" / "bin" / "python"

STAND_IN = """
import json, os, sys
from pathlib import Path

folder = Path(__file__).parent
sys.path.remove(str(folder))
del sys.modules["onnxruntime"]
import onnxruntime as real
sys.path.append(str(folder))  # where the packages of providers lie

names = {providers!r}
plugged = set()
see = real.InferenceSession
fault = {fault!r}

class Options(real.SessionOptions):
    def add_provider_for_devices(self, devices, options):
        assert {{each.ep_name for each in devices}} <= plugged
        self.asked = (devices[0].ep_name, dict(options))

class Session:
    def __init__(self, path, options, providers=None, enable_fallback=1):
        if providers == ["CPUExecutionProvider"]:
            raise AssertionError("the CPU was asked")
        if providers is None:
            name, asked = options.asked
        else:
            assert not enable_fallback, "ONNX Runtime would go on with the CPU"
            (name, asked), = providers
        assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        if fault:
            os.write(2, fault.encode())
            raise RuntimeError("This session contains graph nodes that are assigned to the default CPU EP")
        held = folder / "engines" / Path(path).name
        held.parent.mkdir(exist_ok=True)
        if held.exists():
            assert held.read_bytes() == Path(path).read_bytes(), "the engine of another file would be found"
        held.write_bytes(Path(path).read_bytes())
        with (folder / "asked").open("a") as file:
            file.write(json.dumps([name, asked, Path(path).stem]) + "\\n")
        plain = real.SessionOptions()
        plain.graph_optimization_level = real.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = see(path, plain, providers=["CPUExecutionProvider"])
    def __getattr__(self, name):
        return getattr(self.session, name)

class Device:
    def __init__(self, name):
        self.ep_name = name

def register(name, library):
    assert library == "the library"
    plugged.add(name)

real.get_available_providers = lambda: [*names, "CPUExecutionProvider"]
real.get_ep_devices = lambda: [Device(name) for name in ("CPUExecutionProvider", *sorted(plugged))]
real.register_execution_provider_library = register
real.SessionOptions, real.InferenceSession = Options, Session
"""
"""An ONNX Runtime that has these providers built in, and others in packages of their own."""

PLUGIN = """
__version__ = "0.5.0"
def get_library_path():
    return "the library"
"""

NVIDIA_SMI = """#!/bin/sh
echo "{name}, 550.54, {compute_capability}"
"""


@pytest.fixture
def device(sshd: Device, monkeypatch: pytest.MonkeyPatch) -> Device:  # noqa: F811
    monkeypatch.setenv(SSH_VARIABLE, shlex.join(sshd.ssh))
    monkeypatch.setattr(remote, "PAUSE_S", 0.0)
    return sshd


def exported(out: Path, target: str) -> Path:
    settings = ExportSettings(
        model="in memory",
        data="digits",
        epochs=0,
        out=out,
        target=target,
        recipe="storage=int8,compute=int8",
        max_drop=5.0,
        max_memory_bytes=10**9 if target == "host" else None,
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_trt_build, "_trt", lambda: None)
        pipeline.export(settings, model=trained_digit_net(), task=digits())
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    return {name: exported(folder / name, name) for name in ("host", "rtx-ada", "raspberry-pi-5")}


@pytest.fixture
def for_host(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["host"], tmp_path / "for host"))


@pytest.fixture
def for_rtx(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["rtx-ada"], tmp_path / "for rtx"))


def python_with(folder: Path, *built_in: str, plugin: str | None = None, fault: str = "") -> Path:
    """A Python whose ONNX Runtime is the stand-in."""
    (folder / "onnxruntime.py").write_text(STAND_IN.format(providers=built_in, fault=fault))
    if plugin is not None:
        (folder / f"{plugin}.py").write_text(PLUGIN)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(folder))} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def asked(folder: Path) -> list[tuple[str, dict[str, str], str]]:
    return [tuple(json.loads(line)) for line in (folder / "asked").read_text().splitlines()]


def verify(artifact: Path, *arguments: str) -> int:
    return cli.main(["verify", str(artifact), *arguments])


# -- on a device ---------------------------------------------------------------------------------------------


def test_an_artifact_is_timed_scored_and_read_back_on_a_device(device: Device, for_host: Path) -> None:
    before = manifests.read(for_host)
    assert verify(for_host, "--host", "device", "--host-python", sys.executable) == ExitStatus.OK
    after = manifests.read(for_host)
    assert after.verdict == "pass"
    assert after.artifact == before.artifact
    # the device is this machine, so it gives what this machine gave
    assert after.measured.accuracy == before.measured.accuracy
    assert after.measured.accuracy_search == before.measured.accuracy_search
    assert after.baseline.accuracy == before.baseline.accuracy
    assert [layer.runs_as for layer in after.layers] == [layer.runs_as for layer in before.layers]
    assert after.environment.flags == before.environment.flags
    assert after.environment.cpu == before.environment.cpu
    assert (after.environment.clock, after.runtime.provider, after.runtime.on_host) == ("cpu", None, True)
    assert after.measured.latency_ms != before.measured.latency_ms
    assert after.measured.speedup_ci95 is not None
    for record in (after.measured, after.baseline):
        assert record.memory_bytes is None or record.memory_bytes > 0
    assert (after.measured.memory_bytes is None) == (before.measured.memory_bytes is None)
    assert not list(device.folder.glob("tmp.*")), "the folder on the device is left behind"


def test_another_cpu_than_the_target_is_refused(
    device: Device, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = folders["raspberry-pi-5"]
    before = (artifact / "manifest.json").read_bytes()
    assert verify(artifact, "--host", "device", "--host-python", sys.executable) == ExitStatus.USER_ERROR
    assert "and raspberry-pi-5 asimd" in capsys.readouterr().err
    assert (artifact / "manifest.json").read_bytes() == before


def test_a_file_that_is_not_the_artifact_is_not_measured(device: Device, for_host: Path) -> None:
    before = manifests.read(for_host)
    shutil.copy(for_host / "baseline.onnx", for_host / "model.onnx")
    assert verify(for_host, "--host", "device", "--host-python", sys.executable) == ExitStatus.BUDGET_MISSED
    assert manifests.read(for_host).measured == before.measured


def test_what_was_measured_on_a_device_is_not_overwritten_by_another_machine(
    for_host: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = manifests.read(for_host)
    pi = manifest.environment.model_copy(update={"cpu": "Cortex-A76", "flags": ("asimd",)})
    on_host = manifest.runtime.model_copy(update={"on_host": True})
    for changed in ({"target": "raspberry-pi-5"}, {"environment": pi, "runtime": on_host}):
        manifests.write(manifest.model_copy(update=changed), for_host)
        assert verify(for_host) == ExitStatus.USER_ERROR
        error = capsys.readouterr().err
        assert "which this machine is not" in error
        assert "--host user@device" in error
    # on the device itself it is measured again
    manifests.write(manifest.model_copy(update={"runtime": on_host}), for_host)
    assert verify(for_host) == ExitStatus.OK
    assert not manifests.read(for_host).runtime.on_host


# -- by another provider -------------------------------------------------------------------------------------


@pytest.mark.skipif(not OPENVINO.exists(), reason="`make openvino` makes its environment")
def test_openvino_runs_an_artifact_whole(for_host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = manifests.read(for_host)
    arguments = ("--provider", "openvino", "--host-python", str(OPENVINO))
    # no layer says what it computes in there, and no system what memory it takes
    assert verify(for_host, *arguments) == ExitStatus.UNVERIFIED
    after = manifests.read(for_host)
    assert (after.runtime.name, after.runtime.provider) == ("onnxruntime", "openvino")
    assert after.runtime.version == after.environment.packages["OpenVINOExecutionProvider"] == "1.24.1"
    assert after.measured.accuracy == pytest.approx(before.measured.accuracy, abs=1.0)
    assert after.baseline.accuracy == pytest.approx(before.baseline.accuracy, abs=0.5)
    assert (after.environment.clock, after.measured.memory_bytes) == ("wall", None)
    assert {layer.runs_as for layer in after.layers} == {None}
    assert any("OpenVINOExecutionProvider of ONNX Runtime 1.24.1" in note for note in after.notes_on_measurement)
    shown = capsys.readouterr().out
    assert "peak memory" in shown
    assert "cannot be read" in shown
    assert verify(for_host, *arguments, "--allow-estimates") == ExitStatus.OK
    assert verify(for_host) == ExitStatus.USER_ERROR
    assert "--provider openvino" in capsys.readouterr().err


def test_tensorrt_is_told_which_batches_come_and_to_keep_its_engines(for_rtx: Path, tmp_path: Path) -> None:
    python = python_with(tmp_path, "TensorrtExecutionProvider")
    before = manifests.read(for_rtx)
    assert verify(for_rtx, "--provider", "tensorrt", "--host-python", str(python)) == ExitStatus.UNVERIFIED
    after = manifests.read(for_rtx)
    basis = after.measured.basis
    assert {basis.size, basis.accuracy, basis.latency} == {"measured"}
    assert after.artifact == before.artifact
    assert after.baseline_fp16 is not None
    assert after.baseline_fp16.latency_ms != before.baseline_fp16.latency_ms  # type: ignore[union-attr]
    (smallest, *files) = asked(tmp_path)
    assert smallest[:2] == ("TensorrtExecutionProvider", {})
    (_, options, name) = files[0]
    assert options == {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": f"../{name}",
        "trt_profile_min_shapes": "input:1x1x8x8",
        "trt_profile_opt_shapes": "input:1x1x8x8",
        "trt_profile_max_shapes": "input:64x1x8x8",
    }
    assert {each[1]["trt_engine_cache_path"] for each in files} == {f"../{each[2]}" for each in files}
    assert len({each[2] for each in files}) == 3, "a file is known by its bytes"
    # three files side by side; one on the search split, and all three on the test split
    assert len(files) == 3 + 1 + 3


def test_tensorrt_rtx_comes_as_a_package_of_its_own(
    for_rtx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = providers.PROVIDERS["tensorrt-rtx"].package
    python = python_with(tmp_path, plugin=package)
    gpu(tmp_path, monkeypatch, "NVIDIA GeForce RTX 4060", "8.9")
    assert verify(for_rtx, "--provider", "tensorrt-rtx", "--host-python", str(python)) == ExitStatus.UNVERIFIED
    after = manifests.read(for_rtx)
    assert after.environment.cpu == "NVIDIA GeForce RTX 4060"
    assert after.environment.packages["driver"] == "550.54"
    assert after.environment.packages["NvTensorRTRTXExecutionProvider"] == "0.5.0"
    (called, options, name) = asked(tmp_path)[-1]
    assert called == "NvTensorRTRTXExecutionProvider"
    assert options["nv_profile_max_shapes"] == "input:64x1x8x8"
    assert options["nv_runtime_cache_path"] == f"../{name}"


def test_a_cpus_provider_has_its_threads_and_no_gpu(
    for_host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = python_with(tmp_path, "OpenVINOExecutionProvider")
    gpu(tmp_path, monkeypatch, "NVIDIA GeForce RTX 4060", "8.9")
    before = manifests.read(for_host)
    monkeypatch.chdir(tmp_path)
    arguments = ("--provider", "openvino", "--host-python", f".{os.sep}{python.name}")  # from where the user is
    for _ in range(2):
        assert verify(for_host, *arguments) == ExitStatus.UNVERIFIED
    after = manifests.read(for_host)
    assert after.environment.cpu == before.environment.cpu
    assert "driver" not in after.environment.packages
    assert {options.get("num_of_threads") for _, options, _ in asked(tmp_path)[1:]} == {"1", None}
    assert len(after.notes_on_measurement) == 1, "notes of the measurement before are gone"
    manifests.write(after.model_copy(update={"target": "raspberry-pi-5"}), for_host)
    assert verify(for_host, *arguments) == ExitStatus.USER_ERROR
    assert "and raspberry-pi-5 asimd" in capsys.readouterr().err


def test_a_provider_runs_on_a_device_as_well(device: Device, for_rtx: Path, tmp_path: Path) -> None:
    python = python_with(tmp_path, "CUDAExecutionProvider")
    status = verify(for_rtx, "--host", "device", "--provider", "cuda", "--host-python", str(python))
    assert status == ExitStatus.UNVERIFIED
    assert manifests.read(for_rtx).runtime.provider == "cuda"
    assert {name for name, _, _ in asked(tmp_path)} == {"CUDAExecutionProvider"}


def gpu(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, compute_capability: str) -> None:
    """What nvidia-smi says."""
    command = folder / "bin" / "nvidia-smi"
    command.parent.mkdir(exist_ok=True)
    command.write_text(NVIDIA_SMI.format(name=name, compute_capability=compute_capability))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=":")


def test_another_gpu_than_the_target_is_refused(
    for_rtx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = python_with(tmp_path, "CUDAExecutionProvider")
    gpu(tmp_path, monkeypatch, "NVIDIA GeForce RTX 3060", "8.6")
    assert verify(for_rtx, "--provider", "cuda", "--host-python", str(python)) == ExitStatus.USER_ERROR
    assert "has a GPU of compute capability 8.6, and rtx-ada is one of 8.9" in capsys.readouterr().err


def test_a_provider_for_another_kind_of_device_is_refused(
    for_rtx: Path, for_host: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = python_with(tmp_path, "CUDAExecutionProvider", "OpenVINOExecutionProvider")
    for artifact, name in ((for_rtx, "openvino"), (for_host, "cuda")):
        assert verify(artifact, "--provider", name, "--host-python", str(python)) == ExitStatus.USER_ERROR
        assert f"the provider {name} is for another device" in capsys.readouterr().err


ANSI_LINE = (
    "\x1b[1;31m2026-11-30 [E:onnxruntime:Default, provider_bridge_ort.cc:2458 operator()] /src/provider.cc:2043 Get() "
    "[ONNXRuntimeError] : 1 : FAIL : Failed to load library /lib/libonnxruntime_providers_cuda.so with error: "
    "libcublasLt.so.13: cannot open shared object file: No such file or directory\n\x1b[m\n"
)
"""What onnxruntime-gpu 1.31.1 printed on a machine without CUDA."""


@pytest.mark.parametrize(
    ("fault", "message", "fix"),
    [
        (ANSI_LINE, "CUDAExecutionProvider: libcublasLt.so.13: cannot open", "its libraries are not found"),
        ("nothing of note\n", "are assigned to the default CPU EP", "it does not run the whole file"),
    ],
)
def test_why_a_provider_fails_is_one_message(
    fault: str, message: str, fix: str, for_rtx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (for_rtx / "manifest.json").read_bytes()
    python = python_with(tmp_path, "CUDAExecutionProvider", fault=fault)
    assert verify(for_rtx, "--provider", "cuda", "--host-python", str(python)) == ExitStatus.USER_ERROR
    error = capsys.readouterr().err
    assert message in error
    assert fix in error
    assert (for_rtx / "manifest.json").read_bytes() == before


def test_a_runtime_without_the_provider_is_told(for_rtx: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, package in (("cuda", "onnxruntime-gpu"), ("tensorrt-rtx", "onnxruntime-ep-nv-tensorrt-rtx")):
        assert verify(for_rtx, "--provider", name) == ExitStatus.USER_ERROR
        error = capsys.readouterr().err
        assert f"has no {providers.PROVIDERS[name].called}" in error
        assert package in error
    assert verify(for_rtx, "--provider", "cuda", "--host-python", "no-such-python") == ExitStatus.USER_ERROR
    assert "no-such-python cannot be run" in capsys.readouterr().err


def test_an_export_ends_with_its_provider_and_does_not_begin_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_trt_build, "_trt", lambda: None)

    def export(provider: str, out: Path) -> pipeline.Outcome:
        settings = ExportSettings(
            model="in memory",
            data="digits",
            epochs=0,
            out=out,
            target="rtx-ada",
            recipe="compute=int8",
            max_drop=5.0,
            provider=provider,
            host_python=str(python_with(tmp_path, "CUDAExecutionProvider")),
            allow_estimates=True,
        )
        return pipeline.export(settings, model=trained_digit_net(), task=digits())

    with pytest.raises(UserError, match="has no TensorrtExecutionProvider"):
        export("tensorrt", tmp_path / "without")
    assert not (tmp_path / "without").exists()
    outcome = export("cuda", tmp_path / "with")
    assert (outcome.status, outcome.manifest.measured.basis.latency) == (ExitStatus.OK, "measured")
    assert outcome.manifest.runtime.provider == "cuda"


def test_options_of_another_runtime_are_refused(
    for_host: Path, for_rtx: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for artifact, option in ((for_host, "--host-trtexec"), (for_rtx, "--host-python")):
        assert verify(artifact, "--host", "device", option, "command") == ExitStatus.USER_ERROR
        assert f"error: {option.removeprefix('--')} says" in capsys.readouterr().err


def test_what_a_file_does_not_run_on_is_the_models(
    for_host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an input may be called like a parameter of numpy's."""
    with remote.reached(None) as link:
        runner = remote.Runner(link, sys.executable)
        job = {"action": "outputs", "file": "f.onnx", "inputs": "0.npz", "threads": 1, "batch": 64}
        files = {"f.onnx": (for_host / "model.onnx").read_bytes(), "0.npz": packed({"file": np.zeros((1, 3))})}
        with pytest.raises(UserError, match="this machine, ONNX Runtime: ") as failed:
            runner.job(job, files)
    assert "does the model run on every example" in failed.value.fix


# -- what is asked -------------------------------------------------------------------------------------------


def test_every_provider_that_may_be_named_is_there() -> None:
    assert tuple(providers.PROVIDERS) == PROVIDERS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"host_trtexec": "trtexec"}, "no host is given"),
        ({"host": "device", "provider": "cuda", "host_trtexec": "trtexec"}, "provider cuda takes its place"),
        ({"host_python": "python3"}, "neither host nor provider is given"),
        ({"provider": "tensorrt-rxt"}, "which does not exist"),
    ],
)
def test_options_that_would_do_nothing_are_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Elsewhere(**given)
    with pytest.raises(UserError, match=message):
        ExportSettings(model="m", data="d", target="t", **given)  # type: ignore[arg-type]


def test_the_python_is_the_devices_or_the_one_that_runs_this() -> None:
    assert Elsewhere(host="device").python == "python3"
    assert Elsewhere(provider="openvino").python == sys.executable
    assert Elsewhere(host="device", host_python="venv/bin/python").python == "venv/bin/python"
    assert not Elsewhere()
