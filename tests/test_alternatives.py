"""The other policies that a search leaves beside its artifact."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from hirelc_deploy.alternatives import against_recipes, predicted, write_front
from hirelc_deploy.budget import Budget, Figures
from hirelc_deploy.policy import QUANTIZE_FIRST, Policy
from hirelc_deploy.search.space import Choice, Evaluation


def evaluated(keep: int, size_bytes: int | None, latency_ms: float, drop: float) -> Evaluation:
    """A policy that is told from others by what it keeps."""
    figures = Figures(size_bytes=size_bytes, latency_ms=latency_ms, drop=drop)
    return Evaluation(Policy({}, {"group": keep}), figures, score=90.0 - drop)


def kept(folder: Path, *evaluations: Evaluation, finished: tuple[Evaluation, ...] = ()) -> list[int]:
    """What the policies of the front keep, read from their files."""
    records = write_front(folder / "front", Choice(evaluations[0], evaluations, finished))
    return [json.loads((folder / record.path).read_text())["keep"]["group"] for record in records]


def test_what_another_beats_is_left_out_and_the_smallest_comes_first(tmp_path: Path) -> None:
    best = evaluated(1, 300, 2.0, 0.5), evaluated(2, 100, 3.0, 1.0), evaluated(3, 100, 2.5, 4.0)
    assert kept(tmp_path, evaluated(4, 310, 2.0, 0.5), *best) == [3, 2, 1]


@pytest.mark.parametrize(
    ("drop", "other"),
    [(1.0, 1.0), (1.0, 1.0 + 1e-9), (-0.5, -0.1)],
    ids=["the same drop", "what the manifest rounds away", "no drop"],
)
def test_of_policies_that_are_alike_there_is_one(tmp_path: Path, drop: float, other: float) -> None:
    one, two, far = evaluated(1, 100, 2.0, drop), evaluated(2, 100, 2.0, other), evaluated(3, 50, 1.0, 9.0)
    assert kept(tmp_path, one, two, far) == [3, 1]
    assert kept(tmp_path, one, two, far, finished=(two,)) == [3, 2], "the one whose finished drop is known"


def test_what_was_finished_is_kept_even_where_another_beats_it(tmp_path: Path) -> None:
    best, beaten = evaluated(1, 100, 2.0, 1.0), evaluated(2, 200, 3.0, 2.0)
    assert kept(tmp_path, best, beaten) == [1]
    assert kept(tmp_path, best, beaten, finished=(beaten,)) == [1, 2]


def test_luck_does_not_pay_for_a_larger_file(tmp_path: Path) -> None:
    assert kept(tmp_path, evaluated(1, 100, 2.0, 0.0), evaluated(2, 200, 2.0, -0.8)) == [1]


def test_what_tables_tell_is_told_at_the_machines_pace_and_what_was_seen_of_a_draft_is_not() -> None:
    told, seen = evaluated(1, 100, 2.0, 3.0), evaluated(1, 100, 2.5, 0.5)
    assert predicted(Choice(seen, (told,), (seen,)), pace=1.5).latency_ms == pytest.approx(3.0)
    assert predicted(Choice(seen, (seen,)), pace=1.5).latency_ms == pytest.approx(2.5)


def finished(keep: int, size_bytes: int, speedup: float, drop: float) -> Evaluation:
    figures = Figures(size_bytes=size_bytes, latency_ms=1.0 / speedup, speedup=speedup, drop=drop)
    return Evaluation(Policy({}, {"group": keep}), figures, score=90.0 - drop)


RECIPES = {f"keep={keep}%": Policy({}, {"group": keep}) for keep in (50, 25)}


def beside(best: Evaluation, *others: Evaluation, recipes: Mapping[str, Policy] = RECIPES) -> str | None:
    """What is said of the best of these where a drop of 1.0 is allowed."""
    return against_recipes(Choice(best, (), (best, *others), recipes=recipes), Budget(drop=1.0), "%")


def test_an_export_says_how_it_does_beside_the_best_recipe() -> None:
    best, recipe, worse = finished(1, 2000, 4.0, 0.5), finished(50, 3000, 2.0, 0.25), finished(25, 1000, 5.0, 1.5)
    said = beside(best, recipe, worse)
    assert said is not None
    assert "keep=50% (3.00 KB, 2.00 × faster, drop 0.25 points)" in said
    assert "3.00 times the bytes times milliseconds" in said, "3000 / 2.0 and 2000 / 4.0"


def test_a_search_that_ends_with_a_recipe_says_so() -> None:
    """Whatever the order of its steps, which training alone goes by."""
    recipe = finished(50, 3000, 2.0, 0.25)
    turned = replace(recipe, policy=replace(recipe.policy, order=QUANTIZE_FIRST))
    for best in (recipe, turned):
        assert (beside(best, finished(1, 2000, 4.0, 2.0)) or "").startswith(
            "the chosen policy is a uniform recipe (keep=50%)"
        )


def test_recipes_that_miss_the_limits_are_no_rivals() -> None:
    best = finished(1, 2000, 4.0, 0.5)
    said = beside(best, finished(50, 3000, 2.0, 1.25), finished(25, 1000, 5.0, 1.5))
    assert said is not None
    assert "holds the limits" in said
    assert "keep=50%" in said
    assert beside(best) is None, "none was finished"
    assert beside(best, finished(50, 3000, 2.0, 0.25), recipes={}) is None


def test_the_front_names_recipes(tmp_path: Path) -> None:
    one, two = evaluated(50, 100, 2.0, 1.0), evaluated(1, 50, 3.0, 1.0)
    records = write_front(tmp_path / "front", Choice(one, (one, two), recipes=RECIPES))
    assert [record.recipe for record in records] == [None, "keep=50%"]


def test_without_a_search_or_without_prices_there_is_no_front(tmp_path: Path) -> None:
    assert kept(tmp_path, evaluated(1, 100, 2.0, 0.0)) == []
    assert kept(tmp_path, evaluated(1, 100, 2.0, 0.0), evaluated(2, None, 2.0, -0.8)) == []
    assert not (tmp_path / "front").exists()
