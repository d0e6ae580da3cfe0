"""What a command works on, loaded and checked before a run begins."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from hirelc_deploy import checkpoint, choosing, console, datasets, graph, kernels, modelopt
from hirelc_deploy.augment import augmented
from hirelc_deploy.budget import Budget
from hirelc_deploy.compress.distil import FineTuning, loss_of
from hirelc_deploy.compress.importance import Measure
from hirelc_deploy.compress.posttraining import PostTraining
from hirelc_deploy.config import AUTOCAST, MODELOPT, ExportSettings
from hirelc_deploy.errors import UserError
from hirelc_deploy.graph.attention import with_plain_attention
from hirelc_deploy.identity import fingerprint
from hirelc_deploy.policy import Compute, Policy
from hirelc_deploy.pool import Engine, Pool, in_turn
from hirelc_deploy.profiles import Target, load_target
from hirelc_deploy.rundir import RunFolder
from hirelc_deploy.search.recipe import Recipe
from hirelc_deploy.task import EXAMPLE, Classification, check_labels
from hirelc_deploy.verify import manifest as manifests
from hirelc_deploy.workbench import Workbench

if TYPE_CHECKING:
    from torch import nn

    from hirelc_deploy.checkpoint import Checkpoint
    from hirelc_deploy.graph.model_graph import ModelGraph
    from hirelc_deploy.task import Task

RUN_FOLDER = "run"

POLICY_FILE = "policy.json"

EXTREMES = 64
"""Places of an input of integers whose least and greatest values are looked for."""

ARTIFACT_FILES = (manifests.FILE_NAME, POLICY_FILE, "model.onnx")
"""Names that an export writes."""


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
    if _asks_modelopt(settings):
        modelopt.python()  # refused before anything is trained
    if settings.kernels is not None:
        kernels.add_folder(settings.kernels)
    target = load_target(settings.target)
    if settings.fp16_check == AUTOCAST and not any(Compute.FP16 in each for each in target.computes.values()):
        raise UserError(
            f"fp16-check is {AUTOCAST}, and {target.name} computes nothing in fp16", fix="leave fp16-check out"
        )
    task = augmented(task or datasets.load_task(settings.data, seed=settings.seed), settings.augment)
    trained = checkpoint.of(model, settings.model) if model else checkpoint.load(settings.model, settings.checkpoint)
    trained = replace(trained, model=with_plain_attention(trained.model, task.example))
    network = graph.trace(trained.model, task.example)
    _check_outputs(trained, task)
    _check_integers(trained, task)
    if settings.epochs or settings.importance == "taylor":
        _check_loss(trained, task)
    # whatever can be refused was refused before a run begins: a mistake, once mended, begins in a clean folder
    given = choosing.given(asked_for, network, target)
    _check_free(settings.out)
    with (
        RunFolder.open(
            settings.out / RUN_FOLDER, fingerprint(settings, target, task, trained, given), settings.resume
        ) as run,
        Pool(settings.workers) if settings.workers > 1 else nullcontext(in_turn) as engine,
    ):
        yield _workbench(settings, target, task, trained, network, run, engine), trained, given


def budget_of(settings: ExportSettings) -> Budget:
    """The limits that were given."""
    return Budget(
        latency_ms=settings.max_latency_ms,
        speedup=settings.min_speedup,
        size_bytes=settings.max_size_bytes,
        memory_bytes=settings.max_memory_bytes,
        drop=settings.max_drop,
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
        importance=cast(Measure, settings.importance),
        fine_tuning=FineTuning(epochs=settings.epochs, seed=settings.seed),
        post_training=PostTraining() if settings.post_training is None else post_training_of(settings.post_training),
        threads=settings.threads,
        batch=settings.batch,
        progress=console.progress,
        target_spec=settings.target,
        engine=engine,
        adviser=modelopt.kept_in_fp32 if settings.fp16_check == AUTOCAST else None,
    )


def _check_free(out: Path) -> None:
    """Raises UserError for a folder that holds such files and no run: they are another's, and would be replaced."""
    found = [name for name in ARTIFACT_FILES if (out / name).exists()]
    if found and not (out / RUN_FOLDER).exists():
        raise UserError(f"{out} holds {found[0]} and no run that made it", fix="choose another --out, or empty it")


def _asks_modelopt(settings: ExportSettings) -> bool:
    return (
        settings.search == "modelopt" or settings.fp16_check == AUTOCAST or MODELOPT in (settings.post_training or ())
    )


def post_training_of(steps: Sequence[str]) -> PostTraining:
    """The steps with these names, of POST_TRAINING_STEPS and MODELOPT."""
    return PostTraining.of(steps, propose=modelopt.factors if MODELOPT in steps else None)


def _check_outputs(trained: "Checkpoint", task: "Task") -> None:
    """Outputs without a row an example, and labels that the model has no output for, would only be noticed in the
    middle of fine-tuning."""
    with torch.no_grad():
        outputs = graph.forward(trained.model, graph.tensors(task.example, 1))
    for name, output in outputs.items():
        if not output.dim():
            raise UserError(
                f"the model's output {name} is one number for all examples of a batch",
                fix="let forward return what has a row an example, and nothing else",
            )
    if not isinstance(task, Classification):
        return
    name = task.output_name(outputs)
    shape, places = tuple(outputs[name].shape), task.train.targets.shape[1:]
    if len(shape) < 2 or shape[2:] != places:
        raise UserError(
            f"the model's output {name} has the shape {shape[1:]} an example, and labels have {places}",
            fix="let forward return one score a class, (examples, classes): flatten what has more axes, and leave "
            "argmax to the score",
        )
    check_labels(task, shape[1])


def _check_integers(trained: "Checkpoint", task: "Task") -> None:
    """Whether the model takes the least and the greatest of what its inputs of integers are: token ids are below a
    vocabulary, and one that is not would only be noticed when its batch comes.

    The examples that hold them are run as they are, for the first EXTREMES places of an input.
    """
    whole = [name for name, array in task.example.items() if np.issubdtype(array.dtype, np.integer)]
    for batches in (task.train, task.search) if whole else ():
        seen = {name: np.concatenate([inputs[name] for inputs, _ in batches]) for name in whole}
        for name, values in seen.items():
            places = values.reshape(len(values), -1)[:, :EXTREMES]
            for position in sorted({*places.argmin(0).tolist(), *places.argmax(0).tolist()}):
                inputs, _ = batches.take(np.array([position]))
                try:
                    with torch.no_grad():
                        graph.forward(trained.model, graph.tensors(inputs, 1))
                except Exception as error:  # the model's own, on the user's data
                    raise UserError(
                        f"the model does not run on the {batches.split} data, example {batches.indices[position]}, "
                        f"{name} of {inputs[name].min()} to {inputs[name].max()}: {type(error).__name__}: {error}",
                        fix="is it the model of this data? token ids begin at 0 and lie below its vocabulary",
                    ) from error


def _check_loss(trained: "Checkpoint", task: "Task") -> None:
    """A loss that fails would only be noticed when fine-tuning begins."""
    inputs, target = task.train.take(np.arange(min(EXAMPLE, task.train.examples)))
    loss_of(task, graph.forward(trained.model, graph.tensors(inputs, len(target))), torch.from_numpy(target))
