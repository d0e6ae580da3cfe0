"""At what rate a compressed network learns best: python benchmarks/fine_tuning.py small14 depthwise14 vit14

Recipes from mild to harsh, each evaluated (4,096 images) with Adam's peak rate held at several values, and with the one
that `distil.peak_rate` tells from the network's distance to the original.  With `--epochs 4` they are finished as well,
at the rate that was used for all pruned networks before and at the one that is told.

Writes benchmarks/results/fine_tuning_NETWORK.json, and docs/fine-tuning.md from all of them.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from _bench import RESULTS, ROOT, machine, markdown, save, workbench
from torch import nn

from hirelc_deploy.compress import distil
from hirelc_deploy.policy import Policy
from hirelc_deploy.search.recipe import Recipe
from hirelc_deploy.workbench import Workbench

OUT = Path("out/benchmarks/fine_tuning")
RECIPES = (
    "keep=100%,storage=int2,compute=fp32",
    "keep=75%,storage=int4,compute=fp32",
    "keep=62.5%,storage=int3,compute=fp32",
    "keep=50%,storage=int4,compute=fp32",
    "keep=37.5%,storage=int4,compute=fp32",
    "keep=25%,storage=int4,compute=fp32",
    "keep=12.5%,storage=int4,compute=fp32",
)
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
BEFORE = 2e-3
"""What every pruned network was trained at, whatever it lacked."""


def measure(network: str, out: Path, epochs: int, seed: int) -> dict[str, Any]:
    with workbench(network, out / f"{network}-{seed}", epochs=epochs, seed=seed) as bench:

        def finished(policy: Policy, name: str) -> nn.Module:
            return bench.trainer.trained(policy, name)[0]

        rows = []
        for text in RECIPES:
            row: dict[str, Any] = {"recipe": text, "evaluated": {}, "finished": {}}
            for rate in (*RATES, None):
                row["evaluated"][named(rate)] = drop(bench, text, bench.trainer.recovered, rate, row)
            for rate in (BEFORE, None) if epochs else ():
                row["finished"][named(rate)] = drop(bench, text, finished, rate)
            rows.append(row)
            print(row, flush=True)
        error = bench.scoring.error(bench.task.search.examples)
        return {"machine": machine(), "seed": seed, "epochs": epochs, "score_error": error, "rows": rows}


def named(rate: float | None) -> str:
    return "told" if rate is None else f"{rate:g}"


def drop(
    bench: Workbench,
    text: str,
    make: Callable[..., nn.Module],
    rate: float | None,
    row: dict[str, Any] | None = None,
) -> float:
    """On the search split, of the recipe's network, trained at this rate; `row` takes down what is told, and why."""
    policy = Recipe.parse(text).policy(bench.space, {})
    peak_rate = distil.peak_rate

    def held(default: float, distance: float, kept: float) -> float:
        found = peak_rate(default, distance, kept)
        if row is not None:
            row.update(distance=distance, kept=kept, rate=found)
        return found if rate is None else rate

    name = f"{text}/{named(rate)}/{make.__name__}"
    with patch.object(distil, "peak_rate", held):
        scored = bench.scoring.of(bench.simulated_outputs(make(policy, name), policy))
    bench.run.drop_state(name)
    return bench.scoring.drop(scored)


PAGE = ROOT / "docs" / "fine-tuning.md"

INTRODUCTION = """# At what rate a compressed network learns

Written by `python benchmarks/fine_tuning.py NETWORK…`, whose head says what is measured.  Drop in points on the search
split, one seed.  *Distance* is the mean squared difference of the outputs from the original's before training, in units
of their variance; *kept* the part of the parameters that is left.

The best rate grows with what is to be mended, and with narrowness.  At one rate for all, a network that lacks little is
pushed away from where it was (a point and more on `vit14`), and one that lacks much does not get far.  So the rate is
told: 1.5e-3 times the root of distance over kept, between 2.5e-4 and 8e-3 (`compress/distil.py`).

Measured with channels that go told by those that stay ([compensation.md](compensation.md)): distances are smaller for
it, down to a tenth, and the rates that are told with them; the rule was found before that, and holds.
"""


def page() -> str:
    """From all result files."""
    sections = [INTRODUCTION]
    for path in sorted(RESULTS.glob("fine_tuning_*.json")):
        found = json.loads(path.read_text())
        rates = list(found["rows"][0]["evaluated"])
        finished = list(found["rows"][0]["finished"])
        head = ["recipe", "distance", "kept", "told rate", *(f"at {rate}" for rate in rates[:-1]), "at what is told"]
        head += [f"{found['epochs']} epochs, {'at' if rate != 'told' else 'as'} {rate}" for rate in finished]
        rows = [
            [
                row["recipe"],
                f"{row['distance']:.3f}",
                f"{row['kept']:.2f}",
                f"{row['rate']:.1e}",
                *(f"{row['evaluated'][rate]:.2f}" for rate in rates),
                *(f"{row['finished'][rate]:.2f}" for rate in finished),
            ]
            for row in found["rows"]
        ]
        sections.append(
            f"## `{path.stem.removeprefix('fine_tuning_')}`\n\nOne standard error of a score is "
            f"{found['score_error']:.2f} points.\n\n" + markdown(head, rows)
        )
    return "\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--epochs", type=int, default=0, help="finish the recipes as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    for network in options.networks:
        found = measure(network, options.out, options.epochs, options.seed)
        save(found, RESULTS / f"fine_tuning_{network}.json")
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
