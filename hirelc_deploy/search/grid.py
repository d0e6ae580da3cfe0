"""The recipe grid: one number for all channels and one precision for all layers, as an engineer would try them.

Nothing but `problem.recipes` is ever evaluated.  An engineer who has N evaluations, the prices of the whole grid and
the sensitivities spends them so:

1. The classics: integers of 8 bits, then of 4, one scale an output channel, at every width, mild to harsh.  On each
   of the two, the width at which the drop reaches its limit is found by halving.
2. The rest, but for recipes that another one beats in bytes and in milliseconds with no more damage.  Drops seen so
   far say what to expect of each (`additive.fit`).  In turn, the one that promises to be cheapest at the drop that is
   allowed, and the one that promises most hypervolume: so limit and front are both looked after.
3. If evaluations are left, the beaten ones in the same order: sensitivities may have been wrong.

Recipes that miss a limit on prices are not paid for, unless all do.
"""

from collections import Counter
from itertools import count

import numpy as np

from hirelc_deploy.policy import PerChannel, Policy, Precision
from hirelc_deploy.search.additive import (
    affordable,
    close_in,
    cost,
    efficient,
    fit,
    most_wanted,
    recipes,
    unseen,
)
from hirelc_deploy.search.goal import Goal
from hirelc_deploy.search.problem import Evaluations, GroupVariable, Problem, Rows

CLASSIC_BITS = (8, 4)


def search(problem: Problem, evaluations: Evaluations, *, seed: int) -> None:
    """Evaluates recipes, the most promising first, till all are known.  Every seed gives the same.  Raises Spent."""
    within = affordable(problem, recipes(problem))
    for bits in CLASSIC_BITS:
        column = _classics(problem, within, bits)
        close_in(evaluations, column, Goal.of_problem(problem).drop_max, expected=None, steps=len(column))
    for turn in count():
        left = unseen(evaluations, within)
        if not len(left):
            return
        model = fit(problem, evaluations.seen)
        unbeaten = unseen(evaluations, efficient(problem, within, model))
        left = unbeaten if len(unbeaten) else left
        evaluations.of(problem.policy(most_wanted(evaluations, left, model, turn)))


def _classics(problem: Problem, rows: Rows, bits: int) -> Rows:
    """The cheapest recipe of each width whose layers are integers of so many bits, mild to harsh."""
    of_groups = [i for i, variable in enumerate(problem.variables) if isinstance(variable, GroupVariable)]
    cheapest: dict[tuple[int, ...], np.ndarray] = {}
    costs = cost(Goal.of_problem(problem), problem.costs(rows))
    for row in rows[np.argsort(costs, kind="stable")]:
        precision = _commonest(problem.policy(row))
        if precision is not None and (precision.storage.format, precision.storage.bits) == ("int", bits):
            cheapest.setdefault(tuple(row[of_groups]), row)
    return np.array(list(cheapest.values())[::-1], int).reshape(-1, len(problem.variables))


def _commonest(policy: Policy) -> Precision | None:
    """What most layers are stored in that are not as trained; None unless that has one scale an output channel."""
    counted = Counter(p for p in policy.precisions.values() if not p.storage.is_float)
    precision = max(counted, key=lambda each: counted[each], default=None)
    return precision if precision and isinstance(precision.storage.granularity, PerChannel) else None
