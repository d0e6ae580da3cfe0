"""What a user would lose: a speed-up of 5 that is one of 7, because a neighbour had the other half of the core."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np
import pytest

from hirelc_deploy.budget import Budget
from hirelc_deploy.verify import judge, timing
from hirelc_deploy.verify.manifest import Measured, MeasuredBasis, Rounds
from hirelc_deploy.verify.quiet import FLUKES, MOST_S, Core, loop_ns
from hirelc_deploy.verify.timing import MIN_ROUNDS, Visit, interleave, ratio

ALONE_NS, SHARED_NS = 100, 190


def core_of(loops: Iterator[int], *, left_s: float = 1.0, patience: float = 1.0) -> Core:
    return Core(lambda: next(loops), left_s=left_s, patience=patience)


@dataclass
class Machine:
    """One whose core a neighbour shares for so many looks at it, and then leaves alone for as many."""

    spell: int
    looks: int = 0

    @property
    def is_shared(self) -> bool:
        return self.looks // self.spell % 2 == 1

    def loop_ns(self) -> int:
        self.looks += 1
        return SHARED_NS if self.is_shared else ALONE_NS


@dataclass
class Network:
    """Takes longer beside a neighbour, a small one longer than a large one."""

    machine: Machine
    alone_ms: float
    times_beside: float

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(inputs)

    @property
    def now_ms(self) -> float:
        return self.alone_ms * (self.times_beside if self.machine.is_shared else 1.0)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> tuple[Machine, dict[str, Network]]:
    """A machine, and a network that is eight times faster than another, but five times beside a neighbour."""
    machine = Machine(spell=29)
    monkeypatch.setattr(timing, "_visit", lambda session, *_: Visit((session.now_ms,), session.now_ms))
    return machine, {"large": Network(machine, 2.0, 1.1), "small": Network(machine, 0.25, 1.76)}


def test_what_is_timed_beside_a_neighbour_is_timed_again(two: tuple[Machine, dict[str, Network]]) -> None:
    machine, networks = two
    seen = interleave(networks, {}, rounds=40, core=Core(machine.loop_ns, left_s=1.0))
    assert {each.rounds for each in seen.values()} == {Rounds(all=40, quiet=40, counted=40)}
    assert set(seen["large"].rounds_ms("cpu")) == {2.0}
    assert ratio(seen["large"], seen["small"], clock="cpu").value == 8.0


@pytest.mark.parametrize(
    ("looks", "rounds"),
    [(26, Rounds(all=MIN_ROUNDS, quiet=6, counted=6)), (22, Rounds(all=MIN_ROUNDS, quiet=5, counted=MIN_ROUNDS))],
)
def test_where_half_of_the_rounds_or_more_are_shared_all_of_them_count(
    two: tuple[Machine, dict[str, Network]], looks: int, rounds: Rounds
) -> None:
    """Nobody waits; the neighbour comes after so many looks at the core, four of which make a round of two networks."""
    machine, networks = two
    machine.spell = looks
    seen = interleave(networks, {}, seconds=0.0, core=Core(machine.loop_ns, left_s=0.0, patience=0.0))
    assert seen["small"].rounds == rounds
    beside = {0.25 * 1.76} if rounds.counted > rounds.quiet else set()
    assert set(seen["small"].rounds_ms("cpu")) == {0.25} | beside


def test_what_is_measured_once_is_waited_for_by_whoever_has_no_patience_left(
    two: tuple[Machine, dict[str, Network]],
) -> None:
    machine, networks = two
    core = Core(machine.loop_ns, left_s=-3.0, patience=0.0)
    seen = interleave(networks, {}, rounds=40, core=core, patience_s=1.0)
    assert seen["small"].rounds == Rounds(all=40, quiet=40, counted=40)
    assert core.left_s < 1.0


def test_a_core_that_is_never_quiet_is_put_up_with() -> None:
    """The first loops were fast; nothing after them is."""
    core = core_of(chain([ALONE_NS] * (FLUKES + 1), repeat(SHARED_NS)), left_s=0.01)
    for _ in range(FLUKES + 1):
        core.look()
    began = time.perf_counter()
    assert core.wait() == SHARED_NS
    assert not core.is_waited_for
    assert time.perf_counter() - began < 5.0
    assert core.wait() == SHARED_NS, "not for a moment any more"


def test_a_lucky_moment_of_the_clock_says_nothing_of_the_core() -> None:
    core = core_of(chain([1] * FLUKES, repeat(ALONE_NS)))
    assert [core.is_quiet(core.look()) for _ in range(2 * FLUKES)][FLUKES:] == [True] * FLUKES


def test_what_a_core_can_do_may_be_known_only_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement that begins beside a neighbour takes that for all the core can do; then it sees better."""
    monkeypatch.setattr(timing, "_visit", lambda *_: Visit((1.0,), 1.0))
    begun_beside = core_of(chain(repeat(SHARED_NS, 2 * 5), repeat(ALONE_NS)), left_s=0.0, patience=0.0)
    session = Network(Machine(1), 1.0, 1.0)
    seen = interleave({"one": session}, {}, seconds=1e9, core=begun_beside)["one"]
    later = timing.MAX_ROUNDS - 5
    assert seen.rounds == Rounds(all=timing.MAX_ROUNDS, quiet=later, counted=later)
    assert len(seen.visits) == later


def test_quiet_seconds_earn_patience_and_others_use_it_up() -> None:
    core = Core(left_s=1.0, patience=3.0)
    core.spent(2.0, is_quiet=True)
    assert core.left_s == 7.0
    core.spent(2.0, is_quiet=False)
    assert core.left_s == 5.0
    core.spent(1000.0, is_quiet=True)
    assert core.left_s == MOST_S
    core.left_s = 10 * MOST_S
    core.spent(1000.0, is_quiet=True)
    assert core.left_s == 10 * MOST_S, "who was given more keeps it"


def test_a_loop_takes_as_long_as_a_clock_can_tell() -> None:
    assert min(loop_ns() for _ in range(20)) > 5_000


@pytest.mark.parametrize(("quiet", "counted", "warned"), [(200, 200, False), (3, 240, True), (240, 240, False)])
def test_times_of_a_shared_core_are_told_as_such(quiet: int, counted: int, warned: bool) -> None:
    measured = Measured(
        size_bytes=1,
        accuracy=90.0,
        accuracy_search=90.0,
        latency_ms=None,
        compression=2.0,
        speedup=2.0,
        rounds=Rounds(all=240, quiet=quiet, counted=counted),
        drop_points=0.0,
        drop_ci95=None,
        agreement=None,
        basis=MeasuredBasis(size="measured", accuracy="measured", latency="measured"),
    )
    notes = judge.warnings(Budget(), measured)
    assert any(f"all but {quiet} of 240 rounds" in note for note in notes) is warned
