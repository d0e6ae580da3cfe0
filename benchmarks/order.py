"""Prune first or quantise first: python benchmarks/order.py small14

Policies of one width and one precision each, made real in both orders with equal training: that of an evaluation (4,096
images), halved between the two stages where formats come first.  Beside the drops stands how far each step alone moves
the outputs and the weights, and so which order the Progressive Intensity Hypothesis (arXiv 2603.18426) asks for.
Writes benchmarks/results/order_NETWORK.json and docs/order.md.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from _bench import RESULTS, ROOT, machine, markdown, save, workbench

from hirelc_deploy.budget import Budget
from hirelc_deploy.policy import PRUNE_FIRST, QUANTIZE_FIRST
from hirelc_deploy.posing import Posing
from hirelc_deploy.search.recipe import Recipe

OUT = Path("out/benchmarks/order")
PAGE = ROOT / "docs" / "order.md"
KEEP_PERCENT = (75, 50, 25)
STORAGES = ("int8", "int4", "int3", "int2")
ORDERS = {"prune first": PRUNE_FIRST, "quantise first": QUANTIZE_FIRST}


def measure(network: str, out: Path) -> dict[str, Any]:
    """Both orders of every policy."""
    with workbench(network, out / network, epochs=4) as bench:
        posing = Posing(bench, Budget())
        rows = []
        for keep in KEEP_PERCENT:
            for storage in STORAGES:
                policy = Recipe.parse(f"keep={keep}%,storage={storage},compute=fp32").policy(bench.space)
                strengths = posing.strengths(policy)
                scores = bench.recovered_scores([replace(policy, order=steps) for steps in ORDERS.values()])
                drops = {name: bench.scoring.drop(score) for name, score in zip(ORDERS, scores, strict=True)}
                asked_for = next(name for name, steps in ORDERS.items() if steps == strengths.weaker_first)
                rows.append(
                    {
                        "keep_percent": keep,
                        "storage": storage,
                        "drops": drops,
                        "asked_for": asked_for,
                        **asdict(strengths),
                    }
                )
                print(keep, storage, drops, asked_for, flush=True)
        error = bench.scoring.error(bench.task.search.examples)
        return {"machine": machine(), "score_error": error, "rows": rows}


INTRODUCTION = """# Prune first or quantise first

Written by `python benchmarks/order.py NETWORK`.  Drop in points on the search split after the training of an evaluation
(4,096 images in all), by order; how far each step alone moves the outputs (nats) and the weights (spectral norm of the
change over that of the weight, mean over layers); and the order in which the step that moves the outputs less comes
first, which is what `--order auto` takes.  *Right* where that order has the smaller drop, *even* where the two differ
by less than one standard error of a score.

Channels that go are told by those that stay ([compensation.md](compensation.md)) in both orders, in the second by what
the quantised network reads.
"""


def page() -> str:
    """docs/order.md, from the result files."""
    sections = [INTRODUCTION]
    for path in sorted(RESULTS.glob("order_*.json")):
        found = json.loads(path.read_text())
        rows, right, wrong = [], 0, 0
        for row in found["rows"]:
            first, second = row["drops"].values()
            better = min(row["drops"], key=row["drops"].__getitem__)
            even = abs(first - second) < found["score_error"]
            right += not even and better == row["asked_for"]
            wrong += not even and better != row["asked_for"]
            verdict = "even" if even else "right" if better == row["asked_for"] else "wrong"
            rows.append(
                (
                    f"{row['keep_percent']} %, {row['storage']}",
                    f"{first:.2f}",
                    f"{second:.2f}",
                    *(f"{row[step][of]:.3g}" for step in ("prune", "quantize") for of in ("outputs", "weights")),
                    row["asked_for"],
                    verdict,
                )
            )
        head = (
            "channels, storage",
            *(f"drop, {name}" for name in ORDERS),
            *("pruning: outputs", "weights", "rounding: outputs", "weights"),
            "the weaker first",
            "",
        )
        summary = f"right {right}, wrong {wrong}, even {len(rows) - right - wrong}"
        network = path.stem.removeprefix("order_")
        sections.append(
            f"## `{network}`: {summary}\n\nOne standard error of a score: {found['score_error']:.2f} points.\n\n"
            + markdown(head, rows)
        )
    return "\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    for network in options.networks:
        save(measure(network, options.out), RESULTS / f"order_{network}.json")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
