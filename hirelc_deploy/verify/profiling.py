"""Measures the kernels that a network needs, for the table of a target.

Kernels are timed side by side, a batch at a time, together with one that is in every batch, the anchor.  A kernel's
time is its ratio to the anchor, round by round, times the anchor's time in the table: what slows the machine down for
a while (another process on the same core, a lower clock) slows both.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil
from typing import Protocol

import numpy as np

from hirelc_deploy.cost.kernel import Kernel
from hirelc_deploy.cost.needs import Family, Place, neglect
from hirelc_deploy.cost.prices import kernel_of
from hirelc_deploy.cpu import relevant_flags
from hirelc_deploy.exporters._base import KernelFile, NoKernelError, Runtime, Session
from hirelc_deploy.profiles import Tables, tables_of
from hirelc_deploy.profiles._table import Row, read_table, write_table
from hirelc_deploy.verify import timing
from hirelc_deploy.verify.environment import power_mode

ANCHOR = Kernel.parse("Conv", "pads=1,1,1,1", "x:1x64x14x14 w:64x64x3x3 w:64", "fp32")
"""Some 200 us of multiply-accumulates in the caches of any CPU."""

NOTHING = Kernel.parse("Identity", "", "x:1", "fp32")
"""Timed alone it is the session itself; its time is taken off all others."""

BATCH = 16
"""Kernels that are timed side by side: their files, weights and results are in memory together."""

RUN_US = 150.0
"""Of a run, at least: kernels that are shorter are in their file several times."""

MOST_COPIES = 64
ROUNDS = 11
MORE_ROUNDS = 31
"""Where the rounds of the first few are far apart."""
STEADY = 0.03
"""Half the distance of the quartiles, as a part of the median: above, a kernel is measured for longer."""

SHORTEST_US = 0.05


@dataclass(frozen=True)
class Sample:
    """One kernel's time, in units of its table."""

    kernel: Kernel
    p50_us: float
    p90_us: float
    spread_pct: float
    runs: int


@dataclass(frozen=True)
class Where:
    """What a row says of where it was measured."""

    runtime: str
    flags: str
    power_mode: str
    threads: int


def here(runtime: Runtime, *, threads: int) -> Where:
    """This machine."""
    flags = "+".join(relevant_flags())
    return Where(f"{runtime.name} {runtime.version()}", flags, power_mode() or "", threads)


def tables_here(name_or_path: str, runtime: Runtime) -> Tables:
    """Where a target's latencies lie that hold for this machine."""
    return tables_of(name_or_path, runtime=f"{runtime.name} {runtime.version()}", flags=relevant_flags())


def measure(
    kernels: Sequence[Kernel], anchor_us: float | None, runtime: Runtime, *, threads: int
) -> tuple[list[Sample], dict[Kernel, str]]:
    """Time kernels side by side with the anchor; and what the runtime has no kernel for, with the reason.

    `anchor_us` is the anchor's time in the table, None where the table is empty: then it is what it takes now.
    """
    clock = timing.clock_for(threads)
    files: dict[Kernel, KernelFile] = {}
    refused: dict[Kernel, str] = {}
    for kernel in kernels:
        try:
            files[kernel] = _of_some_length(kernel, runtime, threads)
        except NoKernelError as error:
            refused[kernel] = str(error)
    files[ANCHOR] = _of_some_length(ANCHOR, runtime, threads)
    files[NOTHING] = runtime.nothing_file()
    seen = _timed(files, ROUNDS, runtime, threads)
    unsteady = [
        kernel
        for kernel, each in seen.items()
        if kernel != NOTHING and _spread(_in_anchors(seen, each, clock)) > STEADY
    ]
    again = dict.fromkeys([*unsteady, ANCHOR, NOTHING])
    more = _timed({kernel: files[kernel] for kernel in again}, MORE_ROUNDS, runtime, threads) if unsteady else {}
    scale_us = anchor_us or float(np.median(seen[ANCHOR].rounds_ms(clock))) * 1e3
    samples = []
    for kernel in files:
        if kernel == NOTHING:
            continue
        source = more if kernel in more else seen
        samples.append(_sample(kernel, files[kernel].copies, source, scale_us, clock))
    return samples, refused


def _timed(
    files: Mapping[Kernel, KernelFile], rounds: int, runtime: Runtime, threads: int
) -> dict[Kernel, timing.Timing]:
    sessions = {str(i): runtime.kernel_session(file, threads=threads) for i, file in enumerate(files.values())}
    times = timing.interleave(sessions, {}, warmup=3, rounds=rounds)
    return {kernel: times[str(i)] for i, kernel in enumerate(files)}


def _of_some_length(kernel: Kernel, runtime: Runtime, threads: int) -> KernelFile:
    """The kernel's file with as many copies as make a run long enough."""
    file = runtime.kernel_file(kernel)
    took_us = [_fastest_us(runtime.kernel_session(each, threads=threads)) for each in (file, runtime.nothing_file())]
    one_us = max(took_us[0] - took_us[1], SHORTEST_US)
    copies = min(MOST_COPIES, ceil(RUN_US / one_us))
    return file if copies == 1 else runtime.kernel_file(kernel, copies=copies)


def _fastest_us(session: Session) -> float:
    found = []
    for _ in range(5):
        began = time.perf_counter_ns()
        session.run({})
        found.append(time.perf_counter_ns() - began)
    return min(found) / 1e3


def _in_anchors(seen: Mapping[Kernel, timing.Timing], each: timing.Timing, clock: timing.Clock) -> np.ndarray:
    """A kernel's time in units of the anchor's, round by round."""
    return each.rounds_ms(clock) / seen[ANCHOR].rounds_ms(clock)


def _sample(
    kernel: Kernel, copies: int, seen: Mapping[Kernel, timing.Timing], scale_us: float, clock: timing.Clock
) -> Sample:
    nothing = _in_anchors(seen, seen[NOTHING], clock)
    # the anchor's own time holds a session's work as well
    one = scale_us / (1 - float(np.median(nothing))) if kernel == ANCHOR else scale_us
    each = (_in_anchors(seen, seen[kernel], clock) - nothing) / copies * one
    p50, p90 = np.percentile(each, (50, 90))
    return Sample(
        kernel,
        max(float(p50), SHORTEST_US),
        max(float(p90), SHORTEST_US),
        100 * _spread(each),
        sum(len(visit.wall_ms) for visit in seen[kernel].visits),
    )


def _spread(rounds: np.ndarray) -> float:
    low, middle, high = np.percentile(rounds, (25, 50, 75))
    return float((high - low) / 2 / abs(middle)) if middle else 0.0


class Advance(Protocol):
    """Called after each family of kernels that is done, with a word about it."""

    def __call__(self, detail: str = "") -> None: ...


def profile(
    wanted: Sequence[Family],
    tables: Tables,
    runtime: Runtime,
    where: Where,
    *,
    seconds: float | None = None,
    advance: Advance = lambda detail="": None,
) -> dict[str, str]:
    """Measure what families still need and write it to the table, batch by batch: a run that is killed goes on.

    It ends after `seconds`, with all families equally fine by then.  Returns what the runtime has no kernel for, by
    family, with the reason.
    """
    rows = read_table(tables.own)
    times_us = {kernel_of(row): row.p50_us for row in tables.rows() if row.threads == where.threads}
    anchor_us = times_us.get(ANCHOR)
    deadline = None if seconds is None else time.monotonic() + seconds
    refused: dict[str, str] = {}
    for batch in _batches(wanted, times_us, refused, advance):
        samples, without = measure(
            [family.at(place) for family, place in batch], anchor_us, runtime, threads=where.threads
        )
        refused |= {kernel.family: reason for kernel, reason in without.items()}
        known = {sample.kernel: sample for sample in samples}
        for family, place in batch:
            sample = known.get(family.at(place))
            if sample is not None:
                family.known[place] = sample.p50_us
        kept = [sample for sample in samples if sample.kernel != ANCHOR or anchor_us is None]
        anchor_us = anchor_us or known[ANCHOR].p50_us
        rows += [_row(sample, where) for sample in kept]
        write_table(tables.own, rows)
        if deadline is not None and time.monotonic() > deadline:
            break
    return refused


def _batches(
    wanted: Sequence[Family], times_us: Mapping[Kernel, float], refused: Mapping[str, str], advance: Advance
) -> Iterator[list[tuple[Family, Place]]]:
    """What is to be measured next, one list of each family after the other, in batches.

    What the table has is taken from it.
    """
    plans = [(family, family.plan()) for family in wanted]
    while plans:
        asked: list[tuple[Family, Place]] = []
        going = []
        for family, plan in plans:
            places = [] if family.kernel.family in refused else _missing(family, plan, times_us)
            if not places:
                advance(family.kernel.op)
                continue
            asked += [(family, place) for place in places]
            going.append((family, plan))
        plans = going
        neglect(wanted)
        for start in range(0, len(asked), BATCH):
            batch = [pair for pair in asked[start : start + BATCH] if pair[0].kernel.family not in refused]
            if batch:
                yield batch


def _missing(family: Family, plan: Iterator[list[Place]], times_us: Mapping[Kernel, float]) -> list[Place]:
    """The next places of a plan that no table has; empty at its end."""
    for places in plan:
        known = {place: times_us.get(family.at(place)) for place in places}
        family.known |= {place: us for place, us in known.items() if us is not None}
        if missing := [place for place, us in known.items() if us is None]:
            return missing
    return []


def _row(sample: Sample, where: Where) -> Row:
    kernel = sample.kernel
    return Row(
        op=kernel.op,
        attributes=kernel.attributes,
        operands=kernel.operands_text,
        compute=str(kernel.compute),
        threads=where.threads,
        p50_us=sample.p50_us,
        p90_us=sample.p90_us,
        spread_pct=sample.spread_pct,
        runs=sample.runs,
        date=datetime.now(UTC).date().isoformat(),
        runtime=where.runtime,
        flags=where.flags,
        power_mode=where.power_mode,
    )
