"""What a user would lose: a speed-up that is not one, because the other file was timed at a busier moment."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest

from hirelc_deploy.exporters import _sessions, load_runtime
from hirelc_deploy.exporters._base import NoKernelError
from hirelc_deploy.verify import _runner, profiling, timing as timing_module
from hirelc_deploy.verify.machines import Here
from hirelc_deploy.verify.remote import Runner
from hirelc_deploy.verify.timing import MIN_ROUNDS, Timing, Visit, clock_for, interleave, ratio

INPUTS = {"input": np.zeros((1, 1), np.float32)}


class Busy:
    """Works for a number of loops, and notes that it was its turn."""

    def __init__(self, loops: int, note: Callable[[], None] = lambda: None) -> None:
        self.loops = loops
        self.note = note

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.note()
        for _ in range(self.loops):
            pass
        return dict(inputs)


class Asleep:
    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(0.003)
        return dict(inputs)


def timing(wall_ms: list[float], cpu_ms: list[float]) -> Timing:
    return Timing(tuple(Visit((wall,), cpu) for wall, cpu in zip(wall_ms, cpu_ms, strict=True)))


def test_a_session_with_a_quarter_of_the_work_is_four_times_faster() -> None:
    seen = interleave({"fp32": Busy(40_000), "int8": Busy(10_000)}, INPUTS, seconds=0.5)
    faster = ratio(seen["fp32"], seen["int8"], clock="cpu")
    assert faster.clock == "cpu"
    assert 2.8 < faster.value < 5.6  # within 5 % on a core of its own; tests share theirs, and its caches
    assert faster.lo <= faster.value <= faster.hi


def test_each_round_visits_every_session_in_an_order_of_its_own_and_none_behind_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that ran behind itself would find its caches warm, and be taken for up to 5 % faster than it is."""
    turns: list[str] = []
    names, rounds = ("a", "b", "c", "d"), 60
    monkeypatch.setattr(timing_module, "VISIT_MS", 0.0)  # a visit is one run
    sessions = {name: Busy(10, partial(turns.append, name)) for name in names}
    seen = interleave(sessions, INPUTS, warmup=2, rounds=rounds)
    turns = turns[2 * len(names) :]  # behind the warm-up
    assert all(sorted(turns[i : i + 4]) == list(names) for i in range(0, len(turns), 4))
    assert all(here != there for here, there in pairwise(turns))
    assert len(Counter(tuple(turns[i : i + 4]) for i in range(0, len(turns), 4))) > 12
    assert set(Counter(pairwise(turns))) == set(permutations(names, 2))
    assert {len(seen[name].visits) for name in names} == {rounds}


def test_with_several_threads_a_visit_begins_with_a_run_that_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a pause, in which the workers of the session before go to sleep; it wakes this one's."""
    turns: list[str] = []
    monkeypatch.setattr(timing_module, "VISIT_MS", 0.0)  # a visit is one run
    monkeypatch.setattr(time, "sleep", lambda seconds: turns.append(f"{seconds}"))
    sessions = {name: Busy(10, partial(turns.append, name)) for name in ("a", "b")}
    seen = interleave(sessions, INPUTS, threads=2, warmup=2, rounds=1)
    pause = f"{timing_module.SETTLE_S}"
    assert turns[4:] == [pause, "a", "a", pause, "b", "b"]
    assert [len(visit.wall_ms) for name in sessions for visit in seen[name].visits] == [1, 1]


def test_workers_do_not_spin_into_another_sessions_turn() -> None:
    """Left alone they use a core for up to a second after an inference."""
    runtime = load_runtime("onnxruntime")
    maker = profiling.makers([profiling.ANCHOR], Here(runtime, threads=2))[profiling.ANCHOR]
    assert not isinstance(maker, NoKernelError)
    session = runtime.kernel_session(maker.file(1), threads=2)
    for _ in range(20):
        session.run({})
    time.sleep(0.02)
    began = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - began < 0.02


@pytest.mark.parametrize("version", ["1.16.3", "1.25.1", "1.26.0", "1.32.0"])
def test_a_device_times_several_threads_as_this_machine_does(version: str) -> None:
    setting, _ = _runner.spinning(version)
    assert _runner.spinning(version) == _sessions._spinning(version)
    assert ("spin_duration_us" in setting) == (version >= "1.26"), "older versions pass over what they do not know"
    assert timing_module.SETTLE_S > _sessions.SPIN_US / 1e6


@pytest.mark.parametrize("threads", [1, 2])
def test_a_device_is_told_the_pause_that_is_made_here(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    runner = object.__new__(Runner)
    monkeypatch.setattr(runner, "job", lambda job, files, options: (told.append(job) or {"rounds": []}, {}))
    runner.timed([], threads=threads, warmup=1, rounds=(1, 1), optimise=False)
    assert told[0]["pause_s"] == (timing_module.SETTLE_S if threads > 1 else 0.0)


def test_a_small_model_runs_often_enough_in_a_visit_for_any_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as VISIT_MS by the milliseconds that the runs before have told, here by the number of loops."""
    monkeypatch.setattr(timing_module, "_warm_up", lambda session, *_: session.loops / 1000)
    seen = interleave({"small": Busy(10), "large": Busy(200_000)}, INPUTS, rounds=3)
    assert [len(visit.wall_ms) for visit in seen["small"].visits] == [timing_module.VISIT_MS / 0.01] * 3
    assert [len(visit.wall_ms) for visit in seen["large"].visits] == [1] * 3


def test_the_time_that_is_given_is_spent_and_not_much_more() -> None:
    began = time.perf_counter()
    seen = interleave({"a": Busy(100), "b": Busy(100)}, INPUTS, seconds=0.3)
    assert 0.3 <= time.perf_counter() - began < 1.5
    assert len(seen["a"].visits) >= MIN_ROUNDS


def test_a_slow_model_still_gets_its_rounds() -> None:
    seen = interleave({"slow": Busy(300_000)}, INPUTS, seconds=0.001)
    assert len(seen["slow"].visits) == MIN_ROUNDS


def test_wall_clock_counts_waiting_and_cpu_time_does_not() -> None:
    seen = interleave({"asleep": Asleep()}, INPUTS, rounds=3, warmup=2)["asleep"]
    assert seen.latency_ms()["p50"] >= 3.0
    assert seen.cpu_p50_ms < 1.0
    assert seen.cpu_share < 0.5


def test_percentiles_are_of_single_runs() -> None:
    seen = Timing((Visit((1.0,) * 50, 1.0), Visit((1.0,) * 48 + (9.0,) * 2, 1.0)))
    latency_ms = seen.latency_ms()
    assert latency_ms["p50"] == latency_ms["p90"] == 1.0
    assert latency_ms["p99"] == pytest.approx(9.0)


def test_the_ratio_is_taken_on_the_clock_that_it_names() -> None:
    before, after = timing([9.0] * 11, [4.0] * 11), timing([1.0] * 11, [2.0] * 11)
    assert ratio(before, after, clock="cpu").value == 2.0
    assert ratio(before, after, clock="wall").value == 9.0
    assert (clock_for(1), clock_for(4)) == ("cpu", "wall")


def test_the_interval_narrows_with_rounds_and_holds_the_truth() -> None:
    random = np.random.default_rng(0)

    def interval(rounds: int) -> tuple[float, float]:
        before, after = (mean * random.lognormal(0, 0.1, rounds) for mean in (3.0, 1.0))
        found = ratio(timing([1.0] * rounds, list(before)), timing([1.0] * rounds, list(after)), clock="cpu")
        return found.lo, found.hi

    (few_lo, few_hi), (many_lo, many_hi) = interval(15), interval(600)
    assert few_lo < 3.0 < few_hi
    assert many_lo < 3.0 < many_hi
    assert many_hi - many_lo < (few_hi - few_lo) / 2


def test_a_disturbance_that_lasts_for_many_rounds_widens_the_interval() -> None:
    """One third of the rounds slowed: scattered they cannot move the median, in one stretch they nearly do."""
    rounds = 300
    calm = np.random.default_rng(0).lognormal(0, 0.02, rounds)
    slowed = np.where(np.arange(rounds) < rounds // 3, 1.5, 1.0)
    scattered = np.random.default_rng(1).permutation(slowed)

    def width(disturbance: np.ndarray) -> float:
        found = ratio(
            timing([1.0] * rounds, [3.0] * rounds), timing([1.0] * rounds, list(calm * disturbance)), clock="cpu"
        )
        return found.hi - found.lo

    assert width(slowed) > 2 * width(scattered)


def test_rounds_of_different_calls_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        ratio(timing([1.0], [1.0]), timing([1.0, 1.0], [1.0, 1.0]), clock="cpu")
