"""The path of a model, from a checkpoint to a judged artifact (DESIGN: the path of a model)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hirelc_deploy import (
    __version__,
    checkpoint,
    choosing,
    console,
    datasets,
    demo as demonstration,
    graph,
    kernels,
    report as reports,
)
from hirelc_deploy.alternatives import predicted, write_front
from hirelc_deploy.budget import Budget, Check
from hirelc_deploy.compress.distil import FineTuning
from hirelc_deploy.compress.posttraining import PostTraining
from hirelc_deploy.config import TRTEXEC, ExportSettings
from hirelc_deploy.errors import ExitStatus, UserError
from hirelc_deploy.exporters import load_runtime
from hirelc_deploy.identity import fingerprint
from hirelc_deploy.policy import Policy
from hirelc_deploy.pool import Engine, Pool, in_turn
from hirelc_deploy.profiles import Target, load_target, target_names
from hirelc_deploy.rundir import RunFolder, write_atomic
from hirelc_deploy.search.recipe import Recipe
from hirelc_deploy.task import check_labels
from hirelc_deploy.verify import engines, judge, manifest as manifests, remote
from hirelc_deploy.verify.accuracy import Outputs
from hirelc_deploy.verify.environment import environment
from hirelc_deploy.verify.layers import layer_records
from hirelc_deploy.verify.manifest import Artifact, Manifest, PredictionError
from hirelc_deploy.verify.measure import BASELINE_FILE, BASELINE_FP16_FILE, Measurement, foretold, measure
from hirelc_deploy.workbench import Workbench

if TYPE_CHECKING:
    from torch import nn

    from hirelc_deploy.checkpoint import Checkpoint
    from hirelc_deploy.graph.model_graph import ModelGraph
    from hirelc_deploy.task import Task

POLICY_FILE = "policy.json"
FRONT_FOLDER = "front"
RUN_FOLDER = "run"


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    folder: Path
    manifest: Manifest
    status: ExitStatus


def export(settings: ExportSettings, *, model: "nn.Module | None" = None, task: "Task | None" = None) -> Outcome:
    """Compress a model for its target, write the artifact into `settings.out`, measure it and judge it.

    `model` and `task` are taken instead of what `settings.model` and `settings.data` name, which then are only
    their names in the manifest.  Raises UserError for whatever the user can mend; what was computed until then
    stays in the run folder.
    """
    budget = budget_of(settings)
    asked_for = choosing.asked_for(settings)
    if settings.host is not None:
        _check_host(settings.target, settings.host)
    with opened(settings, asked_for, model=model, task=task) as (bench, trained, given):
        run, task, target, network = bench.run, bench.task, bench.target, bench.graph
        choice = choosing.choose(settings, budget, bench, asked_for, given)
        seconds = run.step("seconds of search", lambda: run.seconds)
        policy = choice.best.policy

        compressed = bench.compressed(policy)
        written = bench.write(compressed.model, policy, compressed.grids)
        exported = written.file
        file = f"model{bench.runtime.suffix}"
        _write(settings.out, {file: exported.data, BASELINE_FILE: bench.write_baseline().data})
        halves = bench.write_halves()
        if halves is not None:
            _write(settings.out, {BASELINE_FP16_FILE: halves.data})
        _write(settings.out, {POLICY_FILE: policy.to_json()})
        others = write_front(settings.out / FRONT_FOLDER, choice)
        inspected = bench.runtime.inspect(settings.out / file, target, exported.tensors)
        seen = _measured(
            run,
            settings,
            bench,
            policy,
            file,
            exported.tensors,
            None if halves is None else BASELINE_FP16_FILE,
            lambda: bench.simulated_outputs(compressed.model, policy),
        )
        if bench.pricing.is_device:
            run.step(f"learned/{policy.digest()}", lambda: bench.learn(policy, seen.p50_ms))
        else:
            seen = bench.as_foretold(seen, policy)

        manifest = Manifest(
            schema=manifests.SCHEMA,
            tool_version=__version__,
            created=manifests.now(),
            target=target.name,
            runtime=manifests.RuntimeRecord(name=bench.runtime.name, version=bench.runtime.version()),
            model=manifests.ModelRecord(spec=settings.model, checkpoint_sha256=trained.sha256),
            task=_task_record(task, settings.data),
            artifact=Artifact.of(settings.out / file),
            baseline=seen.baseline,
            baseline_fp16=seen.baseline_fp16,
            predicted=predicted(choice),
            measured=seen.measured,
            error=PredictionError.between(predicted(choice), seen.measured, agreement=seen.simulated_agreement),
            layers=layer_records(network, policy, exported, seen.runs_as),
            search=manifests.SearchRecord(
                method=choosing.told(settings, budget),
                evaluations=len(choice.evaluations),
                seconds=seconds,
                seed=settings.seed,
                order=policy.order,
                front=others,
            ),
            budget=budget,
            checks=(),
            verdict="unverified",
            environment=environment(threads=settings.threads, batch=settings.batch, clock=seen.clock),
            notes=(
                *(f"{left.name}: {left.reason}" for left in network.left_out),
                *([written.note] if written.note else []),
                *inspected,
                *bench.notes_on_latency(policy),
                *bench.notes_on_rounding(policy),
            ),
        )
        outcome = _judged(settings.out, manifest, allow_estimates=settings.allow_estimates)
    if settings.host is None:
        return outcome
    return verify_on(
        settings.out,
        settings.host,
        trtexec=settings.host_trtexec,
        allow_estimates=settings.allow_estimates,
        task=task,
        target=target,
    )


def _check_host(spec: str, host: str) -> None:
    """Whether there is something to build there and the device answers: before hours are spent, not after."""
    target = load_target(spec)
    if not load_runtime(target.runtime.name).builds_on_device:
        raise UserError(
            f"a file for {target.name} is measured where this program runs, and --host is for what TensorRT builds on "
            "a device",
            fix="leave --host out; `verify` on the device itself measures the artifact there",
        )
    with remote.linked(host):
        pass


@contextmanager
def opened(
    settings: ExportSettings,
    asked_for: Policy | Recipe | None = None,
    *,
    model: "nn.Module | None" = None,
    task: "Task | None" = None,
) -> "Iterator[tuple[Workbench, Checkpoint, Policy | None]]":
    """Everything that the settings name, loaded and checked, its run folder held: the workbench, the checkpoint, and
    the policy that `asked_for` comes to, None if that has to be searched or measured for."""
    if settings.kernels is not None:
        kernels.add_folder(settings.kernels)
    target = load_target(settings.target)
    task = task or datasets.load_task(settings.data, seed=settings.seed)
    trained = checkpoint.of(model, settings.model) if model else checkpoint.load(settings.model, settings.checkpoint)
    network = graph.trace(trained.model, task.example)
    _check_labels(trained, task)
    # whatever can be refused was refused before a run begins: a mistake, once mended, begins in a clean folder
    given = choosing.given(asked_for, network, target)
    with (
        RunFolder.open(
            settings.out / RUN_FOLDER, fingerprint(settings, target, task, trained, given), settings.resume
        ) as run,
        Pool(settings.workers) if settings.workers > 1 else nullcontext(in_turn) as engine,
    ):
        yield _workbench(settings, target, task, trained, network, run, engine), trained, given


def verify(folder: Path, *, allow_estimates: bool = False, task: "Task | None" = None) -> Outcome:
    """Measure an artifact again on this machine, write the figures into its manifest, and judge it.

    The data is loaded anew by its spec, or is `task`.  Raises UserError if it is not the data of the manifest.
    """
    manifest = manifests.read(folder)
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
    return _judged(folder, again, allow_estimates=allow_estimates)


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
    return _judged(folder, again, allow_estimates=allow_estimates, loaded=loaded)


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


def demo(out: Path, *, resume: bool = False) -> Outcome:
    """Export the network that is installed with this program."""
    return export(
        ExportSettings(
            model=demonstration.MODEL,
            data=demonstration.DATA,
            target="host",
            checkpoint=demonstration.CHECKPOINT,
            evaluations=demonstration.EVALUATIONS,
            epochs=demonstration.EPOCHS,
            max_drop=demonstration.MAX_DROP,
            out=out,
            resume=resume,
        )
    )


def _workbench(
    settings: ExportSettings,
    target: Target,
    task: "Task",
    trained: "Checkpoint",
    network: "ModelGraph",
    run: RunFolder,
    engine: Engine,
) -> Workbench:
    return Workbench(
        trained.model,
        task,
        network,
        target,
        run,
        importance="taylor" if settings.importance == "taylor" else "l2",
        fine_tuning=FineTuning(epochs=settings.epochs, seed=settings.seed),
        post_training=PostTraining() if settings.post_training is None else PostTraining.of(settings.post_training),
        threads=settings.threads,
        batch=settings.batch,
        progress=console.progress,
        target_spec=settings.target,
        engine=engine,
    )


def _measured(
    run: RunFolder,
    settings: ExportSettings,
    bench: Workbench,
    policy: Policy,
    file: str,
    tensors: Mapping[str, str],
    baseline_fp16: str | None,
    simulated: Callable[[], Outputs],
) -> Measurement:
    """Measured once a run: a resumed one does not open the test split again."""
    seen = run.step(
        f"measurement/{policy.digest()}",
        lambda: measure(
            settings.out,
            file,
            tensors,
            bench.task,
            bench.runtime,
            baseline_fp16=baseline_fp16,
            threads=settings.threads,
            batch=settings.batch,
            seed=settings.seed,
            simulated=simulated(),
            seconds=bench.target.timing.min_seconds,
            warmup=bench.target.timing.warmup_rounds,
        ).model_dump(mode="json"),
    )
    return Measurement.model_validate(seen)


def _same_task(manifest: Manifest, task: "Task | None") -> "Task":
    """The data of an artifact, loaded anew by its spec if it is not given.  Raises UserError if it is other data."""
    task = task or datasets.load_task(manifest.task.spec, seed=manifest.search.seed)
    if task.fingerprint() != manifest.task.sha256:
        raise UserError(
            f"{manifest.task.spec} is not the data that this artifact was measured on",
            fix="restore the data, or export again on what there is now",
        )
    return task


def _judged(folder: Path, manifest: Manifest, *, allow_estimates: bool, loaded: Check | None = None) -> Outcome:
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


def _task_record(task: "Task", spec: str) -> manifests.TaskRecord:
    return manifests.TaskRecord(
        spec=spec,
        sha256=task.fingerprint(),
        test_examples=task.test.examples,
        search_seen_in_training=task.search_seen_in_training,
        unit=task.unit,
    )


def budget_of(settings: ExportSettings) -> Budget:
    """The limits that were given."""
    return Budget(
        latency_ms=settings.max_latency_ms,
        speedup=settings.min_speedup,
        size_bytes=settings.max_size_bytes,
        memory_bytes=settings.max_memory_bytes,
        drop=settings.max_drop,
    )


def _check_labels(trained: "Checkpoint", task: "Task") -> None:
    """Labels that the model has no output for would only be noticed in the middle of fine-tuning."""
    with torch.no_grad():
        outputs = graph.forward(trained.model, graph.tensors(task.example, 1))
    name = "logits" if "logits" in outputs else next(iter(outputs))
    if outputs[name].dim() > 1:
        check_labels(task, outputs[name].shape[1])


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        write_atomic(folder / name, data)
