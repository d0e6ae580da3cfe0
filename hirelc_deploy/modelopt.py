"""What nvidia-modelopt would choose, asked in a process and an environment of its own.

modelopt can bring runtimes of other versions along, so it is never imported here: the network goes to it as a file, and
what it wants comes back as one.  The bits that its auto_quantize gives each layer are made real by the same means as
every other policy; the factors that its SmoothQuant and AWQ scale activations by are tried beside ours; what its
AutoCast keeps in fp32 can be kept so here.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hirelc_deploy import graph
from hirelc_deploy.errors import UserError
from hirelc_deploy.graph.calling import goes_by_keyword, tensors
from hirelc_deploy.policy import PerChannel, Policy, Precision
from hirelc_deploy.search.problem import LayerVariable, Variable
from hirelc_deploy.task import Classification
from hirelc_deploy.usercode import PREFIX

if TYPE_CHECKING:
    from hirelc_deploy.workbench import Workbench

VARIABLE = "HIRELC_DEPLOY_MODELOPT"
"""The Python of an environment that has nvidia-modelopt."""

NEEDS = "requests huggingface-hub onnx-graphsurgeon onnxslim lief polygraphy"
"""What it imports; its own extra for ONNX would bring a runtime for GPUs along."""

INSTALL = (
    f"make an environment of its own for it: python -m venv DIR; DIR/bin/pip install nvidia-modelopt {NEEDS}; export "
    f"{VARIABLE}=DIR/bin/python"
)

EXAMPLES, BATCH = 512, 64
"""Train examples that it calibrates and scores with."""

SHUFFLE = 1_000_001
"""Their order is drawn like an epoch's, of a number that no fine-tuning reaches."""

WORKER = Path(__file__).with_name("_modelopt_worker.py")


def python() -> str:
    """That which modelopt runs in.  Raises UserError where nobody named one and this one has none."""
    named = os.environ.get(VARIABLE)
    if named is None and find_spec("modelopt") is not None:
        return sys.executable
    if named is None:
        raise UserError("nvidia-modelopt is not installed", fix=INSTALL)
    if shutil.which(named) is None:
        raise UserError(f"{VARIABLE} names {named}, which is no program", fix=INSTALL)
    return named


def policies(bench: "Workbench", variables: Sequence[Variable], count: int) -> list[Policy]:
    """So many choices of auto_quantize, from the most effective bits that are offered to the fewest; nothing is pruned.

    Raises UserError for a task without one label an example, for a network that cannot be sent, and with modelopt's
    own words where it fails.
    """
    layers = [variable for variable in variables if isinstance(variable, LayerVariable)]
    offered = {layer.name: _by_bits(layer) for layer in layers}
    bits = sorted({width for by_bits in offered.values() for width in by_bits})
    if not bits:
        raise UserError("the target has no integers of one scale a channel", fix="leave modelopt out of the methods")
    wanted = np.linspace(bits[-1], bits[0], count).tolist()
    step = f"modelopt/{bits[0]}-{bits[-1]}/{count}"
    chosen: list[dict[str, int]] = bench.run.step(step, lambda: _asked(bench, bits, wanted))
    found = [_policy(layers, offered, each) for each in chosen]
    return list({policy.digest(): policy for policy in found}.values())


def factors(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """What it would scale the inputs of Linear layers by, by its algorithm and by layer, each (channels,).

    `batches` are the examples that it calibrates with.  Raises UserError for a network that cannot be sent, and with
    modelopt's own words where it fails.
    """
    sent = [{"inputs": dict(inputs)} for inputs in batches]
    with _answered(partial(_send, model, sent, {"want": "factors"})) as folder:
        found: dict[str, dict[str, Tensor]] = torch.load(folder / "factors.pt", weights_only=True)
    return {f"modelopt's {algorithm}": by_layer for algorithm, by_layer in found.items()}


def kept_in_fp32(model: bytes, examples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, str]:
    """The names of the nodes of an ONNX model that its AutoCast keeps in fp32 where it turns the model to fp16.

    With a word of explanation each.  Raises UserError with modelopt's own words where it fails.
    """

    def send(folder: Path) -> None:
        job = {"want": "fp32 nodes", "path": [sysconfig.get_path("purelib")]}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        (folder / "model.onnx").write_bytes(model)
        arrays: dict[str, Any] = {name: np.concatenate([each[name] for each in examples]) for name in examples[0]}
        np.savez(folder / "examples.npz", **arrays)

    with _answered(send) as folder:
        nodes = json.loads((folder / "nodes.json").read_text(encoding="utf-8"))
    return dict.fromkeys(nodes, "AutoCast keeps it there")


def _by_bits(layer: LayerVariable) -> dict[int, Precision]:
    """A layer's integers with one scale an output channel; computed in integers where it can be."""
    able = [
        option
        for option in layer.options
        if option.storage.format == "int" and isinstance(option.storage.granularity, PerChannel)
    ]
    return {each.storage.bits: each for each in sorted(able, key=lambda option: option.compute == "int8")}


def _policy(
    layers: Sequence[LayerVariable], offered: dict[str, dict[int, Precision]], chosen: dict[str, int]
) -> Policy:
    """Layers that share a weight take the most bits of any; a layer without so many bits, the next that it has."""
    precisions = {}
    for layer in layers:
        asked = [chosen.get(name) for name in (layer.name, *layer.together)]
        widths = [bits for bits in asked if bits is not None]
        enough = [bits for bits in offered[layer.name] if len(widths) == len(asked) and bits >= max(widths)]
        if enough:
            precisions[layer.name] = offered[layer.name][min(enough)]
    return Policy(precisions, {})


# -- the process -----------------------------------------------------------------------------------------------------


def _asked(bench: "Workbench", bits: Sequence[int], effective_bits: Sequence[float]) -> list[dict[str, int]]:
    """Bits by layer, for each number of effective bits."""
    task = bench.task
    if not isinstance(task, Classification) or task.train.targets.ndim > 1:
        raise UserError(
            "modelopt is asked by the cross entropy of one label an example, and this task has none",
            fix="leave modelopt out of the methods",
        )
    batches = _batches(task)
    with torch.no_grad():
        output = task.output_name(graph.forward(bench.model, batches[0]["inputs"]))
    job = {"want": "bits", "bits": list(bits), "effective_bits": list(effective_bits), "output": output}
    with _answered(partial(_send, bench.model, batches, job)) as folder:
        chosen: list[dict[str, int]] = json.loads((folder / "formats.json").read_text(encoding="utf-8"))
    return chosen


@contextmanager
def _answered(send: Callable[[Path], None]) -> Iterator[Path]:
    """A folder with what it made of the job that is sent there, until the end of the block."""
    interpreter = python()
    with tempfile.TemporaryDirectory(prefix="hirelc-deploy-") as name:
        folder = Path(name)
        send(folder)
        shutil.copy(WORKER, folder)  # a script's folder comes first on its path: an empty one, not this package's
        command = [interpreter, str(folder / WORKER.name), str(folder)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            lacks = "No module named" in done.stderr
            raise UserError(
                f"nvidia-modelopt failed: {said}",
                fix=INSTALL if lacks else "go on without modelopt; its own words are above",
            )
        yield folder


def _send(model: nn.Module, batches: Sequence[dict[str, Any]], job: dict[str, Any], folder: Path) -> None:
    modules, path = _homes(model)
    job = {**job, "modules": modules, "path": path, "by_name": goes_by_keyword(model, batches[0]["inputs"])}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    torch.save(batches, folder / "batches.pt")
    try:
        torch.save(model, folder / "model.pt")
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"the network cannot be written to a file for modelopt: {error}",
            fix="let its modules be classes of a module, without functions that are defined inside others",
        ) from error


def _batches(task: Classification) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for _, inputs, targets in task.train.shuffled(0, SHUFFLE):
        whole, labels = tensors(inputs), torch.as_tensor(targets).long()
        for start in range(0, len(labels), BATCH):
            some = slice(start, start + BATCH)
            found.append({"inputs": {name: each[some] for name, each in whole.items()}, "targets": labels[some]})
        if len(found) * BATCH >= EXAMPLES:
            break
    return found


def _homes(model: nn.Module) -> tuple[dict[str, str], list[str]]:
    """Where the classes of a network are from: files of the user's by module, and folders of all other modules.

    With this environment's own folder, since a file of the user's may import anything.
    """
    files: dict[str, str] = {}
    folders: dict[str, None] = {}
    for name in sorted({type(module).__module__ for module in model.modules()}):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is None:
            raise UserError(
                f"the network has a class of {name}, which is no file that modelopt's process could import",
                fix="let its classes be those of a module",
            )
        depth = name.count(".") + (Path(file).name == "__init__.py")
        if name.startswith(PREFIX):
            files[name], depth = file, 0
        folders[str(Path(file).parents[depth])] = None
    folders[sysconfig.get_path("purelib")] = None
    return files, list(folders)
