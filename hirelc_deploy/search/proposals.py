"""What single changes still gain of what agents propose."""

from collections.abc import Callable

import numpy as np

from hirelc_deploy.search.problem import Problem, Rows

ROUNDS = 150
"""Single changes that are tried on every proposal."""

Worth = Callable[[Rows], np.ndarray]
"""Rewards of rows, each for its own goal, (policies,)."""


def refined(problem: Problem, rows: Rows, worth: Worth, random: np.random.Generator, rounds: int = ROUNDS) -> Rows:
    """Each row after changes of one variable at a time, kept where the surrogate's reward rises.

    Agents place a policy in the right region; what single changes still gain there is cheaper to look up than to learn.
    """
    best = problem.legal(rows)
    reward = worth(best)
    games = np.arange(len(best))
    for _ in range(rounds):
        tried = best.copy()
        variable = random.integers(len(problem.variables), size=len(best))
        size = problem.sizes[variable]
        near = random.random(len(best)) < 0.5
        step = np.where(random.random(len(best)) < 0.5, 1, -1)
        moved = np.clip(tried[games, variable] + step, 0, size - 1)
        tried[games, variable] = np.where(near, moved, (random.random(len(best)) * size).astype(int))
        tried = problem.legal(tried)
        now = worth(tried)
        better = now > reward
        best[better], reward[better] = tried[better], now[better]
    return best
