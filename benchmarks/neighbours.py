"""What another program on the same core does to speed-ups: python benchmarks/neighbours.py

`wide` with a quarter of its channels, in floats and in integers, beside the whole network in fp32: timed as often as
asked for, each time for as long as an export does, once with rounds beside a neighbour left out (`verify/quiet.py`) and
once with all of them.  On a machine of its own both say the same.  Writes benchmarks/results/neighbours_CPU.json; two
minutes and more.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _bench import RESULTS, cpu_kind, machine, markdown, save, workbench

from hirelc_deploy.cpu import cpu_flags
from hirelc_deploy.exporters._base import Arrays, Session
from hirelc_deploy.policy import Policy
from hirelc_deploy.search.recipe import Recipe
from hirelc_deploy.verify import timing
from hirelc_deploy.verify.measure import example
from hirelc_deploy.verify.quiet import Core, loop_ns

WHOLE = "whole, fp32"
RECIPES = {"a quarter, fp32": "keep=25%,compute=fp32", "a quarter, int8": "keep=25%,compute=int8"}
PATIENT_S = 600.0


def always_quiet() -> int:
    """The loop of a core that nobody looks at."""
    return 1


LOOPS: dict[str, Callable[[], int]] = {"not looked at": always_quiet, "watched": loop_ns}


def measure(sessions: dict[str, Session], inputs: Arrays, times: int) -> list[dict[str, Any]]:
    """Speed-ups of every measurement, by how the core is watched: (times,) of each file."""
    cores = {how: Core(loop, left_s=PATIENT_S) for how, loop in LOOPS.items()}
    found: dict[str, dict[str, Any]] = {how: {"seconds": [], "speedups": {}} for how in cores}
    for _ in range(times):
        for how, core in cores.items():
            began = time.perf_counter()
            seen = timing.interleave(sessions, inputs, core=core)
            found[how]["seconds"].append(time.perf_counter() - began)
            for name in RECIPES:
                ratio = timing.ratio(seen[WHOLE], seen[name], clock="cpu").value
                found[how]["speedups"].setdefault(name, []).append(ratio)
            print(how, {name: f"{each[-1]:.2f}" for name, each in found[how]["speedups"].items()}, flush=True)
    return [{"core": how, **each} for how, each in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/neighbours"))
    options = parser.parse_args()
    with workbench("wide", options.out / "wide" / "run", post_training=()) as bench:
        policies = {WHOLE: Policy({}, {})}
        policies |= {name: Recipe.parse(each).policy(bench.space) for name, each in RECIPES.items()}
        files = {name: bench.files.draft(policy) for name, policy in policies.items()}
        with bench.files.loaded(files) as sessions:
            rows = measure(sessions, example(bench.task, 1), options.times)
    save({"machine": machine(), "rows": rows}, RESULTS / f"neighbours_{cpu_kind(cpu_flags())}.json")
    cells = (
        (
            row["core"],
            name,
            *(f"{number(each):.2f}" for number in (np.median, np.min, np.max)),
            f"{np.std(each) / np.mean(each):.1%}",
            f"{np.mean(row['seconds']):.1f}",
        )
        for row in rows
        for name, each in row["speedups"].items()
    )
    print(markdown(("core", "file", "faster", "least", "most", "spread", "seconds each"), cells))


if __name__ == "__main__":
    main()
