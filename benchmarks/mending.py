"""What fine-tuning in full leaves of an evaluation's drop, over finished policies: python benchmarks/mending.py

Reads the finished policies of the searches' manifests in benchmarks/results (and of those that are named), adds them to
benchmarks/results/mending.json, and says there how well what was left is told by the drop alone, by bytes alone, by
speed alone, by all of them, by the drop times powers of how many times smaller and faster the file is, and by the same
over powers of the part of its layers that is whole (`Problem.whole`).  One of the first of these is hardness
(`search/finish.py`).  Each is a line in logarithms with one slope for all networks and a constant for each, which is
another where the evaluation's channels were told by those that stay (`compress/compensate.py`), since it then drops by
less, and where the policy was trained at the rate of its own batches (`compress/distil.py`), for so many epochs, which
leaves less; errors are of every policy held out in turn, of networks with three at least.

And it says how well a policy between two others, the milder of which held a limit that the harder did not, is told by
the line through both: a straight one, and one in logarithms.

The result file also has policies that only the logs of searches told of; how fast they are, or how much of them is
whole, is not always known, and they are then not judged.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
from _bench import RESULTS, save

from hirelc_deploy.search.finish import CHEAPER
from hirelc_deploy.verify.manifest import Manifest

RESULT = RESULTS / "mending.json"

POWERS = (0.0, 0.25, CHEAPER, 1.0)
"""Of how many times smaller, and of how many times faster."""

WHOLE_POWERS, CHEAPER_POWERS = (0.0, 0.5, 1.0, 2.0, 3.0), (0.0, 0.25, CHEAPER)
"""Of the part that is whole, and of smaller times faster, where the first is known."""

LEAST_LEFT = 0.1
"""In points: less is not told apart by a few thousand images."""

BETWEEN = 0.3
"""In points: the limit that the milder of two holds and the harder does not."""

LEAST_POLICIES = 3
"""Of a network: the constant takes one."""

TOLD_SINCE = "2026-11-30T12:00"
"""Manifests of this time and later are of evaluations whose channels were told by those that stay."""

OWN_RATE_SINCE = "2026-11-30T18:12"
"""Manifests of this time and later are of policies that were finished at the rate of their own batches."""

Row = dict[str, Any]


def finished_in(manifest: Path) -> list[Row]:
    """The policies of one search that were fine-tuned in full."""
    found = Manifest.model_validate_json(manifest.read_text(encoding="utf-8"))
    return [
        {
            "network": found.model.spec.rpartition(":")[2],
            "size_bytes": each.size_bytes,
            "speedup": each.speedup,
            "whole": each.whole_part,
            "told": found.created >= TOLD_SINCE,
            "own_rate": found.created >= OWN_RATE_SINCE,
            "epochs": found.training.epochs if found.training and found.created >= OWN_RATE_SINCE else None,
            "drop_points": each.drop_points,
            "left_points": each.finished_drop_points,
        }
        for each in found.search.front
        if each.finished_drop_points is not None
    ]


def kind(row: Row) -> str:
    """What has a constant of its own."""
    epochs = f", {row['epochs']} epochs" if row.get("epochs") else ""
    return f"{row['network']}{', told' * row.get('told', False)}{', own rate' * row.get('own_rate', False)}{epochs}"


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


def with_known(rows: Sequence[Row], key: str) -> list[Row]:
    """Those of which it is known, of networks with enough of them."""
    known = [row for row in rows if row.get(key) is not None]
    names = [kind(row) for row in known]
    return [row for row, name in zip(known, names, strict=True) if names.count(name) >= LEAST_POLICIES]


def logs(rows: Sequence[Row], *keys: str) -> list[np.ndarray]:
    """Logarithms of these figures, each (rows,)."""
    return [np.log(np.maximum([row[key] for row in rows], LEAST_LEFT)) for key in keys]


def judged(rows: Sequence[Row]) -> dict[str, float]:
    """The error by what is told from, where speed is known."""
    kept = with_known(rows, "speedup")
    size, speed, drop = logs(kept, "size_bytes", "speedup", "drop_points")
    told = {"drop": drop, "bytes": size, "speed": speed, "all": np.column_stack([drop, size, speed])}
    for smaller, faster in product(POWERS, POWERS):
        if smaller or faster:
            told[f"drop x smaller ^ {smaller:g} x faster ^ {faster:g}"] = drop - smaller * size + faster * speed
    return errors_of(told, kept)


def judged_by_whole(rows: Sequence[Row]) -> dict[str, float]:
    """The same where it is known how much is whole as well."""
    kept = with_known(with_known(rows, "speedup"), "whole")
    size, speed, drop, whole = logs(kept, "size_bytes", "speedup", "drop_points", "whole")
    told = {}
    for cheaper, power in product(CHEAPER_POWERS, WHOLE_POWERS):
        name = f"drop x (smaller x faster) ^ {cheaper:g} / whole ^ {power:g}"
        told[name] = drop + cheaper * (speed - size) - power * whole
    return errors_of(told, kept)


def judged_between(rows: Sequence[Row]) -> dict[str, Any]:
    """Root mean square, in points, of what is left of a policy whose hardness lies between those of two others."""
    errors: dict[str, list[tuple[float, float]]] = {}
    known = with_known(rows, "speedup")
    for name in sorted({kind(row) for row in known}):
        ordered = sorted((_hardness(row), float(row["left_points"])) for row in known if kind(row) == name)
        for (mild, held), (hard, left), (harder, failed) in combinations(ordered, 3):
            if held <= BETWEEN < failed and mild < hard < harder:
                straight = float(np.interp(hard, (mild, harder), (held, failed)))
                ends = np.log(np.maximum((held, failed), LEAST_LEFT))
                in_logs = float(np.exp(np.interp(np.log(hard), np.log((mild, harder)), ends)))
                errors.setdefault(name, []).append((straight - left, in_logs - left))
    return {
        name: {"triples": len(each), "straight": round(straight, 3), "in logarithms": round(in_logs, 3)}
        for name, each in errors.items()
        for straight, in_logs in [np.sqrt(np.mean(np.square(each), axis=0)).tolist()]
    }


def errors_of(told: dict[str, np.ndarray], rows: Sequence[Row]) -> dict[str, float]:
    """How far what was left is off by each of these."""
    networks, (left,) = [kind(row) for row in rows], logs(rows, "left_points")
    errors = {name: round(held_out_error(networks, each, left), 3) for name, each in told.items()}
    return {"policies": len(rows), **errors}


def _hardness(row: Row) -> float:
    """But for a factor that is the network's."""
    return float(row["drop_points"] * (row["speedup"] / row["size_bytes"]) ** CHEAPER)


def _key(row: Row) -> tuple[Any, ...]:
    """What tells two policies apart."""
    return row["network"], row["size_bytes"], row["drop_points"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("manifests", nargs="*", type=Path, help="others than those in benchmarks/results")
    manifests = [*sorted(RESULTS.glob("export_*_hierarchical*.json")), *parser.parse_args().manifests]
    rows: list[Row] = json.loads(RESULT.read_text(encoding="utf-8"))["finished"] if RESULT.exists() else []
    known = {_key(row): row for row in rows}
    for row in (row for manifest in manifests for row in finished_in(manifest)):
        # a manifest of before 2026-11-30 does not say how much is whole
        told = {name: value for name, value in row.items() if value is not None}
        known[_key(row)] = known.get(_key(row), {}) | told
    rows = sorted(known.values(), key=_key)
    found = {
        "error": judged(rows),
        "error_by_what_is_whole": judged_by_whole(rows),
        "error_between_points": judged_between(rows),
    }
    save({**found, "finished": rows}, RESULT)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
