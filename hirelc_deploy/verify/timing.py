"""How long an inference takes, and how much faster one file is than another."""

import gc
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

from hirelc_deploy.verify import quiet
from hirelc_deploy.verify.manifest import Rounds

if TYPE_CHECKING:
    from hirelc_deploy.exporters._base import Arrays, Session

Clock = Literal["cpu", "wall"]
"""cpu: time that the calling thread really ran, which holds on a busy machine; wall: time that passed."""

WARMUP_RUNS = 20
SECONDS = 2.5
"""Spent on all sessions together, after the warm-up."""
WARMUP_SHARE = 0.2
"""Of the seconds, at most: twenty runs of a large network would take longer than its measurement."""
VISIT_MS = 2.0
"""A session runs for about this long before the other's turn: far above what a clock resolves, and long enough
that the caches which the other has filled do not decide."""
SETTLE_S = 0.001
"""A pause in which the workers of the session before have gone to sleep."""
MIN_ROUNDS, MAX_ROUNDS = 11, 2000
ORDERS_SEED = 0
RESAMPLES = 2000
PATIENCE_S = 60.0
"""Of what is timed for its own sake, and not one of hundreds: an artifact, or what a search has found."""
BLOCKS = 10
"""A resample is put together from about so many runs of consecutive rounds.  What disturbs a machine lasts for many
rounds: to draw them one by one takes them for independent, and the interval comes out too narrow."""
INTERVAL_PCT = (2.5, 97.5)


@dataclass(frozen=True)
class Visit:
    """What was seen of one session in one round."""

    wall_ms: tuple[float, ...]
    """Of every run."""
    cpu_ms: float
    """Of one run: the mean over the visit, so that the clock is read twice and not twice a run."""


@dataclass(frozen=True)
class Timing:
    """One session's visits, one a round that counts."""

    visits: tuple[Visit, ...]
    rounds: Rounds | None = None
    """None where that is not looked at: on a device."""

    @property
    def is_quiet(self) -> bool:
        """Whether nothing else is known to have run on the core in the rounds that count."""
        return self.rounds is None or self.rounds.are_quiet

    @cached_property
    def wall_ms(self) -> np.ndarray:
        """Wall clock of every run, (runs,)."""
        return np.concatenate([visit.wall_ms for visit in self.visits])

    @cached_property
    def cpu_p50_ms(self) -> float:
        """Median over the rounds of the CPU time of the calling thread; meaningless with several threads."""
        return float(np.median(self.rounds_ms("cpu")))

    @cached_property
    def cpu_share(self) -> float:
        """CPU time over wall clock: well below 1, with one thread, the machine was busy with something else."""
        cpu_ms = sum(visit.cpu_ms * len(visit.wall_ms) for visit in self.visits)
        return float(cpu_ms / self.wall_ms.sum())

    def rounds_ms(self, clock: Clock) -> np.ndarray:
        """One figure a round, (rounds,)."""
        if clock == "cpu":
            return np.array([visit.cpu_ms for visit in self.visits])
        return np.array([np.median(visit.wall_ms) for visit in self.visits])

    def p50_ms(self, clock: Clock) -> float:
        """The median on one clock: of the rounds by CPU time, of single runs by the wall."""
        return self.cpu_p50_ms if clock == "cpu" else self.latency_ms()["p50"]

    def latency_ms(self) -> dict[str, float]:
        """Wall clock at p50, p90 and p99, as a manifest holds it."""
        p50, p90, p99 = np.percentile(self.wall_ms, (50, 90, 99)).tolist()
        return {"p50": p50, "p90": p90, "p99": p99}


@dataclass(frozen=True)
class Ratio:
    """How many times faster the candidate is than the baseline, with its 95 % interval."""

    value: float
    lo: float
    hi: float
    clock: Clock


def clock_for(threads: int) -> Clock:
    """The clock that ratios are taken on: CPU time sees one thread only.

    For work that is not on the CPU at all (a GPU) it is always wall.
    """
    return "cpu" if threads == 1 else "wall"


def pause_s(threads: int) -> float:
    """Before each visit.  Sessions of several threads have workers that go on waiting for work after a run: a visit of
    those begins with a pause, and with a run that is not counted and wakes their own."""
    return SETTLE_S if threads > 1 else 0.0


def interleave(
    sessions: "Mapping[str, Session]",
    inputs: "Arrays",
    *,
    threads: int = 1,
    warmup: int = WARMUP_RUNS,
    rounds: int | None = None,
    seconds: float = SECONDS,
    core: quiet.Core = quiet.CORE,
    patience_s: float = 0.0,
) -> dict[str, Timing]:
    """Time sessions side by side, on both clocks, so that whatever disturbs the machine disturbs all of them.

    In each round every session has one visit of several runs on the same inputs, in an order of its own, so that
    none always runs behind the same one; and none runs behind itself, since its caches would still be warm.  Without
    `rounds`, as many are made as fit into `seconds`, between MIN_ROUNDS and MAX_ROUNDS.  `threads` are those of each
    session (`pause_s`).

    A visit beside something else on the `core` is made again, as long as there is patience for that, and that is at
    least `patience_s` of waiting: what little is measured once may take its time.  Rounds without
    one count; where those are at most half of what was asked for, or of MIN_ROUNDS, all of them do.
    """
    if rounds is not None and rounds < 1:
        raise ValueError(f"{rounds} rounds")
    core.left_s = max(core.left_s, patience_s)
    runs = {
        name: _runs_a_visit(_warm_up(session, inputs, warmup, WARMUP_SHARE * seconds / len(sessions)))
        for name, session in sessions.items()
    }
    orders = _orders(list(sessions))
    made: list[dict[str, _Watched]] = []
    with _no_garbage_collection():
        made_s = 0.0
        while not _is_enough(len(made), made_s, rounds, seconds):
            made.append({name: _watched(sessions[name], inputs, runs[name], threads, core) for name in next(orders)})
            made_s += sum(each.seconds for each in made[-1].values())
    alone = [each for each in made if core.is_quiet(max(watched.loop_ns for watched in each.values()))]
    counting = alone if 2 * len(alone) > (rounds or MIN_ROUNDS) else made
    seen = Rounds(all=len(made), quiet=len(alone), counted=len(counting))
    return {name: Timing(tuple(each[name].visit for each in counting), seen) for name in sessions}


@dataclass(frozen=True)
class _Watched:
    """A visit, and how the core was meanwhile."""

    visit: Visit
    seconds: float
    """By the wall clock, without what was waited."""
    loop_ns: int
    """Of the slower of the loops before and behind it."""


def _watched(session: "Session", inputs: "Arrays", runs: int, threads: int, core: quiet.Core) -> _Watched:
    """A visit of so many runs, with the core for itself if that can be waited for."""
    while True:
        before_ns = core.wait()
        began_s = time.perf_counter()
        if pause := pause_s(threads):
            time.sleep(pause)
            session.run(inputs)
        visit = _visit(session, inputs, runs)
        loop_ns = max(before_ns, core.look())
        seconds = time.perf_counter() - began_s
        is_quiet = core.is_quiet(loop_ns)
        core.spent(seconds, is_quiet=is_quiet)
        if is_quiet or not core.is_waited_for:
            return _Watched(visit, seconds, loop_ns)


def _is_enough(made: int, made_s: float, rounds: int | None, seconds: float) -> bool:
    """Whether as many rounds were made as asked for, or the time is up."""
    if rounds is not None:
        return made >= rounds
    return made >= (MIN_ROUNDS if made_s >= seconds else MAX_ROUNDS)


def ratio(baseline: Timing, candidate: Timing, *, clock: Clock, seed: int = 0) -> Ratio:
    """The baseline's median over the candidate's, both taken in the same call of `interleave`.

    The interval is a bootstrap over blocks of rounds, paired: a resample takes both sessions' visits of a round.  It
    holds for the moment of the measurement, and not for a disturbance that outlasts it.
    """
    before, after = baseline.rounds_ms(clock), candidate.rounds_ms(clock)
    if len(before) != len(after):
        raise ValueError(f"{len(before)} rounds of the baseline and {len(after)} of the candidate are no pairs")
    picks = _blocks(len(before), seed)
    resampled = np.median(before[picks], axis=1) / np.median(after[picks], axis=1)
    lo, hi = np.percentile(resampled, INTERVAL_PCT).tolist()
    return Ratio(float(np.median(before) / np.median(after)), lo, hi, clock)


def _blocks(rounds: int, seed: int) -> np.ndarray:
    """Round numbers, (RESAMPLES, rounds): a circular block bootstrap (Politis and Romano, 1992)."""
    length = max(1, rounds // BLOCKS)
    starts = np.random.default_rng(seed).integers(rounds, size=(RESAMPLES, math.ceil(rounds / length), 1))
    return ((starts + np.arange(length)) % rounds).reshape(RESAMPLES, -1)[:, :rounds]


def _warm_up(session: "Session", inputs: "Arrays", runs: int, seconds: float) -> float:
    """Run until memory is allocated and caches are filled; the milliseconds of the fastest run."""
    fastest_ms = math.inf
    deadline = time.perf_counter() + seconds
    for run in range(max(runs, 2)):
        if run >= 2 and time.perf_counter() > deadline:
            break
        fastest_ms = min(fastest_ms, *_visit(session, inputs, 1).wall_ms)
    return fastest_ms


def _runs_a_visit(run_ms: float) -> int:
    return max(1, math.ceil(VISIT_MS / run_ms))


def _orders(names: list[str]) -> Iterator[list[str]]:
    """The names, as they come and then shuffled anew for every round, no round's first being the last of before."""
    random = np.random.default_rng(ORDERS_SEED)
    order = names
    while True:
        yield order
        last = order[-1]
        order = random.permutation(names).tolist()
        if order[0] == last and len(order) > 1:
            other = random.integers(1, len(order))
            order[0], order[other] = order[other], order[0]


def _visit(session: "Session", inputs: "Arrays", runs: int) -> Visit:
    ticks_ns = [0] * (runs + 1)
    cpu_began_ns = time.thread_time_ns()
    ticks_ns[0] = time.perf_counter_ns()
    for run in range(1, runs + 1):
        session.run(inputs)
        ticks_ns[run] = time.perf_counter_ns()
    cpu_ns = time.thread_time_ns() - cpu_began_ns
    wall_ms = tuple((end - start) / 1e6 for start, end in pairwise(ticks_ns))
    return Visit(wall_ms, cpu_ns / runs / 1e6)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection that falls into a run is not part of an inference."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
