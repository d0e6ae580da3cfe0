"""How far a score can be trusted."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from hirelc_deploy.scoring import Scoring


def scoring(original: float, **task: Any) -> Scoring:
    """Of an original whose score is known."""
    judge = Scoring(SimpleNamespace(task=SimpleNamespace(**task)))  # type: ignore[arg-type]
    judge.__dict__["original"] = original
    return judge


@pytest.mark.parametrize(("original", "higher_is_better"), [(99.0, True), (1.0, False)])
def test_the_error_of_a_score_is_that_of_a_share_where_it_may_have_dropped_to(
    original: float, higher_is_better: bool
) -> None:
    judge = scoring(
        original,
        unit="%",
        drop=lambda before, after: before - after if higher_is_better else after - before,
    )
    assert judge.error(400) == pytest.approx(100 * math.sqrt(0.01 * 0.99 / 400))
    assert judge.error(400, drop=3.0) == pytest.approx(100 * math.sqrt(0.04 * 0.96 / 400))


def test_of_what_is_no_share_the_error_is_nothing() -> None:
    assert scoring(0.5, unit="mm", drop=lambda before, after: before - after).error(400) == 0.0
    assert scoring(99.0, unit="%", drop=lambda before, after: after - before).error(400, drop=3.0) == 0.0, "past 100 %"
