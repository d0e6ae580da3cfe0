"""Bytes, load time, memory and speed of large networks by number format: python benchmarks/large_models.py

ResNet-50 and a ViT of the size of DeiT-small, with random weights: nothing is scored and nothing downloaded.  Decoding
is work for the moment when a session loads, and must leave no trace in what runs: a file's optimised graph is compared
with that of the plain file of the same compute.  The files go to out/benchmarks/large, the record to
benchmarks/results/large_models.json.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bench import RESULTS, machine, markdown, save
from _graphs import shape_of
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hirelc_deploy.compress.distil import as_tensors
from hirelc_deploy.compress.fold import fold, foldable
from hirelc_deploy.compress.grids import fitted
from hirelc_deploy.cpu import cpu_flags
from hirelc_deploy.exporters import load_runtime
from hirelc_deploy.exporters.onnxruntime import optimised
from hirelc_deploy.kernels import vector
from hirelc_deploy.policy import FP32, INT8, Compute, PerChannel, Precision, Storage
from hirelc_deploy.profiles import load_target
from hirelc_deploy.verify import timing

RESULT = RESULTS / "large_models.json"
PIXELS = 224
LABELS = 1000


def resnet50() -> nn.Module:
    """25.6 million parameters."""
    return ResNetForImageClassification(ResNetConfig(num_labels=LABELS))


def vit_small() -> nn.Module:
    """22 million parameters."""
    shape = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
    return ViTForImageClassification(ViTConfig(**shape, image_size=PIXELS, num_labels=LABELS))


NETWORKS = {"resnet50": resnet50, "vit_small": vit_small}


def _stored(format: str, bits: int, compute: Compute) -> Precision:
    return Precision(Storage(format, bits, PerChannel()), compute)


PRECISIONS = {
    "fp32": FP32,
    "int8, computed in int8": INT8,
    "int4, computed in int8": _stored("int", 4, Compute.INT8),
    "int4, computed in fp32": _stored("int", 4, Compute.FP32),
    "codebook3, computed in fp32": _stored("codebook", 3, Compute.FP32),
    "vector1, computed in fp32": _stored("vector", 1, Compute.FP32),
}
PLAIN = {Compute.FP32: "fp32", Compute.INT8: "int8, computed in int8"}
"""The file of the same compute whose weights need no decoding."""

CALIBRATION_BATCHES, CALIBRATION_BATCH = 2, 4
LOADS = 15
SECONDS = 60.0
"""Spent on timing all files of one network."""

LOADER = """
import resource, sys, time
import onnxruntime as ort

options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.log_severity_level = 3
wall, cpu = time.perf_counter(), time.process_time()
if len(sys.argv) > 1:
    session = ort.InferenceSession(sys.argv[1], options, ["CPUExecutionProvider"])
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
# not ru_maxrss: Linux counts into it what the parent held when it forked
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(wall, cpu, int(status["VmHWM"].split()[0]) / 1024)
"""
"""A process of its own that imports nothing but the runtime; prints seconds, CPU seconds and its peak in MiB."""


@dataclass(frozen=True)
class Load:
    """One process that loaded a file, or none."""

    wall_s: float
    cpu_s: float
    peak_mib: float


@dataclass(frozen=True)
class Row:
    """One file of a network."""

    what: str
    size_bytes: int
    compression: float
    load_cpu_s: float
    """Median, as of the next two."""
    load_wall_s: float
    load_peak_mib: float
    """More than a process that loads nothing."""
    load_cpu_s_over_plain: float
    load_least_cpu_s: float
    """Of the load that the machine disturbed least; likewise over plain."""
    load_least_cpu_s_over_plain: float
    loads: tuple[Load, ...]
    latency_cpu_ms: float
    speedup: float
    """Over fp32, as CPU time."""
    speedup_ci95: tuple[float, float]
    speed_of_plain: float
    """Over the plain file of the same compute: 1 if decoding leaves nothing behind."""
    speed_of_plain_ci95: tuple[float, float]
    same_graph_as_plain: bool
    operators: Mapping[str, int]
    """Of the optimised graph."""


def write_files(network: nn.Module, folder: Path) -> dict[str, Path]:
    """The network in every precision, by name."""
    runtime, target = load_runtime("onnxruntime"), load_target("host")
    largest = target.largest_code(cpu_flags())
    batches = list(images(CALIBRATION_BATCHES, CALIBRATION_BATCH))
    network = fold(network, foldable(network, as_tensors(batches[0]))).eval()
    graph = runtime.float_graph(network, batches[0], opset=target.runtime.opset)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, precision in PRECISIONS.items():
        began = time.monotonic()
        chosen = dict.fromkeys(graph.weights, precision)
        # weights are not put on their grids first: packing gives the same codes either way
        grids = fitted(network, chosen, {}, largest=largest)
        seen = runtime.observe(graph, chosen, batches)
        file = runtime.write(graph, chosen, grids, seen=seen, largest=largest)
        paths[name] = folder / f"{name.replace(', computed in ', '-')}.onnx"
        paths[name].write_bytes(file.data)
        print(f"  {name}: {len(file.data) / 1e6:.1f} MB, written in {time.monotonic() - began:.0f} s", flush=True)
    return paths


def images(batches: int, examples: int) -> Iterator[dict[str, np.ndarray]]:
    """Noise, as the networks take images."""
    random = np.random.default_rng(0)
    for _ in range(batches):
        yield {"pixel_values": random.normal(size=(examples, 3, PIXELS, PIXELS)).astype(np.float32)}


def load_in_turns(paths: Mapping[str, Path], times: int) -> tuple[dict[str, tuple[Load, ...]], float]:
    """Loads by file, each in a fresh process, every other round in the opposite order; and the peak of one without."""
    seen: dict[str, list[Load]] = {name: [] for name in paths}
    names = list(paths)
    for number in range(times):
        for name in names if number % 2 == 0 else reversed(names):
            seen[name].append(_load(str(paths[name])))
    return {name: tuple(loads) for name, loads in seen.items()}, _load().peak_mib


def _load(*file: str) -> Load:
    printed = subprocess.run([sys.executable, "-c", LOADER, *file], capture_output=True, text=True, check=True).stdout
    return Load(*map(float, printed.split()))


def measure(name: str, paths: Mapping[str, Path], *, loads: int, seconds: float) -> list[Row]:
    """All files of a network side by side."""
    runtime = load_runtime("onnxruntime")
    loaded, empty_mib = load_in_turns(paths, loads)
    sessions = {what: runtime.load(path, threads=1) for what, path in paths.items()}
    times = timing.interleave(sessions, next(images(1, 1)), seconds=seconds)
    graphs = {what: optimised(path, threads=1) for what, path in paths.items()}
    shapes = {what: shape_of(graph) for what, graph in graphs.items()}
    cpu_s = {what: statistics.median(load.cpu_s for load in each) for what, each in loaded.items()}
    least_s = {what: min(load.cpu_s for load in each) for what, each in loaded.items()}
    rows = []
    for what, path in paths.items():
        plain = PLAIN[PRECISIONS[what].compute]
        faster, of_plain = (timing.ratio(times[than], times[what], clock="cpu") for than in ("fp32", plain))
        kinds = [node.op_type for node in graphs[what].node]
        rows.append(
            Row(
                what=what,
                size_bytes=path.stat().st_size,
                compression=paths["fp32"].stat().st_size / path.stat().st_size,
                load_cpu_s=cpu_s[what],
                load_wall_s=statistics.median(load.wall_s for load in loaded[what]),
                load_peak_mib=statistics.median(load.peak_mib for load in loaded[what]) - empty_mib,
                load_cpu_s_over_plain=cpu_s[what] - cpu_s[plain],
                load_least_cpu_s=least_s[what],
                load_least_cpu_s_over_plain=least_s[what] - least_s[plain],
                loads=loaded[what],
                latency_cpu_ms=times[what].cpu_p50_ms,
                speedup=faster.value,
                speedup_ci95=(faster.lo, faster.hi),
                speed_of_plain=of_plain.value,
                speed_of_plain_ci95=(of_plain.lo, of_plain.hi),
                same_graph_as_plain=shapes[what] == shapes[plain],
                operators={kind: kinds.count(kind) for kind in sorted(set(kinds))},
            )
        )
    print(table(name, rows))
    return rows


def table(name: str, rows: Sequence[Row]) -> str:
    """In Markdown."""
    head = (
        *(name, "file", "smaller", "load, CPU: median, least", "over plain", "peak memory", "latency"),
        *("faster [95 %]", "against plain [95 %]", "same graph"),
    )
    cells = (
        (
            row.what,
            f"{row.size_bytes / 1e6:.1f} MB",
            f"{row.compression:.1f} ×",
            f"{row.load_cpu_s:.2f}, {row.load_least_cpu_s:.2f} s",
            f"{row.load_cpu_s_over_plain:+.2f}, {row.load_least_cpu_s_over_plain:+.2f} s",
            f"{row.load_peak_mib:.0f} MiB",
            f"{row.latency_cpu_ms:.1f} ms",
            f"{row.speedup:.2f} × [{row.speedup_ci95[0]:.2f}, {row.speedup_ci95[1]:.2f}]",
            f"{row.speed_of_plain:.2f} × [{row.speed_of_plain_ci95[0]:.2f}, {row.speed_of_plain_ci95[1]:.2f}]",
            "yes" if row.same_graph_as_plain else "**no**",
        )
        for row in rows
    )
    return markdown(head, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/large"), help="where the files go")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--loads", type=int, default=LOADS, help="fresh processes a file")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing, a network")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    vector.ROUNDS = 1  # of k-means: random weights have no clusters to find, and minutes would go by
    record: dict[str, Any] = {
        "machine": machine(),
        "pixels": PIXELS,
        "networks": {},
    }
    for name in options.networks:
        print(name, flush=True)
        paths = write_files(NETWORKS[name]().eval(), options.out / name)
        rows = measure(name, paths, loads=options.loads, seconds=options.seconds)
        record["networks"][name] = [asdict(row) for row in rows]
    save(record, options.result)


if __name__ == "__main__":
    main()
