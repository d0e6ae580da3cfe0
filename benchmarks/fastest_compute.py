"""`compute=fastest` beside all layers in integers and all in floats: python benchmarks/fastest_compute.py

`wide` with all its channels, half and a quarter of them, untrained: the predictor's choice, and three files of each
timed side by side in one process.  Writes benchmarks/results/fastest_compute.json.
"""

import argparse
from pathlib import Path
from typing import Any

from _bench import RESULTS, machine, markdown, save, workbench

from hirelc_deploy.policy import Compute
from hirelc_deploy.search.recipe import Recipe
from hirelc_deploy.verify import timing
from hirelc_deploy.verify.measure import example

RESULT = RESULTS / "fastest_compute.json"
KEEP_PERCENT = (100, 50, 25)
SECONDS = 20.0


def measure(network: str, keep_percent: float, out: Path) -> dict[str, Any]:
    """CPU time of one thread of the three files, and in what the fastest one's layers compute."""
    with workbench(network, out / network / "run") as bench:
        counts = Recipe(keep_percent, Compute.FP32).counts(bench.space)
        chosen = bench.latencies.fastest_computes(counts)
        policies = {
            "fp32": Recipe(keep_percent, Compute.FP32).policy(bench.space),
            "int8": Recipe(keep_percent, Compute.INT8).policy(bench.space),
            "fastest": Recipe(keep_percent, None).policy(bench.space, chosen),
        }
        files = {name: bench.files.draft(policy) for name, policy in policies.items()}
        with bench.files.loaded(files) as sessions:
            times = timing.interleave(sessions, example(bench.task, 1), seconds=SECONDS)
    ratios = {name: timing.ratio(times[name], times["fastest"], clock="cpu") for name in ("fp32", "int8")}
    return {
        "keep_percent": keep_percent,
        "layers_in_int8": sum(compute is Compute.INT8 for compute in chosen.values()),
        "layers": len(chosen),
        "computes": {layer: str(compute) for layer, compute in chosen.items()},
        "cpu_p50_ms": {name: each.cpu_p50_ms for name, each in times.items()},
        "fastest_over": {name: {"value": r.value, "ci95": [r.lo, r.hi]} for name, r in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--network", default="wide")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/fastest_compute"))
    options = parser.parse_args()
    rows = [measure(options.network, percent, options.out) for percent in KEEP_PERCENT]
    save({"network": options.network, "machine": machine(), "rows": rows}, RESULT)
    cells = (
        (
            f"{row['keep_percent']} %",
            f"{row['layers_in_int8']} of {row['layers']}",
            *(f"{row['cpu_p50_ms'][name]:.3f}" for name in ("fp32", "int8", "fastest")),
        )
        for row in rows
    )
    print(markdown(("channels", "layers in int8", "fp32, ms", "int8, ms", "fastest, ms"), cells))


if __name__ == "__main__":
    main()
