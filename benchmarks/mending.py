"""What fine-tuning in full leaves of an evaluation's drop, over finished policies: python benchmarks/mending.py

Reads the finished policies of the searches' manifests in benchmarks/results (and of those that are named), adds them to
benchmarks/results/mending.json, and says there how well what was left is told by the drop alone, by bytes alone, by
speed alone, by all of them, and by hardness: the drop times powers of how many times smaller and faster the file is
(`search/finish.py`).  Each is a line in logarithms with one slope for all networks and a constant for each; errors are
of every policy held out in turn, of networks with three at least.  The result file also has policies that only the logs
of searches told of; how fast they are is not always known, and they are then not judged.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from _bench import RESULTS, save

from hirelc_deploy.search.finish import CHEAPER
from hirelc_deploy.verify.manifest import Manifest

RESULT = RESULTS / "mending.json"

POWERS = (0.0, 0.25, CHEAPER, 1.0)
"""Of how many times smaller, and of how many times faster."""

LEAST_LEFT = 0.1
"""In points: less is not told apart by a few thousand images."""

LEAST_POLICIES = 3
"""Of a network: the constant takes one."""

Row = dict[str, Any]


def finished_in(manifest: Path) -> list[Row]:
    """The policies of one search that were fine-tuned in full."""
    found = Manifest.model_validate_json(manifest.read_text(encoding="utf-8"))
    return [
        {
            "network": found.model.spec.rpartition(":")[2],
            "size_bytes": each.size_bytes,
            "speedup": each.speedup,
            "drop_points": each.drop_points,
            "left_points": each.finished_drop_points,
        }
        for each in found.search.front
        if each.finished_drop_points is not None
    ]


def held_out_error(networks: Sequence[str], told: np.ndarray, left: np.ndarray) -> float:
    """Root mean square in logarithms, of every policy told by a line through the others."""
    constants = np.array([[float(each == name) for name in sorted(set(networks))] for each in networks])
    columns = np.column_stack([told, constants])
    errors = []
    for i in range(len(left)):
        others = np.arange(len(left)) != i
        line = np.linalg.lstsq(columns[others], left[others], rcond=None)[0]
        errors.append(columns[i] @ line - left[i])
    return float(np.sqrt(np.mean(np.square(errors))))


def judged(rows: Sequence[Row]) -> dict[str, float]:
    """The error by what is told from."""
    rows = [row for row in rows if row["speedup"] is not None]
    names = [row["network"] for row in rows]
    kept = [row for row, name in zip(rows, names, strict=True) if names.count(name) >= LEAST_POLICIES]
    networks = [row["network"] for row in kept]
    size, speed, drop, left = (
        np.log(np.maximum([row[key] for row in kept], LEAST_LEFT))
        for key in ("size_bytes", "speedup", "drop_points", "left_points")
    )
    told = {"drop": drop, "bytes": size, "speed": speed, "all": np.column_stack([drop, size, speed])}
    for smaller, faster in product(POWERS, POWERS):
        if smaller or faster:
            told[f"drop x smaller ^ {smaller:g} x faster ^ {faster:g}"] = drop - smaller * size + faster * speed
    errors = {name: round(held_out_error(networks, each, left), 3) for name, each in told.items()}
    return {"policies": len(kept), **errors}


def _key(row: Row) -> tuple[Any, ...]:
    """What tells two policies apart."""
    return row["network"], row["size_bytes"], row["drop_points"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("manifests", nargs="*", type=Path, help="others than those in benchmarks/results")
    manifests = [*sorted(RESULTS.glob("export_*_hierarchical*.json")), *parser.parse_args().manifests]
    rows: list[Row] = json.loads(RESULT.read_text(encoding="utf-8"))["finished"] if RESULT.exists() else []
    known = {_key(row): row for row in [*rows, *(row for manifest in manifests for row in finished_in(manifest))]}
    rows = sorted(known.values(), key=_key)
    errors = judged(rows)
    save({"error": errors, "finished": rows}, RESULT)
    print(json.dumps(errors, indent=1))


if __name__ == "__main__":
    main()
