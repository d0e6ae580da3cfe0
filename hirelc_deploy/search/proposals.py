"""From what agents propose to what is evaluated: refined, likely to be worth it, and unlike one another."""

from collections.abc import Callable

import numpy as np

from hirelc_deploy.search.front import front, hypervolume
from hirelc_deploy.search.problem import Problem, Rows

ROUNDS = 150
"""Single changes that are tried on every proposal."""

CONTENDERS = 48
"""Of one pick, those whose gain is worked out exactly."""

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


def pick(
    places: np.ndarray, seen: np.ndarray, reference: np.ndarray, many: int, random: np.random.Generator
) -> list[int]:
    """Positions of the candidates that add most to the front, (many,) or fewer.

    `places` (members, candidates, 3) are the candidates' points as each member of the surrogate tells them, `seen`
    those of evaluations.  Each pick believes one member, drawn at random, and takes the candidate that adds most
    hypervolume to what was seen and to earlier picks (Thompson sampling): where members differ, picks do.
    """
    chosen: list[int] = []
    known = seen
    for _ in range(many):
        told = places[random.integers(len(places))]
        open_ = np.array([i for i in range(told.shape[0]) if i not in chosen and (told[i] < reference).all()], int)
        if not len(open_):
            break
        contenders = open_[front(told[open_])]
        if len(contenders) > CONTENDERS:
            contenders = random.choice(contenders, CONTENDERS, replace=False)
        now = hypervolume(known, reference)
        gains = [hypervolume(np.vstack([known, told[i : i + 1]]), reference) - now for i in contenders]
        best = int(contenders[int(np.argmax(gains))])
        chosen.append(best)
        known = np.vstack([known, told[best : best + 1]])
    return chosen


def pick_for(worth: np.ndarray, taken: list[int], random: np.random.Generator) -> int | None:
    """The candidate that the goal itself would choose, as one member of the surrogate, drawn at random, tells it.

    `worth` is the reward by member and candidate, (members, candidates); those `taken` are passed over.
    """
    told = worth[random.integers(len(worth))].copy()
    told[taken] = -np.inf
    best = int(np.argmax(told))
    return best if np.isfinite(told[best]) else None
