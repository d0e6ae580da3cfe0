"""Pruning and rounding in rounds, always the step next that perturbs the network less (arXiv 2603.18426).

The Progressive Intensity Hypothesis: steps do best from the weakest to the strongest.  Two ladders are climbed, one of
widths and one of bits a weight, uniform as in the recipes; a round goes up on that of the two whose next rung does
less damage.  `--order auto` trains what comes of it in that order as well.

Advantages beyond the paper: of the recipes with the same rungs the cheapest stands for all; the damage of a rung is
looked up, and how pruning's compares with rounding's is corrected by every real evaluation, after which the sequence
is taken anew (`additive.follow`).
"""

from itertools import count

import numpy as np

from hirelc_deploy.search.additive import (
    DropModel,
    affordable,
    cost,
    damages,
    fit,
    follow,
    most_wanted,
    recipes,
    unseen,
)
from hirelc_deploy.search.goal import Goal
from hirelc_deploy.search.problem import Evaluations, GroupVariable, LayerVariable, Problem, Rows

Rungs = dict[tuple[int, int], np.ndarray]
"""The row of each pair of rungs, of widths and of bits; (0, 0) is the network as it was trained."""


def search(problem: Problem, evaluations: Evaluations, *, seed: int) -> None:
    """Follows the sequences, then tries what lies beside them.  Nothing is drawn: every seed gives the same.  Raises
    Spent."""
    follow(problem, evaluations, lambda model, goal: sequence(problem, model, goal))
    beside = affordable(problem, np.array(list(rungs(problem, Goal.of_problem(problem)).values())))
    for turn in count():
        left = unseen(evaluations, beside)
        if not len(left):
            return
        evaluations.of(problem.policy(most_wanted(evaluations, left, fit(problem, evaluations.seen), turn)))


def sequence(problem: Problem, model: DropModel, goal: Goal) -> Rows:
    """The policies after each round, (rounds, variables)."""
    found = rungs(problem, goal)
    here = (0, 0)
    rows: list[np.ndarray] = []
    while True:
        above = [place for place in ((here[0] + 1, here[1]), (here[0], here[1] + 1)) if place in found]
        if not above:
            return np.array(rows, int).reshape(len(rows), len(problem.variables))
        damage = model.damage(problem, np.array([found[place] for place in above]))
        here = above[int(damage.argmin())]
        rows.append(found[here])


def rungs(problem: Problem, goal: Goal) -> Rungs:
    """Both ladders from mild to harsh; of several recipes on the same rungs the one that costs least by the goal."""
    known = recipes(problem)
    is_group = np.array([isinstance(variable, GroupVariable) for variable in problem.variables])
    widths = np.unique(np.vstack([problem.as_trained, known])[:, is_group], axis=0)
    narrowed = np.tile(problem.as_trained, (len(widths), 1))
    narrowed[:, is_group] = widths
    # by damage, all units first
    narrowed = narrowed[np.argsort(damages(problem, narrowed)[:, 1], kind="stable")]
    position = {tuple(row[is_group]): i for i, row in enumerate(narrowed)}
    bits = sorted({_bits(problem, row) for row in (problem.as_trained, *known)}, reverse=True)
    found: Rungs = {(i, 0): row for i, row in enumerate(narrowed)}
    for row in known[np.argsort(cost(goal, problem.costs(known)), kind="stable")]:
        found.setdefault((position[tuple(row[is_group])], bits.index(_bits(problem, row))), row)
    return found


def _bits(problem: Problem, row: np.ndarray) -> int:
    """A weight's, added up over layers."""
    chosen = zip(problem.variables, row, strict=True)
    return sum(v.options[i].storage.bits for v, i in chosen if isinstance(v, LayerVariable))
