"""One artifact measured beside its baseline: bytes, milliseconds, and scores of the files themselves."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hirelc_deploy.verify import accuracy, timing
from hirelc_deploy.verify.manifest import (
    Baseline,
    Environment,
    Measured,
    MeasuredBasis,
    Percentiles,
    Record,
    sha256,
)

if TYPE_CHECKING:
    from hirelc_deploy.exporters._base import Arrays, Footprint, Runtime, Session
    from hirelc_deploy.task import Batch, Task

BASELINE_FILE = "baseline.onnx"
"""In every artifact folder: the stripped fp32 file, so that anyone can measure again."""


BASELINE_FP16_FILE = "baseline_fp16.onnx"
"""The same in fp16, on targets that compute in it: what is faster than fp32 there need not be faster than this."""


MOST_BYTES = 1 << 25
"""Of inputs that go to a device in one job."""


class Measurement(Record):
    """What was seen, as it is journalled."""

    baseline: Baseline
    baseline_fp16: Baseline | None = None
    measured: Measured
    runs_as: dict[str, str | None]
    clock: str
    p50_ms: float
    """Of the artifact, on that clock."""
    simulated_agreement: float | None = None
    """Percent of equal decisions of the simulated network and the file, on the search split."""
    pace: float = 1.0
    """How many times slower the machine was than when its tables were made."""

    @property
    def is_quiet(self) -> bool:
        """Whether nothing else ran on the core, as far as that was looked at: later files are told by it then."""
        return self.measured.rounds is None or self.measured.rounds.are_quiet


@dataclass(frozen=True)
class OnDevice:
    """What was seen of an artifact, and where."""

    seen: Measurement
    environment: Environment
    version: str
    """Of its runtime."""
    notes: tuple[str, ...] = ()


def together(batches: "Iterable[Batch]") -> "Iterator[Batch]":
    """Batches put together to as much as one job on a device takes: a program that starts anew for each has a price."""
    held: list[Batch] = []
    for batch in batches:
        held.append(batch)
        if sum(array.nbytes for inputs, _ in held for array in inputs.values()) >= MOST_BYTES:
            yield _one(held)
            held = []
    if held:
        yield _one(held)


def _one(held: "Sequence[Batch]") -> "Batch":
    names = held[0][0]
    inputs = {name: np.concatenate([np.asarray(each[name]) for each, _ in held]) for name in names}
    return inputs, np.concatenate([target for _, target in held])


class Place(Protocol):
    """Where an artifact is measured, and by what it is run."""

    @property
    def clock(self) -> timing.Clock:
        """That ratios are taken on."""
        ...

    def load(self, path: Path) -> "Session":
        """A file, ready to run.  Raises UserError if it cannot be loaded."""
        ...

    def timed(self, sessions: "Mapping[str, Session]", inputs: "Arrays") -> dict[str, timing.Timing]:
        """Files that it has loaded, side by side on the same inputs."""
        ...

    def batches(self, split: "Iterable[Batch]") -> "Iterable[Batch]":
        """A split in pieces of the size that is best here."""
        ...

    def footprint(self, path: Path, inputs: "Arrays") -> "Footprint | None":
        """Memory and load time of a file in a process of its own; None where they are not told."""
        ...

    def runs_as(self, path: Path, tensors: Mapping[str, str]) -> dict[str, str | None]:
        """Layer -> what it computes in; None where that cannot be read."""
        ...


@dataclass(frozen=True)
class InProcess:
    """This process, on this machine."""

    runtime: "Runtime"
    threads: int
    seconds: float = timing.SECONDS
    warmup: int = timing.WARMUP_RUNS

    @property
    def clock(self) -> timing.Clock:
        return timing.clock_for(self.threads)

    def load(self, path: Path) -> "Session":
        return self.runtime.load(path, threads=self.threads)

    def timed(self, sessions: "Mapping[str, Session]", inputs: "Arrays") -> dict[str, timing.Timing]:
        return timing.interleave(
            sessions,
            inputs,
            threads=self.threads,
            warmup=self.warmup,
            seconds=self.seconds,
            patience_s=timing.PATIENCE_S,
        )

    def batches(self, split: "Iterable[Batch]") -> "Iterable[Batch]":
        return split

    def footprint(self, path: Path, inputs: "Arrays") -> "Footprint | None":
        return self.runtime.footprint(path, inputs, threads=self.threads)

    def runs_as(self, path: Path, tensors: Mapping[str, str]) -> dict[str, str | None]:
        return self.runtime.runs_as(path, tensors, threads=self.threads)


def measure(
    folder: Path,
    file: str,
    tensors: Mapping[str, str],
    task: "Task",
    place: Place,
    *,
    baseline_fp16: str | None = None,
    batch: int,
    seed: int,
    simulated: accuracy.Outputs | None = None,
) -> Measurement:
    """Measure `file` and the baseline in `folder` at a place, in turns.

    `tensors` says where each layer's weights lie in the file; `simulated` holds the outputs that PyTorch foresaw
    on the search split; `baseline_fp16` is a file that is measured with them.  This is what reads the test split.
    """
    paths = {"baseline": folder / BASELINE_FILE, "artifact": folder / file}
    if baseline_fp16 is not None:
        paths["halves"] = folder / baseline_fp16
    sessions = {name: place.load(path) for name, path in paths.items()}
    inputs = example(task, batch)
    times = place.timed(sessions, inputs)
    speedup = timing.ratio(times["baseline"], times["artifact"], clock=place.clock, seed=seed)
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    needs = {name: _needs(place, path, inputs) for name, path in paths.items()}

    searched, search_targets = accuracy.outputs(sessions["artifact"], place.batches(task.search))
    outputs, targets = accuracy.side_by_side(sessions, place.batches(task.test))
    compared = accuracy.compare(task, outputs["baseline"], outputs["artifact"], targets, seed)
    scores = {"baseline": compared.before}
    if "halves" in paths:
        scores["halves"] = accuracy.score_of(task, "fp16", outputs["halves"], targets)
    baselines = {
        name: Baseline(
            size_bytes=sizes[name],
            accuracy=score,
            latency_ms=Percentiles.model_validate(times[name].latency_ms()),
            sha256=sha256(paths[name]),
            **needs[name],
        )
        for name, score in scores.items()
    }
    return Measurement(
        baseline=baselines["baseline"],
        baseline_fp16=baselines.get("halves"),
        measured=Measured(
            size_bytes=sizes["artifact"],
            accuracy=compared.after,
            accuracy_search=accuracy.score_of(task, "compressed", searched, search_targets),
            latency_ms=Percentiles.model_validate(times["artifact"].latency_ms()),
            compression=sizes["baseline"] / sizes["artifact"],
            speedup=speedup.value,
            speedup_ci95=(speedup.lo, speedup.hi),
            rounds=times["artifact"].rounds,
            drop_points=compared.drop,
            drop_ci95=compared.drop_ci95,
            agreement=compared.agreement,
            basis=MeasuredBasis(size="measured", accuracy="measured", latency="measured"),
            **needs["artifact"],
        ),
        runs_as=place.runs_as(paths["artifact"], tensors),
        clock=place.clock,
        p50_ms=times["artifact"].p50_ms(place.clock),
        simulated_agreement=None if simulated is None else task.agreement(simulated, searched),
    )


def foretold(
    seen: Measurement,
    baseline_ms: float,
    artifact_ms: float,
    *,
    halves_ms: float | None = None,
    is_final: bool = True,
) -> Measurement:
    """What was measured on another machine than the target, with the latencies that are told of the target.

    Bytes are the file's, an estimate where the device runs what it builds from the file (not `is_final`); the score is
    that of the file on this machine's CPU.
    """
    figures = seen.model_dump()
    figures["baseline"]["latency_ms"] = dict.fromkeys(("p50", "p90", "p99"), baseline_ms)
    if seen.baseline_fp16 is not None:
        assert halves_ms is not None
        figures["baseline_fp16"]["latency_ms"] = dict.fromkeys(("p50", "p90", "p99"), halves_ms)
    figures["measured"] |= {
        "latency_ms": dict.fromkeys(("p50", "p90", "p99"), artifact_ms),
        "speedup": baseline_ms / artifact_ms,
        "speedup_ci95": None,
        "rounds": None,
        "basis": {"size": "measured" if is_final else "estimate", "accuracy": "simulated", "latency": "estimate"},
    }
    return Measurement.model_validate(figures | {"p50_ms": artifact_ms})


def _needs(place: Place, path: Path, inputs: "Arrays") -> dict[str, Any]:
    """Memory and load time, as both records of the manifest have them."""
    found = place.footprint(path, inputs)
    return {} if found is None else asdict(found)


def example(task: "Task", batch: int) -> "Arrays":
    """One batch of exactly `batch` examples, repeated from the task's own where those are fewer."""
    return {name: np.resize(array, (batch, *array.shape[1:])) for name, array in task.example.items()}
