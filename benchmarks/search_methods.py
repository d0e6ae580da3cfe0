"""Methods of search side by side: python benchmarks/search_methods.py run small14 vit14 --seeds 5

    python benchmarks/search_methods.py run NETWORK…     every method, what the folder holds is not done again
    python benchmarks/search_methods.py parts NETWORK…   the hierarchical search without one of its parts
    python benchmarks/search_methods.py page             docs/search.md from the result files

The same evaluations for all: a policy made real, trained for 4,096 images, scored on 2,000 search images.  Target host;
the drop that is allowed is that of an evaluation, which a finished policy undercuts.  A result file a network in
benchmarks/results/.
"""

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from _bench import RESULTS, ROOT, machine, markdown, save, workbench
from latency_prediction import hasten

from hirelc_deploy import compare as comparing
from hirelc_deploy.budget import Budget
from hirelc_deploy.compare import Row, Run
from hirelc_deploy.posing import Posing
from hirelc_deploy.search.goal import Goal
from hirelc_deploy.search.hierarchical import Parts, search
from hirelc_deploy.search.methods import FILES
from hirelc_deploy.search.problem import Evaluations, Problem
from hirelc_deploy.search.space import Evaluation

OUT = Path("out/benchmarks/search_methods")
MAX_DROP = 2.0
"""In points, of an evaluation."""

WITHOUT = {
    "hierarchical": Parts(),
    "without hierarchy": Parts(hierarchy=False),
    "an agent a block": Parts(shared=False),
    "without Fisher": Parts(fisher=False),
    "without surrogate": Parts(surrogate=False),
    "without vote": Parts(vote=False),
    "without latency": Parts(latency=False),
    "without refinement": Parts(refinement=False),
    "without agents": Parts(agents=False),
}


def compare(network: str, out: Path, methods: list[str], seeds: int, evaluations: int) -> dict[str, Any]:
    """Every method with every seed."""
    with workbench(network, out / network, epochs=4) as bench:
        problem = Posing(bench, Budget(drop=MAX_DROP)).problem()
        runs = comparing.run(problem, bench.run, methods, range(seeds), evaluations, told)
        return record(problem, runs, evaluations)


def parts(network: str, out: Path, seeds: int, evaluations: int) -> dict[str, Any]:
    """The hierarchical search as it is, and without one of its parts."""
    with workbench(network, out / network, epochs=4) as bench:
        problem = Posing(bench, Budget(drop=MAX_DROP)).problem()
        runs = [
            comparing.read(
                bench.run.step(f"parts/{name}/{seed}/{evaluations}", partial(one, problem, name, seed, evaluations))
            )
            for seed in range(seeds)
            for name in WITHOUT
        ]
        return record(problem, runs, evaluations)


def one(problem: Problem, name: str, seed: int, evaluations: int) -> dict[str, Any]:
    """A search, as it is written."""

    def method(problem: Problem, seen: Evaluations, *, seed: int) -> None:
        search(problem, seen, seed=seed, parts=WITHOUT[name])

    return comparing.timed(problem, name, method, seed, evaluations, told)


ONE_SEED = "one seed (differences of a tenth say nothing)"

PAGE = ROOT / "docs" / "search.md"

INTRODUCTION = """# Methods of search side by side

Written by `python benchmarks/search_methods.py page` from `benchmarks/results/search_*.json`; the head of that script
says what makes those.  Every method has the same space, the same predictors, the same number of real evaluations (a
policy made real, trained for 4,096 images, scored on 2,000 search images) and the same seeds.  Hypervolume is that of
drop, log bytes and log milliseconds of what was really evaluated, below a drop of twice the allowed one and the
original's size and latency: 0 is the front of the hand recipes, 1 that of all methods together.  *Smaller* and
*faster* are those of the policy with the least bytes times milliseconds that holds the drop, in the middle of the
seeds; the drop is that of an evaluation, before anything is finished.

What the hierarchical search evaluates next was settled on a model of `small14`, fitted to the other methods'
evaluations of it (docs/findings.md), so `small14` is no network that it has never seen.
"""


def write_page() -> None:
    sections = [INTRODUCTION]
    for step, title in (("run", "`{}`: methods"), ("parts", "`{}`: the hierarchical search without one of its parts")):
        for path in sorted(RESULTS.glob(f"search_{step}_*.json")):
            found = json.loads(path.read_text())
            network = path.stem.removeprefix(f"search_{step}_")
            seeds = len({run["seed"] for run in found["runs"]})
            ran = ONE_SEED if seeds == 1 else f"{seeds} seeds"
            rows = [comparing.cells(Row(**{**row, "final_range": tuple(row["final_range"])})) for row in found["table"]]
            sections.append(
                f"## {title.format(network)}\n\n{found['evaluations']} evaluations, {ran}, a drop of "
                f"{found['max_drop']:g} points allowed, one standard error of a score {found['score_error']:.2f}; "
                f"{found['machine']['cpu']} ({', '.join(found['machine']['flags'])}).\n\n"
                + markdown(comparing.HEAD, rows)
            )
    PAGE.write_text("\n".join(sections), encoding="utf-8")


def told(run: str, number: int, evaluation: Evaluation) -> None:
    figures = evaluation.figures
    assert figures.size_bytes is not None
    print(
        f"{run} {number}: drop {figures.drop:.2f}, {figures.size_bytes / 1e3:.1f} KB, {figures.latency_ms:.4f} ms",
        flush=True,
    )


def record(problem: Problem, runs: list[Run], evaluations: int) -> dict[str, Any]:
    """What a result file holds."""
    goal = Goal.of(problem.budget, problem.before)
    rows = comparing.table(runs, goal, evaluations)
    print(comparing.markdown(rows))
    return {
        "machine": machine(),
        "max_drop": MAX_DROP,
        "evaluations": evaluations,
        "before": asdict(problem.before),
        "score_error": problem.score_error,
        "table": [asdict(row) for row in rows],
        "runs": [asdict(run) for run in runs],
    }


def main() -> None:
    hasten()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("run", "parts"):
        step = steps.add_parser(name)
        step.add_argument("networks", nargs="+")
        step.add_argument("--seeds", type=int, default=5)
        step.add_argument("--evaluations", type=int, default=32)
        step.add_argument("--out", type=Path, default=OUT)
    steps.choices["run"].add_argument("--methods", default=",".join(FILES))
    steps.add_parser("page")
    options = parser.parse_args()
    if options.step == "page":
        write_page()
        return
    for network in options.networks:
        if options.step == "run":
            found = compare(network, options.out, options.methods.split(","), options.seeds, options.evaluations)
        else:
            found = parts(network, options.out, options.seeds, options.evaluations)
        save(found, RESULTS / f"search_{options.step}_{network}.json")


if __name__ == "__main__":
    main()
