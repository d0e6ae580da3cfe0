"""At what rate a compressed network learns best: python benchmarks/fine_tuning.py small14 depthwise14 vit14

Recipes from mild to harsh, each evaluated (4,096 images in batches of 32) with Adam's peak rate held at several values,
and with the one that `distil.peak_rate` tells from the network's distance to the original.  With `--epochs 6` some of
them are finished instead, in batches of 128, at multiples of the rate that an evaluation would have.

Writes benchmarks/results/fine_tuning_NETWORK.json or finishing_rates_NETWORK.json, and docs/fine-tuning.md from all.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from _bench import RESULTS, ROOT, machine, markdown, save, workbench
from torch import nn

from hirelc_deploy.compress import distil
from hirelc_deploy.policy import Policy
from hirelc_deploy.search.recipe import Recipe
from hirelc_deploy.verify.accuracy import Outputs
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
FINISHED = (
    "keep=25%,storage=int4,compute=fp32",
    "keep=25%,storage=int2,compute=fp32",
    "keep=12.5%,storage=int4,compute=fp32",
)
MULTIPLES = (1, 2, 4)
"""Of what an evaluation's rate would be."""

Rate = Callable[[float, float, float, int], float]
"""`distil.peak_rate`, or what takes its place."""


def measure(network: str, out: Path, epochs: int, seed: int) -> dict[str, Any]:
    with workbench(network, out / f"{network}-{seed}", epochs=epochs, seed=seed) as bench:
        rows = []
        for text in FINISHED if epochs else RECIPES:
            rows.append(finished(bench, text) if epochs else evaluated(bench, text))
            print(rows[-1], flush=True)
        error = bench.scoring.error(bench.task.search.examples)
        return {"machine": machine(), "seed": seed, "epochs": epochs, "score_error": error, "rows": rows}


def evaluated(bench: Workbench, text: str) -> dict[str, Any]:
    """An evaluation's drop at each of RATES, and at what is told."""
    row: dict[str, Any] = {"recipe": text, "evaluated": {}}
    peak_rate = distil.peak_rate

    def told(default: float, distance: float, kept: float, batch: int) -> float:
        row.update(distance=distance, kept=kept, rate=peak_rate(default, distance, kept, batch))
        return float(row["rate"])

    rates: dict[str, Rate] = {f"{rate:g}": lambda *_, rate=rate: rate for rate in RATES}
    for name, rate in {**rates, "told": told}.items():
        outputs = outputs_of(bench, text, bench.trainer.recovered, name, rate)
        row["evaluated"][name] = bench.scoring.drop(bench.scoring.of(outputs))
    return row


def finished(bench: Workbench, text: str) -> dict[str, Any]:
    """What is left of the drop and of the distance after all epochs, at each of MULTIPLES."""
    row: dict[str, Any] = {"recipe": text, "finished": {}, "distance": {}}
    peak_rate = distil.peak_rate
    original = distil.Teacher(bench.trainer.original, bench.task.search)
    said = original.outputs(np.arange(bench.task.search.examples), {})

    def make(policy: Policy, name: str) -> nn.Module:
        return bench.trainer.trained(policy, name)[0]

    for times in MULTIPLES:

        def multiple(default: float, distance: float, kept: float, batch: int, times: int = times) -> float:
            row["rate"] = peak_rate(default, distance, kept, distil.RATE_BATCH)
            row["batch"] = batch
            return float(times * row["rate"])

        outputs = outputs_of(bench, text, make, str(times), multiple)
        row["finished"][str(times)] = bench.scoring.drop(bench.scoring.of(outputs))
        row["distance"][str(times)] = original.distance(distil.as_tensors(outputs), said).item()
    return row


def outputs_of(bench: Workbench, text: str, make: Callable[..., nn.Module], named: str, rate: Rate) -> Outputs:
    """On the search split, of the recipe's network, trained at the rate of this name."""
    policy = Recipe.parse(text).policy(bench.space, {})
    name = f"{text}/{named}/{make.__name__}"
    with patch.object(distil, "peak_rate", rate):
        outputs = bench.simulated_outputs(make(policy, name), policy)
    bench.run.drop_state(name)
    return outputs


PAGE = ROOT / "docs" / "fine-tuning.md"

INTRODUCTION = """# At what rate a compressed network learns

Written by `python benchmarks/fine_tuning.py NETWORK…`, whose head says what is measured.  Drop in points on the search
split, one seed.  *Distance* is the mean squared difference of the outputs from the original's before training, in units
of their variance; *kept* the part of the parameters that is left.

The best rate grows with what is to be mended, and with narrowness.  At one rate for all, a network that lacks little is
pushed away from where it was (a point and more on `vit14`), and one that lacks much does not get far.  So the rate is
told: 1.5e-3 times the root of distance over kept, between 2.5e-4 and 8e-3 in batches of 32 (`compress/distil.py`).

Measured with channels that go told by those that stay ([compensation.md](compensation.md)): distances are smaller for
it, down to a tenth, and the rates that are told with them; the rule was found before that, and holds.
"""

ON_FINISHING = """## And in batches of 128, to the end

A policy that is finished sees all of the train split, in the task's own batches.  One four times as large is surer of
its gradient, and Adam's rate may grow with the root of that (arXiv 2205.10287): twice, in 128 instead of 32.  In
brackets is how far the outputs are from the original's, which is less a matter of luck than a score is.  So
`peak_rate` is told the batch.
"""


def page() -> str:
    """From all result files."""
    sections = [INTRODUCTION]
    for path in sorted(RESULTS.glob("fine_tuning_*.json")):
        found = json.loads(path.read_text())
        rates = list(found["rows"][0]["evaluated"])
        head = ["recipe", "distance", "kept", "told rate", *(f"at {rate}" for rate in rates[:-1]), "at what is told"]
        rows = [
            [
                row["recipe"],
                f"{row['distance']:.3f}",
                f"{row['kept']:.2f}",
                f"{row['rate']:.1e}",
                *(f"{row['evaluated'][rate]:.2f}" for rate in rates),
            ]
            for row in found["rows"]
        ]
        sections.append(titled(path.stem.removeprefix("fine_tuning_"), found, markdown(head, rows)))
    sections.append(ON_FINISHING)
    for path in sorted(RESULTS.glob("finishing_rates_*.json")):
        found = json.loads(path.read_text())
        head = ["recipe", "an evaluation's rate", "epochs", *(f"{each} times that" for each in MULTIPLES)]
        rows = [
            [
                row["recipe"],
                f"{row['rate']:.1e}",
                str(found["epochs"]),
                *(f"{row['finished'][str(each)]:.2f} ({row['distance'][str(each)]:.4f})" for each in MULTIPLES),
            ]
            for row in found["rows"]
        ]
        name = path.stem.removeprefix("finishing_rates_")
        sections.append(titled(name, found, markdown(head, rows), level=3))
    return "\n".join(sections)


def titled(title: str, found: dict[str, Any], table: str, *, level: int = 2) -> str:
    error = f"One standard error of a score is {found['score_error']:.2f} points."
    return f"{'#' * level} `{title}`\n\n{error}\n\n{table}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--epochs", type=int, default=0, help="finish recipes, instead of evaluating them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    for network in options.networks:
        found = measure(network, options.out, options.epochs, options.seed)
        save(found, RESULTS / f"{'finishing_rates' if options.epochs else 'fine_tuning'}_{network}.json")
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
