"""Hard limits, and the comparison of figures with them."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from hirelc_deploy.errors import UserError

NOT_SLOWER = "not slower than fp32"
"""What a limit on latency asks for as well: a compressed network that is slower is no gain, however fast it is."""

AT_LEAST = frozenset({"speedup", NOT_SLOWER})
"""Limits from below; every other limit is from above."""

OF_ANY_SIGN = frozenset({"drop"})
"""A drop below zero is a gain, and may be demanded."""


@dataclass(frozen=True)
class Budget:
    """The limits that a user gave; None where nothing was said."""

    latency_ms: float | None = None
    """Median wall clock of one batch."""
    speedup: float | None = None
    """Times faster than the fp32 file in the same runtime."""
    size_bytes: int | None = None
    """Of the file on disk."""
    memory_bytes: int | None = None
    drop: float | None = None
    """In the unit of the task's score, positive is worse."""

    # a manifest with a limit of another name is refused, not read as one without limits
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name, limit in self.limits.items():
            if not math.isfinite(limit) or (limit <= 0 and name not in OF_ANY_SIGN):
                raise UserError(f"the limit {name} = {limit} can never be judged", fix="give a finite limit above 0")

    @property
    def limits(self) -> dict[str, float | int]:
        """Those that were given, by name."""
        return {name: limit for name, limit in asdict(self).items() if limit is not None}

    def with_limits_of(self, other: "Budget") -> "Budget":
        """The same, but for limits that the other has as well: those are the other's."""
        return Budget(**{**asdict(self), **other.limits})

    @property
    def given(self) -> bool:
        """Whether there is any limit at all."""
        return bool(self.limits)


@dataclass(frozen=True)
class Figures:
    """What a budget is judged on and what else is told of a file, measured or predicted; None where it is not known."""

    latency_ms: float | None = None
    speedup: float | None = None
    size_bytes: int | None = None
    memory_bytes: int | None = None
    drop: float | None = None
    load_ms: float | None = None
    """Of a process; no budget limits it."""


@dataclass(frozen=True)
class Check:
    """One comparison.  `ok` is None where the figure is not known or not measured."""

    name: str
    limit: int | float | str | None
    measured: int | float | str | None
    ok: bool | None

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


def judge(budget: Budget, figures: Figures) -> tuple[Check, ...]:
    """One check for every limit.  Limits are inclusive; NaN meets none.

    A limit on latency brings NOT_SLOWER with it, unless a speed-up was demanded, be it one below 1.
    """
    known = asdict(figures)
    checks = [_check(name, limit, known[name]) for name, limit in budget.limits.items()]
    if budget.latency_ms is not None and budget.speedup is None:
        checks.append(_check(NOT_SLOWER, 1.0, figures.speedup))
    return tuple(checks)


def met(budget: Budget, figures: Figures) -> bool:
    """Whether every limit is known to hold."""
    return all(check.ok is True for check in judge(budget, figures))


def excess(budget: Budget, figures: Figures) -> float:
    """By how much limits other than the drop's are missed: the sum of the logarithms of how many times."""
    return sum(_times_missed(check) for check in judge(replace(budget, drop=None), figures) if check.ok is False)


def _times_missed(check: Check) -> float:
    """The logarithm of it, for a limit on what is never below nought."""
    assert isinstance(check.limit, (int, float))
    assert isinstance(check.measured, (int, float))
    return abs(math.log(check.measured / check.limit)) if check.measured > 0 else math.inf


def _check(name: str, limit: float, figure: float | None) -> Check:
    if figure is None:
        return Check(name, limit, None, None)
    return Check(name, limit, figure, figure >= limit if name in AT_LEAST else figure <= limit)
