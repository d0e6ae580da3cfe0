"""An artifact measured again, here or on its device, and judged."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hirelc_deploy import datasets, report as reports
from hirelc_deploy.budget import Check
from hirelc_deploy.config import TRTEXEC
from hirelc_deploy.errors import ExitStatus, UserError
from hirelc_deploy.exporters import load_runtime
from hirelc_deploy.profiles import Target, load_target, target_names
from hirelc_deploy.verify import engines, judge, manifest as manifests, remote
from hirelc_deploy.verify.environment import environment
from hirelc_deploy.verify.manifest import Artifact, Manifest, PredictionError
from hirelc_deploy.verify.measure import BASELINE_FP16_FILE, Measurement, foretold, measure

if TYPE_CHECKING:
    from hirelc_deploy.task import Task


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    folder: Path
    manifest: Manifest
    status: ExitStatus


def verify(folder: Path, *, allow_estimates: bool = False, task: "Task | None" = None) -> Outcome:
    """Measure an artifact again on this machine, write the figures into its manifest, and judge it.

    A file that is not the one of the manifest is not measured: the artifact fails, and keeps its figures.

    The data is loaded anew by its spec, or is `task`.  Raises UserError if it is not the data of the manifest.
    """
    manifest = manifests.read(folder)
    if any(check.ok is False for check in judge.unchanged(folder, manifest.artifact)):
        # figures of another file would be no figures of this artifact
        return judged(folder, manifest, allow_estimates=allow_estimates)
    task, runtime = _same_task(manifest, task), load_runtime(manifest.runtime.name)
    seen = measure(
        folder,
        manifest.artifact.path,
        {layer.name: layer.tensor for layer in manifest.layers if layer.tensor is not None},
        task,
        runtime,
        baseline_fp16=BASELINE_FP16_FILE if manifest.baseline_fp16 else None,
        threads=manifest.environment.threads,
        batch=manifest.environment.batch,
        seed=manifest.search.seed,
    )
    if manifest.measured.basis.latency == "estimate" and manifest.measured.latency_ms and manifest.baseline.latency_ms:
        # this machine is still not the device
        seen = foretold(
            seen,
            manifest.baseline.latency_ms.p50,
            manifest.measured.latency_ms.p50,
            halves_ms=manifests.p50(manifest.baseline_fp16.latency_ms) if manifest.baseline_fp16 else None,
            is_final=not runtime.builds_on_device,
        )
    where = environment(threads=manifest.environment.threads, batch=manifest.environment.batch, clock=seen.clock)
    again = _with(manifest, seen, runtime.version(), where, baseline_fp16=seen.baseline_fp16)
    return judged(folder, again, allow_estimates=allow_estimates)


def verify_on(
    folder: Path,
    host: str,
    *,
    trtexec: str = TRTEXEC,
    allow_estimates: bool = False,
    task: "Task | None" = None,
    target: Target | None = None,
) -> Outcome:
    """Build an artifact's engine on a device that `ssh` reaches, measure it there, and judge it.

    The engine takes the file's place as the artifact.  `target` is that of the export, where it is at hand: a user's
    own is a file that the manifest does not name.  Raises UserError if the device cannot be reached, refuses the
    file, or has another TensorRT than the target, and as `verify`.
    """
    manifest = manifests.read(folder)
    runtime = load_runtime(manifest.runtime.name)
    if not runtime.builds_on_device:
        raise UserError(
            f"{manifest.artifact.path} is a file of {runtime.name}, which is measured where this program runs",
            fix="run `verify` on the device itself; --host is for what TensorRT builds there",
        )
    task = _same_task(manifest, task)
    tensors = {layer.name: layer.tensor for layer in manifest.layers if layer.tensor is not None}
    if target is None and manifest.target in target_names():
        target = load_target(manifest.target)
    with remote.linked(host) as link:
        found = engines.measure_on(
            engines.Board(link, trtexec),
            folder,
            f"model{runtime.suffix}",
            tensors,
            task,
            min_version=engines.FIRST_VERSION if target is None else target.runtime.min_version,
            batch=manifest.environment.batch,
            seed=manifest.search.seed,
        )
    again = _with(
        manifest,
        found.seen,
        found.version,
        found.environment,
        found.notes,
        baseline_fp16=found.baseline_fp16,
        artifact=Artifact.of(folder / engines.ENGINE_FILE),
    )
    loaded = Check(judge.LOADS, None, f"built and run by TensorRT {found.version}", True)
    return judged(folder, again, allow_estimates=allow_estimates, loaded=loaded)


def _with(
    manifest: Manifest,
    seen: Measurement,
    version: str,
    where: manifests.Environment,
    notes: Iterable[str] = (),
    **changed: Any,
) -> Manifest:
    """A manifest with what was measured anew, by this version of its runtime; what it warned of before is left out."""
    outdated = judge.warnings(manifest.budget, manifest.measured, manifest.baseline_fp16)
    return manifest.model_copy(
        update={
            "created": manifests.now(),
            "runtime": manifests.RuntimeRecord(name=manifest.runtime.name, version=version),
            "baseline": seen.baseline,
            "measured": seen.measured,
            "error": PredictionError.between(manifest.predicted, seen.measured, agreement=manifest.error.agreement),
            "layers": tuple(
                layer.model_copy(update={"runs_as": seen.runs_as.get(layer.name)}) for layer in manifest.layers
            ),
            "environment": where,
            "notes": (*(note for note in manifest.notes if note not in outdated), *notes),
            **changed,
        }
    )


def _same_task(manifest: Manifest, task: "Task | None") -> "Task":
    """The data of an artifact, loaded anew by its spec if it is not given.  Raises UserError if it is other data."""
    task = task or datasets.load_task(manifest.task.spec, seed=manifest.search.seed)
    if task.fingerprint() != manifest.task.sha256:
        raise UserError(
            f"{manifest.task.spec} is not the data that this artifact was measured on",
            fix="restore the data, or export again on what there is now",
        )
    return task


def judged(folder: Path, manifest: Manifest, *, allow_estimates: bool, loaded: Check | None = None) -> Outcome:
    """Judge, and write manifest and report; `loaded` says whether the file loads where that was seen on a device."""
    runtime = load_runtime(manifest.runtime.name)
    if loaded is None:
        loaded = judge.loads(runtime, folder / manifest.artifact.path, threads=manifest.environment.threads)
    verdict = judge.judge(
        manifest.budget,
        manifest.measured,
        manifest.layers,
        of_the_file=(loaded, *judge.unchanged(folder, manifest.artifact)),
        allow_estimates=allow_estimates,
    )
    judged = manifest.model_copy(
        update={
            "checks": verdict.checks,
            "verdict": verdict.word,
            "notes": (*manifest.notes, *judge.warnings(manifest.budget, manifest.measured, manifest.baseline_fp16)),
        }
    )
    manifests.write(judged, folder)
    reports.write(judged, folder)
    return Outcome(folder, judged, verdict.status)
