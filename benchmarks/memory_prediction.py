"""Memory told from shapes and formats, against processes: python benchmarks/memory_prediction.py measure NETWORK…

    python benchmarks/memory_prediction.py measure wide vit mobilenetv2 resnet18   files of random policies, each loaded
                                                                                   and run in a process of its own
    python benchmarks/memory_prediction.py fit                                     the law, and how far off it is

The original and random policies of each network, with untrained weights, since no memory depends on values: each layer
any compute and a storage that needs no search for its values, every prune group any count.  The law is fitted to all
networks, and once more with each of them held out.  Writes benchmarks/results/memory_prediction.json, docs/memory.md;
some twenty minutes.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _bench import RESULTS, ROOT, machine, markdown, save
from _networks import NETWORKS, bench_of, random_policies
from scipy.optimize import least_squares

from hirelc_deploy.cost.latency import decisions_of
from hirelc_deploy.cost.memory import Activations, MemoryLaw
from hirelc_deploy.exporters._memory import decoded_bytes
from hirelc_deploy.policy import Policy
from hirelc_deploy.workbench import Workbench

RESULT = RESULTS / "memory_prediction.json"
PAGE = ROOT / "docs" / "memory.md"
OUT = Path("out/benchmarks/memory_prediction")
POLICIES = 24

START = (12e6, 3.0, 1.0, 5.0)
"""Of a law's four numbers, from which they are fitted."""
COMMON_ERROR = 0.05
"""Errors above it count by their size and not by its square: a page more or less of an allocator is no matter."""


@dataclass(frozen=True)
class Seen:
    """One file: what the law goes by, and the peak of its process."""

    size_bytes: int
    decoded_bytes: int
    activation_bytes: float
    peak_bytes: int


def measure(network: str, out: Path, policies: int) -> list[dict[str, Any]]:
    """The original and random policies; what was measured before is not again."""
    with bench_of(network, out) as bench:
        found = []
        for number, policy in enumerate([Policy({}, {}), *random_policies(bench.space, policies)]):
            peak_bytes = bench.run.step(f"peak/{number}", partial(bench.latencies.seen_memory_bytes, policy))
            assert peak_bytes is not None, "this system does not tell a process its peak"
            found.append(asdict(_seen(bench, policy, peak_bytes)))
            print(f"{network} {number}/{policies}: {found[-1]}", flush=True)
    return found


def _seen(bench: Workbench, policy: Policy, peak_bytes: int) -> Seen:
    """What the law goes by is told anew, by the rules of today."""
    network = bench.latencies.network
    file = bench.files.foreseen(policy)
    (activation_bytes,) = Activations(network)(decisions_of(network, [policy]))
    return Seen(len(file), decoded_bytes(file), float(activation_bytes), peak_bytes)


# -- the law ---------------------------------------------------------------------------------------------------------


def told(numbers: Sequence[float], files: Sequence[Seen]) -> np.ndarray:
    """Bytes at the peak, (files,)."""
    parts = np.array([[f.size_bytes, f.decoded_bytes, f.activation_bytes] for f in files], float).T
    return MemoryLaw(*numbers, decoded_bytes=decoded_bytes)(*parts)


def fitted(files: Sequence[Seen]) -> list[float]:
    """The law's numbers, by relative errors."""
    peaks = np.array([file.peak_bytes for file in files])
    scale = np.array(START)

    def off(numbers: np.ndarray) -> np.ndarray:
        return np.asarray(np.log(np.maximum(told(numbers * scale, files), 1.0) / peaks))

    found = least_squares(off, np.ones(len(START)), loss="soft_l1", f_scale=COMMON_ERROR, bounds=(0, np.inf))
    return (found.x * scale).tolist()


def errors_pct(numbers: Sequence[float], files: Sequence[Seen]) -> np.ndarray:
    """(files,)."""
    return 100 * (told(numbers, files) / np.array([file.peak_bytes for file in files]) - 1)


def judged(networks: Mapping[str, Sequence[Seen]]) -> dict[str, Any]:
    """The law of all networks; its errors on each, and those of a law that has not seen the network."""
    law = fitted([file for files in networks.values() for file in files])
    found: dict[str, Any] = {"law": law, "errors_pct": {}, "held_out": {}}
    for name, files in networks.items():
        found["errors_pct"][name] = errors_pct(law, files).tolist()
        others = fitted([file for other, files in networks.items() if other != name for file in files])
        found["held_out"][name] = {"law": others, "errors_pct": errors_pct(others, files).tolist()}
    return found


# -- the page --------------------------------------------------------------------------------------------------------

HEAD = """# Memory, told before anything is built

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


def page(record: Mapping[str, Any]) -> str:
    """docs/memory.md."""
    runtime, file, decoded, activations = record["law"]
    law = (
        f"    peak = {runtime / 1e6:.1f} MB + max({file:.1f} x file + {decoded:.2f} x decoded, "
        f"{activations:.1f} x activations)\n"
    )
    rows = []
    for name, errors in record["errors_pct"].items():
        others = record["held_out"][name]["errors_pct"]
        peaks_mb = [seen["peak_bytes"] / 1e6 for seen in record["networks"][name]]
        rows.append(
            (
                f"`{name}`",
                str(len(errors)),
                f"{min(peaks_mb):.1f} to {max(peaks_mb):.1f} MB",
                *_cells(errors),
                *_cells(others),
            )
        )
    every = [error for errors in record["errors_pct"].values() for error in errors]
    rows.append(("all", str(len(every)), "", *_cells(every), "", "", ""))
    head = ("network", "files", "peak", "mean", "95 of 100 within", "worst", "held out: mean", "95 of 100", "worst")
    where = record["machine"]
    return (
        f"{HEAD}{law}{BEHIND}{markdown(head, rows)}\n"
        "Held out: the law was fitted to the other networks.  Activations decide the peak of files of `mobilenetv2` "
        "more than of others,\nso a law without it hardly knows their number.\n\n"
        f"{where['cpu']}, onnxruntime {where['packages']['onnxruntime']}, one thread, batch 1.\n"
    )


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
            save(record, RESULT)
    record |= judged({name: [Seen(**each) for each in files] for name, files in record["networks"].items()})
    save(record, RESULT)
    PAGE.write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    main()
