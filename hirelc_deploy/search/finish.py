"""From evaluations to one policy: the best few are made real in full, and what is seen of them decides.

An evaluation trains for seconds, a finished policy for epochs, so its drop is smaller: by half on one network, by all
of it on another.  So search and finishing take turns.  One recipe is finished before the search begins, and says which
drops are mended; after FIRST_PART of the evaluations the best policy that they led to is finished, which corrects that,
and the search goes on with what is known then.

What finishing leaves is told by hardness: a drop times the square root of how many times smaller and faster the file
is than the original's (CHEAPER).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hirelc_deploy.budget import Budget, excess, judge, met
from hirelc_deploy.policy import Policy
from hirelc_deploy.search.additive import halved_ladder
from hirelc_deploy.search.goal import SPREAD_PART, Goal
from hirelc_deploy.search.problem import Evaluations, Prices, Problem
from hirelc_deploy.search.space import Choice, Evaluation

FINALISTS = 5
"""At most so many policies are finished."""

MARGIN, LEAST_SAFE = 1.0, 1 / 4
"""How far below the limit a drop has to be to be relied on, in standard errors of a score on the search split and of
one on the test split, which has other examples, both together; never less than such a part of the limit.  The error of
a difference of two scores on the same examples is 0.6 to 0.9 of one score's (`drop_ci95` of the recorded manifests),
and 1.28 of these errors hold nine times of ten."""

LATENCY_MARGIN = 0.03
"""Below its limit a latency has to be by such a part of it to be relied on: two measurements of one file, each with the
core to itself, differed by 3.6 % (docs/findings.md), and a gate measures again."""

FIRST_PART = 2 / 3
"""Of the evaluations, before what they led to is finished and the rest is spent by what that has shown."""

CHEAPER = 0.5
"""Power of how many times smaller and how many times faster a file is in how hard its drop is to mend: what told best
what was left of the finished policies on record (benchmarks/mending.py).  One power for both, as both count
alike in what is minimised: so of two policies that cost as much the milder one is never told to be the harder, and
nothing is gained by storing more bits or by running slower."""

MOST_TIMES, FURTHER, FURTHER_UNHARMED = 80.0, 1.5, 2.0
"""How hard a policy may be at most, in that unit and times the hardest that was seen to be mended: what is left tells
little of what more would leave, since mending ends abruptly.  Where nothing has failed yet it may be so much harder
than what was mended, by the larger step where that lost nothing, as long as another can be finished to step back."""

UNHARMED = 1 / 10
"""A drop of such a part of the limit is nothing, where a score cannot tell it from that."""

POWER, POWERS = 1.5, (1.0, 4.0)
"""What is left grows with this power of hardness, as long as one policy is known, and between these with more."""

ALMOST = 0.05
"""By how much, as a logarithm, another limit may be told to be missed by what is finished all the same: how far off a
told latency may be."""

TINY = 1e-6

Pair = tuple[Evaluation, Evaluation]
"""A policy as it was evaluated, and as it was finished."""

Complete = Callable[[Policy], Evaluation]

Prepare = Callable[[Sequence[Policy]], None]


@dataclass(frozen=True)
class Mending:
    """What fine-tuning leaves of an evaluation's drop: between two that were seen a straight line, and beyond them
    factor x hardness ** power.

    What is left rises ever faster with hardness, so that a straight line says rather too much of it; and it begins
    below nought, where fine-tuning makes a network better than it was, of which a logarithm knows nothing
    (benchmarks/mending.py holds the two beside each other).
    """

    seen: tuple[tuple[float, float], ...]
    """Hardness, and what was left."""
    power: float
    least: float
    """In a power of hardness less than this counts as this."""

    @classmethod
    def seen_in(
        cls, pairs: Sequence[Pair], limit: float, score_error: float, hardness: Callable[[Evaluation], float]
    ) -> "Mending | None":
        """As far as it was seen, what is least being half of what a score can tell; None where no evaluation dropped by
        more."""
        # never above what is safe: what held is shown to hold
        least = max(min(score_error / 2, LEAST_SAFE * limit), limit / 20)
        seen = tuple((hardness(e), after.drop) for e, after in pairs if e.drop > least)
        if not seen:
            return None
        before, after = np.log([(hard, max(left, least)) for hard, left in seen]).T
        power = POWER
        if np.ptp(before) > 0:
            power = float(np.clip(np.polyfit(before, after, 1)[0], *POWERS))
        return cls(seen, power, least)

    def hardest(self, left: float) -> float:
        """The hardness of which so much is left: between the largest that left no more and the smallest that did, else
        from where nearly that was seen, since mending ends abruptly."""
        held = max((pair for pair in self.seen if pair[1] <= left), default=None)
        failed = min((pair for pair in self.seen if pair[1] > left), default=None)
        if held is not None and failed is not None and held[0] < failed[0]:
            return float(np.interp(left, (held[1], failed[1]), (held[0], failed[0])))
        counted = [(before, max(after, self.least)) for before, after in self.seen]
        before, after = min(counted, key=lambda pair: (abs(np.log(pair[1] / left)), -pair[0]))
        return float(before * (left / after) ** (1 / self.power))


UNSEEN = 2.0
"""Drops of evaluations, as parts of what is safe, that are hoped to be mended before anything was seen."""

FIRST_HARDNESS, RECIPES = 40.0, 4
"""Of the recipe that is finished first, in the same unit: twice this was mended on three networks while evaluations
dropped twice as much (compress/compensate.py), and what is far milder would teach nothing.  It is looked for with so
many evaluations, and at most a third of all."""


class Finishing:
    """The policies of one search that are made real in full, and what that teaches."""

    def __init__(
        self,
        problem: Problem,
        complete: Complete,
        *,
        most: int = FINALISTS,
        prepare: Prepare = lambda _: None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`complete` trains a policy in full, times and weighs its file; at most so many are.

        `prepare` is told of those that are completed next, so that they are trained side by side, as many as the
        problem has processes for.  `note` is for people.
        """
        self._problem = problem
        self._complete = complete
        self._prepare = prepare
        self._most = most
        self._note = note
        self._pairs: dict[str, Pair] = {}
        self._goal = Goal.of_problem(problem)
        limit = problem.budget.drop
        errors = math.hypot(problem.score_error, problem.test_error)
        self._safe = math.inf if limit is None else _safe(limit, errors)

    @property
    def parts(self) -> tuple[float, ...]:
        """How much of the evaluations is spent before each turn.  Without a limit on the drop there is nothing to learn
        about it, and so one turn."""
        return (FIRST_PART, 1.0) if self._is_limited else (1.0,)

    def recipe(self, evaluations: Evaluations) -> None:
        """Where there is a limit on the drop, finish one of the recipes worth trying: that which comes nearest to
        FIRST_HARDNESS, found by halving among those that keep the other limits."""
        if not self._is_limited:
            return
        wanted = FIRST_HARDNESS * self._unit
        seen = halved_ladder(evaluations, RECIPES, lambda each: self._hardness(each) <= wanted)
        # from the last: of those that drop by nothing it is the harshest
        self._finish(min(reversed(seen), key=lambda each: abs(math.log(max(self._hardness(each), TINY) / wanted))))

    @property
    def aim(self) -> Problem:
        """The problem with what is known of mending: drops of evaluations as they will be left, and limits where they
        may be relied on.  Where what was finished has lost nothing that a score can tell, drops are taken as they are.
        """
        limit, mending = self._goal.drop_max, self._mending
        problem = replace(self._problem, budget=_relied_on(self._problem.budget))
        if mending is None:
            return problem
        part = limit / self._told(mending)
        return replace(problem, part_left=lambda prices: np.minimum(1.0, part * self._times(prices)))

    def promising(self, seen: Sequence[Evaluation], count: int) -> list[Evaluation]:
        """Those that were evaluated and are most worth finishing, so many at most."""
        return self._in_order([*self._apart_from(seen), *seen])[:count]

    def reprice(self, problem: Problem, told: Callable[[Evaluation], Evaluation]) -> None:
        """Go on with the problem as its prices are told by now; `told` says what evaluations are by them."""
        self._problem = problem
        self._goal = Goal.of_problem(problem)
        self._pairs = {digest: (told(before), after) for digest, (before, after) in self._pairs.items()}

    def some(self, seen: Sequence[Evaluation]) -> bool:
        """Finish what is most worth it among those that were evaluated: one, or as many as are trained side by side,
        but as many may be finished after them; False where nothing is worth it, or no more may be."""
        return self._some(seen, max(1, (self._most - len(self._pairs)) // 2))

    def _some(self, seen: Sequence[Evaluation], most: int) -> bool:
        count = min(self._problem.at_once, most, self._most - len(self._pairs))
        wanted = self._apart(self.promising(seen, len(seen) + len(self._pairs)), count) if count else []
        if len(wanted) > 1:
            self._prepare([each.policy for each in wanted])
        for each in wanted:
            self._finish(each)
        return bool(wanted)

    def _apart(self, ordered: Sequence[Evaluation], count: int) -> list[Evaluation]:
        """The first, and others for the case that it fails, so many in all: each is the first that is milder by a
        further step on the way from its hardness to what was mended already, and misses the other limits by no more."""
        if not ordered or not self._is_limited:
            return list(ordered[:count])
        found = [ordered[0]]
        able = [e for e in ordered if self._over(e) <= self._over(found[0])]
        hard = max(self._hardness(found[0]), TINY)
        mended = min(max(self._mended(self._safe), self._goal.drop_max), hard)
        for step in range(1, count):
            milder = hard * (mended / hard) ** (step / count)
            found += [e for e in able if self._hardness(e) < milder and e not in found][:1]
        return found

    def choice(self, seen: Sequence[Evaluation]) -> Choice:
        """The best policy under the budget, of those that are finished.

        With a limit on the drop: the cheapest that is told to hold it is finished, then a cheaper or a dearer one, by
        what was seen, until nothing cheaper is left, not even between what held and what did not; one that holds it by
        MARGIN comes before one that just does.
        Without one: those with the best reward.
        """
        while self._some(seen, self._most):
            pass
        ends = [after for _, after in self._pairs.values()]
        best = min(ends, key=lambda each: _rank(each, self._goal, self._problem.budget, self._safe))
        known = (*self._apart_from(seen), *seen)
        hardness = {each.policy.digest(): self._hardness(each) for each in known}
        whole = {each.policy.digest(): self._problem.whole(each.policy) for each in known}
        return Choice(best, known, tuple(ends), hardness, whole, self._problem.recipes)

    @property
    def _is_limited(self) -> bool:
        limit = self._problem.budget.drop
        return limit is not None and limit > 0

    @property
    def _unit(self) -> float:
        """What hardness is told in, in the score's unit: the limit on the drop, or a part of the score's spread where
        that is more, since what is mended hardly depends on what was allowed."""
        return max(self._goal.drop_max, SPREAD_PART * self._problem.score_spread)

    @property
    def _mending(self) -> Mending | None:
        """None where there is nothing to learn about, or nothing was seen."""
        if not self._is_limited:
            return None
        seen, score_error = list(self._pairs.values()), self._problem.score_error
        return Mending.seen_in(seen, self._goal.drop_max, score_error, self._hardness)

    def _hardness(self, evaluation: Evaluation) -> float:
        size_bytes, latency_ms = _prices(evaluation, self._goal)
        return evaluation.drop * float(self._times(Prices(np.array([size_bytes]), np.array([latency_ms])))[0])

    def _times(self, prices: Prices) -> np.ndarray:
        """By how much drops are harder to mend in such files than in one like the original's, (files,)."""
        smaller = self._goal.size_bytes_before / prices.size_bytes
        faster = self._goal.latency_ms_before / prices.latency_ms
        found: np.ndarray = (smaller * faster) ** CHEAPER
        return found

    def _hardest(self, left: float, mending: Mending) -> float:
        """The hardness of which so much is left, as far as it is believed."""
        return min(mending.hardest(left), max(MOST_TIMES * self._unit, FURTHER * self._mended(left)))

    def _told(self, mending: Mending) -> float:
        """The hardness that is told to leave what is safe, or a step further that is worth trying."""
        return max(self._hardest(self._safe, mending), self._further)

    @property
    def _further(self) -> float:
        """The hardness that is tried to learn whether it is mended as well, while another can be finished after it."""
        return self._untried if self._can_follow else 0.0

    @property
    def _can_follow(self) -> bool:
        """Whether another may be finished after the next one, to step back."""
        return len(self._pairs) + 1 < self._most

    @property
    def _untried(self) -> float:
        """A step further than what was mended; nought where as much has failed.

        Recipes are no example: of what is uniform more is left than of what was searched and is as hard by its figures.
        """
        mended, recipes = self._mended(self._safe), list(self._problem.recipes.values())
        searched = [pair for pair in self._pairs.values() if pair[0].policy not in recipes]
        has_failed = any(self._hardness(e) >= mended and after.drop > self._safe for e, after in searched)
        if has_failed:
            return 0.0
        unharmed = self._mended(min(self._problem.score_error / 2, UNHARMED * self._goal.drop_max))
        return max(FURTHER * mended, FURTHER_UNHARMED * unharmed)

    def _mended(self, left: float) -> float:
        """The hardest evaluation of which no more was left; nought where that was never seen."""
        return max((self._hardness(e) for e, after in self._pairs.values() if after.drop <= left), default=0.0)

    @property
    def _failed(self) -> float:
        """The least hard evaluation above all that were mended of which too much was left; nought if none."""
        mended = self._mended(self._safe)
        hard = (self._hardness(e) for e, after in self._pairs.values() if after.drop > self._safe)
        return min((each for each in hard if each > mended), default=0.0)

    def _apart_from(self, seen: Sequence[Evaluation]) -> list[Evaluation]:
        """What was finished without being one of these."""
        return [before for before, _ in self._pairs.values() if before not in seen]

    def _finish(self, before: Evaluation) -> None:
        after = self._complete(before.policy)
        self._pairs[before.policy.digest()] = (before, after)
        if self._is_limited:
            hard = self._hardness(before)
            told = "" if self._mending is None else f": {self._told(self._mending):.1f} may be"
            self._note(
                f"fine-tuning leaves {after.drop:.2f} of a drop of {before.drop:.2f}, as hard to mend as {hard:.1f} in "
                f"a file like the original's{told}"
            )

    def _in_order(self, seen: Sequence[Evaluation]) -> list[Evaluation]:
        """What is worth finishing now, the most worth first; nothing if nothing can be better than what is."""
        goal, budget = self._goal, self._problem.budget
        open_ = [each for each in seen if each.policy.digest() not in self._pairs]
        if budget.drop is None:
            return sorted(open_, key=lambda each: (self._over(each), -_reward(each, goal)))
        ends = [after for _, after in self._pairs.values()]
        holding = [after for after in ends if met(budget, after.figures) and not _risks(after, budget, self._safe)]
        cheapest = min((_cost(each, goal) for each in holding), default=float("inf"))
        # of figures that are not judged yet the search's own predictions stand for what will be seen
        cheaper = [e for e in open_ if not self._over(e) and _cost(e, goal) < cheapest]
        hopeful = [e for e in cheaper if self._is_hopeful(e)]
        if holding and not hopeful:  # what fails now costs time alone
            held, failed = self._mended(self._safe), self._failed
            between = [e for e in cheaper if self._is_limited and held < self._hardness(e) < failed]
            if between:  # it fails the sooner the nearer it is to what did
                return sorted(between, key=lambda e: (_cost(e, goal) - cheapest) * math.log(failed / self._hardness(e)))
            if not self._is_limited:
                return []
            step = [e for e in cheaper if self._hardness(e) <= self._untried]
            if failed or step or not self._can_follow:
                return sorted(step, key=lambda e: _cost(e, goal))
            return sorted(cheaper, key=self._hardness)[:1]  # nothing has failed yet, and the limit is unspent
        if hopeful:
            return sorted(hopeful, key=lambda each: (_cost(each, goal), each.drop))
        if any(not self._over(after) for after in ends):  # one that misses a limit takes the place of none of these
            open_ = [each for each in open_ if self._over(each) <= ALMOST]
        return sorted(open_, key=lambda each: (self._over(each), self._hardness(each)))

    def _over(self, evaluation: Evaluation) -> float:
        """By how much limits other than the drop's are missed."""
        return excess(self._problem.budget, evaluation.figures)

    def _is_hopeful(self, evaluation: Evaluation) -> bool:
        """Whether fine-tuning is told to leave of it what is safe, or it is a step that is worth trying."""
        if not self._is_limited:
            return evaluation.drop <= self._safe
        mending, rounding = self._mending, 1 + 1e-9
        if mending is None:
            return evaluation.drop <= rounding * UNSEEN * self._safe
        told = self._told(mending)
        return evaluation.drop <= rounding * self._safe or self._hardness(evaluation) <= rounding * told


def _safe(drop: float, error: float) -> float:
    """What a drop has to stay below to be relied on."""
    return drop - min(MARGIN * error, (1 - LEAST_SAFE) * abs(drop))


def _relied_on(budget: Budget) -> Budget:
    """The same with limits on latency that leave room for the next measurement."""
    return replace(
        budget,
        latency_ms=None if budget.latency_ms is None else (1 - LATENCY_MARGIN) * budget.latency_ms,
        speedup=None if budget.speedup is None else budget.speedup / (1 - LATENCY_MARGIN),
    )


def _risks(evaluation: Evaluation, budget: Budget, safe: float) -> int:
    """How many limits are held so nearly that they may be missed when they are measured again."""
    is_near = excess(_relied_on(budget), evaluation.figures) > excess(budget, evaluation.figures)
    return is_near + (evaluation.drop > safe)


def _rank(evaluation: Evaluation, goal: Goal[float], budget: Budget, safe: float) -> tuple[float, ...]:
    """The lower, the better: limits that are missed, and by how much; what is held by a hair; then what it is for.

    A drop that has a limit is not traded against anything once it is safe: it decides between equals.
    """
    missed = sum(check.ok is False for check in judge(budget, evaluation.figures))
    over = excess(budget, evaluation.figures)
    risks = _risks(evaluation, budget, safe)
    if budget.drop is None:
        return (missed > 0, over, risks, -_reward(evaluation, goal))
    over += max(0.0, evaluation.drop - budget.drop)
    risk = evaluation.drop if evaluation.drop > safe else -np.inf
    return (missed > 0, over, risks, risk, _cost(evaluation, goal), evaluation.drop)


def _reward(evaluation: Evaluation, goal: Goal[float]) -> float:
    """Without what missed budgets cost: they were judged before."""
    return -_cost(evaluation, goal) - evaluation.drop / goal.drop_max


def _cost(evaluation: Evaluation, goal: Goal[float]) -> float:
    """Logarithm of bytes times milliseconds, as far as they have no limit."""
    size, latency = np.log(_prices(evaluation, goal))
    return float(goal.size_weight * size + goal.latency_weight * latency)


def _prices(evaluation: Evaluation, goal: Goal[float]) -> tuple[float, float]:
    """Bytes and milliseconds.

    Policies are timed an hour apart, when the machine is a faster or a slower one: so milliseconds are those that the
    speed-up leaves of the original's.
    """
    figures = evaluation.figures
    latency_ms = goal.latency_ms_before / figures.speedup if figures.speedup else figures.latency_ms
    assert figures.size_bytes
    assert latency_ms
    return figures.size_bytes, latency_ms
