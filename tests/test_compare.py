"""Methods side by side: what the table says, and that nothing is done twice."""

from pathlib import Path

import numpy as np
import pytest
from toy_search import toy

from hirelc_deploy import compare as comparing
from hirelc_deploy.compare import Run, Scale, at_the_budget, cells, curve, front_of_two, markdown, table
from hirelc_deploy.rundir import RunFolder
from hirelc_deploy.search.goal import Goal

GOAL: Goal[float] = Goal(
    drop_max=1.0,
    latency_ms_max=None,
    size_bytes_max=None,
    latency_ms_before=1.0,
    size_bytes_before=1.0,
    latency_weight=1.0,
    size_weight=1.0,
)
"""The worst corner is (2, 0, 0)."""


def made(method: str, *places: tuple[float, float, float], seed: int = 0) -> Run:
    return Run(method, seed, places, tuple(map(str, range(len(places)))), seconds=1.0)


RECIPES = made("recipe", (1.0, -1.0, -1.0))  # a volume of 1
BETTER = made("hierarchical", (1.0, -1.0, -1.0), (1.0, -2.0, -1.5))  # 1, then 3
WORSE = made("random", (1.5, -1.0, -1.0))  # a half


def test_hypervolume_is_scaled_between_the_recipes_and_all() -> None:
    scale = Scale.of([RECIPES, BETTER, WORSE], GOAL)
    assert (scale.least, scale.most) == (pytest.approx(1.0), pytest.approx(3.0))
    assert curve(RECIPES, scale, 3) == pytest.approx([0.0, 0.0, 0.0])
    assert curve(BETTER, scale, 3) == pytest.approx([0.0, 1.0, 1.0])
    assert curve(WORSE, scale, 2) == pytest.approx([-0.25, -0.25])


def test_the_table_has_the_best_first_and_medians() -> None:
    rows = table([RECIPES, BETTER, WORSE], GOAL, 2)
    assert [row.method for row in rows] == ["hierarchical", "recipe", "random"]
    best = rows[0]
    assert (best.half, best.final) == (pytest.approx(0.0), pytest.approx(1.0))
    assert best.compression == pytest.approx(np.exp(2.0))
    assert best.speedup == pytest.approx(np.exp(1.5))
    assert rows[-1].compression is None, "it holds no drop of 1"
    assert "| hierarchical | 0.00 | 1.00 |" in markdown(rows)
    assert len(cells(best)) == len(comparing.HEAD)


def test_at_the_budget_is_the_cheapest_that_holds_the_drop() -> None:
    run = made("x", (0.2, -1.0, -1.0), (0.9, -2.0, -0.5), (1.1, -9.0, -9.0))
    assert at_the_budget(run, GOAL) == (0.9, -2.0, -0.5)
    assert at_the_budget(WORSE, GOAL) is None


def test_the_plotted_front_only_rises() -> None:
    steps = front_of_two(np.array([(1.0, -1.0, -1.0), (0.5, -2.0, -1.0), (2.0, -0.5, -0.5)]))
    assert steps[:, 0].tolist() == [0.5, 1.0, 2.0]
    assert steps[:, 1] == pytest.approx([np.exp(3.0)] * 3)


def test_runs_are_kept_and_not_made_again(tmp_path: Path) -> None:
    problem = toy().problem
    with RunFolder.open(tmp_path, {}, resume=False) as folder:
        first = comparing.run(problem, folder, ["recipe", "random"], range(2), 6)
    heard: list[str] = []
    with RunFolder.open(tmp_path, {}, resume=True) as folder:
        again = comparing.run(problem, folder, ["recipe", "random"], range(2), 6, lambda name, *_: heard.append(name))
    assert again == first
    assert not heard
    assert [(run.method, run.seed) for run in first] == [("recipe", 0), ("random", 0), ("recipe", 1), ("random", 1)]
    assert all(len(run.places) == 6 for run in first)


def test_a_plot_is_written(tmp_path: Path) -> None:
    comparing.draw([RECIPES, BETTER, WORSE], GOAL, 2, "three runs", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
