"""Tables of a target: how long each kernel takes there, one line a kernel, so that a change shows in a diff."""

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from hirelc_deploy.errors import UserError
from hirelc_deploy.rundir import disk_errors, write_atomic

ALONE, SHARED = "alone", "shared"


@dataclass(frozen=True)
class Row:
    """What was measured of one kernel (`hirelc_deploy.cost.kernel` says how its text reads)."""

    op: str
    attributes: str
    operands: str
    compute: str
    threads: int
    p50_us: float
    p90_us: float
    spread_pct: float
    """Of the rounds around their median: half the distance of the quartiles."""
    runs: int
    date: str
    runtime: str
    """Its name and version."""
    flags: str
    """The CPU's, as far as they decide which kernels run, with + between."""
    power_mode: str
    core: str = ""
    """ALONE or SHARED: whether the rounds that count had the core for themselves; empty where that was not looked at,
    on a device."""

    @property
    def key(self) -> tuple[str, ...]:
        """What the row is about; a later measurement of the same takes its place."""
        return (self.op, self.compute, str(self.threads), self.attributes, self.operands)


COLUMNS = tuple(field.name for field in fields(Row))
_HEADS = (COLUMNS, COLUMNS[:-1])
"""The second of tables that were measured before the core was watched."""
_NUMBERS = {"threads": int, "p50_us": float, "p90_us": float, "spread_pct": float, "runs": int}
_DIGITS = 4
"""Significant ones of a time: more than any measurement holds."""


def read_table(path: Path) -> list[Row]:
    """The rows of a table; none where there is no file.  Raises UserError for a broken line, by its number."""
    if not path.exists():
        return []
    with disk_errors(path):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is no table: it is not text", fix="name a .csv that `profile` has written"
            ) from error
    lines = csv.reader(io.StringIO(text))
    head = next(lines, [])
    if tuple(head) not in _HEADS:
        raise UserError(
            f"{path.name}, line 1: the columns are {', '.join(head) or 'none'}",
            fix=f"a table begins with {','.join(COLUMNS)}",
        )
    return [_row(path, number, head, cells) for number, cells in enumerate(lines, start=2) if cells]


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """All rows, sorted, the last of each kernel: so the same measurements make the same file."""
    last = {row.key: row for row in rows}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_cells(last[key]) for key in sorted(last, key=_order))
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue().encode())


def _order(key: tuple[str, ...]) -> tuple[object, ...]:
    """Numbers by their size, so that channels stand in their order."""
    return tuple(tuple(int(p) if p.isdigit() else p for p in re.split(r"(\d+)", part)) for part in key)


def _cells(row: Row) -> Sequence[object]:
    return [f"{value:.{_DIGITS}g}" if isinstance(value, float) else value for value in astuple(row)]


def _row(path: Path, number: int, head: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) != len(head):
        raise UserError(
            f"{path.name}, line {number} has {len(cells)} cells instead of {len(head)}",
            fix="mend or delete the line; `hirelc-deploy profile` measures it again",
        )
    values: dict[str, object] = {}
    for name, cell in zip(head, cells, strict=True):
        try:
            values[name] = _NUMBERS[name](cell) if name in _NUMBERS else cell
        except ValueError:
            raise _broken(path, number, name, cell) from None
        if name in ("p50_us", "p90_us") and not (math.isfinite(float(cell)) and float(cell) > 0):
            raise _broken(path, number, name, cell)
    return Row(**values)  # type: ignore[arg-type]


def _broken(path: Path, number: int, name: str, cell: str) -> UserError:
    return UserError(
        f"{path.name}, line {number}: {name} is {cell!r}",
        fix="mend or delete the line; `hirelc-deploy profile` measures it again",
    )
