"""From evaluations to one policy: the best few are made real in full, and what is seen of them decides.

An evaluation trains for seconds, a finished policy for epochs, so its drop is smaller: by half on one network, by nine
tenths on another.  So one recipe is finished before the search begins (`aimed`), which then looks for policies whose
evaluations may drop by as much as fine-tuning mends; and each policy that is finished later corrects that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hirelc_deploy.budget import Budget, judge, met
from hirelc_deploy.policy import Policy
from hirelc_deploy.search.additive import recipe_ladder
from hirelc_deploy.search.goal import Goal
from hirelc_deploy.search.problem import Problem
from hirelc_deploy.search.space import Choice, Evaluation

FINALISTS = 4
"""At most so many policies are finished."""

MARGIN = 0.8
"""In standard errors of a score, how far below the limit a drop has to be to be relied on: the test split has other
examples.  The error of a difference of two scores on the same examples is about so much of one score's."""


MOST_TIMES = 10.0
"""How far an evaluation's drop may be above the limit at most, whatever one policy has shown."""

POWER, POWERS = 1.5, (1.0, 2.0)
"""What is left of a drop grows with this power of it, as long as one policy is known, and between these with more."""

Pair = tuple[Evaluation, Evaluation]
"""A policy as it was evaluated, and as it was finished."""

Complete = Callable[[Policy], Evaluation]


@dataclass(frozen=True)
class Mending:
    """What fine-tuning leaves of an evaluation's drop: factor x drop ** power."""

    factor: float
    power: float

    @classmethod
    def seen_in(cls, pairs: Sequence[Pair], limit: float, score_error: float) -> "Mending | None":
        """As far as it was seen, drops below half of what a score can tell counting as that half; None where no
        evaluation dropped by more."""
        least = max(min(score_error, limit) / 2, limit / 20)  # never above what is safe: what held is shown to hold
        logs = np.log([(e.drop, max(after.drop, least)) for e, after in pairs if e.drop > least]).reshape(-1, 2)
        if not len(logs):
            return None
        before, after = logs.T
        power = POWER
        if np.ptp(before) > 0:
            power = float(np.clip(np.polyfit(before, after, 1)[0], *POWERS))
        return cls(float(np.exp(np.median(after - power * before))), power)

    def before(self, left: float) -> float:
        """The evaluation's drop of which so much is left."""
        return float((left / self.factor) ** (1 / self.power))


UNSEEN = Mending(0.5, 1.0)
"""Before anything was seen."""


def aimed(problem: Problem, complete: Complete) -> tuple[Problem, list[Pair]]:
    """The problem with the drop that an evaluation may have, and what that was learned from.

    One recipe is evaluated and finished: the one in the middle of those worth trying, which is a finalist as well.
    Where it drops by nothing that a score can tell, evaluations may drop by what is allowed in the end.  Without a
    limit on the drop there is nothing to learn.
    """
    limit = problem.budget.drop
    if limit is None or limit <= 0:
        return problem, []
    ladder = recipe_ladder(problem)
    before = problem.evaluate(ladder[(len(ladder) - 1) // 2])
    pairs = [(before, complete(before.policy))]
    mending = Mending.seen_in(pairs, limit, problem.score_error)
    if mending is None:
        return problem, pairs
    allowed = float(np.clip(mending.before(limit), limit, MOST_TIMES * limit))
    return replace(problem, budget=replace(problem.budget, drop=allowed)), pairs


def finish(
    problem: Problem,
    seen: Sequence[Evaluation],
    complete: Complete,
    pairs: Sequence[Pair] = (),
    *,
    most: int = FINALISTS,
) -> Choice:
    """The best policy under the budget, as `complete` sees it: trained in full, its file timed and weighed.

    With a limit on the drop: the cheapest that is told to hold it is finished, then a cheaper or a dearer one, by what
    was seen, until `most` or until nothing cheaper is left; one that holds it by MARGIN comes before one that just
    does.  Without one: those with the best reward.  `pairs` were finished before.
    """
    goal, budget = Goal.of(problem.budget, problem.before), problem.budget
    safe = None if budget.drop is None else _safe(budget.drop, problem.score_error)
    finished = {before.policy.digest(): (before, after) for before, after in pairs}
    seen = [*(before for before, _ in pairs if before not in seen), *seen]
    while len(finished) < most:
        wanted = _next(seen, finished, goal, problem, safe)
        if wanted is None:
            break
        finished[wanted.policy.digest()] = (wanted, complete(wanted.policy))
    ends = [after for _, after in finished.values()]
    return Choice(min(ends, key=lambda each: _rank(each, goal, budget, safe)), tuple(seen), tuple(ends))


def _safe(drop: float, score_error: float) -> float:
    """What a drop has to stay below to be relied on; at least half of the limit is left to it."""
    return drop - min(MARGIN * score_error, abs(drop) / 2)


def _next(
    seen: Sequence[Evaluation],
    finished: dict[str, Pair],
    goal: Goal[float],
    problem: Problem,
    safe: float | None,
) -> Evaluation | None:
    """What is worth finishing now; None if nothing can be better than what is."""
    budget = problem.budget
    open_ = [each for each in seen if each.policy.digest() not in finished]
    if not open_:
        return None
    if safe is None:
        return min(open_, key=lambda each: (_excess(each, budget), -_reward(each, goal)))
    mending = Mending.seen_in(list(finished.values()), goal.drop_max, problem.score_error) or UNSEEN
    allowed = mending.before(safe) * (1 + 1e-9)  # the limit itself is on the safe side of rounding
    holding = [after for _, after in finished.values() if met(budget, after.figures) and after.drop <= safe]
    cheapest = min((_cost(each) for each in holding), default=float("inf"))
    # of figures that are not judged yet the search's own predictions stand for what will be seen
    hopeful = [e for e in open_ if e.drop <= allowed and not _excess(e, budget) and _cost(e) < cheapest]
    if hopeful:
        return min(hopeful, key=_cost)
    if holding:
        return None
    return min(open_, key=lambda each: (_excess(each, budget), each.drop))


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
