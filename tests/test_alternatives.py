"""The other policies that a search leaves beside its artifact."""

import json
from pathlib import Path

import pytest

from hirelc_deploy.alternatives import write_front
from hirelc_deploy.budget import Figures
from hirelc_deploy.policy import Policy
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


def test_without_a_search_or_without_prices_there_is_no_front(tmp_path: Path) -> None:
    assert kept(tmp_path, evaluated(1, 100, 2.0, 0.0)) == []
    assert kept(tmp_path, evaluated(1, 100, 2.0, 0.0), evaluated(2, None, 2.0, -0.8)) == []
    assert not (tmp_path / "front").exists()
