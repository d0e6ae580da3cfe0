"""Whether a uniform recipe would have done as well as what a search chose: python benchmarks/recipe_twins.py wide

Goes on from the run of `fashion_mnist.py NETWORK --search hierarchical`.  Of all uniform recipes that cost at most half
as much again as the chosen policy, in bytes times milliseconds, the dearest eight are evaluated as the search's
candidates were.  The one that drops by the least is fine-tuned as long as the chosen policy, and both stand side by
side: bytes, milliseconds of an untrained file, and what is left of the drop on the search split.

Writes benchmarks/results/recipe_twin_NETWORK_CPU.json.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _bench import RESULTS, cpu_kind, machine, save
from fashion_mnist import MAX_DROP, OUT, searched, settings_of

from hirelc_deploy.cpu import cpu_flags
from hirelc_deploy.opening import POLICY_FILE, budget_of, opened
from hirelc_deploy.policy import Policy
from hirelc_deploy.posing import Posing
from hirelc_deploy.search.space import Evaluation

TIMES = 1.5
"""What a search is asked to be better by, in bytes times milliseconds."""

EVALUATED = 8


def measure(network: str, folder: Path) -> dict[str, Any]:
    settings = settings_of(network, searched(network, "hierarchical"), out=folder, workers=1)
    policy = Policy.from_dict(json.loads((folder / POLICY_FILE).read_text(encoding="utf-8")))
    with opened(settings) as (bench, _, _):
        posing = Posing(bench, budget_of(settings))
        chosen = bench.evaluate(policy)
        recipes = posing.problem().recipes
        told_ms = posing.predictor.foretell(list(recipes.values())).ms
        costs = {
            name: bench.files.predicted_bytes(each) * float(ms)
            for (name, each), ms in zip(recipes.items(), told_ms, strict=True)
        }
        most = TIMES * cost(chosen)
        near = sorted((name for name in recipes if costs[name] <= most), key=lambda name: -costs[name])[:EVALUATED]
        evaluated = {name: posing.evaluate(recipes[name]) for name in near}
        for name, each in evaluated.items():
            print(name, each.figures, flush=True)
        twin = min(near, key=lambda name: evaluated[name].drop)
        finished = bench.evaluate(recipes[twin])
        return {
            "machine": machine(),
            "epochs": settings.epochs,
            "max_drop": settings.max_drop,
            "score_error": bench.scoring.error(bench.task.search.examples),
            "chosen": asdict(chosen.figures),
            "evaluated": {name: asdict(each.figures) for name, each in evaluated.items()},
            "twin": twin,
            "finished": asdict(finished.figures),
            "times": cost(finished) / cost(chosen),
        }


def cost(evaluation: Evaluation) -> float:
    """Bytes times milliseconds."""
    figures = evaluation.figures
    assert figures.size_bytes is not None
    assert figures.latency_ms is not None
    return figures.size_bytes * figures.latency_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("networks", nargs="+", choices=MAX_DROP)
    parser.add_argument("--out", type=Path, default=OUT, help="where fashion_mnist.py wrote to")
    options = parser.parse_args()
    for network in options.networks:
        found = measure(network, options.out / f"{network}_hierarchical")
        save(found, RESULTS / f"recipe_twin_{network}_{cpu_kind(cpu_flags())}.json")
        print({name: found[name] for name in ("chosen", "twin", "finished", "times")})


if __name__ == "__main__":
    main()
