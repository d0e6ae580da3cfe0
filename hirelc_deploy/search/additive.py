"""What the methods without agents share: drops from additive damage, the worth of a policy, and paths of policies.

Sensitivities order policies of one kind well, and policies of different kinds badly: recovery mends pruning and
rounding to different degrees, and nobody knows how many points of the score a nat is.  So every method fits, to what
it has really seen,

    drop = scale * (damage of layers + group_weight * damage of groups) ^ power

on a logarithmic scale, where what lies near the limit counts most.  The weight of groups is what corrects the order;
scale and power only make it a drop.  What the formula gets wrong of a policy it gets wrong of those that are like it:
its error is told by a Gaussian process on what policies share of their damage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import numpy as np
from scipy.optimize import least_squares

from hirelc_deploy.policy import Policy
from hirelc_deploy.search.front import front, hypervolume, most_added, places_of, points
from hirelc_deploy.search.goal import Goal, reference
from hirelc_deploy.search.problem import Evaluations, GroupVariable, Prices, Problem, Rows
from hirelc_deploy.search.space import Evaluation

LEAST_DAMAGE = 1e-9
"""In nats, of a policy: a power of nought has no logarithm."""

LEAST_NOISE = 0.01
"""As a part of the drop that is allowed: drops below it are one as good as another."""

POWER_SPREAD, WEIGHT_SPREAD = 0.3, 1.0
"""How far the logarithms of power and group_weight are believed to lie from nought, before anything is seen."""
SCALE_SPREAD = 3.0
"""Likewise of the scale, from what makes the damage of the average policy seen just the drop that is allowed."""

ERROR_SPREAD = 0.3
"""How far drops lie from the formula, as a logarithm."""
UNLIKE = 0.1
"""Part of that which two policies do not share, however alike they are."""

Lean = tuple[float, float]
"""What weights of latency and of size are multiplied by."""

EVEN, TO_LATENCY, TO_SIZE = (1.0, 1.0), (1.5, 0.5), (0.5, 1.5)

LEANS = (EVEN, EVEN, TO_LATENCY, EVEN, TO_SIZE)
"""Of paths, in turn: most go to the goal itself, some to the front's other corners."""

PARTS = (1.0, 0.85, 1.0, 1.15)
"""Of the drop that is allowed, in turn: where the cheapest policy is looked for, since models err to either side."""

MISSED_DROP = 10.0
"""What a drop of twice the wanted one costs, in the unit of `cost`."""

COLD_STEPS, STEPS = 6, 4
"""Evaluations that look for the limit on a path: halving it blindly, and starting from a predicted place."""

WIDENING = 2
"""Evaluations besides, on the path's other places."""

LEAST_GAIN = 1e-3
"""Of hypervolume, as a part of what there is: less is not worth an evaluation."""

DOUBTS = (1.0, 1.5, 1 / 1.5, 2.2, 1 / 2.2, 3.5, 1 / 3.5)
"""Factors of the weight of groups that are tried when the fit itself leads to nothing new."""

TIE = 1e-3
"""What all the drop that is wanted costs, in the unit of `cost`: of policies that cost the same, the milder."""


# -- from damage to drop -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DropModel:
    """The formula above, fitted, and what it got wrong of policies that were seen."""

    scale: float
    """In the score's unit, at a damage of one nat."""
    power: float
    group_weight: float
    seen: Rows | None = None
    """Policies that corrections come from, (seen, variables)."""
    corrections: np.ndarray | None = None
    """What the logarithm of the drop of a policy moves by, for each of these that it is like, (seen,)."""

    def damage(self, problem: Problem, rows: Rows) -> np.ndarray:
        """Weighted and added, (policies,), in nats."""
        return damages(problem, rows) @ np.array([1.0, self.group_weight])

    def damage_left(self, problem: Problem, rows: Rows) -> np.ndarray:
        """The damage that would drop by as much as fine-tuning is told to leave, (policies,), in nats."""
        damage = self.damage(problem, rows)
        if problem.part_left is None:
            return damage
        return np.asarray(damage * problem.part_left(problem.costs(rows)) ** (1 / self.power))

    def drop(self, problem: Problem, rows: Rows) -> np.ndarray:
        """(policies,), in the score's unit."""
        found = self.uncorrected(damages(problem, rows))
        if self.seen is None or self.corrections is None:
            return found
        return found * np.exp(alike(problem, rows, self.seen) @ self.corrections)

    def uncorrected(self, parts: np.ndarray) -> np.ndarray:
        """The formula alone, of damage of layers and of groups, (policies, 2): drops, (policies,)."""
        damage = np.maximum(parts @ np.array([1.0, self.group_weight]), LEAST_DAMAGE)
        return np.asarray(self.scale * damage**self.power)

    def damage_at(self, drop: float) -> float:
        """The inverse: how much damage a drop leaves room for."""
        return float((drop / self.scale) ** (1 / self.power))


UNFITTED = DropModel(scale=1.0, power=1.0, group_weight=1.0)
"""Before anything is seen: good for an order, not for a drop."""


def damages(problem: Problem, rows: Rows) -> np.ndarray:
    """Damage of layers and of groups, (policies, 2).  A choice that seemed to help is taken to do nothing."""
    of_groups = np.array([isinstance(variable, GroupVariable) for variable in problem.variables])
    each = np.maximum(problem.damage(rows), 0.0)
    return np.stack([each[:, ~of_groups].sum(1), each[:, of_groups].sum(1)], axis=1)


def noise(problem: Problem) -> float:
    """What no drop is told apart from nought by, in the score's unit."""
    return max(problem.score_error, LEAST_NOISE * Goal.of_problem(problem).drop_max)


def fit(problem: Problem, seen: Sequence[Evaluation]) -> DropModel:
    """The formula that agrees best with what was seen, and with what is believed of such formulas; UNFITTED of none."""
    if not seen:
        return UNFITTED
    rows = np.array([problem.row(evaluation.policy) for evaluation in seen])
    parts, floor, limit = damages(problem, rows), noise(problem), Goal.of_problem(problem).drop_max
    logs = np.log(np.maximum([evaluation.drop for evaluation in seen], 0.0) + floor)
    left = np.maximum(problem.left_of(seen), 0.0)
    counts = 1 / (1 + np.abs(np.log((left + floor) / (limit + floor))))
    usual = np.log(limit) - np.log(max(parts.sum(1).mean(), LEAST_DAMAGE))

    def residuals(parameters: np.ndarray) -> np.ndarray:
        scale, power, group_weight = parameters
        damage = np.maximum(parts @ np.array([1.0, np.exp(group_weight)]), LEAST_DAMAGE)
        predicted = np.logaddexp(np.log(floor), scale + np.exp(power) * np.log(damage))
        believed = ((scale - usual) / SCALE_SPREAD, power / POWER_SPREAD, group_weight / WEIGHT_SPREAD)
        return np.concatenate([counts * (predicted - logs) / ERROR_SPREAD, believed])

    scale, power, group_weight = np.exp(least_squares(residuals, np.array([usual, 0.0, 0.0])).x)
    fitted = DropModel(float(scale), float(power), float(group_weight))
    missed = logs - np.log(fitted.drop(problem, rows) + floor)
    # the mean of a Gaussian process: errors of so much, alike as policies are, seen through the noise of scores
    heard = np.square(floor / np.exp(logs)) + np.square(ERROR_SPREAD) * UNLIKE
    covariance = np.square(ERROR_SPREAD) * alike(problem, rows, rows)
    corrections = np.square(ERROR_SPREAD) * np.linalg.solve(covariance + np.diag(heard), missed)
    return replace(fitted, seen=rows, corrections=corrections)


def alike(problem: Problem, rows: Rows, others: Rows) -> np.ndarray:
    """How much of their damage policies have in common, nought to one, (policies, others): min over max, added up."""
    mine, theirs = (np.maximum(problem.damage(each), 0.0) + LEAST_DAMAGE for each in (rows, others))
    common = np.stack([np.minimum(mine, each).sum(1) / np.maximum(mine, each).sum(1) for each in theirs], axis=1)
    return np.asarray(common)


# -- what is wanted -------------------------------------------------------------------------------------------------


def leaning(goal: Goal, lean: Lean) -> Goal:
    """The same with its weights of latency and size multiplied."""
    return replace(goal, latency_weight=goal.latency_weight * lean[0], size_weight=goal.size_weight * lean[1])


def cost(goal: Goal, prices: Prices) -> np.ndarray:
    """What is to be made small, (policies,): weighted logarithms, and by how much limits on prices are missed."""
    total: np.ndarray = goal.latency_weight * np.log(prices.latency_ms / goal.latency_ms_before)
    return total + goal.size_weight * np.log(prices.size_bytes / goal.size_bytes_before) + excess(goal, prices)


def excess(goal: Goal, prices: Prices) -> np.ndarray:
    """Logarithms of how many times limits on prices are missed, summed, (policies,); nought if they are kept."""
    missed = np.zeros(len(prices.latency_ms))
    for told, most in goal.limited(prices).values():
        missed += np.maximum(np.log(told / most), 0.0)
    return missed


def affordable(problem: Problem, rows: Rows) -> Rows:
    """Those that keep the limits on prices; if none does, the one that misses them by the least."""
    if not len(rows):
        return rows
    missed = excess(Goal.of_problem(problem), problem.costs(rows))
    return rows[missed <= max(0.0, missed.min())]


def efficient(problem: Problem, rows: Rows, model: DropModel) -> Rows:
    """Those that none beats in bytes and milliseconds with no more damage, each once."""
    rows = np.unique(rows, axis=0)
    prices = problem.costs(rows)
    return rows[front(np.column_stack([model.damage_left(problem, rows), prices.size_bytes, prices.latency_ms]))]


def most_wanted(evaluations: Evaluations, rows: Rows, model: DropModel, turn: int) -> np.ndarray:
    """What to pay for next, as far as a model knows, (variables,).

    In every other turn that is the cheapest of the rows at the drop that is allowed, or somewhat to the side of it in
    case the model errs; in the turns between, the one that adds most hypervolume to what was seen.
    """
    problem = evaluations.problem
    if turn % 2 and (found := widest(evaluations, rows, model)) is not None:
        return found
    goal, prices = Goal.of_problem(problem), problem.costs(rows)
    left = problem.left(model.drop(problem, rows), prices)
    part = left / (PARTS[turn // 2 % len(PARTS)] * goal.drop_max)
    price = cost(goal, prices) + MISSED_DROP * np.maximum(0.0, part - 1) + TIE * part
    return np.asarray(rows[price.argmin()])


def widest(evaluations: Evaluations, rows: Rows, model: DropModel) -> np.ndarray | None:
    """The row that adds most hypervolume to what was seen, (variables,), as far as a model knows; None if none does."""
    problem = evaluations.problem
    corner = reference(Goal.of_problem(problem))
    seen, prices = points(problem, evaluations.seen), problem.costs(rows)
    left = problem.left(model.drop(problem, rows), prices)
    found = most_added(places_of(left, prices, problem.before), seen, corner)
    return None if found is None or found[1] <= LEAST_GAIN * hypervolume(seen, corner) else np.asarray(rows[found[0]])


def recipes(problem: Problem) -> Rows:
    """What an engineer would try by hand, as legal rows, each once."""
    rows = [problem.row(policy) for policy in problem.recipes.values()] or [problem.as_trained]
    return np.unique(problem.legal(np.array(rows)), axis=0)


def recipe_ladder(problem: Problem) -> list[Policy]:
    """Recipes worth an engineer's while, the dearest first: none smaller and faster does less damage."""
    good = efficient(problem, recipes(problem), UNFITTED)
    prices = problem.costs(good)
    cost = np.log(prices.size_bytes) + np.log(prices.latency_ms)
    return [problem.policy(row) for row in good[np.argsort(-cost)]]


def halved_ladder(evaluations: Evaluations, most: int, is_mild: Callable[[Evaluation], bool]) -> list[Evaluation]:
    """Recipes about where that ladder ceases to be mild, by halving: at most so many, and at most a third of all
    evaluations, but one.  Of those that keep the limits on prices, where any does: milder ones are trained for longer
    and say little of these.  Raises Spent."""
    problem = evaluations.problem
    every = recipe_ladder(problem)
    missed = excess(Goal.of_problem(problem), problem.costs(np.array([problem.row(policy) for policy in every])))
    ladder = [policy for policy, over in zip(every, missed, strict=True) if not over] or every
    mild, harsh = 0, len(ladder) - 1
    found: list[Evaluation] = []
    while mild <= harsh and len(found) < max(1, min(most, evaluations.limit // 3)):
        middle = (mild + harsh) // 2
        found.append(evaluations.of(ladder[middle]))
        mild, harsh = (middle + 1, harsh) if is_mild(found[-1]) else (mild, middle - 1)
    return found


def draw(problem: Problem, count: int, generator: np.random.Generator) -> Rows:
    """Random legal rows, (count, variables).

    Each draws two intensities, of layers and of groups.  Of every variable it takes an option as far along the order
    of their damage as so many coins say: with none nothing changes, with one everything is as harsh as it can be.
    """
    intensity = generator.random((count, 2))
    rows = np.empty((count, len(problem.variables)), int)
    for i, variable in enumerate(problem.variables):
        by_damage = np.argsort(problem.sensitivity.damage[variable.name], kind="stable")
        of_kind = intensity[:, int(isinstance(variable, GroupVariable))]
        rows[:, i] = by_damage[generator.binomial(len(by_damage) - 1, of_kind)]
    return problem.legal(rows)


def unseen(evaluations: Evaluations, rows: Rows) -> Rows:
    """Those that are yet to be evaluated."""
    new = [evaluations.problem.policy(row) not in evaluations for row in rows]
    return rows[np.array(new, bool)]


# -- paths ----------------------------------------------------------------------------------------------------------

Trace = Callable[[DropModel, Goal], Rows]
"""Policies from mild to harsh, each the best for its damage, as far as a model of the damage knows."""


def follow(problem: Problem, evaluations: Evaluations, trace: Trace) -> None:
    """Spends the evaluations along paths, each traced with what the ones before it have taught.

    On a path the limit of the drop is looked for first: by halving while nothing is known, then from where the fit
    expects it.  Then come the policies of the path that add most hypervolume.  Returns when no path leads to anything
    new or nothing is left to spend; raises Spent.
    """
    goal, empty = Goal.of_problem(problem), 0
    for lean in cycle(LEANS):
        if empty == len(DOUBTS) or not evaluations.left:
            return
        before = len(evaluations.seen)
        model = fit(problem, evaluations.seen)
        doubted = replace(model, group_weight=model.group_weight * DOUBTS[empty])
        rows = affordable(problem, trace(doubted, leaning(goal, lean)))
        expected = problem.left(model.drop(problem, rows), problem.costs(rows)) if before else None
        close_in(evaluations, rows, goal.drop_max, expected, STEPS if before else COLD_STEPS)
        for _ in range(WIDENING):
            found = widest(evaluations, unseen(evaluations, rows), fit(problem, evaluations.seen))
            if found is None:
                break
            evaluations.of(problem.policy(found))
        empty = 0 if len(evaluations.seen) > before else empty + 1


def close_in(evaluations: Evaluations, rows: Rows, limit: float, expected: np.ndarray | None, steps: int) -> None:
    """Evaluates where a path crosses a drop: between what kept it and what missed it, till these are neighbours.

    What is known costs no step.  Each drop seen corrects what is `expected` of the whole path, (rows,).  Of drops what
    is left when they are mended counts.
    """
    problem = evaluations.problem
    floor = noise(problem)
    kept, missed = -1, len(rows)
    while missed - kept > 1:
        place = (kept + missed) // 2 if expected is None else _nearest(expected + floor, limit + floor)
        place = min(max(place, kept + 1), missed - 1)
        policy = problem.policy(rows[place])
        if policy not in evaluations:
            if not steps:
                return
            steps -= 1
        drop = problem.left_of([evaluations.of(policy)])[0]
        kept, missed = (place, missed) if drop <= limit else (kept, place)
        if expected is not None:
            expected = expected * (max(drop, 0.0) + floor) / (expected[place] + floor)


def _nearest(values: np.ndarray, wanted: float) -> int:
    return int(np.abs(np.log(values / wanted)).argmin())
