"""What small changes still gain of what agents propose."""

from collections.abc import Callable

import numpy as np

from hirelc_deploy.search.problem import Problem, Rows

ROUNDS = 200
"""Rounds of changes that are tried on every proposal."""

TRIES = 4
"""Changes of a row that are tried in a round, of which the best is kept if it is one: pricing four times as many rows
at once takes twice as long."""

OF_TWO, NEXT = 0.3, 0.3
"""How many changes move a second variable as well, as a limit asks for that makes room in one layer to fill it in
another; and how many go to the next option instead of to any."""

Worth = Callable[[Rows, np.ndarray], np.ndarray]
"""Rewards of rows, each for the goal of the game with that number, (policies,)."""


def refined(problem: Problem, rows: Rows, worth: Worth, random: np.random.Generator, rounds: int = ROUNDS) -> Rows:
    """Each row after changes of one or two variables at a time, kept where the surrogate's reward rises.

    Agents place a policy in the right region; what small changes still gain there is cheaper to look up than to learn.
    """
    best = problem.legal(rows).copy()
    games = np.arange(len(best))
    each = np.repeat(games, TRIES)
    reward = worth(best, games)
    for _ in range(rounds):
        tried = _changed(problem, best[each], random)
        rewards = worth(tried, each).reshape(-1, TRIES)
        first = rewards.argmax(1)
        now, tried = rewards[games, first], tried[games * TRIES + first]
        better = now > reward
        best[better], reward[better] = tried[better], now[better]
    return best


def _changed(problem: Problem, rows: Rows, random: np.random.Generator) -> Rows:
    """Rows after one change each, or two; they are changed in place."""
    count = len(rows)
    for moving in (np.arange(count), np.flatnonzero(random.random(count) < OF_TWO)):
        variable = random.integers(len(problem.sizes), size=len(moving))
        most = problem.sizes[variable] - 1
        step = random.choice((-1, 1), size=len(moving))
        next_ = np.clip(rows[moving, variable] + step, 0, most)
        any_ = random.integers(most + 1)
        rows[moving, variable] = np.where(random.random(len(moving)) < NEXT, next_, any_)
    return problem.legal(rows)
