"""What fine-tuning in full leaves of an evaluation's drop, over finished policies: python benchmarks/mending.py

Reads the finished policies of the searches' manifests in benchmarks/results (and of those that are named), adds them to
benchmarks/results/mending.json, and says there how well what was left is told by the drop alone, by bytes alone, and by
hardness, the drop times a power of how much smaller the file is.  Each is a line in logarithms with one slope for all
networks and a constant for each; errors are of every policy held out in turn, of networks with three at least.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from _bench import RESULTS, save

from hirelc_deploy.search.problem import MENDED_BY_SIZE

RESULT = RESULTS / "mending.json"

LEAST_LEFT = 0.1
"""In points: less is not told apart by a few thousand images."""

LEAST_POLICIES = 3
"""Of a network: the constant takes one."""

Row = dict[str, float | str]


def finished_in(manifest: Path) -> list[Row]:
    """The policies of one search that were fine-tuned in full."""
    found = json.loads(manifest.read_text(encoding="utf-8"))
    front = (found.get("search") or {}).get("front", [])
    return [
        {
            "network": found["model"]["spec"].rpartition(":")[2],
            "size_bytes": each["size_bytes"],
            "drop_points": each["drop_points"],
            "left_points": each["finished_drop_points"],
        }
        for each in front
        if each["finished_drop_points"] is not None
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
    names = [str(row["network"]) for row in rows]
    kept = [row for row, name in zip(rows, names, strict=True) if names.count(name) >= LEAST_POLICIES]
    networks = [str(row["network"]) for row in kept]
    size, drop, left = (
        np.log(np.maximum([float(row[key]) for row in kept], LEAST_LEFT))
        for key in ("size_bytes", "drop_points", "left_points")
    )
    powers = (1.0, MENDED_BY_SIZE, 3.0, 4.0)
    told = {"drop": drop, "bytes": size} | {f"drop x smaller ^ {power:g}": drop - power * size for power in powers}
    return {"policies": len(kept)} | {
        name: round(held_out_error(networks, each, left), 3) for name, each in told.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("manifests", nargs="*", type=Path, help="others than those in benchmarks/results")
    manifests = [*sorted(RESULTS.glob("export_*.json")), *parser.parse_args().manifests]
    rows: list[Row] = json.loads(RESULT.read_text(encoding="utf-8"))["finished"] if RESULT.exists() else []
    for row in (row for manifest in manifests for row in finished_in(manifest)):
        if row not in rows:
            rows.append(row)
    rows.sort(key=lambda row: (row["network"], row["size_bytes"], row["drop_points"]))
    errors = judged(rows)
    save({"error": errors, "finished": rows}, RESULT)
    for name, error in errors.items():
        print(f"{name}: {error:g}")


if __name__ == "__main__":
    main()
