"""An artifact measured on the device that runs it: engines built there by trtexec, timed, scored and read back.

Nothing but TensorRT's own program, a shell and tar is needed on the device.  The artifact's file becomes an engine, and
beside it the original's in fp32 and in fp16, since INT8 has to beat both.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters import _trt_exec as trtexec_of
from hirelc_deploy.exporters._trt_build import LARGEST_BATCH
from hirelc_deploy.exporters._trt_exec import JETPACK, Times
from hirelc_deploy.rundir import write_atomic
from hirelc_deploy.verify import accuracy
from hirelc_deploy.verify.machines import numbers_of
from hirelc_deploy.verify.manifest import Baseline, Environment, Measured, MeasuredBasis, Percentiles, sha256
from hirelc_deploy.verify.measure import BASELINE_FILE, BASELINE_FP16_FILE, Measurement, OnDevice, example, together
from hirelc_deploy.verify.power import Power, drawn, watched

if TYPE_CHECKING:
    from hirelc_deploy.exporters._base import Arrays
    from hirelc_deploy.task import Task
    from hirelc_deploy.verify.remote import Link

ENGINE_FILE = "model.engine"

FIRST_VERSION = "10.0"
"""Of TensorRT: earlier ones build no strongly typed engines."""

ARTIFACT, BASELINE, HALVES = "artifact", "baseline", "baseline_fp16"


@dataclass(frozen=True)
class _Built:
    size_bytes: int
    version: str
    times: Times
    layers: str
    """As trtexec wrote them."""
    power: Power | None
    """While it was timed; None where the device does not tell."""
    inferences_per_s: float | None

    @property
    def latency_ms(self) -> Percentiles:
        p50, p90, p99 = np.percentile(self.times.end_to_end_ms, (50, 90, 99)).tolist()
        return Percentiles(p50=p50, p90=p90, p99=p99)

    @property
    def energy_mj(self) -> float | None:
        """Of one inference."""
        if self.power is None or self.inferences_per_s is None:
            return None
        return 1000 * self.power.watts / self.inferences_per_s


class Board:
    """A device with TensorRT."""

    def __init__(self, link: "Link", trtexec: str) -> None:
        """Raises UserError if there is no trtexec on it."""
        self.link = link
        find = f"{{ command -v {shlex.quote(trtexec)} || ls {JETPACK}; }} > trtexec 2>/dev/null"
        ask = (
            "nvpmodel -q > power 2>/dev/null; jetson_clocks --show > clocks 2>/dev/null; "
            "cat /proc/device-tree/model > board 2>/dev/null; nproc > cores 2>/dev/null; true"
        )
        said = {
            name: data.decode(errors="replace").strip("\0 \n") for name, data in link.job(f"{find}; {ask}", {}).items()
        }
        if not said["trtexec"]:
            raise UserError(
                f"{link.host} has no {trtexec}",
                fix=f"name it with --host-trtexec, or install TensorRT's (JetPack has it as {JETPACK})",
            )
        self.trtexec = said["trtexec"].splitlines()[0]
        self.name = said["board"] or "a device with TensorRT"
        self.cores = int(said["cores"] or 1)
        self.power_mode = " ".join(said["power"].split()) or None
        self.clocks = " ".join(said["clocks"].split()) or None

    def build(self, name: str, file: Path, shapes: trtexec_of.Shapes, *, batch: int) -> tuple[_Built, bytes]:
        """Build a file's engine and time it; it stays on the device under this name.  The engine is given as well.

        Raises UserError in our words, where they are known, if the device refuses.
        """
        engine = f"../{name}.engine"
        make = trtexec_of.build_command(self.trtexec, file.name, engine, shapes, batch=batch)
        time = trtexec_of.time_command(
            self.trtexec, engine, shapes, batch=batch, times="times.json", layers="layers.json"
        )
        back = self._checked(
            f"{make} > log 2>&1 && {watched(f'{time} >> log 2>&1', 'power')} && cp {engine} engine",
            {file.name: file.read_bytes()},
            also=f"rm -f {shlex.quote(file.name)}",
        )
        log = back["log"].decode(errors="replace")
        built = _Built(
            len(back["engine"]),
            trtexec_of.version_of(log),
            trtexec_of.times_of(back["times.json"].decode()),
            back["layers.json"].decode(),
            drawn(back["power"].decode(errors="replace"), trtexec_of.SECONDS),
            trtexec_of.inferences_per_s(log),
        )
        return built, back["engine"]

    def run(self, name: str, inputs: "Arrays") -> dict[str, np.ndarray]:
        """The outputs of an engine that was built, on any number of examples."""
        examples = len(next(iter(inputs.values())))
        shapes = {key: array.shape[1:] for key, array in inputs.items()}
        commands: list[str] = []
        files: dict[str, bytes] = {}
        for start in range(0, examples, LARGEST_BATCH):
            part = {key: np.ascontiguousarray(array[start : start + LARGEST_BATCH]) for key, array in inputs.items()}
            names = {key: f"{start}-{number}.bin" for number, key in enumerate(part)}
            files |= {names[key]: array.tobytes() for key, array in part.items()}
            batch = len(next(iter(part.values())))
            commands.append(
                trtexec_of.run_command(
                    self.trtexec, f"../{name}.engine", shapes, batch=batch, inputs=names, out=f"{start}.json"
                )
            )
        whole = " && ".join(f"{command} >> log 2>&1" for command in commands)
        back = self._checked(whole, files, also="rm -f *.bin")
        parts = [trtexec_of.outputs_of(back[f"{start}.json"].decode()) for start in range(0, examples, LARGEST_BATCH)]
        return {output: np.concatenate([part[output] for part in parts]) for output in parts[0]}

    def _checked(self, command: str, files: Mapping[str, bytes], also: str = "true") -> dict[str, bytes]:
        """What a command leaves once `also` has been done; raises UserError with what trtexec said if it fails."""
        back = self.link.job(f"{{ {{ {command}; }}; echo $? > status; {also}; }}", files)
        if back["status"].strip() != b"0":
            what, fix = trtexec_of.failure_of(back.get("log", b"").decode(errors="replace"))
            raise UserError(f"trtexec on {self.link.host} failed: {what}", fix=fix)
        return back


@dataclass(frozen=True)
class _Session:
    board: Board
    name: str

    def run(self, inputs: "Arrays") -> dict[str, np.ndarray]:
        return self.board.run(self.name, inputs)


def measure_on(
    board: Board,
    folder: Path,
    file: str,
    tensors: Mapping[str, str],
    task: "Task",
    *,
    min_version: str,
    batch: int,
    seed: int,
) -> OnDevice:
    """Build, time and score `file` and the baseline of `folder` on a device; its engine is written beside them.

    Raises UserError if the device's TensorRT is older than `min_version`, or refuses a file.
    """
    shapes = {name: array.shape[1:] for name, array in example(task, batch).items()}
    built, engine = {}, {}
    files = {ARTIFACT: file, BASELINE: BASELINE_FILE, HALVES: BASELINE_FP16_FILE}
    for name, source in files.items():
        built[name], engine[name] = board.build(name, folder / source, shapes, batch=batch)
        if numbers_of(built[name].version) < numbers_of(min_version):
            raise UserError(
                f"{board.link.host} has TensorRT {built[name].version}, and the target begins with {min_version}",
                fix="install a newer JetPack there, or lower runtime.min_version in a target of your own",
            )
    sessions = {name: _Session(board, name) for name in built}
    searched, search_targets = accuracy.outputs(sessions[ARTIFACT], together(task.search))
    outputs, targets = accuracy.side_by_side(sessions, together(task.test))
    compared = accuracy.compare(task, outputs[BASELINE], outputs[ARTIFACT], targets, seed)
    latencies = {name: each.latency_ms for name, each in built.items()}
    gpu_ms = {name: float(np.median(each.times.gpu_ms)) for name, each in built.items()}
    artifact, baseline = built[ARTIFACT], built[BASELINE]
    seen = Measurement(
        baseline=Baseline(
            size_bytes=baseline.size_bytes,
            accuracy=compared.before,
            latency_ms=latencies[BASELINE],
            energy_mj=baseline.energy_mj,
            sha256=sha256(folder / BASELINE_FILE),
        ),
        baseline_fp16=Baseline(
            size_bytes=built[HALVES].size_bytes,
            accuracy=accuracy.score_of(task, "fp16", outputs[HALVES], targets),
            latency_ms=latencies[HALVES],
            energy_mj=built[HALVES].energy_mj,
            sha256=sha256(folder / BASELINE_FP16_FILE),
        ),
        measured=Measured(
            size_bytes=artifact.size_bytes,
            accuracy=compared.after,
            accuracy_search=accuracy.score_of(task, "compressed", searched, search_targets),
            latency_ms=latencies[ARTIFACT],
            compression=baseline.size_bytes / artifact.size_bytes,
            speedup=latencies[BASELINE].p50 / latencies[ARTIFACT].p50,
            drop_points=compared.drop,
            drop_ci95=compared.drop_ci95,
            agreement=compared.agreement,
            energy_mj=artifact.energy_mj,
            basis=MeasuredBasis(size="measured", accuracy="measured", latency="measured"),
        ),
        runs_as=trtexec_of.runs_as(artifact.layers, onnx.load(folder / file), tensors),
        clock="wall",
        p50_ms=latencies[ARTIFACT].p50,
    )
    # only now: an engine that was measured before is the artifact until this one is
    write_atomic(folder / ENGINE_FILE, engine[ARTIFACT])
    return OnDevice(
        seen=seen,
        environment=Environment(
            cpu=board.name,
            flags=(),
            cores=board.cores,
            threads=1,
            batch=batch,
            clock="wall",
            power_mode=board.power_mode,
            packages={"tensorrt": artifact.version},
        ),
        version=artifact.version,
        notes=(
            f"measured on {board.name} with TensorRT {artifact.version}; the GPU alone takes "
            f"{gpu_ms[ARTIFACT]:.3g} ms, {gpu_ms[HALVES]:.3g} ms in fp16 and {gpu_ms[BASELINE]:.3g} ms in fp32 "
            "(medians, CUDA graph)",
            *([f"clocks: {board.clocks}"] if board.clocks else []),
            *([_note_on(artifact.power)] if artifact.power else []),
        ),
    )


def _note_on(power: Power) -> str:
    return f"energy: the board draws {power.watts:.3g} W while the engine is timed ({' + '.join(power.rails)})"
