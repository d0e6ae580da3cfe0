"""What a policy is worth: hard budgets as multipliers that grow, everything else as a weight.

    R = - drop / drop_max - l_d max(0, drop / drop_max - 1)
        - l_ms max(0, ms / ms_max - 1) - l_B max(0, bytes / bytes_max - 1)
        - w_ms log(ms / ms_fp32) - w_B log(bytes / bytes_fp32)

Every term is in units of its budget.  Where no drop was allowed or forbidden, drop_max is DROP_UNIT.  A weight is
nought where its figure has a budget: below the budget there is nothing to gain.  A budget of a speed-up is one of
milliseconds: ms_max = ms_fp32 / speedup.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from hirelc_deploy.budget import Budget, Figures
from hirelc_deploy.search.problem import Prices

DROP_UNIT = 1.0
"""In the score's unit: what counts as one where no limit says."""

GROWTH, DECAY = 1.5, 0.9
"""Of a multiplier while its budget is missed, and while it holds."""

LEAST, MOST = 1.0, 100.0
"""Multipliers stay between these."""


@dataclass(frozen=True)
class Multipliers:
    """What missing a budget costs: the paper has them fixed, here they follow what happens."""

    drop: float = 10.0
    latency: float = 10.0
    size: float = 10.0

    def after(self, *, drop_missed: bool, latency_missed: bool, size_missed: bool) -> "Multipliers":
        """Those of the next cycle."""
        return Multipliers(
            _moved(self.drop, drop_missed), _moved(self.latency, latency_missed), _moved(self.size, size_missed)
        )


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

    @staticmethod
    def of(budget: Budget, before: Figures) -> "Goal[float]":
        """What a user's budget asks for.  Raises ValueError where the original's own figures are not known."""
        if before.latency_ms is None or before.size_bytes is None:
            raise ValueError("the original's latency and size have to be known")
        limits = [] if budget.latency_ms is None else [budget.latency_ms]
        limits += [] if budget.speedup is None else [before.latency_ms / budget.speedup]
        return Goal(
            drop_max=budget.drop if budget.drop is not None and budget.drop > 0 else DROP_UNIT,
            latency_ms_max=min(limits, default=None),
            size_bytes_max=budget.size_bytes,
            latency_ms_before=before.latency_ms,
            size_bytes_before=before.size_bytes,
            latency_weight=0.0 if limits else 1.0,
            size_weight=0.0 if budget.size_bytes is not None else 1.0,
        )

    def reward(self, drop: np.ndarray, prices: Prices, multipliers: Multipliers) -> np.ndarray:
        """R of the formula above, (policies,); `drop` in the score's unit, (policies,)."""
        reward = -drop / self.drop_max - multipliers.drop * np.maximum(0.0, drop / self.drop_max - 1)
        if self.latency_ms_max is not None:
            reward = reward - multipliers.latency * np.maximum(0.0, prices.latency_ms / self.latency_ms_max - 1)
        if self.size_bytes_max is not None:
            reward = reward - multipliers.size * np.maximum(0.0, prices.size_bytes / self.size_bytes_max - 1)
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
