"""What a policy is worth: hard budgets as multipliers that grow, everything else as a weight.

    R = - drop / drop_max - l_d max(0, drop / drop_max - 1)
        - l_ms max(0, ms / ms_max - 1) - l_B max(0, bytes / bytes_max - 1) - l_M max(0, memory / memory_max - 1)
        - w_ms log(ms / ms_fp32) - w_B log(bytes / bytes_fp32)

Every term is in units of its budget.  A drop is what fine-tuning is told to leave of it (`Problem.left`).  Where no
drop was allowed or forbidden, drop_max is SPREAD_PART of the standard deviation of one example's score, or DROP_UNIT
where that is not known.  A weight is nought where its figure has a budget: below the budget there is nothing to gain.
A budget of a speed-up is one of milliseconds: ms_max = ms_fp32 / speedup; with one of milliseconds alone the original's
are one as well, since a file that is slower is judged to miss it.  Memory is worth nothing but its budget, and that is
no term where no law tells what a runtime needs (`Figures.memory_bytes` of the original is None).
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Generic, TypeVar

import numpy as np

from hirelc_deploy.budget import Budget, Figures
from hirelc_deploy.search.problem import Prices, Problem

SPREAD_PART = 1 / 30
"""A thirtieth is one point for a classifier that is right nine of ten times."""

DROP_UNIT = 1.0
"""In the score's unit: what counts as one where neither a limit nor the score's spread says."""

GROWTH, DECAY = 1.5, 0.9
"""Of a multiplier while its budget is missed, and while it holds."""

LEAST, MOST = 1.0, 100.0
"""Multipliers stay between these."""


@dataclass(frozen=True)
class Multipliers:
    """What missing a budget costs: the paper has them fixed, here they follow what happens.

    Where budgets clash, those of bytes, milliseconds and memory come first: they are known before anything is
    evaluated, and a drop is told.  What misses all of them by a little is of no use to anyone, and teaches nothing.
    """

    drop: float = 10.0
    latency: float = 10.0
    size: float = 10.0
    memory: float = 10.0

    @classmethod
    def first(cls, goal: "Goal[float]") -> "Multipliers":
        """Those to begin with: a drop's is the least where anything else has a budget as well."""
        others = (goal.latency_ms_max, goal.size_bytes_max, goal.memory_bytes_max)
        return cls() if others == (None, None, None) else cls(drop=LEAST)

    def after(self, missed: Collection[str]) -> "Multipliers":
        """Those of the next cycle; the budgets that are missed are named like the multipliers.  A drop's grows only
        while no other is missed."""
        grow = set(missed) - {"drop"} or set(missed)
        return Multipliers(**{name: _moved(value, name in grow) for name, value in asdict(self).items()})


def _moved(multiplier: float, missed: bool) -> float:
    return float(np.clip(multiplier * (GROWTH if missed else DECAY), LEAST, MOST))


REFERENCE_DROPS = 2.0
"""The front is of interest up to so many times the drop that is allowed."""

N = TypeVar("N", float, np.ndarray)
"""A number, or one a policy, (policies,), where many goals are pursued side by side."""


@dataclass(frozen=True)
class Goal(Generic[N]):
    """Budgets and weights."""

    drop_max: N
    latency_ms_max: float | None
    size_bytes_max: float | None
    latency_ms_before: float
    size_bytes_before: float
    latency_weight: N
    size_weight: N
    memory_bytes_max: float | None = None

    @staticmethod
    def of(budget: Budget, before: Figures, *, score_spread: float = 0.0) -> "Goal[float]":
        """What a user's budget asks for; `score_spread` as in `Problem`.

        Raises ValueError where the original's own figures are not known.
        """
        if before.latency_ms is None or before.size_bytes is None:
            raise ValueError("the original's latency and size have to be known")
        limits = [] if budget.latency_ms is None else [budget.latency_ms]
        limits += [] if budget.speedup is None else [before.latency_ms / budget.speedup]
        if budget.latency_ms is not None and budget.speedup is None:  # NOT_SLOWER is judged with it
            limits.append(before.latency_ms)
        return Goal(
            drop_max=budget.drop if budget.drop and budget.drop > 0 else SPREAD_PART * score_spread or DROP_UNIT,
            latency_ms_max=min(limits, default=None),
            size_bytes_max=budget.size_bytes,
            latency_ms_before=before.latency_ms,
            size_bytes_before=before.size_bytes,
            latency_weight=0.0 if limits else 1.0,
            size_weight=0.0 if budget.size_bytes is not None else 1.0,
            memory_bytes_max=None if before.memory_bytes is None else budget.memory_bytes,
        )

    @staticmethod
    def of_problem(problem: Problem) -> "Goal[float]":
        """The user's."""
        return Goal.of(problem.budget, problem.before, score_spread=problem.score_spread)

    def limited(self, prices: Prices) -> dict[str, tuple[np.ndarray, float]]:
        """The prices that have a limit, (policies,), and the limit; named like the multipliers."""
        found = {}
        if self.latency_ms_max is not None:
            found["latency"] = prices.latency_ms, self.latency_ms_max
        if self.size_bytes_max is not None:
            found["size"] = prices.size_bytes, float(self.size_bytes_max)
        if self.memory_bytes_max is not None:
            found["memory"] = prices.memory, float(self.memory_bytes_max)
        return found

    def reward(self, drop: np.ndarray, prices: Prices, multipliers: Multipliers) -> np.ndarray:
        """R of the formula above, (policies,); `drop` as it is left, in the score's unit, (policies,)."""
        reward = -drop / self.drop_max - multipliers.drop * np.maximum(0.0, drop / self.drop_max - 1)
        for name, (told, most) in self.limited(prices).items():
            reward = reward - getattr(multipliers, name) * np.maximum(0.0, told / most - 1)
        reward = reward - self.latency_weight * np.log(prices.latency_ms / self.latency_ms_before)
        found: np.ndarray = reward - self.size_weight * np.log(prices.size_bytes / self.size_bytes_before)
        return found


def reference(goal: Goal[float]) -> np.ndarray:
    """The worst corner of what is of interest, in drop and logarithms of bytes and milliseconds: (3,)."""
    return np.array(
        [
            REFERENCE_DROPS * goal.drop_max,
            np.log((goal.size_bytes_max or goal.size_bytes_before) / goal.size_bytes_before),
            np.log((goal.latency_ms_max or goal.latency_ms_before) / goal.latency_ms_before),
        ]
    )
