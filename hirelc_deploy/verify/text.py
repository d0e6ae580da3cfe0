"""Figures as people read them, with their units; the figure's name decides the unit."""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields

from hirelc_deploy.budget import AT_LEAST, NOT_SLOWER, Budget, Check

Shown = int | float | str | None

NOT_MEASURED = "–"


def size(size_bytes: float) -> str:
    """1000 bytes a KB, as on the command line."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size_bytes >= factor:
            return f"{_significant(size_bytes / factor)} {unit}"
    return f"{size_bytes:.0f} B"


def milliseconds(latency_ms: float) -> str:
    return f"{_significant(latency_ms)} ms"


def millijoules(energy_mj: float) -> str:
    return f"{_significant(energy_mj)} mJ"


def times(factor: float) -> str:
    return f"{_significant(factor)} ×"


def score(value: float, unit: str) -> str:
    """Two decimals of a percentage; four significant digits of anything else, whose scale is not known."""
    return f"{value:.2f} %" if unit == "%" else f"{value:.4g} {unit}".strip()


def points(value: float, unit: str) -> str:
    """A difference of two scores: of percentages it is points."""
    return f"{value:.2f} points" if unit == "%" else f"{value:.4g} {unit}".strip()


def quantity(name: str, value: Shown, unit: str) -> str:
    """The value of a check or figure of this name; `unit` is that of the task's score."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, str):
        return value[:12] if name == "sha256" else value
    if name == "drop":
        return points(value, unit)
    return _FORMATS[name](value) if name in _FORMATS else f"{value:g}"


def listed(items: Sequence[str], most: int = 3) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more


def limit(check: Check, unit: str) -> str:
    """A check's limit with its direction: ≤ 400 KB, ≥ 3 ×."""
    text = quantity(check.name, check.limit, unit)
    if check.name in _BOUNDS:
        return f"{'≥' if check.name in AT_LEAST else '≤'} {text}"
    return text


def measured(check: Check, unit: str) -> str:
    """What was measured; in full where rounding would hide by how little it failed."""
    text = quantity(check.name, check.measured, unit)
    rounded_away = check.ok is False and text == quantity(check.name, check.limit, unit)
    return f"{text} ({check.measured})" if rounded_away else text


def outcome(ok: bool | None) -> str:
    return {True: "ok", False: "FAILED", None: "unverified"}[ok]


def _significant(value: float) -> str:
    """Three significant digits, never as a power of ten."""
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, 2 - magnitude)}f}"


_BOUNDS = {field.name for field in fields(Budget)} | {NOT_SLOWER}
"""Checks whose limit is a bound; the others ask for one value."""

_FORMATS: dict[str, Callable[[float], str]] = {
    "latency_ms": milliseconds,
    "speedup": times,
    NOT_SLOWER: times,
    "compression": times,
    "size_bytes": size,
    "memory_bytes": size,
    "load_ms": milliseconds,
    "energy_mj": millijoules,
    "size on disk": "{:.0f} bytes".format,
}
