"""The methods by name.  Each is a file with one function: it evaluates until it may not, or wants nothing more."""

import importlib
from typing import Protocol

from hirelc_deploy.search.problem import Evaluations, Problem

HIERARCHICAL = "hierarchical"

FILES = {
    HIERARCHICAL: "hierarchical",
    "recipe": "grid",
    "greedy": "greedy",
    "greedy-order": "greedy_order",
    "knapsack": "knapsack",
    "evolution": "evolution",
    "random": "random_search",
    "modelopt": "modelopt",
    "scratch": "scratch",
}
"""Imported when they are used: some bring large libraries with them."""

ONLY_COMPARED = frozenset({"scratch"})
"""Their evaluations say nothing of the network that was trained, and no export may go by them."""


class Method(Protocol):
    """Chooses what is evaluated, until nothing is left (it may raise Spent) or it wants nothing more; whoever calls it
    reads `evaluations.seen`."""

    def __call__(self, problem: Problem, evaluations: Evaluations, *, seed: int) -> None: ...


def load(name: str) -> Method:
    """Raises KeyError for a name that is not in FILES."""
    method: Method = importlib.import_module(f"{__package__}.{FILES[name]}").search
    return method
