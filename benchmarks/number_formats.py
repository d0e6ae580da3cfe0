"""Every layer of the Fashion-MNIST networks in one number format, the formats side by side.

    python benchmarks/number_formats.py build wide            files, post-training only
    python benchmarks/number_formats.py build wide --epochs 1 files, fine-tuned for so long
    python benchmarks/number_formats.py measure wide          what there is, in one run
    python benchmarks/number_formats.py write                 docs/number-formats.md and the README's table of them

Nothing is pruned: the gain is that of the formats alone.  Building may share the machine and goes on where it was
killed; for measuring it should be quiet.  Files go to out/benchmarks/number_formats, the figures of a network to
benchmarks/results/number_formats_NETWORK.json.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import against_onnxruntime
import large_models
import post_training
import size_prediction
from _bench import RESULTS, ROOT, between_marks, cpu_text, load_task, machine, markdown, save, workbench
from _graphs import shape_of

from hirelc_deploy.exporters import load_runtime
from hirelc_deploy.exporters.onnxruntime import optimised
from hirelc_deploy.rundir import write_atomic
from hirelc_deploy.search.recipe import Recipe
from hirelc_deploy.verify import accuracy, timing
from hirelc_deploy.verify.measure import example

NETWORKS = ("wide", "depthwise", "vit")
OUT = Path("out/benchmarks/number_formats")
PAGE = ROOT / "docs" / "number-formats.md"

STORAGES = (
    *("int8", "int4", "int4/group32", "float4", "log4", "codebook4"),
    *("int3", "log3", "codebook3", "int2", "codebook2", "vector2", "vector1", "shared_vector1"),
)
COMPUTED_IN_INT8 = ("int8", "int4", "int3", "int2", "vector1")
UNTUNED = (*(f"{storage}/fp32" for storage in STORAGES), *(f"{storage}/int8" for storage in COMPUTED_IN_INT8))
"""What is only corrected, by storage and compute."""
TUNED = ("vector1/fp32", "int3/fp32", "int2/fp32", "int4/int8", "shared_vector1/fp32", "vector2/fp32")
"""What is fine-tuned, by storage and compute: where post-training leaves most to gain, first."""

SECONDS = 90.0
"""Spent on timing all files of one network."""
SEED = 0
BASELINE = "fp32"
PLAIN = {"int8": "int8/int8", "fp32": BASELINE}
"""By compute the file with weights that need no decoding: the others must run like it."""


@dataclass(frozen=True)
class Row:
    """What a file came to."""

    storage: str
    compute: str
    epochs: int
    """Of fine-tuning; 0 is post-training only."""
    size_bytes: int
    compression: float
    """Against the stripped fp32 file."""
    accuracy: float
    """On the test images, as the drop."""
    drop_points: float
    drop_ci95: tuple[float, float]
    latency_cpu_ms: float | None
    """None, as all below, for fine-tuned files: they have the graphs of the others."""
    speedup: float | None
    """Over fp32."""
    speedup_ci95: tuple[float, float] | None
    of_plain: float | None
    """Time of the file of the same compute that needs no decoding, over this one's."""
    of_plain_ci95: tuple[float, float] | None
    same_graph_as_plain: bool
    """After optimisation: operators, attributes, types and shapes."""


def build(network: str, epochs: int, out: Path, only: Sequence[str]) -> None:
    """Write what is not there yet."""
    folder = out / network / f"epochs{epochs}"
    wanted = only or (TUNED if epochs else UNTUNED)
    with workbench(network, folder / "run", epochs=epochs) as bench:
        write_atomic(out / network / "baseline.onnx", bench.files.baseline().data)
        for name in wanted:
            path = folder / f"{name.replace('/', '-')}.onnx"
            if path.exists():
                continue
            storage, _, compute = name.rpartition("/")
            policy = Recipe.parse(f"storage={storage},compute={compute}").policy(bench.space)
            compressed = bench.compressed(policy)
            data = bench.files.write(compressed.model, policy, compressed.grids).file.data
            write_atomic(path, data)
            print(f"{network} {name}, {epochs} epochs: {len(data)} bytes, search {compressed.simulated_score:.2f}")


def measure(network: str, out: Path, seconds: float) -> dict[str, Any]:
    """Every file of a network that was built, side by side."""
    folder = out / network
    files = {BASELINE: folder / "baseline.onnx"}
    known: dict[str, tuple[str, str, int]] = {}
    for path in sorted(folder.glob("epochs*/*.onnx")):
        epochs = int(path.parent.name.removeprefix("epochs"))
        storage, _, compute = path.stem.replace("-", "/").rpartition("/")
        name = f"{storage}/{compute}" + (f" after {epochs} epochs" if epochs else "")
        files[name], known[name] = path, (storage, compute, epochs)
    runtime = load_runtime("onnxruntime")
    shapes = {name: shape_of(optimised(path, threads=1)) for name, path in files.items()}
    task = load_task(network)
    timed = [name for name in files if name == BASELINE or known[name][2] == 0]
    times = timing.interleave(
        {name: runtime.load(files[name], threads=1) for name in timed}, example(task, 1), seconds=seconds
    )
    # threads of one's own wait for each other by spinning: on a busy machine more of them take longer
    sessions = {name: runtime.load(path, threads=1) for name, path in files.items()}
    outputs, targets = accuracy.side_by_side(sessions, task.test)
    rows = []
    for name, (storage, compute, epochs) in known.items():
        plain = PLAIN[compute]
        faster, alike = (
            timing.ratio(times[than], times[name], clock="cpu", seed=SEED) if name in times else None
            for than in (BASELINE, plain)
        )
        compared = accuracy.compare(task, outputs[BASELINE], outputs[name], targets, SEED)
        rows.append(
            Row(
                storage=storage,
                compute=compute,
                epochs=epochs,
                size_bytes=files[name].stat().st_size,
                compression=files[BASELINE].stat().st_size / files[name].stat().st_size,
                accuracy=compared.after,
                drop_points=compared.drop,
                drop_ci95=compared.drop_ci95,
                latency_cpu_ms=times[name].cpu_p50_ms if name in times else None,
                speedup=faster and faster.value,
                speedup_ci95=faster and (faster.lo, faster.hi),
                of_plain=alike and alike.value,
                of_plain_ci95=alike and (alike.lo, alike.hi),
                same_graph_as_plain=shapes[name] == shapes[plain],
            )
        )
    return {
        "machine": machine(),
        "test_images": task.test.examples,
        "baseline": {
            "size_bytes": files[BASELINE].stat().st_size,
            "accuracy": task.score(outputs[BASELINE], targets),
            "latency_cpu_ms": times[BASELINE].cpu_p50_ms,
        },
        "rows": [asdict(row) for row in rows],
    }


# -- page ----------------------------------------------------------------------------------------------------


def page() -> str:
    """docs/number-formats.md, from the result files."""
    parts = [INTRODUCTION]
    for network in NETWORKS:
        path = RESULTS / f"number_formats_{network}.json"
        if path.exists():
            parts.append(section(network, json.loads(path.read_text())))
    if post_training.RESULT.exists():
        found = json.loads(post_training.RESULT.read_text())["networks"]
        parts.append(f"{POST_TRAINING}\n{post_training.table(found)}")
    if against_onnxruntime.RESULT.exists():
        networks = json.loads(against_onnxruntime.RESULT.read_text())["networks"]
        rows = {name: [against_onnxruntime.Row(**row) for row in each] for name, each in networks.items()}
        parts += [AGAINST, *(against_onnxruntime.table(name, each) for name, each in rows.items())]
    if large_models.RESULT.exists():
        networks = json.loads(large_models.RESULT.read_text())["networks"]
        large = {name: [large_models.Row(**row) for row in each] for name, each in networks.items()}
        parts += [LARGE, *(large_models.table(name, each) for name, each in large.items())]
    if size_prediction.RESULT.exists():
        parts.append(size_prediction.summary(json.loads(size_prediction.RESULT.read_text())))
    return "\n".join(parts)


INTRODUCTION = """# Number formats, side by side

Written by `python benchmarks/number_formats.py write` from `benchmarks/results/number_formats_*.json`; what makes
those stands at the head of that script.

Every layer of a network is in one format, and no channel is removed.  *Smaller* is against the stripped fp32 file.
*Faster* is against that file as well, *plain* against the file of the same compute whose weights need no decoding
(int8 weights, or fp32 ones): CPU time of one thread, batch 1, all files in turns in one process.  *Graph* says whether
ONNX Runtime makes the very same graph of it as of the plain file.  *Drop* is in points of the 10,000 test images, with
its paired 95 % interval, post-training and after fine-tuning.  `-` was not run.
"""


POST_TRAINING = """## What each correction gains

Scores in percent of the 6,000 search images, under the formats and before any fine-tuning, by the steps of
`--post-training` (`python benchmarks/post_training.py`).  Statistics are estimated again only where channels are gone,
and `smooth` has norms to work on in `vit` alone; the drops of `vit` further up were taken before it was a step.
"""


AGAINST = """## Beside ONNX Runtime's own tools

Nothing is pruned and nothing trained; every tool starts from the same stripped fp32 file, and its own is stripped
in the same way (`python benchmarks/against_onnxruntime.py`).
"""


LARGE = """## Large networks

Random weights, so nothing is scored (`python benchmarks/large_models.py`).  Loading is the CPU time of a process of its
own, the median of 15 in turns and the one that the machine disturbed least; its peak is over that of a process that
loads nothing.
"""


def section(network: str, record: Mapping[str, Any]) -> str:
    baseline, taken_on = record["baseline"], record["machine"]
    rows = [row for row in record["rows"] if row["epochs"] == 0]
    tuned = {(row["storage"], row["compute"]): row for row in record["rows"] if row["epochs"]}
    rows.sort(key=lambda row: UNTUNED.index(f"{row['storage']}/{row['compute']}"))
    head = ("storage", "compute", "KB", "smaller", "faster", "plain [95 %]", "graph")
    cells = (
        (
            row["storage"],
            row["compute"],
            f"{row['size_bytes'] / 1000:.1f}",
            f"{row['compression']:.1f} ×",
            f"{row['speedup']:.2f} ×",
            f"{row['of_plain']:.3f} [{row['of_plain_ci95'][0]:.3f}, {row['of_plain_ci95'][1]:.3f}]",
            "same" if row["same_graph_as_plain"] else "**other**",
            _drop(row),
            _tuned(tuned.get((row["storage"], row["compute"]))),
        )
        for row in rows
    )
    return (
        f"## `{network}`\n\nfp32: {baseline['size_bytes'] / 1000:.1f} KB, {baseline['accuracy']:.2f} %, "
        f"{baseline['latency_cpu_ms']:.2f} ms. CPU: {cpu_text(taken_on['cpu'], taken_on['flags'])}.\n\n"
        f"{markdown((*head, 'drop, post-training', 'drop, fine-tuned'), cells)}"
    )


def _tuned(row: Mapping[str, Any] | None) -> str:
    return "-" if row is None else f"{_drop(row)}, {_epochs(row['epochs'])}"


README = ROOT / "README.md"
HIGHLIGHTS = ("int8/int8", "int4/int8", "int4/fp32", "int3/fp32", "int2/fp32", "vector1/fp32")


def with_highlights(readme: str) -> str:
    """The README with some rows of `wide` between its marks: fine-tuned where that was run."""
    path = RESULTS / "number_formats_wide.json"
    if not path.exists():
        return readme
    record = json.loads(path.read_text())
    rows = [_highlight(name, record["rows"]) for name in HIGHLIGHTS]
    table = markdown(("every layer of `wide`", "file", "smaller", "faster", "drop, points [95 %]", "trained"), rows)
    return between_marks(readme, "formats", table)


def _highlight(name: str, every: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    storage, _, compute = name.rpartition("/")
    rows = [row for row in every if (row["storage"], row["compute"]) == (storage, compute)]
    # not the better one: that would be chosen on the test images
    last, timed = max(rows, key=lambda row: row["epochs"]), next(row for row in rows if row["speedup"])
    return (
        f"{storage}, computed in {compute}",
        f"{last['size_bytes'] / 1000:.1f} KB",
        f"{last['compression']:.1f} ×",
        f"{timed['speedup']:.2f} ×",
        _drop(last),
        _epochs(last["epochs"]) if last["epochs"] else "no",
    )


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' * (count > 1)}"


def _drop(row: Mapping[str, Any]) -> str:
    return f"{row['drop_points']:.2f} [{row['drop_ci95'][0]:.2f}, {row['drop_ci95'][1]:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    steps = parser.add_subparsers(dest="step", required=True)
    building, measuring, _ = steps.add_parser("build"), steps.add_parser("measure"), steps.add_parser("write")
    for step in (building, measuring):
        step.add_argument("networks", nargs="+", choices=NETWORKS)
        step.add_argument("--out", type=Path, default=OUT)
    building.add_argument("--epochs", type=int, default=0)
    building.add_argument("--only", nargs="+", default=(), metavar="STORAGE/COMPUTE")
    measuring.add_argument("--seconds", type=float, default=SECONDS)
    options = parser.parse_args()
    if options.step == "write":
        PAGE.write_text(page(), encoding="utf-8")
        README.write_text(with_highlights(README.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for network in options.networks:
        if options.step == "build":
            build(network, options.epochs, options.out, options.only)
        else:
            save(measure(network, options.out, options.seconds), RESULTS / f"number_formats_{network}.json")


if __name__ == "__main__":
    main()
