"""What channels that go are worth when those that stay tell them: python benchmarks/compensation.py

Recipes of the small networks, cut in three ways: those channels go that have the smallest weights, and what is left
stays as it was; the same channels, and those that stay tell them; and those that the others tell best.  How far the
outputs are from the original's before any training, with statistics estimated anew, and the drop of an evaluation
(4,096 images).  `--finished` trains in full as well, which takes an hour.

Writes benchmarks/results/compensation.json and docs/compensation.md.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from _bench import RESULTS, ROOT, cpu_text, machine, markdown, save, workbench

from hirelc_deploy.policy import Policy
from hirelc_deploy.search.recipe import Recipe
from hirelc_deploy.trainer import Trainer
from hirelc_deploy.verify.accuracy import Outputs
from hirelc_deploy.workbench import Workbench

OUT = Path("out/benchmarks/compensation")
NETWORKS = ("small14", "depthwise14", "vit14")
KEEPS = ("75%", "50%", "25%", "12.5%")
RECIPE = "keep={},storage=int4,compute=fp32"
EPOCHS = 6
WAYS = {"plain": ("l2", False), "told": ("l2", True), "obs": ("obs", True)}
"""Importance, and whether what is left is changed."""


def measure(network: str, out: Path, *, finished: bool) -> dict[str, Any]:
    """Each recipe in each way."""
    with workbench(network, out / network, epochs=EPOCHS) as bench:
        original = bench.scoring.outputs(bench.model)
        rows = []
        for keep in KEEPS:
            policy = Recipe.parse(RECIPE.format(keep)).policy(bench.space, {})
            for way in WAYS:
                found = figures(bench, cutting(bench.trainer, way), policy, original, way, finished=finished)
                row = {"keep": keep, "way": way, **found}
                rows.append(row)
                print(network, row, flush=True)
        error = bench.scoring.error(bench.task.search.examples)
    return {"network": network, "score_error": error, "rows": rows}


def cutting(trainer: Trainer, way: str) -> Trainer:
    """The same that cuts in this way."""
    found = trainer.starting_from(trainer._start)
    found._importance, found._compensates = WAYS[way]
    return found


def figures(
    bench: Workbench, trainer: Trainer, policy: Policy, original: Outputs, name: str, *, finished: bool
) -> dict[str, float]:
    key = f"{name}/{policy.digest()}"

    def settled() -> float:
        return distance(bench.scoring.outputs(trainer.settled(policy)), original)

    def evaluated() -> float:
        return drop(bench, trainer.recovered(policy, f"evaluated/{key}"), policy)

    def trained() -> float:
        return drop(bench, trainer.trained(policy, f"finished/{key}")[0], policy)

    steps = {"distance": settled, "evaluated": evaluated} | ({"finished": trained} if finished else {})
    return {step: bench.run.step(f"{step}/{key}", make) for step, make in steps.items()}


def drop(bench: Workbench, model: Any, policy: Policy) -> float:
    return bench.scoring.drop(bench.scoring.of(bench.simulated_outputs(model, policy)))


def distance(outputs: Outputs, original: Outputs) -> float:
    """Mean squared difference in units of the original's variance."""
    found, wanted = (np.concatenate([each.ravel() for each in some.values()]) for some in (outputs, original))
    return float(np.square(found - wanted).mean() / wanted.var())


PAGE = ROOT / "docs" / "compensation.md"

INTRODUCTION = """# Channels that go, told by those that stay

Written by `python benchmarks/compensation.py`, whose head says what is measured.  Before channels are cut, every layer
that reads them gets for each the combination of those that stay which is nearest to it on what the layer has read
(1,024 train examples): it is multiplied into the layer's weights, and what is constant of the rest into its bias, or
into the mean of the BatchNorm behind it.  Which channels go is told by the same error, one after the other, since of
two that tell each other one has to stay (`hirelc_deploy/compress/compensate.py`; `--importance obs`, the default).
Neither trains anything.

The recipes keep a part of all channels, in 4 bits.  *Plain*: the channels with the smallest weights go, and nothing
else changes; *told*: the same go, told by those that stay; *obs*: those go that the others tell best.  *Distance* is
the mean squared difference of the outputs from the original's before any training, without formats, in units of their
variance; the drop is in points on the search split, one seed.
"""

TITLES = {"distance": "distance", "evaluated": "drop of an evaluation", "finished": f"after {EPOCHS} epochs"}
DIGITS = {"distance": 3, "evaluated": 2, "finished": 2}


def page(record: dict[str, Any]) -> str:
    on = record["machine"]
    sections = [f"{INTRODUCTION}\n{cpu_text(on['cpu'], on['flags'])}.\n"]
    for found in record["networks"]:
        measured = [key for key in TITLES if key in found["rows"][0]]
        head = ["channels kept", *(f"{TITLES[key]}, {way}" for key in measured for way in WAYS)]
        by_place = {(row["keep"], row["way"]): row for row in found["rows"]}
        rows = [
            (keep, *(f"{by_place[keep, way][key]:.{DIGITS[key]}f}" for key in measured for way in WAYS))
            for keep in KEEPS
        ]
        sections.append(
            f"## `{found['network']}`\n\nOne standard error of a score is {found['score_error']:.2f} points.\n\n"
            + markdown(head, rows)
        )
    return "\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--finished", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    found = [measure(network, options.out, finished=options.finished) for network in options.networks.split(",")]
    record = {"machine": machine(), "networks": found}
    save(record, RESULTS / "compensation.json")
    PAGE.write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    main()
