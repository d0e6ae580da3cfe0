"""What the benchmarks on Fashion-MNIST have in common: a workbench for one of the example networks."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hirelc_deploy import checkpoint, console, datasets, graph
from hirelc_deploy.compress.distil import FineTuning
from hirelc_deploy.config import POST_TRAINING_STEPS
from hirelc_deploy.cpu import cpu_flags, has_dot_product
from hirelc_deploy.opening import post_training_of
from hirelc_deploy.profiles import load_target
from hirelc_deploy.rundir import RunFolder
from hirelc_deploy.task import Task
from hirelc_deploy.verify.environment import environment
from hirelc_deploy.verify.timing import clock_for
from hirelc_deploy.workbench import Workbench

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "fashion_mnist"
RESULTS = ROOT / "benchmarks" / "results"
NETWORKS = ("wide", "small", "depthwise", "vit")


def load_task(network: str, seed: int = 0) -> Task:
    """Fashion-MNIST, as this example network was trained on it."""
    name = "task14" if network.endswith("14") else "task"
    return datasets.load_task(f"{EXAMPLE}/task.py:{name}", seed=seed)


@contextmanager
def workbench(
    network: str,
    run: Path,
    *,
    epochs: int = 0,
    seed: int = 0,
    post_training: tuple[str, ...] = POST_TRAINING_STEPS,
    target: str = "host",
    threads: int = 1,
    batch: int = 1,
) -> Iterator[Workbench]:
    """A network as it was trained, on its target; what was computed in the folder `run` before is not done again."""
    task = load_task(network, seed)
    file = EXAMPLE / "checkpoints" / f"{network}.safetensors"
    trained = checkpoint.load(f"{EXAMPLE}/networks.py:{network}", file)
    fingerprint = {"model": trained.sha256, "epochs": str(epochs), "cpu": " ".join(sorted(cpu_flags()))}
    if not epochs:
        fingerprint["post-training"] = ",".join(post_training)
    with RunFolder.open(run, fingerprint, resume=True) as folder:
        yield Workbench(
            trained.model,
            task,
            graph.trace(trained.model, task.example),
            load_target(target),
            folder,
            importance="obs",
            fine_tuning=FineTuning(epochs=epochs, seed=seed),
            post_training=post_training_of(post_training),
            threads=threads,
            batch=batch,
            progress=console.progress,
        )


def machine(*, threads: int = 1, batch: int = 1) -> dict[str, Any]:
    """Where figures are taken, on the clock of so many threads, for a result file."""
    return environment(threads=threads, batch=batch, clock=clock_for(threads)).model_dump(mode="json")


CPU_KINDS = ("avx2", "vnni")
"""Of x86: what INT8 gains depends on it."""


def cpu_kind(flags: Iterable[str]) -> str:
    """Which of them a CPU is."""
    return CPU_KINDS[has_dot_product(frozenset(flags))]


def record_export(artifact: Path, name: str) -> None:
    """Keep an artifact's manifest as the result file of that name and the kind of CPU that it was measured on."""
    manifest = artifact / "manifest.json"
    flags = json.loads(manifest.read_text(encoding="utf-8"))["environment"]["flags"]
    shutil.copy(manifest, RESULTS / f"export_{name}_{cpu_kind(flags)}.json")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), ""])


def between_marks(page: str, mark: str, text: str) -> str:
    """The page with this text between `<!-- mark -->` and `<!-- end of mark -->`."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n"
    head, _, rest = page.partition(begin)
    return f"{head}{begin}{text}{end}{rest.partition(end)[2]}"


def cpu_text(name: str, flags: Iterable[str]) -> str:
    """A processor, for a page."""
    return f"{name} ({', '.join(flags)})"


def save(record: Any, path: Path) -> None:
    """Write a result file, with six significant digits: more than any measurement here holds."""
    path.write_text(json.dumps(_rounded(record), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return float(f"{value:.6g}")
        case dict():
            return {key: _rounded(each) for key, each in value.items()}
        case list() | tuple():
            return [_rounded(each) for each in value]
    return value
