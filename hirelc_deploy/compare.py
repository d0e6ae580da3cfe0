"""Methods side by side: the same problem, the same evaluations, several seeds; one table and one plot.

What is compared is what was really evaluated.  Hypervolume is that of (drop on the search split, log bytes, log ms)
below a fixed reference, scaled so that 0 is the front of the recipes and 1 the front of all methods together.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from hirelc_deploy import console, modelopt, plots, tensorboard
from hirelc_deploy.choosing import EVALUATIONS
from hirelc_deploy.config import ExportSettings, nearest, require_at_least
from hirelc_deploy.errors import UserError
from hirelc_deploy.opening import budget_of, opened
from hirelc_deploy.posing import Posing
from hirelc_deploy.rundir import write_atomic
from hirelc_deploy.search import methods
from hirelc_deploy.search.front import hypervolume, points
from hirelc_deploy.search.goal import Goal, reference
from hirelc_deploy.search.methods import FILES
from hirelc_deploy.search.problem import Evaluations, Problem, Spent
from hirelc_deploy.search.space import Evaluation

if TYPE_CHECKING:
    from rich.table import Table

    from hirelc_deploy.rundir import RunFolder

BASELINE = "recipe"
"""The method whose front is nought."""


@dataclass(frozen=True)
class Run:
    """One method, one seed: places of its evaluations in their order, and the seconds that it took besides them."""

    method: str
    seed: int
    places: tuple[tuple[float, float, float], ...]
    """Drop in the score's unit, log of bytes and of milliseconds against the original's."""
    policies: tuple[str, ...]
    """Their digests."""
    seconds: float
    """Of the method itself: learning and pricing, evaluations apart."""

    @property
    def name(self) -> str:
        return f"{self.method}/{self.seed}"

    def until(self, evaluations: int) -> np.ndarray:
        return np.array(self.places[:evaluations]).reshape(-1, 3)


def run(
    problem: Problem,
    folder: "RunFolder",
    names: Iterable[str],
    seeds: Iterable[int],
    evaluations: int,
    told: "Told" = lambda *_: None,
    logs: Path | None = None,
) -> list[Run]:
    """Every method with every seed; what the folder holds is not done again.  `logs` is for TensorBoard."""
    wanted = list(names)
    found = []
    for seed in seeds:
        for name in wanted:
            method, own = methods.load(name), None if logs is None else logs / f"{name}-{seed}"
            one = partial(timed, problem, name, method, seed, evaluations, told, own)
            found.append(read(folder.step(f"compare/{name}/{seed}/{evaluations}", one)))
    return found


Told = Callable[[str, int, Evaluation], None]
"""Hears of an evaluation: the run, how many it has made, the evaluation."""


def timed(
    problem: Problem,
    name: str,
    method: methods.Method,
    seed: int,
    evaluations: int,
    told: Told,
    logs: Path | None = None,
) -> dict[str, Any]:
    """One run of a method, as it is written; `read` is the inverse."""
    clock = _Clock(problem)
    with tensorboard.logged(logs) as log:
        seen = Evaluations(
            clock.problem, evaluations, lambda each: told(f"{name}/{seed}", len(seen.seen), each), log=log
        )
        began = time.monotonic()
        with suppress(Spent):
            method(clock.problem, seen, seed=seed)
    spent = time.monotonic() - began - clock.seconds
    places = points(problem, seen.seen)
    return {
        "method": name,
        "seed": seed,
        "places": [[float(x) for x in place] for place in places],
        "policies": [each.policy.digest() for each in seen.seen],
        "seconds": spent,
    }


def read(value: Mapping[str, Any]) -> Run:
    """A run as it was written."""
    return Run(
        value["method"],
        value["seed"],
        tuple((a, b, c) for a, b, c in value["places"]),
        tuple(value["policies"]),
        value["seconds"],
    )


Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class _Clock:
    """Seconds that evaluations take, so that the method's own can be told apart."""

    def __init__(self, problem: Problem) -> None:
        self.seconds = 0.0
        self.problem = replace(
            problem,
            evaluate=self._timed(problem.evaluate),
            evaluate_anew=self._timed(problem.evaluate_anew),
            prepare=self._timed(problem.prepare),
        )

    def _timed(self, call: Callable[[Asked], Answer]) -> Callable[[Asked], Answer]:
        def timed(asked: Asked) -> Answer:
            began = time.monotonic()
            try:
                return call(asked)
            finally:
                self.seconds += time.monotonic() - began

        return timed


# -- what it comes to ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """From hypervolumes to parts: 0 for the recipes' front, 1 for that of all methods together."""

    reference: tuple[float, float, float]
    least: float
    most: float

    @classmethod
    def of(cls, runs: Sequence[Run], goal: Goal[float]) -> "Scale":
        corner = tuple(float(x) for x in reference(goal))
        recipes = [each.until(len(each.places)) for each in runs if each.method == BASELINE]
        every = np.concatenate([each.until(len(each.places)) for each in runs])
        least = hypervolume(np.concatenate(recipes), corner) if recipes else 0.0
        return cls((corner[0], corner[1], corner[2]), least, hypervolume(every, corner))

    def part(self, places: np.ndarray) -> float:
        """Of a front.  Below nought where it is less than the recipes'; in parts of theirs where nothing is more."""
        gained = self.most - self.least
        unit = gained if gained > 1e-9 * self.most else self.most
        return (hypervolume(places, self.reference) - self.least) / max(unit, 1e-12)


def curve(one: Run, scale: Scale, evaluations: int) -> list[float]:
    """Scaled hypervolume after each evaluation; a run that ended early keeps its last."""
    return [scale.part(one.until(n)) for n in range(1, evaluations + 1)]


def at_the_budget(one: Run, goal: Goal[float]) -> tuple[float, float, float] | None:
    """The place with the smallest bytes times milliseconds among those that hold the drop; None if none does."""
    holding = [each for each in one.places if each[0] <= goal.drop_max]
    return min(holding, key=lambda each: each[1] + each[2], default=None)


@dataclass(frozen=True)
class Row:
    """One method over its seeds: medians, and the least and the most."""

    method: str
    half: float
    """Scaled hypervolume after half of the evaluations."""
    final: float
    final_range: tuple[float, float]
    compression: float | None
    """Times smaller at the budget of drop, of the run in the middle; None if fewer than half of the runs hold it."""
    speedup: float | None
    seconds: float
    """Of the method itself, a run."""


def table(runs: Sequence[Run], goal: Goal[float], evaluations: int) -> list[Row]:
    """The best first."""
    scale = Scale.of(runs, goal)
    found = []
    for method in dict.fromkeys(each.method for each in runs):
        mine = [each for each in runs if each.method == method]
        curves = np.array([curve(each, scale, evaluations) for each in mine])
        held = sorted(
            (place for place in (at_the_budget(each, goal) for each in mine) if place), key=lambda p: p[1] + p[2]
        )
        middle = held[(len(held) - 1) // 2] if 2 * len(held) >= len(mine) and held else None
        found.append(
            Row(
                method,
                float(np.median(curves[:, (evaluations - 1) // 2])),
                float(np.median(curves[:, -1])),
                (float(curves[:, -1].min()), float(curves[:, -1].max())),
                None if middle is None else float(np.exp(-middle[1])),
                None if middle is None else float(np.exp(-middle[2])),
                float(np.median([each.seconds for each in mine])),
            )
        )
    return sorted(found, key=lambda row: -row.final)


def draw(runs: Sequence[Run], goal: Goal[float], evaluations: int, title: str, path: Path) -> None:
    """Hypervolume over evaluations, and the fronts: a line each.  Raises UserError without matplotlib."""
    scale = Scale.of(runs, goal)
    with plots.panels(path, 2, title, height=4.5) as (left, right):
        for method in dict.fromkeys(each.method for each in runs):
            mine = [each for each in runs if each.method == method]
            curves = np.array([curve(each, scale, evaluations) for each in mine])
            count = np.arange(1, evaluations + 1)
            (line,) = left.plot(count, np.median(curves, axis=0), label=method)
            left.fill_between(count, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.12)
            places = np.concatenate([each.until(len(each.places)) for each in mine])
            steps = front_of_two(places)
            right.step(steps[:, 0], steps[:, 1], where="post", label=method, color=line.get_color())
        left.set(
            title="median and range over seeds",
            xlabel="evaluations",
            ylabel="hypervolume: 0 recipes, 1 all",
            ylim=(-1.0, 1.05),
        )
        right.set(
            title="the best of all seeds",
            xlabel="drop on the search split",
            ylabel="times smaller x times faster",
            yscale="log",
            xlim=(-0.5, scale.reference[0]),
        )
        left.legend()


def front_of_two(places: np.ndarray) -> np.ndarray:
    """Drop, and the largest product of compression and speed-up that holds it: (steps, 2), drops ascending."""
    order = places[np.argsort(places[:, 0])]
    gain = np.maximum.accumulate(np.exp(-(order[:, 1] + order[:, 2])))
    return np.stack([order[:, 0], gain], axis=1)


# -- the command ---------------------------------------------------------------------------------------------

RESULT_FILE, TABLE_FILE, PLOT_FILE = "compare.json", "compare.md", "compare.png"


def compare(settings: ExportSettings, names: Sequence[str], seeds: int) -> list[Row]:
    """Run methods on what the settings name, and write table, plot and result file into `settings.out`.

    Seeds count from that of the settings.  Evaluations of the same policy are shared.  Raises UserError for whatever
    the user can mend.
    """
    require_at_least(1, "seeds", seeds)
    for name in names:
        if name not in FILES:
            raise UserError(
                f"there is no method {name!r}", fix=f"did you mean {nearest(name, FILES)}? There is {', '.join(FILES)}"
            )
    # refused before anything is trained
    plots.require()
    if "modelopt" in names:
        modelopt.python()
    if not settings.epochs:
        raise UserError("epochs is 0, and evaluations are trained", fix="leave epochs out")
    evaluations = settings.evaluations or EVALUATIONS
    with opened(settings) as (bench, _, _):
        problem = Posing(bench, budget_of(settings), order=settings.order).problem()
        every = range(settings.seed, settings.seed + seeds)
        with console.progress("evaluations", len(names) * seeds * evaluations) as advance:
            runs = run(
                problem, bench.run, names, every, evaluations, lambda name, *_: advance(name), settings.tensorboard
            )
        goal = Goal.of_problem(problem)
        rows = table(runs, goal, evaluations)
        record = {"evaluations": evaluations, "goal": asdict(goal), "runs": [asdict(each) for each in runs]}
        write_atomic(settings.out / RESULT_FILE, (json.dumps(record, indent=1) + "\n").encode())
        write_atomic(settings.out / TABLE_FILE, markdown(rows).encode())
        draw(runs, goal, evaluations, settings.model, settings.out / PLOT_FILE)
    return rows


HEAD = (
    "method",
    "hypervolume, half way",
    "at the end",
    "least to most",
    "smaller, drop held",
    "faster",
    "seconds besides evaluations",
)


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    return (
        row.method,
        f"{row.half:.2f}",
        f"{row.final:.2f}",
        f"{row.final_range[0]:.2f} to {row.final_range[1]:.2f}",
        "-" if row.compression is None else f"{row.compression:.1f} x",
        "-" if row.speedup is None else f"{row.speedup:.1f} x",
        f"{row.seconds:.0f}",
    )


def markdown(rows: Sequence[Row]) -> str:
    """The table, for a page."""
    lines = [HEAD, ["---"] * len(HEAD), *map(cells, rows)]
    return "".join(f"| {' | '.join(each)} |\n" for each in lines)


def rich_table(rows: Sequence[Row]) -> "Table":
    """The table, for a terminal."""
    from rich.table import Table

    found = Table(*HEAD)
    for row in rows:
        found.add_row(*cells(row))
    return found
