"""An artifact measured again, here or on its device, and judged."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hirelc_deploy import datasets, report as reports
from hirelc_deploy.augment import augmented
from hirelc_deploy.budget import Check
from hirelc_deploy.config import TRTEXEC, Elsewhere
from hirelc_deploy.cpu import cpu_flags, relevant_flags, stands_for
from hirelc_deploy.errors import ExitStatus, UserError
from hirelc_deploy.exporters import load_runtime
from hirelc_deploy.profiles import Target, load_target, target_names
from hirelc_deploy.verify import engines, judge, manifest as manifests, ort_device, remote
from hirelc_deploy.verify.environment import cpu_model, environment
from hirelc_deploy.verify.manifest import Artifact, Manifest, PredictionError
from hirelc_deploy.verify.measure import BASELINE_FILE, BASELINE_FP16_FILE, InProcess, OnDevice, foretold, measure
from hirelc_deploy.verify.providers import PROVIDERS, Provider

if TYPE_CHECKING:
    from hirelc_deploy.task import Task


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    folder: Path
    manifest: Manifest
    status: ExitStatus


def verify(
    folder: Path, *, allow_estimates: bool = False, data: str | None = None, task: "Task | None" = None
) -> Outcome:
    """Measure an artifact again on this machine, write the figures into its manifest, and judge it.

    A file that is not the one of the manifest is not measured: the artifact fails, and keeps its figures.

    The data is loaded anew by its spec, or by `data` where it lies elsewhere by now, or is `task`.  Raises UserError if
    it is not the data of the manifest, or if what the artifact is measured beside is another file than it was.
    """
    manifest = manifests.read(folder)
    if any(check.ok is False for check in judge.unchanged(folder, manifest.artifact)):
        # figures of another file would be no figures of this artifact
        return judged(folder, manifest, allow_estimates=allow_estimates)
    _can_be_measured_here(manifest)
    _check_baselines(folder, manifest)
    task, runtime = _same_task(manifest, task, data), load_runtime(manifest.runtime.name)
    seen = measure(
        folder,
        manifest.artifact.path,
        _tensors(manifest),
        task,
        InProcess(runtime, manifest.environment.threads),
        baseline_fp16=BASELINE_FP16_FILE if manifest.baseline_fp16 else None,
        batch=manifest.environment.batch,
        seed=manifest.search.seed,
    )
    is_foretold = manifest.measured.basis.latency == "estimate" and not _is_the_target(manifest)
    if is_foretold and manifest.measured.latency_ms and manifest.baseline.latency_ms:
        seen = foretold(
            seen,
            manifest.baseline.latency_ms.p50,
            manifest.measured.latency_ms.p50,
            halves_ms=manifests.p50(manifest.baseline_fp16.latency_ms) if manifest.baseline_fp16 else None,
            is_final=not runtime.builds_on_device,
        )
    where = environment(threads=manifest.environment.threads, batch=manifest.environment.batch, clock=seen.clock)
    found = OnDevice(seen, where, runtime.version(), manifest.notes_on_measurement)
    again = _with(manifest, found, Elsewhere())
    return judged(folder, again, allow_estimates=allow_estimates)


def verify_elsewhere(
    folder: Path,
    elsewhere: Elsewhere,
    *,
    allow_estimates: bool = False,
    data: str | None = None,
    task: "Task | None" = None,
    target: Target | None = None,
) -> Outcome:
    """Measure an artifact on a device that `ssh` reaches, or by another provider of ONNX Runtime, and judge it.

    For TensorRT without a provider an engine is built on the device, and takes the file's place as the artifact.
    `target` is that of the export, where it is at hand: a user's own is a file that the manifest does not name.  Raises
    UserError if the device cannot be reached, refuses the file, or is not the target, and as `verify`.
    """
    manifest = manifests.read(folder)
    if target is None and manifest.target in target_names():
        target = load_target(manifest.target)
    builds = _builds(manifest.runtime.name, elsewhere)
    file = manifest.built_from or manifest.artifact
    if any(check.ok is False for check in judge.unchanged(folder, file)):
        return judged(folder, manifest, allow_estimates=allow_estimates)
    _check_baselines(folder, manifest)
    task = _same_task(manifest, task, data)
    if builds:
        found = _by_trtexec(folder, file.path, manifest, elsewhere, task, target)
        again = _with(manifest, found, elsewhere, artifact=Artifact.of(folder / engines.ENGINE_FILE), built_from=file)
        loaded = f"built and run by TensorRT {found.version}"
    else:
        found = _by_onnxruntime(folder, file.path, manifest, elsewhere, task, target)
        again = _with(manifest, found, elsewhere, artifact=file, built_from=None)
        loaded = f"loaded by onnxruntime {found.version}"
    return judged(folder, again, allow_estimates=allow_estimates, loaded=Check(judge.LOADS, None, loaded, True))


def check_elsewhere(target: Target, elsewhere: Elsewhere) -> None:
    """Whether a device answers and has what is needed, before hours are spent and not after.

    Raises UserError where it does not.
    """
    if _builds(target.runtime.name, elsewhere):
        with remote.linked(_host_of(elsewhere)) as link:
            engines.Board(link, elsewhere.host_trtexec or TRTEXEC)
        return
    with remote.reached(elsewhere.host) as link:
        ort_device.check(remote.Runner(link, elsewhere.python, _provider_of(elsewhere)), target)


def _builds(runtime: str, elsewhere: Elsewhere) -> bool:
    """Whether an engine is built by TensorRT's own program.  Raises UserError for options that would do nothing."""
    if load_runtime(runtime).builds_on_device and elsewhere.provider is None:
        if elsewhere.host_python is not None:
            raise UserError(
                "host-python says what runs ONNX Runtime, and the engine is built and run by trtexec",
                fix="leave it out, or give provider as well",
            )
        return True
    if elsewhere.host_trtexec is not None:
        raise UserError(
            f"host-trtexec says what builds engines, and the file is one of {runtime}", fix="leave host-trtexec out"
        )
    return False


def _by_trtexec(
    folder: Path, file: str, manifest: Manifest, elsewhere: Elsewhere, task: "Task", target: Target | None
) -> OnDevice:
    with remote.linked(_host_of(elsewhere)) as link:
        return engines.measure_on(
            engines.Board(link, elsewhere.host_trtexec or TRTEXEC),
            folder,
            file,
            _tensors(manifest),
            task,
            min_version=engines.FIRST_VERSION if target is None else target.runtime.min_version,
            batch=manifest.environment.batch,
            seed=manifest.search.seed,
        )


def _by_onnxruntime(
    folder: Path, file: str, manifest: Manifest, elsewhere: Elsewhere, task: "Task", target: Target | None
) -> OnDevice:
    threads, batch = manifest.environment.threads, manifest.environment.batch
    provider = _provider_of(elsewhere)
    with ort_device.connected(elsewhere.host, elsewhere.python, provider, task, threads=threads, batch=batch) as place:
        if target is not None:
            ort_device.check(place.runner, target)
        seen = measure(
            folder,
            file,
            _tensors(manifest),
            task,
            place,
            baseline_fp16=BASELINE_FP16_FILE if manifest.baseline_fp16 else None,
            batch=batch,
            seed=manifest.search.seed,
        )
        return OnDevice(seen, place.environment(batch=batch), place.runner.version, place.notes())


def _can_be_measured_here(manifest: Manifest) -> None:
    """Raises UserError where an artifact's figures are those of a device, and this machine would put its own there."""
    where = manifest.environment
    if manifest.runtime.provider is not None:
        raise UserError(
            f"its figures were measured on {where.cpu}, by the provider {manifest.runtime.provider}",
            fix=f"measure it so again: --provider {manifest.runtime.provider}, with --host where it was one",
        )
    if manifest.built_from is not None:
        return  # an engine is refused by what would load it
    is_another = manifest.runtime.on_host and (where.cpu, where.flags) != (cpu_model(), relevant_flags())
    if manifest.measured.basis.latency == "measured" and manifest.target in target_names():
        is_another |= not stands_for(cpu_flags(), load_target(manifest.target).flags(cpu_flags()))
    if is_another:
        raise UserError(
            f"its figures were measured on {where.cpu}, which this machine is not",
            fix="measure it there: hirelc-deploy verify DIR --host user@device",
        )


def _is_the_target(manifest: Manifest) -> bool:
    """Whether this machine is the device that the artifact was made for: a processor that is told by its flags.

    A target of the user's own is a file that the manifest does not name.
    """
    if manifest.target not in target_names():
        return False
    target = load_target(manifest.target)
    if target.kind != "cpu" or target.cpu is None:
        return False
    return stands_for(cpu_flags(), target.flags(cpu_flags()))


def _provider_of(elsewhere: Elsewhere) -> Provider | None:
    return None if elsewhere.provider is None else PROVIDERS[elsewhere.provider]


def _host_of(elsewhere: Elsewhere) -> str:
    if elsewhere.host is None:
        raise ValueError("without a host there is no device that builds")
    return elsewhere.host


def _tensors(manifest: Manifest) -> dict[str, str]:
    """Layer -> where its weights lie in the file."""
    return {layer.name: layer.tensor for layer in manifest.layers if layer.tensor is not None}


def _with(manifest: Manifest, found: OnDevice, elsewhere: Elsewhere, **changed: Any) -> Manifest:
    """A manifest with what was measured anew; what it warned of before is left out."""
    seen = found.seen
    outdated = judge.warnings(manifest.budget, manifest.measured, manifest.baseline_fp16)
    return manifest.model_copy(
        update={
            "created": manifests.now(),
            "runtime": manifests.RuntimeRecord(
                name=manifest.runtime.name,
                version=found.version,
                provider=elsewhere.provider,
                on_host=elsewhere.host is not None,
            ),
            "baseline": seen.baseline,
            "baseline_fp16": seen.baseline_fp16,
            "measured": seen.measured,
            "error": PredictionError.between(manifest.predicted, seen.measured, agreement=manifest.error.agreement),
            "layers": tuple(
                layer.model_copy(update={"runs_as": seen.runs_as.get(layer.name)}) for layer in manifest.layers
            ),
            "environment": found.environment,
            "notes": tuple(note for note in manifest.notes if note not in outdated),
            "notes_on_measurement": found.notes,
            **changed,
        }
    )


def _check_baselines(folder: Path, manifest: Manifest) -> None:
    """Raises UserError where the original is not the file that it was: ratios would be those of another network."""
    for baseline, name in ((manifest.baseline, BASELINE_FILE), (manifest.baseline_fp16, BASELINE_FP16_FILE)):
        if baseline is None or baseline.sha256 is None:
            continue
        if manifests.sha256(folder / name) != baseline.sha256:
            raise UserError(
                f"{folder / name} is not the file that this artifact was measured beside",
                fix="restore it, or export again",
            )


def _same_task(manifest: Manifest, task: "Task | None", data: str | None) -> "Task":
    """The data of an artifact, loaded anew if it is not given.  Raises UserError if it is other data."""
    spec = manifest.task.spec if data is None else data
    task = task or datasets.load_task(spec, seed=manifest.search.seed)
    if manifest.training is not None and task.train.augment is None:
        task = augmented(task, manifest.training.augment)  # it is a part of the fingerprint
    if task.fingerprint() != manifest.task.sha256:
        raise UserError(
            f"{spec} is not the data that this artifact was measured on",
            fix="restore the data, say where it is (--data), or export again on what there is now",
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
