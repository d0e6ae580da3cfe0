"""manifest.json: what was asked for, what was predicted, what was measured, and where."""

import json
from datetime import UTC, datetime
from hashlib import file_digest
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from hirelc_deploy.budget import Budget, Check
from hirelc_deploy.errors import UserError
from hirelc_deploy.rundir import write_atomic

SCHEMA = 1
FILE_NAME = "manifest.json"

Basis = Literal["measured", "simulated", "estimate"]
"""measured: on the file, on the device; simulated: in PyTorch; estimate: from a table or a formula."""

VerdictWord = Literal["pass", "fail", "unverified"]


def _readable(value: float) -> float:
    """Six significant digits, more than any measurement here holds; what is judged is what is written."""
    return float(f"{value:.6g}")


def _plain_name(path: str) -> str:
    if not path or PurePath(path).name != path:
        raise ValueError("a file of the artifact folder, without a path")
    return path


Figure = Annotated[float, AfterValidator(_readable)]
FileName = Annotated[str, AfterValidator(_plain_name)]


class Record(BaseModel):
    """Unknown entries are refused: they would be limits or figures that nobody judges."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Percentiles(Record):
    """Wall clock of one batch; an estimate has no spread, and so p50 alone."""

    p50: Figure
    p90: Figure | None = None
    p99: Figure | None = None


def p50(latency_ms: Percentiles | None) -> float | None:
    """The figure that limits and predictions are held against."""
    return None if latency_ms is None else latency_ms.p50


class RuntimeRecord(Record):
    """What the file is for, and what ran it."""

    name: str
    version: str
    """ONNX Runtime's, where a provider ran the file."""
    provider: str | None = None
    """That of ONNX Runtime which ran the file, where it is not the runtime's own."""
    on_host: bool = False
    """Whether that was on a device, reached over ssh."""

    def __str__(self) -> str:
        """For people."""
        if self.provider is None:
            return f"{self.name} {self.version}"
        return f"{self.provider} by onnxruntime {self.version}"


class ModelRecord(Record):
    spec: str
    checkpoint_sha256: str | None
    """None for a model that came with its weights."""


class TaskRecord(Record):
    spec: str
    sha256: str
    test_examples: int
    search_seen_in_training: bool
    unit: str = "%"
    """Of the score; a drop of percentages is in points."""


class Artifact(Record):
    path: FileName
    """Within the folder."""
    sha256: str
    size_bytes: int

    @classmethod
    def of(cls, path: Path) -> "Artifact":
        """What lies on the disk now."""
        return cls(path=path.name, sha256=sha256(path), size_bytes=path.stat().st_size)


class Baseline(Record):
    """The network as it was, stripped likewise: same runtime, same machine, same run."""

    size_bytes: int
    accuracy: Figure | None
    latency_ms: Percentiles | None
    memory_bytes: int | None = None
    load_ms: Figure | None = None
    energy_mj: Figure | None = None
    sha256: str | None = None
    """Of the file in the artifact folder, of which a device may have built an engine; None in older manifests."""


class Predicted(Record):
    """What the search believed."""

    size_bytes: int | None
    accuracy: Figure | None
    """On the search split."""
    latency_ms: Figure | None
    speedup: Figure | None = None
    """Against the fp32 file; unlike milliseconds it holds when the machine's own speed moves."""
    memory_bytes: int | None = None
    load_ms: Figure | None = None


class Rounds(Record):
    """Of the timing: how many were made, in how many nothing else ran on the core, and how many count."""

    all: int
    quiet: int
    counted: int
    """The quiet ones, or all where those were too few."""

    @property
    def are_quiet(self) -> bool:
        """Whether those that count had the core for themselves."""
        return self.counted <= self.quiet


class MeasuredBasis(Record):
    size: Basis
    accuracy: Basis
    latency: Basis


class Measured(Record):
    size_bytes: int
    accuracy: Figure | None
    """On the test split."""
    accuracy_search: Figure | None
    latency_ms: Percentiles | None
    compression: Figure
    """Times smaller than the baseline's file."""
    speedup: Figure | None
    """Times faster than the baseline, on the clock that the environment names."""
    speedup_ci95: tuple[Figure, Figure] | None = None
    rounds: Rounds | None = None
    """Whose times those are; None where the core was not watched."""
    drop_points: Figure | None
    """On the test split, in the unit of the score; positive is worse."""
    drop_ci95: tuple[Figure, Figure] | None
    agreement: Figure | None
    """Percent of equal decisions; None where outputs are no decisions."""
    basis: MeasuredBasis
    memory_bytes: int | None = None
    """Peak of a process that loads and runs the file, over what it held before; None where the system hides it."""
    load_ms: Figure | None = None
    """Wall clock, in that process."""
    energy_mj: Figure | None = None
    """Of one inference, run back to back: what the whole board draws, idle or not; None where no sensor tells."""


class PredictionError(Record):
    """Predicted against measured; positive where the prediction was the larger."""

    size_pct: Figure | None
    latency_pct: Figure | None
    accuracy_points: Figure | None
    agreement: Figure | None = None
    """Percent of equal decisions of the simulated network and the file, on the search split."""
    memory_pct: Figure | None = None
    load_pct: Figure | None = None
    speedup_pct: Figure | None = None

    @classmethod
    def between(cls, predicted: Predicted, measured: Measured, *, agreement: float | None = None) -> "PredictionError":
        return cls(
            size_pct=_excess_pct(predicted.size_bytes, measured.size_bytes),
            latency_pct=_excess_pct(predicted.latency_ms, p50(measured.latency_ms)),
            accuracy_points=_difference(predicted.accuracy, measured.accuracy_search),
            agreement=agreement,
            memory_pct=_excess_pct(predicted.memory_bytes, measured.memory_bytes),
            load_pct=_excess_pct(predicted.load_ms, measured.load_ms),
            speedup_pct=_excess_pct(predicted.speedup, measured.speedup),
        )


class LayerRecord(Record):
    name: str
    op: str
    kept: int
    """Output channels; 0 for a layer that is gone."""
    of: int
    storage: str
    encoding: str | None
    """Which nodes hold its codes."""
    compute: str
    weight_bytes: int
    runs_as: str | None
    """Read from the runtime after it optimised the graph; None where it cannot be read."""
    tensor: str | None = None
    """Where its weights lie in the file; None for a layer that is gone."""


class FrontRecord(Record):
    """A policy that no other evaluated one beats in bytes, milliseconds and drop, none below nought, at once; or one
    that was fine-tuned in full."""

    path: str
    """Its policy file, from the artifact folder."""
    size_bytes: int
    latency_ms: Figure
    """Predicted, as the size is."""
    speedup: Figure | None
    drop_points: Figure
    """Of its evaluation, on the search split."""
    finished_drop_points: Figure | None
    """The same once it was fine-tuned in full; None where it was not."""
    hardness_points: Figure | None = None
    """How hard the evaluation's drop is to mend: as what drop of a file like the original's.  None without a search."""
    whole_part: Figure | None = None
    """Of its layers: one of two bits counts a half, one of one bit or gone nothing.  None without a search."""
    recipe: str | None = None
    """The uniform recipe that it is, if it is one."""


class SearchRecord(Record):
    method: str
    evaluations: int
    seconds: Figure
    seed: int
    order: tuple[str, ...]
    front: tuple[FrontRecord, ...] = ()
    """What else there is to choose from, the smallest first."""


class TrainingRecord(Record):
    """How the weights of the file were made from the checkpoint's."""

    epochs: int
    """Of fine-tuning; 0 where nothing was trained."""
    importance: str
    """By what channels were removed: obs, l2 or taylor."""
    augment: tuple[str, ...] = ()
    """How train images were changed at random."""
    post_training: tuple[str, ...] = ()
    """The steps that were taken where nothing was trained."""


class Environment(Record):
    cpu: str
    flags: tuple[str, ...]
    cores: int
    threads: int
    batch: int
    clock: str
    """What ratios are taken on."""
    power_mode: str | None
    packages: dict[str, str]


class Manifest(Record):
    """Everything about one artifact."""

    schema_number: int = Field(SCHEMA, alias="schema")
    tool_version: str
    created: str
    target: str
    runtime: RuntimeRecord
    model: ModelRecord
    task: TaskRecord
    artifact: Artifact
    baseline: Baseline
    baseline_fp16: Baseline | None = None
    predicted: Predicted
    measured: Measured
    error: PredictionError
    layers: tuple[LayerRecord, ...]
    search: SearchRecord
    training: TrainingRecord | None = None
    """None in a manifest of before it was written down."""
    budget: Budget
    checks: tuple[Check, ...]
    verdict: VerdictWord
    environment: Environment
    notes: tuple[str, ...] = ()
    """What a reader should know: groups that were left out and why, a network that got slower."""
    notes_on_measurement: tuple[str, ...] = ()
    """Likewise of how the figures were taken; others take their place when it is measured again."""
    built_from: Artifact | None = None
    """The file that the artifact, an engine, was built from on its device; None where the artifact is that file."""

    def to_json(self) -> str:
        """Keys sorted, one entry a line: two manifests can be compared by eye."""
        data = self.model_dump(mode="json", by_alias=True)
        return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write(manifest: Manifest, folder: Path) -> None:
    """Write the manifest into its artifact folder.  Raises UserError if the disk does not take it."""
    write_atomic(folder / FILE_NAME, manifest.to_json().encode())


def read(folder: Path) -> Manifest:
    """The manifest of an artifact folder.  Raises UserError, naming the entry, if it is not a valid one."""
    path = folder / FILE_NAME
    data = _read_json(path)
    number = data.get("schema") if isinstance(data, dict) else None
    if number != SCHEMA:
        raise UserError(
            f"{path} has schema {number}, and this version reads {SCHEMA}",
            fix="use the version of hirelc-deploy that wrote it, or export again",
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        entry = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path} is not a valid manifest: {entry}: {first['msg']}",
            fix="was it edited? export again, or restore the file that export wrote",
        ) from error


def sha256(path: Path) -> str:
    """Of a file, read in pieces.  Raises UserError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", fix="is it there, and may you read it?") from error


def now() -> str:
    """For `created`: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{path.parent} holds no {path.name}", fix="name a folder that `hirelc-deploy export` wrote"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", fix="may you read it?") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}", fix="export again, or restore the file") from error


def _excess_pct(predicted: float | None, measured: float | None) -> float | None:
    return None if predicted is None or measured is None else 100 * (predicted / measured - 1)


def _difference(predicted: float | None, measured: float | None) -> float | None:
    return None if predicted is None or measured is None else predicted - measured
