"""Greedy compression: from the policy as trained, always the change that costs the least damage for what it gains.

NetAdapt (Yang et al., arXiv 1804.03230) shrinks a network in steps that each save a fixed share of its latency, and
takes the layer whose shrinking hurts least.  Here a step gains a fixed share of bytes and milliseconds together
(logarithms, weighted as the goal says; a figure with a limit only until the limit is kept).

Advantages beyond the paper: a change may move one variable by any number of options, all layers of a block to one
precision, or all groups of a block by one count, so that neighbours which only pay off together are seen; damage (less
what fine-tuning will mend) is looked up instead of measured by a short training for every candidate, and its weights
are fitted to what real evaluations showed, after which the whole path is taken again; evaluations are spent where the
path crosses the drop that is allowed; some paths lean to bytes or to milliseconds.
"""

import numpy as np

from hirelc_deploy.search.additive import DropModel, cost, follow
from hirelc_deploy.search.goal import Goal
from hirelc_deploy.search.problem import Evaluations, GroupVariable, LayerVariable, Problem, Rows

STEP = 0.04
"""What a step gains at least, as a logarithm: four per cent of bytes or of milliseconds."""

LEAST_GAIN = 1e-9
"""Less is none: rounding."""

LEAST_DAMAGE = 1e-9
"""In nats: among changes that hurt less, the one that gains most is taken."""


def search(problem: Problem, evaluations: Evaluations, *, seed: int) -> None:
    """Follows greedy paths.  Nothing is drawn: every seed gives the same.  Raises Spent."""
    follow(problem, evaluations, lambda model, goal: path(problem, model, goal))


def path(problem: Problem, model: DropModel, goal: Goal) -> Rows:
    """The policies at the ends of the steps, (steps, variables), as trained excluded."""
    changes = _changes(problem)
    row = problem.as_trained
    ends: list[np.ndarray] = []
    end_cost = cost(goal, problem.costs(row[None]))[0]
    while True:
        rows = problem.legal(np.vstack([row, np.where(changes >= 0, changes, row), _narrower(problem, row)]))
        costs, damage = cost(goal, problem.costs(rows)), model.damage_left(problem, rows)
        gains, added = costs[0] - costs, np.maximum(damage - damage[0], LEAST_DAMAGE)
        useful = gains > LEAST_GAIN
        if not useful.any():
            break
        best = int(np.where(useful, added / np.maximum(gains, LEAST_GAIN), np.inf).argmin())
        row = rows[best]
        if end_cost - costs[best] >= STEP:
            ends.append(row)
            end_cost = costs[best]
    return np.array([*ends, row])


def _changes(problem: Problem) -> Rows:
    """Every option of every variable, and every precision on a whole block; -1 where nothing changes."""
    found = []
    for i, variable in enumerate(problem.variables):
        for option in range(len(variable.options)):
            found.append({i: option})
    for block in problem.blocks:
        layers = [v for v in problem.variables if isinstance(v, LayerVariable) and block in v.blocks]
        for precision in dict.fromkeys(precision for layer in layers for precision in layer.options):
            able = [layer for layer in layers if precision in layer.options]
            found.append({problem.position[layer.name]: layer.options.index(precision) for layer in able})
    changes = np.full((len(found), len(problem.variables)), -1)
    for change, options in zip(changes, found, strict=True):
        change[list(options)] = list(options.values())
    return changes


def _narrower(problem: Problem, row: np.ndarray) -> Rows:
    """All groups that touch a block by one count, (blocks, variables)."""
    groups = [(i, v) for i, v in enumerate(problem.variables) if isinstance(v, GroupVariable)]
    touches = np.zeros((len(problem.blocks), len(problem.variables)), int)
    for number, block in enumerate(problem.blocks):
        touches[number, [i for i, group in groups if block in group.blocks]] = 1
    return np.maximum(row - touches, 0) * touches + row * (1 - touches)
