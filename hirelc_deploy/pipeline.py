"""The path of a model, from a checkpoint to a judged artifact."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hirelc_deploy import __version__, choosing, console, demo as demonstration
from hirelc_deploy.alternatives import against_recipes, predicted, write_front
from hirelc_deploy.config import POST_TRAINING_STEPS, ExportSettings
from hirelc_deploy.opening import POLICY_FILE, budget_of, opened
from hirelc_deploy.policy import Policy
from hirelc_deploy.profiles import load_target
from hirelc_deploy.rundir import RunFolder, write_atomic
from hirelc_deploy.verification import Outcome, check_elsewhere, judged, verify_elsewhere
from hirelc_deploy.verify import manifest as manifests
from hirelc_deploy.verify.accuracy import Outputs
from hirelc_deploy.verify.environment import environment
from hirelc_deploy.verify.layers import layer_records
from hirelc_deploy.verify.manifest import Artifact, Manifest, PredictionError
from hirelc_deploy.verify.measure import BASELINE_FILE, BASELINE_FP16_FILE, InProcess, Measurement, measure
from hirelc_deploy.workbench import Workbench

if TYPE_CHECKING:
    from torch import nn

    from hirelc_deploy.task import Task

FRONT_FOLDER = "front"


def export(settings: ExportSettings, *, model: "nn.Module | None" = None, task: "Task | None" = None) -> Outcome:
    """Compress a model for its target, write the artifact into `settings.out`, measure it and judge it.

    `model` and `task` are taken instead of what `settings.model` and `settings.data` name, which then are only
    their names in the manifest.  Raises UserError for whatever the user can mend; what was computed until then
    stays in the run folder.
    """
    budget = budget_of(settings)
    asked_for = choosing.asked_for(settings)
    if settings.elsewhere:
        check_elsewhere(load_target(settings.target), settings.elsewhere)
    with opened(settings, asked_for, model=model, task=task) as (bench, trained, given):
        run, task, target, network = bench.run, bench.task, bench.target, bench.graph
        choice = choosing.choose(settings, budget, bench, asked_for, given)
        seconds = run.step("seconds of search", lambda: run.seconds)
        policy = choice.best.policy

        compressed = bench.compressed(policy)
        written = bench.files.write(compressed.model, policy, compressed.grids)
        exported = written.file
        file = f"model{bench.runtime.suffix}"
        _write(settings.out, {file: exported.data, BASELINE_FILE: bench.files.baseline().data})
        halves = bench.files.halves()
        if halves is not None:
            _write(settings.out, {BASELINE_FP16_FILE: halves.data})
        _write(settings.out, {POLICY_FILE: policy.to_json()})
        others = write_front(settings.out / FRONT_FOLDER, choice)
        beside = against_recipes(choice, budget, task.unit)
        if beside is not None:
            console.note(beside)
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
        told = predicted(choice, pace=seen.pace)
        if not bench.pricing.is_device:
            seen = bench.latencies.as_foretold(seen, bench.predict(policy))
        elif seen.is_quiet:
            run.step(f"learned/{policy.digest()}", lambda: bench.latencies.learn(policy, seen.p50_ms))

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
            predicted=told,
            measured=seen.measured,
            error=PredictionError.between(told, seen.measured, agreement=seen.simulated_agreement),
            layers=layer_records(network, policy, exported, seen.runs_as),
            search=manifests.SearchRecord(
                method=choosing.told(settings, budget),
                evaluations=len(choice.evaluations),
                seconds=seconds,
                seed=settings.seed,
                order=policy.order,
                front=others,
            ),
            training=_training_record(settings),
            budget=budget,
            checks=(),
            verdict="unverified",
            environment=environment(threads=settings.threads, batch=settings.batch, clock=seen.clock),
            notes=(
                *([] if beside is None else [beside]),
                *(f"{left.name}: {left.reason}" for left in network.left_out),
                *([written.note] if written.note else []),
                *bench.files.notes_on_rounding(policy),
                *bench.trainer.notes(policy),
                *bench.latencies.notes_on_tables,
            ),
            notes_on_measurement=(*inspected, *bench.latencies.notes(policy)),
        )
        outcome = judged(settings.out, manifest, allow_estimates=settings.allow_estimates)
    if not settings.elsewhere:
        return outcome
    return verify_elsewhere(
        settings.out, settings.elsewhere, allow_estimates=settings.allow_estimates, task=task, target=target
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

    def now() -> dict[str, Any]:
        pace = bench.pricing.pace()
        seen = measure(
            settings.out,
            file,
            tensors,
            bench.task,
            InProcess(
                bench.runtime,
                settings.threads,
                seconds=bench.target.timing.min_seconds,
                warmup=bench.target.timing.warmup_rounds,
            ),
            baseline_fp16=baseline_fp16,
            batch=settings.batch,
            seed=settings.seed,
            simulated=simulated(),
        )
        return seen.model_copy(update={"pace": pace}).model_dump(mode="json")

    return Measurement.model_validate(run.step(f"measurement/{policy.digest()}", now))


def _task_record(task: "Task", spec: str) -> manifests.TaskRecord:
    return manifests.TaskRecord(
        spec=spec,
        sha256=task.fingerprint(),
        test_examples=task.test.examples,
        search_seen_in_training=task.search_seen_in_training,
        unit=task.unit,
    )


def _training_record(settings: ExportSettings) -> manifests.TrainingRecord:
    steps = POST_TRAINING_STEPS if settings.post_training is None else settings.post_training
    return manifests.TrainingRecord(
        epochs=settings.epochs,
        importance=settings.importance,
        augment=settings.augment,
        post_training=() if settings.epochs else steps,
    )


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        write_atomic(folder / name, data)
