"""Methods of search side by side: python benchmarks/search_methods.py run small14 vit14 --seeds 5

    python benchmarks/search_methods.py run NETWORK…     every method, what the folder holds is not done again
    python benchmarks/search_methods.py run wide --seeds 2 --methods recipe,hierarchical,knapsack
    python benchmarks/search_methods.py parts NETWORK…   the hierarchical search without one of its parts
    python benchmarks/search_methods.py targets NETWORK…  the same search for two targets, priced on both
    python benchmarks/search_methods.py page             docs/search.md and a table of README from the result files

The same evaluations for all: a policy made real, trained for 4,096 images, scored on 2,000 search images.  Target host;
the drop that is allowed is that of an evaluation, which a finished policy undercuts.  A result file a network in
benchmarks/results/.
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from _bench import RESULTS, ROOT, between_marks, cpu_text, machine, markdown, save, workbench

from hirelc_deploy import compare as comparing
from hirelc_deploy.budget import Budget, Figures
from hirelc_deploy.compare import Run
from hirelc_deploy.policy import Policy
from hirelc_deploy.posing import Posing
from hirelc_deploy.search.front import volume
from hirelc_deploy.search.goal import Goal, reference
from hirelc_deploy.search.hierarchical import HARD, Parts, search
from hirelc_deploy.search.methods import FILES
from hirelc_deploy.search.problem import Evaluations, Problem, Spent, prices_of
from hirelc_deploy.search.space import Evaluation
from hirelc_deploy.workbench import Workbench

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


def parts(network: str, out: Path, names: list[str], seeds: int, evaluations: int) -> dict[str, Any]:
    """The hierarchical search as it is, and without one of its parts."""
    with workbench(network, out / network, epochs=4) as bench:
        problem = Posing(bench, Budget(drop=MAX_DROP)).problem()
        runs = [
            comparing.read(
                bench.run.step(f"parts/{name}/{seed}/{evaluations}", partial(one, problem, name, seed, evaluations))
            )
            for seed in range(seeds)
            for name in names
        ]
        return record(problem, runs, evaluations)


def one(problem: Problem, name: str, seed: int, evaluations: int) -> dict[str, Any]:
    """A search, as it is written."""

    def method(problem: Problem, seen: Evaluations, *, seed: int) -> None:
        search(problem, seen, seed=seed, parts=WITHOUT[name])

    return comparing.timed(problem, name, method, seed, evaluations, told)


TARGETS = ("host", "raspberry-pi-5")
"""A table that was measured, and an estimate."""

SMALLER = 10.0
"""Times that a file has to be smaller in the search for two targets, so that what is left to gain is latency."""


def targets(network: str, out: Path, evaluations: int) -> dict[str, Any]:
    """A search for each target, from the same seed, and what either policy costs on both."""
    chosen: dict[str, Evaluation] = {}
    for target in TARGETS:
        with workbench(network, out / f"{network}-{target}", epochs=4, target=target) as bench:
            chosen[target] = best_for(bench, target, evaluations)
    rows = []
    for target in TARGETS:
        with workbench(network, out / f"{network}-{target}", epochs=4, target=target) as bench:
            policies = [chosen[each].policy for each in TARGETS]
            told = Posing(bench, Budget()).predictor.foretell([*policies, Policy({}, {})]).ms.tolist()
            seen = bench.latencies.times_ms(policies) if target == "host" else None
            rows += [
                {
                    "target": target,
                    "searched_for": searched_for,
                    "predicted_speedup": told[-1] / told[i],
                    "predicted_ms": told[i],
                    "measured_ms": None if seen is None else seen[i],
                    "drop": chosen[searched_for].drop,
                    "size_bytes": chosen[searched_for].figures.size_bytes,
                }
                for i, searched_for in enumerate(TARGETS)
            ]
    policies_by_target = {target: each.policy.to_dict() for target, each in chosen.items()}
    return {"machine": machine(), "evaluations": evaluations, "rows": rows, "policies": policies_by_target}


def best_for(bench: Workbench, target: str, evaluations: int) -> Evaluation:
    """The fastest policy that a search finds which holds drop and size."""
    size_bytes = int(len(bench.files.baseline().data) / SMALLER)
    problem = Posing(bench, Budget(drop=MAX_DROP, size_bytes=size_bytes)).problem()
    seen = Evaluations(problem, evaluations, lambda each: told(target, len(seen.seen), each))
    with suppress(Spent):
        search(problem, seen, seed=0)
    goal = Goal.of_problem(problem)
    rewards = goal.reward(np.array([each.drop for each in seen.seen]), prices_of(seen.seen), HARD)
    return seen.seen[int(np.argmax(rewards))]


ONE_SEED = "one seed (differences of a tenth say nothing)"

PAGE = ROOT / "docs" / "search.md"

WITHOUT_RECIPES = (
    "  Without recipes beside them, 0 is nothing found, and 1 what all of these found together.  A part that changes "
    "no evaluation has the figures of the whole: networks of the surrogate count only while they have predicted new "
    "evaluations better than the formula that they correct."
)

INTRODUCTION = """# Methods of search side by side

Written by `python benchmarks/search_methods.py page` from `benchmarks/results/search_*.json`; the head of that script
says what makes those.  Every method has the same space, the same predictors, the same number of real evaluations (a
policy made real, trained for 4,096 images, scored on 2,000 search images, of `wide` on 6,000) and the same seeds.
Hypervolume is that of drop, log bytes and log milliseconds of what was really evaluated, below a drop of twice the
allowed one and the original's size and latency: 0 is the front of the hand recipes, 1 that of all methods together.
*Smaller* and *faster* are those of the policy with the least bytes times milliseconds that holds the drop, in the
middle of the seeds; the drop is that of an evaluation, before anything is finished.  A drop below nought counts as
nought: a standard error of a score is 0.7 to 0.8 points (of `wide` 0.35), and a mild policy that happens to score
above the original is worth nothing to who allows a drop.  The last column counts it, as all of this was counted
before 2026-11-28.

What the hierarchical search evaluates next was settled on a model of `small14`, fitted to the other methods'
evaluations of it (docs/findings.md), so `small14` is no network that it has never seen.

`small14`, `vit14` and `wide`, on which no rule was tuned, were evaluated last, as a search evaluates today, `vit14`
with whole heads and its residual width among what can go.  `depthwise14`, and parts and targets, were evaluated before
removed channels were reconstructed ([compensation.md](compensation.md), 2026-11-30): evaluations of narrow networks
drop less now, those of uniform recipes most, so that there is less between these and what all methods find together.
On `small14` that is little more than what the luck of a score moves (docs/findings.md).  The rate of an evaluation's
training follows from the network's distance to the original ([fine-tuning.md](fine-tuning.md)).
"""


def page() -> str:
    """From all result files."""
    sections = [INTRODUCTION]
    for step, title in (("run", "`{}`: methods"), ("parts", "`{}`: the hierarchical search without one of its parts")):
        for found in compared(step):
            ran = ONE_SEED if found.seeds == 1 else f"{found.seeds} seeds"
            luck = with_luck(found.runs, found.goal)
            on = found.record["machine"]
            sections.append(
                f"## {title.format(found.network)}\n\n{found.evaluations} evaluations, {ran}, a drop of "
                f"{found.goal.drop_max:g} points allowed, one standard error of a score "
                f"{found.record['score_error']:.2f}; {cpu_text(on['cpu'], on['flags'])}."
                f"{WITHOUT_RECIPES if step == 'parts' else ''}\n\n"
                + markdown(
                    (*comparing.HEAD, "hypervolume, drops below nought counted"),
                    [(*comparing.cells(row), f"{luck[row.method]:.2f}") for row in found.rows()],
                )
            )
    sections += [
        section_of_targets(path.stem.removeprefix("search_targets_"), json.loads(path.read_text()))
        for path in sorted(RESULTS.glob("search_targets_*.json"))
    ]
    return "\n".join(sections)


@dataclass(frozen=True)
class Compared:
    """A result file of methods side by side."""

    network: str
    record: dict[str, Any]

    @cached_property
    def runs(self) -> list[Run]:
        return [comparing.read(run) for run in self.record["runs"]]

    @property
    def goal(self) -> Goal[float]:
        return Goal.of(Budget(drop=self.record["max_drop"]), Figures(**self.record["before"]))

    @property
    def evaluations(self) -> int:
        return int(self.record["evaluations"])

    @property
    def seeds(self) -> int:
        return len({run.seed for run in self.runs})

    def rows(self) -> list[comparing.Row]:
        """The best method first."""
        return comparing.table(self.runs, self.goal, self.evaluations)


def compared(step: str) -> list[Compared]:
    """All result files of that step, by the name of the network."""
    prefix = f"search_{step}_"
    return [
        Compared(path.stem.removeprefix(prefix), json.loads(path.read_text()))
        for path in sorted(RESULTS.glob(f"{prefix}*.json"))
    ]


README = ROOT / "README.md"


def with_methods(readme: str) -> str:
    """The README with the hierarchical search beside the next three methods between its marks, a line a network."""
    rows = []
    for found in compared("run"):
        by_method = {row.method: row for row in found.rows()}
        ours = by_method.pop("hierarchical")
        least, most = ours.final_range
        others = ", ".join(f"`{row.method}` {row.final:.2f}" for row in list(by_method.values())[:3])
        rows.append(
            (
                f"`{found.network}`",
                f"{found.seeds}",
                f"{ours.final:.2f} [{least:.2f}, {most:.2f}]",
                f"{ours.half:.2f}",
                others,
            )
        )
    columns = ("network", "seeds", "`hierarchical` [least, most]", "after half of the evaluations", "the next best")
    return between_marks(readme, "methods", markdown(columns, rows))


def with_luck(runs: Sequence[Run], goal: Goal[float]) -> dict[str, float]:
    """By method, the scaled hypervolume where what scores better than the original counts as gained."""
    corner = reference(goal)

    def reached(some: Sequence[Run]) -> float:
        return volume(np.array([place for run in some for place in run.places]).reshape(-1, 3), corner)

    by_method = {run.method: [each for each in runs if each.method == run.method] for run in runs}
    least, most = reached(by_method.get(comparing.BASELINE, [])), reached(runs)
    return {
        method: (float(np.median([reached([run]) for run in mine])) - least) / (most - least)
        for method, mine in by_method.items()
    }


def section_of_targets(network: str, found: dict[str, Any]) -> str:
    rows = [
        (
            row["target"],
            row["searched_for"],
            f"{row['predicted_speedup']:.2f} x",
            "-" if row["measured_ms"] is None else f"{row['predicted_ms'] / row['measured_ms']:.2f}",
            f"{row['size_bytes'] / 1e3:.1f} KB",
            f"{row['drop']:.2f}",
        )
        for row in found["rows"]
    ]
    layers, groups = (
        sum(a != b for a, b in zip(*(policy[part].values() for policy in found["policies"].values()), strict=True))
        for part in ("precisions", "keep")
    )
    on = found["machine"]
    return (
        f"## `{network}`: the same search for two targets\n\n{found['evaluations']} evaluations each, a drop of "
        f"{MAX_DROP:g} points and a tenth of the original's bytes allowed, so that latency is what is left to gain; "
        f"{cpu_text(on['cpu'], on['flags'])}.  The two policies differ in {layers} layers and {groups} groups.\n\n"
        + markdown(("on", "searched for", "faster, by its table", "predicted / measured", "file", "drop"), rows)
    )


def told(run: str, number: int, evaluation: Evaluation) -> None:
    figures = evaluation.figures
    assert figures.size_bytes is not None
    print(
        f"{run} {number}: drop {figures.drop:.2f}, {figures.size_bytes / 1e3:.1f} KB, {figures.latency_ms:.4f} ms",
        flush=True,
    )


def record(problem: Problem, runs: list[Run], evaluations: int) -> dict[str, Any]:
    """What a result file holds."""
    goal = Goal.of_problem(problem)
    print(comparing.markdown(comparing.table(runs, goal, evaluations)))
    return {
        "machine": machine(),
        "max_drop": MAX_DROP,
        "evaluations": evaluations,
        "before": asdict(problem.before),
        "score_error": problem.score_error,
        "runs": [asdict(run) for run in runs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("run", "parts", "targets"):
        step = steps.add_parser(name)
        step.add_argument("networks", nargs="+")
        step.add_argument("--evaluations", type=int, default=32)
        step.add_argument("--out", type=Path, default=OUT)
    for name in ("run", "parts"):
        steps.choices[name].add_argument("--seeds", type=int, default=5)
    steps.choices["run"].add_argument("--methods", default=",".join(FILES))
    steps.choices["parts"].add_argument("--parts", default=",".join(WITHOUT))
    steps.add_parser("page")
    options = parser.parse_args()
    if options.step == "page":
        PAGE.write_text(page(), encoding="utf-8")
        README.write_text(with_methods(README.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for network in options.networks:
        if options.step == "run":
            found = compare(network, options.out, options.methods.split(","), options.seeds, options.evaluations)
        elif options.step == "targets":
            found = targets(network, options.out, options.evaluations)
        else:
            found = parts(network, options.out, options.parts.split(","), options.seeds, options.evaluations)
        save(found, RESULTS / f"search_{options.step}_{network}.json")


if __name__ == "__main__":
    main()
