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
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hirelc_deploy.cost.kernel import Kernel
from hirelc_deploy.cost.needs import Family, Place, neglect
from hirelc_deploy.cost.predictor import artifacts_path
from hirelc_deploy.cost.prices import kernel_of, times_of
from hirelc_deploy.cpu import RELEVANT_FLAGS
from hirelc_deploy.exporters._base import KernelFile, KernelMaker, NoKernelError, Request
from hirelc_deploy.profiles import Tables, Target, tables_of
from hirelc_deploy.profiles._table import ALONE, SHARED, Row, read_table, write_table
from hirelc_deploy.verify import timing
from hirelc_deploy.verify.machines import Machine, Where
from hirelc_deploy.verify.manifest import Rounds

ANCHOR = Kernel.parse("Conv", "pads=1,1,1,1", "x:1x64x14x14 w:64x64x3x3 w:64", "fp32")
"""Some 200 us of multiply-accumulates in the caches of any CPU."""

BATCH = 16
"""Kernels that are timed side by side: their files, weights and results are in memory together."""

RUN_US = 150.0
"""Of a run, at least: kernels that are shorter are in their file several times."""

MOST_COPIES = 64
FEW_ROUNDS = 3
"""To see how long a kernel takes, about."""
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
    core: str = ""
    """As a row has it."""


def tables_at(name_or_path: str, target: Target, where: Where) -> Tables:
    """Where the latencies of a target lie: those of its own CPU, or of the machine's where it names none."""
    flags = sorted(target.flags(frozenset(where.flags)) & RELEVANT_FLAGS)
    return tables_of(name_or_path, runtime=where.runtime, flags=flags)


def makers(kernels: Sequence[Kernel], machine: Machine) -> dict[Kernel, KernelMaker | NoKernelError]:
    """Kernels made for a machine, or why it has none: what they ask of it is asked for all of them at once."""
    made: dict[Kernel, KernelMaker | NoKernelError] = {}
    going = {kernel: machine.runtime.kernel_steps(kernel) for kernel in kernels}
    answers: dict[Kernel, Any] = dict.fromkeys(kernels)
    while going:
        requests: dict[Kernel, Request] = {}
        for kernel, steps in going.items():
            try:
                answer = answers[kernel]
                requests[kernel] = steps.throw(answer) if isinstance(answer, Exception) else steps.send(answer)
            except StopIteration as end:
                made[kernel] = end.value
            except NoKernelError as error:
                made[kernel] = error
        going = {kernel: going[kernel] for kernel in requests}
        answers = dict(zip(requests, machine.answers(list(requests.values())), strict=True)) if requests else {}
    return made


def measure(
    kernels: Sequence[Kernel], anchor_us: float | None, machine: Machine
) -> tuple[list[Sample], dict[Kernel, str]]:
    """Time kernels side by side with the anchor; and what the runtime has no kernel for, with the reason.

    `anchor_us` is the anchor's time in the table, None where the table is empty: then it is what it takes now.
    """
    clock = timing.clock_for(machine.where.threads)
    made = makers(list(dict.fromkeys([*kernels, ANCHOR])), machine)
    refused = {kernel: str(maker) for kernel, maker in made.items() if isinstance(maker, NoKernelError)}
    able = {kernel: maker for kernel, maker in made.items() if not isinstance(maker, NoKernelError)}
    files = _of_some_length(able, machine)
    seen = _timed(files, ROUNDS, machine, clock)
    unsteady = [kernel for kernel, each in seen.items() if kernel != ANCHOR and _spread(each.us_each) > STEADY]
    if unsteady:
        seen |= _timed({kernel: files[kernel] for kernel in (*unsteady, ANCHOR)}, MORE_ROUNDS, machine, clock)
    unit_us = anchor_us or float(np.median(seen[ANCHOR].us_each))
    return [_sample(kernel, each, unit_us) for kernel, each in seen.items()], refused


def unit(machine: Machine, times_us: Mapping[Kernel, float]) -> float | None:
    """By what a time of this moment is multiplied to be in units of a table; None where the table has no anchor."""
    if ANCHOR not in times_us:
        return None
    maker = makers([ANCHOR], machine)[ANCHOR]
    if isinstance(maker, NoKernelError):
        return None
    now = _timed({ANCHOR: maker.file(1)}, MORE_ROUNDS, machine, timing.clock_for(machine.where.threads))
    return times_us[ANCHOR] / float(np.median(now[ANCHOR].us_each))


@dataclass(frozen=True)
class _Rounds:
    """One kernel's rounds, without what a session costs by itself."""

    us_each: np.ndarray
    """Microseconds of the kernel now, (rounds,)."""
    in_anchors: np.ndarray
    """In units of the anchor's, (rounds,)."""
    runs: int
    core: str


def _timed(
    files: Mapping[Kernel, KernelFile], rounds: int, machine: Machine, clock: timing.Clock
) -> dict[Kernel, _Rounds]:
    nothing, *times = machine.timed([machine.runtime.nothing().file(1), *files.values()], rounds)
    alone_ms = nothing.rounds_ms(clock)
    us = {
        kernel: 1e3 * (each.rounds_ms(clock) - alone_ms) / file.copies
        for (kernel, file), each in zip(files.items(), times, strict=True)
    }
    runs = {kernel: sum(len(visit.wall_ms) for visit in each.visits) for kernel, each in zip(files, times, strict=True)}
    core = _core(nothing.rounds)
    return {kernel: _Rounds(each, each / us[ANCHOR], runs[kernel], core) for kernel, each in us.items()}


def _core(rounds: Rounds | None) -> str:
    """Of what was timed side by side."""
    if rounds is None:
        return ""
    return ALONE if rounds.are_quiet else SHARED


def _of_some_length(able: Mapping[Kernel, KernelMaker], machine: Machine) -> dict[Kernel, KernelFile]:
    """Files with as many copies of their kernel as make a run long enough."""
    single = {kernel: maker.file(1) for kernel, maker in able.items()}
    nothing, *times = machine.timed([machine.runtime.nothing().file(1), *single.values()], FEW_ROUNDS)
    files = {}
    for (kernel, file), each in zip(single.items(), times, strict=True):
        one_us = max(1e3 * float(each.wall_ms.min() - nothing.wall_ms.min()), SHORTEST_US)
        copies = min(MOST_COPIES, ceil(RUN_US / one_us))
        files[kernel] = file if copies == 1 else able[kernel].file(copies)
    return files


def _sample(kernel: Kernel, rounds: _Rounds, unit_us: float) -> Sample:
    p50, p90 = np.maximum(np.percentile(rounds.in_anchors * unit_us, (50, 90)), SHORTEST_US).tolist()
    return Sample(kernel, p50, p90, 100 * _spread(rounds.in_anchors), rounds.runs, rounds.core)


def _spread(rounds: np.ndarray) -> float:
    """Half the distance of the quartiles, as a part of the median."""
    low, middle, high = np.percentile(rounds, (25, 50, 75))
    return float((high - low) / 2 / abs(middle)) if middle else 0.0


class Advance(Protocol):
    """Called after each family of kernels that is done, with a word about it."""

    def __call__(self, detail: str = "") -> None: ...


def profile(
    wanted: Sequence[Family],
    tables: Tables,
    machine: Machine,
    *,
    seconds: float | None = None,
    advance: Advance = lambda detail="": None,
    anew: bool = False,
) -> dict[str, str]:
    """Measure what families still need and write it to the table, batch by batch: a run that is killed goes on.

    It ends after `seconds`, with all families equally fine by then.  `anew` measures again what was measured beside
    something else on the core.  Returns what the runtime has no kernel for, by family, with the reason.
    """
    threads = machine.where.threads
    if anew:
        _drop_a_shared_unit(tables.own, threads)
    rows, all_rows = read_table(tables.own), tables.rows()
    anchor_us = times_of(all_rows, threads=threads).get(ANCHOR)
    times_us = times_of((row for row in all_rows if not (anew and row.core == SHARED)), threads=threads)
    deadline = None if seconds is None else time.monotonic() + seconds
    refused: dict[str, str] = {}
    for batch in _batches(wanted, times_us, refused, advance):
        samples, without = measure([family.at(place) for family, place in batch], anchor_us, machine)
        refused |= {kernel.family: reason for kernel, reason in without.items()}
        known = {sample.kernel: sample for sample in samples}
        for family, place in batch:
            sample = known.get(family.at(place))
            if sample is not None:
                family.known[place] = sample.p50_us
        kept = [sample for sample in samples if sample.kernel != ANCHOR or anchor_us is None]
        anchor_us = anchor_us or known[ANCHOR].p50_us
        rows += [_row(sample, machine.where) for sample in kept]
        write_table(tables.own, rows)
        if deadline is not None and time.monotonic() > deadline:
            break
    return refused


def _drop_a_shared_unit(table: Path, threads: int) -> None:
    """Where the anchor was measured beside something else, all times are too long by as much, and what corrects them
    too: nothing of that is kept."""
    rows = read_table(table)
    if any(row.core == SHARED and kernel_of(row) == ANCHOR for row in rows if row.threads == threads):
        write_table(table, [row for row in rows if row.threads != threads])
        artifacts_path(table).unlink(missing_ok=True)


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
        flags="+".join(where.flags),
        power_mode=where.power_mode,
        core=sample.core,
    )
