"""What every paper on pruning is asked: the same network, uniformly narrow from the start, its weights drawn anew.

Outside the space of the others: the same recipes, in the order in which an engineer would try them (`grid`), the same
formats and prices, and evaluations that train as many steps towards the same outputs, from weights that know nothing.
"""

from dataclasses import replace

from hirelc_deploy.search import grid
from hirelc_deploy.search.problem import Evaluations, Problem


def search(problem: Problem, evaluations: Evaluations, *, seed: int) -> None:
    """Evaluates recipes till all are known.  Every seed gives the same.  Raises Spent."""
    anew = replace(problem, evaluate=problem.evaluate_anew, prepare=lambda _: None)
    evaluations.go_on(anew, evaluations.limit)
    grid.search(anew, evaluations, seed=seed)
