"""What people see while a command runs.  Results go to stdout; progress and messages go to stderr.

On a terminal progress is a bar with the remaining time.  In a log it is a plain line now and then.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console, RenderableType
from rich.table import Table

from hirelc_deploy.errors import UserError
from hirelc_deploy.profiles import Target

LOG_SECONDS = 30.0  # between two lines of one progress in a log: a night's run stays readable
LOG_COLUMNS = 120  # a log has no width of its own, and 80 columns break the tables


class Advance(Protocol):
    """Called after each step that is done, with a word about it where there is one."""

    def __call__(self, detail: str = "") -> None: ...


def show(result: RenderableType) -> None:
    """Print a result, a table or a text, to stdout."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_COLUMNS)
    console.print(result, markup=False, highlight=False)


def note(text: str) -> None:
    """Print a message to stderr that the user should know of, on one line."""
    _stderr().print(text, markup=False, highlight=False, soft_wrap=True)


def complain(error: UserError) -> None:
    """Print the user's mistake and its fix to stderr."""
    console = _stderr()
    console.print("error: ", style="bold red", end="")
    console.print(str(error), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(what: str, total: int, *, clock: Callable[[], float] = time.monotonic) -> Iterator[Advance]:
    """Show how far `what` is through `total` steps; the function that it yields is called after each.

    Safe to nest: an export of several recipes shows the recipes and, below, the epochs of the present one.
    """
    console = _stderr()
    if not console.is_terminal:
        yield _Log(console, what, total, clock, began=clock()).advance
        return
    from rich import progress as bars  # a quarter of what `targets` may take

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("passed,"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("left"),
        bars.TextColumn("{task.fields[detail]}", markup=False),
    )
    with bars.Progress(*columns, console=console, get_time=clock) as bar:
        task = bar.add_task(what, total=total, detail="")
        yield lambda detail="": bar.update(task, advance=1, detail=detail)


@dataclass
class _Log:
    """Progress as lines: the first step, the last, and one every LOG_SECONDS between them."""

    console: Console
    what: str
    total: int
    clock: Callable[[], float]
    began: float
    done: int = 0
    printed: float = -math.inf

    def advance(self, detail: str = "") -> None:
        self.done += 1
        now = self.clock()
        if self.done < self.total and now - self.printed < LOG_SECONDS:
            return
        self.printed = now
        elapsed_s = now - self.began
        left_s = elapsed_s / self.done * (self.total - self.done)
        line = f"{self.what} {self.done}/{self.total}, {_clock(elapsed_s)} passed, {_clock(left_s)} left"
        self.console.print(f"{line}, {detail}" if detail else line, markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    """0:07, 12:30 or 3:05:09"""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def _stderr() -> Console:
    # made anew each time, so that it is the stderr of now: tests and callers replace it
    return Console(stderr=True)


def targets_table(targets: Iterable[Target]) -> Table:
    """One row a target and an arithmetic: which layers run in it there."""
    table = Table("target", "device", "runtime", "latency", "compute", "layers")
    for target in targets:
        runtime = f"{target.runtime.name} >= {target.runtime.min_version}"
        about = [target.name, target.description, runtime, target.basis]
        for compute, ops in target.ops_by_compute.items():
            table.add_row(*about, compute.value, ", ".join(ops))
            about = [""] * len(about)
        table.add_section()
    return table
