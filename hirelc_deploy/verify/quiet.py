"""Whether the core that is timed on is this program's alone.

Two hardware threads share one core.  On a virtual machine the other one may be a neighbour's: no time counts as stolen
then, and still everything takes up to twice as long, for a tenth of a second or for several.  Small kernels suffer more
than large ones, so that not even ratios hold (docs/findings.md).  A loop that always does the same tells: it takes as
long as ever, or half as long again and more, and hardly anything between.
"""

import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field

LOOPS = 6000
"""Some 70 us: far above what a clock costs, far below a visit."""

SHARED = 1.45
"""Times a fast loop: by its clock a core is up to a fifth slower than then, beside a neighbour two thirds at least."""

FLUKES = 4
"""Loops that may be faster than a fast one: a clock that was read at a lucky moment says nothing of the core."""

PATIENCE = 5.0
"""Seconds that may be waited for a quiet second: a core that is never quiet is soon put up with."""

FIRST_S, MOST_S = 30.0, 60.0
"""What may be waited before anything was quiet, and what is saved up at most."""


def loop_ns() -> int:
    """CPU time of the calling thread for a loop that always does the same."""
    began_ns = time.thread_time_ns()
    for _ in range(LOOPS):
        pass
    return time.thread_time_ns() - began_ns


@dataclass
class Core:
    """The core of the calling thread, and how much longer it is waited for."""

    loop_ns: Callable[[], int] = loop_ns
    left_s: float = FIRST_S
    patience: float = PATIENCE
    _fastest_ns: list[int] = field(default_factory=list, init=False)
    """Ascending."""

    def look(self) -> int:
        """Nanoseconds of a loop now; `is_quiet` knows later, when faster ones may have been seen, what they say."""
        took_ns = self.loop_ns()
        if len(self._fastest_ns) <= FLUKES or took_ns < self._fastest_ns[-1]:
            insort(self._fastest_ns, took_ns)
            del self._fastest_ns[FLUKES + 1 :]
        return took_ns

    def is_quiet(self, took_ns: int) -> bool:
        """Whether a loop that took so long had the core for itself."""
        return took_ns <= SHARED * self._fastest_ns[-1]

    @property
    def is_waited_for(self) -> bool:
        """Whether what was measured beside a neighbour is measured once more."""
        return self.left_s > 0

    def wait(self) -> int:
        """Until nothing shares the core, or patience is at its end: nanoseconds of the last loop."""
        while True:
            began_s = time.perf_counter()
            took_ns = self.look()
            if not self.is_waited_for or self.is_quiet(took_ns):
                return took_ns
            self.left_s -= time.perf_counter() - began_s

    def spent(self, seconds: float, *, is_quiet: bool) -> None:
        """So long was measured: quiet seconds earn patience, up to MOST_S, others use it up."""
        if is_quiet:
            self.left_s = max(self.left_s, min(MOST_S, self.left_s + self.patience * seconds))
        else:
            self.left_s -= seconds


CORE = Core()
"""This process's: what it has learned of the core's speed holds for all that it measures."""
