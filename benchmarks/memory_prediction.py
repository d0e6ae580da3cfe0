"""Memory and time of loading, told from shapes and formats: python benchmarks/memory_prediction.py measure NETWORK…

    python benchmarks/memory_prediction.py measure wide vit mobilenetv2 resnet18   files of random policies, each loaded
                                                                                   and run in a process of its own
    python benchmarks/memory_prediction.py fit                                     the laws, and how far off they are

The original and random policies of each network, with untrained weights, since no memory depends on values: each layer
any compute and a storage that needs no search for its values, every prune group any count.  Loading is timed by the CPU
clock, in runs of the kernel that every table's times are in units of.  The laws are fitted to all networks, and once
more with each of them held out.  Writes benchmarks/results/memory_prediction.json, docs/memory.md; some twenty minutes.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _bench import RESULTS, ROOT, machine, markdown, save
from _networks import NETWORKS, bench_of, random_policies
from latency_prediction import here, table_of
from scipy.optimize import least_squares

from hirelc_deploy.cost.latency import decisions_of
from hirelc_deploy.cost.memory import Activations, MemoryLaw
from hirelc_deploy.cost.prices import times_of
from hirelc_deploy.exporters._base import NoKernelError
from hirelc_deploy.exporters._memory import decoded_bytes, nodes
from hirelc_deploy.policy import Policy
from hirelc_deploy.profiles import Tables
from hirelc_deploy.verify import profiling
from hirelc_deploy.verify.machines import Here
from hirelc_deploy.workbench import Workbench

RESULT = RESULTS / "memory_prediction.json"
PAGE = ROOT / "docs" / "memory.md"
OUT = Path("out/benchmarks/memory_prediction")
POLICIES = 24
LOADS = 7

LEAST = 1e-9
"""So that a logarithm exists while numbers are tried."""
COMMON_ERROR = 0.05
"""Errors above it count by their size and not by its square: a page more or less of an allocator is no matter."""


@dataclass(frozen=True)
class Seen:
    """One file: what the laws go by, and what was seen of it."""

    size_bytes: int
    decoded_bytes: int
    activation_bytes: float
    peak_bytes: int
    nodes: int
    load_anchors: float
    """Of loading it, in runs of the anchor."""


def measure(network: str, out: Path, policies: int) -> list[dict[str, Any]]:
    """The original and random policies; what was measured before is not again."""
    with bench_of(network, out) as bench:
        found = []
        chosen = [Policy({}, {}), *random_policies(bench.space, policies)]
        loads = bench.run.step(f"loads/{len(chosen)}", partial(_loads_anchors, bench, chosen))
        for number, (policy, load_anchors) in enumerate(zip(chosen, loads, strict=True)):
            peak_bytes = bench.run.step(f"peak/{number}", partial(bench.latencies.seen_memory_bytes, policy))
            assert peak_bytes is not None, "this system does not tell a process its peak"
            found.append(asdict(_seen(bench, policy, peak_bytes, load_anchors)))
            print(f"{network} {number}/{policies}: {found[-1]}", flush=True)
    return found


def _seen(bench: Workbench, policy: Policy, peak_bytes: int, load_anchors: float) -> Seen:
    """What the laws go by is told anew, by the rules of today."""
    network = bench.latencies.network
    file = bench.files.foreseen(policy)
    (activation_bytes,) = Activations(network)(decisions_of(network, [policy]))
    return Seen(len(file), decoded_bytes(file), float(activation_bytes), peak_bytes, nodes(file), load_anchors)


def anchor_us() -> float:
    """Of the table of the target that this machine stands for."""
    target = here()
    tables = Tables(table_of(target), table_of(target))
    return times_of(tables.rows(), threads=1)[profiling.ANCHOR]


def _loads_anchors(bench: Workbench, policies: Sequence[Policy]) -> list[float]:
    """The least of several of each file, in turn with the others' and the anchor's: whatever else the machine does for
    a while only adds to either."""
    maker = profiling.makers([profiling.ANCHOR], Here(bench.runtime, threads=1))[profiling.ANCHOR]
    assert not isinstance(maker, NoKernelError)
    anchor = bench.runtime.kernel_session(maker.file(1), threads=1)
    nothing = bench.runtime.kernel_session(bench.runtime.nothing().file(1), threads=1)
    drafts = {str(i): bench.files.draft(policy) for i, policy in enumerate(policies)}
    with bench.files.on_disk(drafts) as paths:
        loads_s = np.empty((LOADS, len(paths)))
        anchors_s = np.empty((LOADS, len(paths), 2))
        for number in range(LOADS):
            for i, path in enumerate(paths.values()):
                loads_s[number, i] = _cpu_s(partial(bench.runtime.load, path, threads=1))
                anchors_s[number, i] = [_cpu_s(partial(each.run, {})) for each in (anchor, nothing)]
    anchor_s, nothing_s = anchors_s.min((0, 1))
    found: list[float] = (loads_s.min(0) / (anchor_s - nothing_s)).tolist()
    return found


def _cpu_s(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


# -- the laws --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """Numbers by which something is told of files, fitted to what was seen of others."""

    start: tuple[float, ...]
    """From which they are fitted."""
    told: Callable[[Sequence[float], Sequence[Seen]], np.ndarray]
    """By such numbers, (files,)."""
    seen: Callable[[Seen], float]

    def fitted(self, files: Sequence[Seen]) -> list[float]:
        """By relative errors."""
        scale, seen = np.array(self.start), np.array([self.seen(file) for file in files])

        def off(numbers: np.ndarray) -> np.ndarray:
            return np.asarray(np.log(np.maximum(self.told(numbers * scale, files), LEAST) / seen))

        found = least_squares(off, np.ones(len(scale)), loss="soft_l1", f_scale=COMMON_ERROR, bounds=(0, np.inf))
        return (found.x * scale).tolist()

    def errors_pct(self, numbers: Sequence[float], files: Sequence[Seen]) -> list[float]:
        """(files,)."""
        return (100 * (self.told(numbers, files) / np.array([self.seen(file) for file in files]) - 1)).tolist()

    def judged(self, networks: Mapping[str, Sequence[Seen]]) -> dict[str, Any]:
        """Fitted to all networks; the errors on each, and those of a law that has not seen the network."""
        law = self.fitted([file for files in networks.values() for file in files])
        found: dict[str, Any] = {"law": law, "errors_pct": {}, "held_out": {}}
        for name, files in networks.items():
            others = self.fitted([file for other, rest in networks.items() if other != name for file in rest])
            found["errors_pct"][name] = self.errors_pct(law, files)
            found["held_out"][name] = {"law": others, "errors_pct": self.errors_pct(others, files)}
        return found


def told_bytes(numbers: Sequence[float], files: Sequence[Seen]) -> np.ndarray:
    """At the peak, (files,)."""
    parts = np.array([[f.size_bytes, f.decoded_bytes, f.activation_bytes] for f in files], float).T
    return MemoryLaw(*numbers, decoded_bytes=decoded_bytes)(*parts)


def told_anchors(numbers: Sequence[float], files: Sequence[Seen]) -> np.ndarray:
    """Of loading, (files,)."""
    features = np.array([[f.nodes, f.size_bytes, f.decoded_bytes] for f in files], float)
    return features @ np.asarray(numbers)


PEAK = Law((12e6, 3.0, 1.0, 5.0), told_bytes, lambda file: file.peak_bytes)
LOAD = Law((0.7, 17e-6, 9e-6), told_anchors, lambda file: file.load_anchors)


def judged(networks: Mapping[str, Sequence[Seen]]) -> dict[str, Any]:
    """Both laws."""
    return {**PEAK.judged(networks), "load": LOAD.judged(networks)}


# -- the page --------------------------------------------------------------------------------------------------------

HEAD = """# Memory and loading, told before anything is built

Written by `python benchmarks/memory_prediction.py fit` from `benchmarks/results/memory_prediction.json`.  Memory is the
peak of a fresh process that loads a file and runs it, over what it held with the runtime alone; `--max-memory` limits
it.  A search with that limit is told the memory of every policy by one law:

"""

BEHIND = """
Loading comes before running, and what it needed is free by then, so the larger of the two is the peak.  What loading
decodes is counted from the file's nodes: everything that is computed from constants, every step of it, since a session
keeps it until it is made.  It is most of the memory of a compressed file: a weight of four bits lies there as codes, as
integers and as floats.  Activations are tensors that were written and are still to be read, an integer one byte an
element, and copies where one kernel writes a tensor in one way and another reads it in another; they are told from the
shapes and the policy's counts.  On the machine that is the target, six files of the very network correct the law by one
factor before a search begins.

Errors of the law on files of random policies, in percent of the peak that was seen:

"""

LOADING = """
## Time of loading

Until a session is made.  Told for targets that are not at hand, by one law:

    load = {node:.2f} x nodes + {file:.1f} x MB of the file + {decoded:.1f} x MB that loading decodes

in runs of the kernel that all tables are in units of ({anchor_us:.0f} us on the machine below), so a target
loads as much slower as its table or estimate says of that kernel; nobody has held that against a second machine.  Where
the machine is the target, a file with the policy's shapes is loaded and timed instead.  Errors of the law, in percent
of the CPU time that was seen (the least of seven loads):

"""


def page(record: Mapping[str, Any]) -> str:
    """docs/memory.md."""
    runtime, file, decoded, activations = record["law"]
    law = (
        f"    peak = {runtime / 1e6:.1f} MB + max({file:.1f} x file + {decoded:.2f} x decoded, "
        f"{activations:.1f} x activations)\n"
    )
    node, file_byte, decoded_byte = record["load"]["law"]
    loading = LOADING.format(node=node, file=1e6 * file_byte, decoded=1e6 * decoded_byte, anchor_us=record["anchor_us"])
    files = record["networks"]
    peaks_mb = {name: [seen["peak_bytes"] / 1e6 for seen in each] for name, each in files.items()}
    loads_ms = {
        name: [seen["load_anchors"] * record["anchor_us"] / 1e3 for seen in each] for name, each in files.items()
    }
    where = record["machine"]
    return (
        f"{HEAD}{law}{BEHIND}{_errors(record, 'peak', 'MB', peaks_mb)}\n"
        "Held out: the law was fitted to the other networks.  Activations decide the peak of files of `mobilenetv2` "
        "more than of others,\nso a law without it hardly knows their number.\n"
        f"{loading}{_errors(record['load'], 'load', 'ms', loads_ms)}\n"
        f"{where['cpu']}, onnxruntime {where['packages']['onnxruntime']}, one thread, batch 1.\n"
    )


def _errors(judged: Mapping[str, Any], what: str, unit: str, seen: Mapping[str, Sequence[float]]) -> str:
    """A line a network: what was seen, and how far off it was told."""
    rows = [
        (
            f"`{name}`",
            str(len(errors)),
            f"{min(seen[name]):.1f} to {max(seen[name]):.1f} {unit}",
            *_cells(errors),
            *_cells(judged["held_out"][name]["errors_pct"]),
        )
        for name, errors in judged["errors_pct"].items()
    ]
    every = [error for errors in judged["errors_pct"].values() for error in errors]
    rows.append(("all", str(len(every)), "", *_cells(every), "", "", ""))
    head = ("network", "files", what, "mean", "95 of 100 within", "worst", "held out: mean", "95 of 100", "worst")
    return markdown(head, rows)


def _cells(errors_pct: Sequence[float]) -> tuple[str, str, str]:
    sizes = np.abs(errors_pct)
    return tuple(f"{value:.1f} %" for value in (sizes.mean(), np.percentile(sizes, 95), sizes.max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("step", choices=("measure", "fit"))
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--policies", type=int, default=POLICIES)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    record: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"networks": {}}
    if options.step == "measure":
        for network in options.networks:
            record["networks"][network] = measure(network, options.out, options.policies)
            record["machine"] = machine()
            record["anchor_us"] = anchor_us()
            save(record, RESULT)
    record |= judged({name: [Seen(**each) for each in files] for name, files in record["networks"].items()})
    save(record, RESULT)
    PAGE.write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    main()
