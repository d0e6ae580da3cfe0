"""How far a score can be trusted."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
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


def millimetres(scores: Callable[[np.ndarray], float]) -> Scoring:
    """Of an original that is off by what stands in its outputs."""
    off = np.random.default_rng(0).exponential(2.0, 500)
    task = SimpleNamespace(
        unit="mm",
        drop=lambda before, after: after - before,
        score=lambda outputs, targets: scores(outputs["off"]),
        search=SimpleNamespace(targets=np.zeros(500)),
    )
    run = SimpleNamespace(step=lambda name, make: make())
    judge = Scoring(SimpleNamespace(task=task, run=run, model=None))  # type: ignore[arg-type]
    judge.__dict__["original"] = scores(off)
    judge.outputs = lambda model: {"off": off}  # type: ignore[method-assign]
    return judge


def test_the_error_of_what_is_no_share_is_seen_on_examples_that_are_drawn_anew() -> None:
    judge = millimetres(lambda off: float(off.mean()))
    spread = float(np.random.default_rng(0).exponential(2.0, 500).std())
    assert judge.error(1) == pytest.approx(spread, rel=0.15)
    assert judge.error(400) == pytest.approx(judge.error(1) / 20)


def test_a_score_that_some_resamples_have_not_has_no_error_that_is_known() -> None:
    def score(off: np.ndarray) -> float:
        if len(set(off)) < len(off):
            raise ValueError("an example twice")
        return float(off.mean())

    assert millimetres(score).error(1) == 0.0
    assert millimetres(lambda off: math.nan).error(1) == 0.0


def test_a_few_resamples_without_a_score_are_left_out() -> None:
    """As those that lack the one example of a class."""
    largest = np.random.default_rng(0).exponential(2.0, 500).max()

    def score(off: np.ndarray) -> float:
        if largest not in off:
            raise ValueError("no example of that kind")
        return float(off.mean())

    assert millimetres(score).error(1) == pytest.approx(millimetres(lambda off: float(off.mean())).error(1), rel=0.3)
