"""Evolution: NSGA-II (Deb et al., 2002; pymoo's) on drop, bytes and milliseconds, with a model in front of the bill.

With some tens of evaluations a population that is evaluated for real has hardly a second generation.  So it is done as
NSGANetV2 (Lu et al., arXiv 2007.10396) does: generations live on predictions, and from time to time some of the
population are evaluated, the predictor of the drop is fitted again, and evolution goes on from there.

Advantages it was given: exact prices; the sensitivities, fitted to the drops seen (`additive.fit`); a start from the
recipes and from unbeaten random policies; limits on prices as constraints, and no offspring wasted on drops that are
many times the one that is allowed; and what is paid for is, in turn, what promises to be cheapest at the drop that is
allowed and what promises most hypervolume.
"""

from itertools import count

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.evaluator import Evaluator
from pymoo.core.problem import Problem as Objectives
from pymoo.operators.crossover.ux import UX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.problems.static import StaticProblem

from hirelc_deploy.search.additive import (
    UNFITTED,
    DropModel,
    affordable,
    draw,
    efficient,
    excess,
    fit,
    most_wanted,
    recipes,
    unseen,
)
from hirelc_deploy.search.goal import REFERENCE_DROPS, Goal
from hirelc_deploy.search.problem import Evaluations, Problem, Rows

RANDOM = 1000
"""Random policies, of which the unbeaten are in the first population."""

POPULATION = 80
GENERATIONS = 30
"""On predictions, between two times that policies are evaluated."""

PAID = 5
"""Policies of a population that are evaluated."""

SPREAD = 3.0
"""Of mutations: pymoo's eta; the lower, the further an option moves."""


def search(problem: Problem, evaluations: Evaluations, *, seed: int) -> None:
    """Evolves on predictions, pays for a few, and again.  Returns when evolution brings nothing new; raises Spent."""
    generator = np.random.default_rng(seed)
    known = affordable(problem, recipes(problem))
    population = np.vstack([known, draw(problem, RANDOM, generator)])
    population = efficient(problem, population, UNFITTED)
    middle = known[np.argsort(UNFITTED.damage(problem, known), kind="stable")[len(known) // 2]]
    evaluations.of(problem.policy(middle))  # how many points a nat is has to be known to roughly a factor
    turns = count()
    while evaluations.left:
        some = generator.permutation(population)[:POPULATION]
        seen = np.array([problem.row(evaluation.policy) for evaluation in evaluations.seen])
        start = np.unique(np.vstack([some, seen]), axis=0)
        population = evolved(problem, fit(problem, evaluations.seen), start, seed=int(generator.integers(2**31)))
        if not len(unseen(evaluations, population)):
            return
        for _ in range(PAID):
            left = affordable(problem, unseen(evaluations, population))
            if len(left):
                model = fit(problem, evaluations.seen)
                evaluations.of(problem.policy(most_wanted(evaluations, left, model, next(turns))))


def evolved(problem: Problem, model: DropModel, start: Rows, *, seed: int) -> Rows:
    """The population after GENERATIONS on predicted drops, (policies, variables), each policy once."""
    space = Objectives(n_var=len(problem.variables), n_obj=3, n_ieq_constr=2, xl=0, xu=problem.sizes - 1, vtype=int)
    repair = RoundingRepair()
    mutation = PM(prob=1.0, eta=SPREAD, repair=repair)
    nsga = NSGA2(POPULATION, sampling=start, crossover=UX(), mutation=mutation, repair=repair)
    nsga.setup(space, termination=("n_gen", GENERATIONS), seed=seed, verbose=False)
    while nsga.has_next():
        asked = nsga.ask()
        if asked is None:  # of few options all are there
            break
        rows = problem.legal(asked.get("X").astype(int))
        asked.set("X", rows)
        objectives, broken = _predicted(problem, model, rows)
        Evaluator().eval(StaticProblem(space, F=objectives, G=broken), asked)
        nsga.tell(infills=asked)
    found: Rows = np.unique(nsga.pop.get("X").astype(int), axis=0)
    return found


def _predicted(problem: Problem, model: DropModel, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Drop, log bytes and log milliseconds, (policies, 3); by how much prices and drop break bounds, (policies, 2)."""
    goal, prices = Goal.of_problem(problem), problem.costs(rows)
    drop = problem.left(model.drop(problem, rows), prices)
    beyond = np.full(len(rows), -1.0) if problem.budget.drop is None else drop / goal.drop_max - REFERENCE_DROPS
    objectives = np.column_stack([drop, np.log(prices.size_bytes), np.log(prices.latency_ms)])
    return objectives, np.column_stack([excess(goal, prices), beyond])
