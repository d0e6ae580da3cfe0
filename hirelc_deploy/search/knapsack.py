"""A multiple-choice knapsack: the cheapest policy of at most so much damage, by an exact solver.

As HALP (Shen et al., arXiv 2110.10811) does for latency and NVIDIA's ModelOpt (`auto_quantize`) for bits: damage is
taken to be additive over decisions, one option is taken of each, and an integer program finds the best.  Here it is
solved by HiGHS through `scipy.optimize.milp`.

Bytes and milliseconds of a layer are products of what its input, its output and its precision are, so no sum gives
them.  Their logarithms are nearly sums: they are linearised about a policy by pricing every change of one variable,
the program is solved, and that is repeated about what it found, with fewer and fewer variables allowed to move where
its true price is no better.  Layers that share a weight are one decision: the change of one is priced and damaged as
the change of all.

Advantages beyond the papers: the true prices decide; a solution starts from the best recipe of that damage where that
beats the last solution, so that layers which only pay off together are found; limits on prices are part of the
program; what fine-tuning will mend is taken off the damage; a sweep of damages traces a front; weights of damage are
fitted to real evaluations and the programs solved again; some sweeps lean to bytes or to milliseconds.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from hirelc_deploy.search.additive import TIE, DropModel, affordable, cost, excess, follow, recipes
from hirelc_deploy.search.goal import Goal
from hirelc_deploy.search.problem import Evaluations, Problem, Rows

LEVELS = 8
"""Damages that a sweep visits."""

MILDEST, HARSHEST = 0.3, 2.0
"""Of a sweep, as parts of the drop that is allowed."""

MILDEST_COLD = 1e-3
"""Of the first sweep, which knows no drops: as a part of the damage of the harshest policy there is."""

ROUNDS = 4
"""Programs at most for one policy."""

ROUNDING = 1e-4
"""By how much more than was allowed a solution's damage may be: the solver's tolerance."""

PLAIN = 3
"""Figures that every policy has: damage, latency and size; those that are limited come behind them."""

MISSED = 10.0
"""What a limit on a price costs where it is missed, in the unit of `cost`: kept wherever it can be."""

GAP = 3e-3
"""Of `cost`, at which the solver stops: three thousandths of a logarithm are below what any price is known to."""


def search(problem: Problem, evaluations: Evaluations, *, seed: int) -> None:
    """Follows sweeps of the knapsack.  Nothing is drawn: every seed gives the same.  Raises Spent."""
    follow(problem, evaluations, lambda model, goal: sweep(problem, model, goal))


def sweep(problem: Problem, model: DropModel, goal: Goal) -> Rows:
    """Solutions for rising damage, each once, (policies, variables)."""
    known = recipes(problem)
    known_damage, known_price = model.damage_left(problem, known), _price(problem, goal, known)
    if model.seen is None:
        most = sum(table.max() for table in problem.sensitivity.damage.values())
        # where nothing does any harm it matters not how much is allowed
        allowed = np.geomspace(MILDEST_COLD * most, most, LEVELS) if most > 0 else np.ones(1)
    else:
        limit = Goal.of_problem(problem).drop_max
        least, most = model.damage_at(MILDEST * limit), model.damage_at(HARSHEST * limit)
        # limits on prices may ask for more than the drop allows
        most = max(most, model.damage_left(problem, affordable(problem, known)).min())
        allowed = np.geomspace(least, most, LEVELS)
    solutions: list[np.ndarray] = []
    row = problem.as_trained
    for damage in allowed:
        within = np.flatnonzero(known_damage <= damage)
        if len(within):
            start = known[within[known_price[within].argmin()]]
            row = min(row, start, key=lambda each: _price(problem, goal, each[None])[0])
        row = solve(problem, model, goal, row, float(damage))
        if not solutions or (row != solutions[-1]).any():
            solutions.append(row)
    return np.array(solutions)


def solve(problem: Problem, model: DropModel, goal: Goal, start: np.ndarray, allowed: float) -> np.ndarray:
    """The cheapest policy of at most the damage that is allowed, (variables,); `start` has no more than that."""
    best, best_price = start, _price(problem, goal, start[None])[0]
    movable = len(start)
    for _ in range(ROUNDS):
        found = _program(problem, model, goal, best, allowed, movable)
        if found is None or (found == best).all():
            break
        found_price = _price(problem, goal, found[None])[0]
        # what a solver calls a solution is trusted no further than it can be checked
        if found_price < best_price and model.damage_left(problem, found[None])[0] <= allowed * (1 + ROUNDING):
            best, best_price = found, found_price
        else:
            movable //= 2
    return best


def _price(problem: Problem, goal: Goal, rows: Rows) -> np.ndarray:
    """`cost`, with limits that are hard, (policies,)."""
    prices = problem.costs(rows)
    return np.asarray(cost(goal, prices) + (MISSED - 1) * excess(goal, prices))


def _program(
    problem: Problem, model: DropModel, goal: Goal, row: np.ndarray, allowed: float, movable: int
) -> np.ndarray | None:
    """The best policy, linearised about a row, of which at most so many variables move; None if the solver has none.

    The unknowns are a nought or a one for every option of every variable that is possible, then for every limit on
    a price by how much it is missed, as a logarithm.
    """
    owner = np.repeat(np.arange(len(row)), problem.sizes)
    option = np.concatenate([np.arange(size) for size in problem.sizes])
    changed = np.tile(row, (len(owner), 1))
    changed[np.arange(len(owner)), owner] = option
    figures, mosts = _figures(problem, model, goal, np.vstack([row, changed]))
    added = figures[1:] - figures[0]
    # what alone does more damage than is allowed only makes the numbers large
    alone = added[:, 0] - added[option == problem.as_trained[owner], 0][owner]
    possible = (alone <= allowed) | (option == row[owner])
    owner, option, added = owner[possible], option[possible], added[possible]
    limits = list(range(PLAIN, figures.shape[1]))

    rooms = np.log(mosts) - figures[0, PLAIN:]
    least = np.concatenate([np.ones(len(row)), [-np.inf, len(row) - movable], [-np.inf for _ in limits]])
    most = np.concatenate([np.ones(len(row)), [1 - figures[0, 0] / allowed, np.inf], rooms])
    sums = np.zeros((len(most), len(owner) + len(limits)))
    sums[owner, np.arange(len(owner))] = 1.0  # one option of each variable
    sums[len(row), : len(owner)] = added[:, 0] / allowed
    sums[len(row) + 1, : len(owner)] = option == row[owner]
    for number, i in enumerate(limits):
        sums[len(row) + 2 + number, : len(owner)] = added[:, i]
        sums[len(row) + 2 + number, len(owner) + number] = -1.0

    worth = added[:, :PLAIN] @ np.array([TIE / allowed, goal.latency_weight, goal.size_weight])
    # The solver's gap is relative, and close to the optimum there is nothing left to gain: -1 on whatever the first
    # variable takes makes it one of a number near 1.
    worth[owner == 0] -= 1.0
    with _without_output():
        solution = milp(
            np.concatenate([worth, [MISSED for _ in limits]]),
            integrality=np.concatenate([np.ones(len(owner)), [0.0 for _ in limits]]),
            bounds=Bounds(0.0, np.concatenate([np.ones(len(owner)), [np.inf for _ in limits]])),
            constraints=LinearConstraint(sums, least, most),
            options={"mip_rel_gap": GAP},
        )
    if solution.x is None:
        return None
    taken = solution.x[: len(owner)] > 0.5
    found: np.ndarray = problem.legal(option[taken][None])[0]
    return found


@contextmanager
def _without_output() -> Iterator[None]:
    """Some versions of HiGHS print a line that was forgotten there, past every option and past `sys.stdout`.

    What other threads print in that moment is lost as well.
    """
    library, kept, nowhere = ctypes.CDLL(None), os.dup(1), os.open(os.devnull, os.O_WRONLY)
    library.fflush(None)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _figures(problem: Problem, model: DropModel, goal: Goal, rows: Rows) -> tuple[np.ndarray, list[float]]:
    """Damage, logarithms of milliseconds and of bytes, and of all that is limited, (policies, figures), of rows made
    legal; and the limits."""
    rows = problem.legal(rows)
    prices = problem.costs(rows)
    limited = list(goal.limited(prices).values())
    plain = [model.damage_left(problem, rows), np.log(prices.latency_ms), np.log(prices.size_bytes)]
    return np.column_stack([*plain, *(np.log(told) for told, _ in limited)]), [most for _, most in limited]
