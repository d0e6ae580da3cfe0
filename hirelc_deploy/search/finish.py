"""From evaluations to one policy: the best few are made real in full, and what is seen of them decides.

An evaluation trains for seconds, a finished policy for epochs, so its drop is smaller.  How much smaller is learned
from those that are finished: the first guess is GAIN, and each finished policy corrects it.
"""

from collections.abc import Callable, Sequence

import numpy as np

from hirelc_deploy.budget import Budget, judge, met
from hirelc_deploy.policy import Policy
from hirelc_deploy.search.goal import Goal
from hirelc_deploy.search.problem import Problem
from hirelc_deploy.search.space import Choice, Evaluation

FINALISTS = 4
"""At most so many policies are finished."""

MARGIN = 0.8
"""In standard errors of a score, how far below the limit a drop has to be to be relied on: the test split has other
examples.  The error of a difference of two scores on the same examples is about so much of one score's."""

GAIN = 0.5
"""Part of an evaluation's drop that fine-tuning leaves, before any was seen."""


def finish(
    problem: Problem, seen: Sequence[Evaluation], complete: Callable[[Policy], Evaluation], *, most: int = FINALISTS
) -> Choice:
    """The best policy under the budget, as `complete` sees it: trained in full, its file timed and weighed.

    With a limit on the drop: the cheapest that is told to hold it is finished, then a cheaper or a dearer one, by what
    was seen, until `most` or until nothing cheaper is left; one that holds it by MARGIN comes before one that just
    does.  Without one: those with the best reward.
    """
    goal, budget = Goal.of(problem.budget, problem.before), problem.budget
    safe = None if budget.drop is None else _safe(budget.drop, problem.score_error)
    finished: dict[str, tuple[Evaluation, Evaluation]] = {}
    while len(finished) < most:
        wanted = _next(seen, finished, goal, budget, safe)
        if wanted is None:
            break
        finished[wanted.policy.digest()] = (wanted, complete(wanted.policy))
    ends = [after for _, after in finished.values()]
    return Choice(min(ends, key=lambda each: _rank(each, goal, budget, safe)), tuple(seen))


def _safe(drop: float, score_error: float) -> float:
    """What a drop has to stay below to be relied on; at least half of the limit is left to it."""
    return drop - min(MARGIN * score_error, abs(drop) / 2)


def _next(
    seen: Sequence[Evaluation],
    finished: dict[str, tuple[Evaluation, Evaluation]],
    goal: Goal[float],
    budget: Budget,
    safe: float | None,
) -> Evaluation | None:
    """What is worth finishing now; None if nothing can be better than what is."""
    open_ = [each for each in seen if each.policy.digest() not in finished]
    if not open_:
        return None
    if safe is None:
        return min(open_, key=lambda each: (_excess(each, budget), -_reward(each, goal)))
    gain = _gain(list(finished.values()))
    holding = [after for _, after in finished.values() if met(budget, after.figures) and after.drop <= safe]
    cheapest = min((_cost(each) for each in holding), default=float("inf"))
    # of figures that are not judged yet the search's own predictions stand for what will be seen
    hopeful = [e for e in open_ if gain * e.drop <= safe and not _excess(e, budget) and _cost(e) < cheapest]
    if hopeful:
        return min(hopeful, key=_cost)
    if holding:
        return None
    return min(open_, key=lambda each: (_excess(each, budget), each.drop))


def _gain(finished: Sequence[tuple[Evaluation, Evaluation]]) -> float:
    """Part of a drop that was left, as far as it was seen: the median, and never below nought."""
    parts = [max(0.0, after.drop) / before.drop for before, after in finished if before.drop > 0]
    return float(np.median(parts)) if parts else GAIN


def _rank(evaluation: Evaluation, goal: Goal[float], budget: Budget, safe: float | None) -> tuple[float, ...]:
    """The lower, the better: limits that are missed, and by how much; whether that is safe; then what it is for."""
    missed = sum(check.ok is False for check in judge(budget, evaluation.figures))
    over = 0.0 if budget.drop is None else max(0.0, evaluation.drop - budget.drop)
    unsafe = safe is not None and evaluation.drop > safe
    return (missed > 0, _excess(evaluation, budget) + over, unsafe, -_reward(evaluation, goal))


def _reward(evaluation: Evaluation, goal: Goal[float]) -> float:
    """Without what missed budgets cost: they were judged before."""
    weights = -goal.size_weight * np.log(evaluation.figures.size_bytes or 1) - goal.latency_weight * np.log(
        evaluation.figures.latency_ms or 1
    )
    return float(weights) - evaluation.drop / goal.drop_max


def _cost(evaluation: Evaluation) -> float:
    """Logarithm of bytes times milliseconds."""
    assert evaluation.figures.size_bytes
    assert evaluation.figures.latency_ms
    return float(np.log(evaluation.figures.size_bytes) + np.log(evaluation.figures.latency_ms))


def _excess(evaluation: Evaluation, budget: Budget) -> float:
    """By how much limits other than the drop's are missed: sum of logarithms of ratios."""
    figures = evaluation.figures
    over = 0.0
    for limit, figure in (
        (budget.size_bytes, figures.size_bytes),
        (budget.latency_ms, figures.latency_ms),
        (budget.memory_bytes, figures.memory_bytes),
    ):
        if limit is not None and figure is not None:
            over += max(0.0, float(np.log(figure / limit)))
    if budget.speedup is not None and figures.speedup is not None:
        over += max(0.0, float(np.log(budget.speedup / figures.speedup)))
    return over
