"""What a user may set: quantities with units, and the settings of an export.

Settings come from the command line, from a TOML file, or from both; the command line wins.  Both use the same
names and the same notation, so that an option can be moved from one to the other as it is.
"""

import difflib
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from hirelc_deploy.errors import UserError

MS_PER_UNIT = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3, "min": 6e4}
BYTES_PER_UNIT = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([^\W\d]*)\s*")

SEARCHES = ("recipe", "hierarchical", "greedy", "greedy-order", "knapsack", "evolution", "random", "modelopt")
"""What can choose a policy; each name is something that exists."""
ORDERS = ("prune-first", "quantize-first", "auto")
IMPORTANCES = ("obs", "l2", "taylor")
TRTEXEC = "trtexec"
"""The command on a device that has it where its shell looks."""
HOST_PYTHON = "python3"
"""Likewise."""
PROVIDERS = ("cuda", "tensorrt", "tensorrt-rtx", "openvino")
"""What ONNX Runtime can run a file by, beside its own kernels for CPUs (`hirelc_deploy.verify.providers`)."""
POST_TRAINING_STEPS = ("statistics", "equalise", "smooth", "feed-back", "biases")
"""What is done to weights that are not fine-tuned: BatchNorm's statistics are estimated again, channels are scaled so
that layers have even ranges, and between a norm and what reads it, errors of rounding are fed back into weights not yet
rounded, and biases make up for what is left in the means."""
MODELOPT = "modelopt"
"""A step beside them, which needs nvidia-modelopt: smooth tries what it proposes as well."""
AUTOCAST = "autocast"
FP16_CHECKS = ("measured", AUTOCAST)
"""Who says which layers and operators fp16 ruins: their values on train examples, or nvidia-modelopt's AutoCast."""
AUGMENTATIONS = ("flip", "shift")
"""How train images are changed at random for fine-tuning (`hirelc_deploy.augment`)."""


def parse_duration_ms(text: object) -> float:
    """Milliseconds of "5ms", "800us" or "0.1s".  Raises UserError without a unit, with another one, or for zero."""
    return _quantity(text, MS_PER_UNIT, kind="time", example="5ms, 800us or 0.1s")


def parse_size_bytes(text: object) -> int:
    """Bytes of "400KB" (1000 a KB) or "2MiB" (1024 a KiB), rounded to whole ones; upper and lower case are the same.

    Raises UserError without a unit, with another one, or for less than a byte.
    """
    size_bytes = round(_quantity(text, BYTES_PER_UNIT, kind="size", example="400KB or 2MiB"))
    if size_bytes < 1:
        raise UserError(f"{text!r} is less than one byte", fix="give a size such as 400KB or 2MiB")
    return size_bytes


def _quantity(text: object, units: Mapping[str, float], *, kind: str, example: str) -> float:
    match = _QUANTITY.fullmatch(str(text))
    if match is None:
        raise UserError(f"{text!r} is no {kind}", fix=f"write a number and its unit: {example}")
    number, unit = match.groups()
    if not unit:
        raise UserError(f"{text!r} is a {kind} without a unit", fix=f"add the unit: {example}")
    if unit.lower() not in units:
        raise UserError(f"{text!r}: {unit!r} is no unit of {kind}", fix=f"write {example}")
    if float(number) == 0:
        raise UserError(f"{text!r} is a {kind} of zero", fix=f"write {example}")
    return float(number) * units[unit.lower()]


def nearest(name: str, known: Iterable[str]) -> str:
    """The name in `known`, which is not empty, that `name` was most likely meant to be."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    return by_lower[difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.0)[0]]


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.  Raises UserError, with the line, where it is missing or cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist", fix="check the path; it is relative to where you are") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", fix="is it a file, and may you read it?") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}", fix='lines look like max-latency = "5ms"') from error


@dataclass(frozen=True)
class Elsewhere:
    """Where an artifact is measured that is not run by this process.  Raises UserError for what does not go together.

    A device that `ssh` reaches, another provider of ONNX Runtime, or both.
    """

    host: str | None = None
    """For `ssh`; None for this machine."""
    provider: str | None = None
    """One of PROVIDERS; None for TensorRT's own program, or for the CPU, as the target has it."""
    host_python: str | None = None
    """The Python that has the runtime, there; None for HOST_PYTHON, and without a host for the one that runs this."""
    host_trtexec: str | None = None
    """The command of TensorRT's own program; None for TRTEXEC."""

    def __post_init__(self) -> None:
        if self.provider is not None:
            _require_one_of("provider", self.provider, PROVIDERS)
        if self.host_trtexec is not None and (self.host is None or self.provider is not None):
            why = "no host is given" if self.host is None else f"provider {self.provider} takes its place"
            raise UserError(f"host-trtexec says what builds engines on a host, and {why}", fix="leave one out")
        if self.host_python is not None and self.host is None and self.provider is None:
            raise UserError(
                "host-python says what runs the file, and neither host nor provider is given",
                fix="give one of them, or leave host-python out",
            )

    @property
    def python(self) -> str:
        """The command that runs ONNX Runtime."""
        return self.host_python or (HOST_PYTHON if self.host is not None else sys.executable)

    def __bool__(self) -> bool:
        """Whether anything is run elsewhere."""
        return self.host is not None or self.provider is not None


@dataclass(frozen=True)
class ExportSettings:
    """Everything that `export` may be told, with its defaults.  Raises UserError for what cannot be meant.

    The limits are judged as a `Budget`, which refuses those that nothing can meet.
    """

    model: str
    """FILE.py:callable, package.module:callable, timm:NAME, torchvision:NAME or hf:FOLDER"""
    data: str
    """digits, FILE.npz, a folder of images, or FILE.py:callable"""
    target: str
    """A name that `hirelc-deploy targets` lists, or FILE.toml"""
    checkpoint: Path | None = None
    max_latency_ms: float | None = None
    """Judged on the median of single inferences."""
    min_speedup: float | None = None
    """Against the fp32 file of the same model, on the same runtime."""
    max_size_bytes: int | None = None
    max_memory_bytes: int | None = None
    max_drop: float | None = None
    """In the unit of the task's score: percentage points for classification."""
    search: str | None = None
    """One of SEARCHES; None is the hierarchical one, or recipe where nothing is limited or nothing is fine-tuned."""
    recipe: str | None = None
    """One uniform recipe instead of a search: keep=50%,compute=int8"""
    policy: Path | None = None
    """A policy file instead of a search."""
    kernels: Path | None = None
    """A folder with number formats of the user's own."""
    order: str = "prune-first"
    """Whether channels go first or formats come first; auto lets the step that perturbs the network less go first."""
    importance: str = "obs"
    allow_estimates: bool = False
    evaluations: int | None = None
    """At most so many; None is EVALUATIONS for a search, and as many as a recipe needs."""
    epochs: int = 4
    """Of fine-tuning; 0 is post-training only."""
    augment: tuple[str, ...] = ()
    """Of AUGMENTATIONS those that fine-tuning uses; a task of the user's own has its own."""
    post_training: tuple[str, ...] | None = None
    """The steps of POST_TRAINING_STEPS to take where nothing is fine-tuned, and MODELOPT; None takes all but that."""
    fp16_check: str = "measured"
    """One of FP16_CHECKS, for targets that compute in fp16."""
    workers: int = 1
    """Processes that make evaluations side by side."""
    seed: int = 0
    threads: int = 1
    """Of the runtime that is measured."""
    batch: int = 1
    """Examples an inference that is measured."""
    host: str | None = None
    """A device, for `ssh`: the artifact is measured there; where the target is TensorRT, its engine is built there."""
    provider: str | None = None
    """One of PROVIDERS, by which ONNX Runtime then runs the file, on the host or here."""
    host_python: str | None = None
    host_trtexec: str | None = None
    tensorboard: Path | None = None
    """A folder for TensorBoard: what the search did."""
    out: Path = Path("out/export")
    resume: bool = False

    @property
    def elsewhere(self) -> Elsewhere:
        """Where the artifact is measured in the end, beside here."""
        return Elsewhere(self.host, self.provider, self.host_python, self.host_trtexec)

    def __post_init__(self) -> None:
        self.elsewhere  # noqa: B018 - refuses what does not go together
        for name, choices in (
            ("search", SEARCHES),
            ("order", ORDERS),
            ("importance", IMPORTANCES),
            ("fp16_check", FP16_CHECKS),
        ):
            if getattr(self, name) is not None:
                _require_one_of(name, getattr(self, name), choices)
        for name in ("evaluations", "workers", "threads", "batch"):
            require_at_least(1, name, getattr(self, name))
        for name in ("epochs", "seed"):
            require_at_least(0, name, getattr(self, name))
        if self.post_training is not None and self.epochs:
            raise UserError(
                f"post-training says how weights are corrected that are not fine-tuned, and epochs is {self.epochs}",
                fix="give epochs 0 as well, or leave post-training out",
            )
        if MODELOPT in (self.post_training or ()) and "smooth" not in (self.post_training or ()):
            raise UserError(
                "modelopt proposes factors that smooth may take, and smooth is not among the steps of post-training",
                fix="name smooth as well, or leave modelopt out",
            )
        given = "recipe" if self.recipe is not None else "policy" if self.policy is not None else None
        for name in ("search", "evaluations", "tensorboard"):
            if given is not None and getattr(self, name) is not None:
                raise UserError(
                    f"{given} says what is built, and {name} {getattr(self, name)} is for a search",
                    fix="leave one out",
                )
        if Path(str(self.out).strip()) == Path():  # as an empty variable makes it
            raise UserError("out is the folder that you are in", fix="name one for the artifact: --out out/net")
        if self.augment and not self.epochs:
            raise UserError(
                "augment changes what fine-tuning sees, and epochs is 0", fix="leave augment out, or give epochs"
            )
        if self.search not in (None, "recipe") and not self.epochs and self.recipe is None and self.policy is None:
            raise UserError(
                f"epochs is 0, and the evaluations of search {self.search} are trained",
                fix="leave epochs out, or give search recipe, which can do without",
            )
        if self.recipe is not None and self.policy is not None:
            raise UserError("recipe and policy are both given", fix="each says what to build: give one of them")


def _require_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(
            f"{name.replace('_', '-')} is {value!r}, which does not exist",
            fix=f"did you mean {nearest(value, choices)}? There is {', '.join(choices)}",
        )


def require_known(names: Iterable[str], known: tuple[str, ...], kind: str) -> None:
    """Raises UserError for the first name that is not among the known ones."""
    for name in names:
        if name not in known:
            raise UserError(
                f"{name!r} is no {kind}",
                fix=f"did you mean {nearest(name, known)}? There is {', '.join(known)}, with commas between them, "
                "or none",
            )


def require_at_least(least: int, name: str, value: int | None) -> None:
    if value is not None and value < least:
        raise UserError(f"{name} is {value}", fix=f"it is {least} or more")


def _text(value: object) -> str:
    return _of_type(value, str, "a text in quotes")


def _path(value: object) -> Path:
    return Path(_of_type(value, (str, Path), "a path in quotes")).expanduser()


def _steps(value: object) -> tuple[str, ...]:
    return _names(value, (*POST_TRAINING_STEPS, MODELOPT), "step of post-training")


def _augmentations(value: object) -> tuple[str, ...]:
    return _names(value, AUGMENTATIONS, "augmentation")


def _names(value: object, known: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """`none`, or names with commas between them."""
    text = _text(value)
    names = () if text == "none" else tuple(part.strip() for part in text.split(","))
    require_known(names, known, kind)
    return names


def _flag(value: object) -> bool:
    return _of_type(value, bool, "true or false")


def _whole(value: object) -> int:
    return _of_type(value, int, "a whole number")


def _number(value: object) -> float:
    return float(_of_type(value, (int, float), "a number"))


def _of_type(value: object, types: type | tuple[type, ...], wanted: str) -> Any:
    # bool is a subclass of int in Python, but nobody who writes `epochs = true` means 1
    if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
        raise UserError(f"{value!r} is not {wanted}", fix=f"write {wanted}")
    return value


class Option(NamedTuple):
    """How an option's notation becomes a field of ExportSettings."""

    field: str
    read: Callable[[object], Any]


OPTIONS: Mapping[str, Option] = {
    "model": Option("model", _text),
    "data": Option("data", _text),
    "target": Option("target", _text),
    "checkpoint": Option("checkpoint", _path),
    "max_latency": Option("max_latency_ms", parse_duration_ms),
    "min_speedup": Option("min_speedup", _number),
    "max_size": Option("max_size_bytes", parse_size_bytes),
    "max_memory": Option("max_memory_bytes", parse_size_bytes),
    "max_drop": Option("max_drop", _number),
    "search": Option("search", _text),
    "recipe": Option("recipe", _text),
    "policy": Option("policy", _path),
    "kernels": Option("kernels", _path),
    "order": Option("order", _text),
    "importance": Option("importance", _text),
    "allow_estimates": Option("allow_estimates", _flag),
    "evaluations": Option("evaluations", _whole),
    "epochs": Option("epochs", _whole),
    "augment": Option("augment", _augmentations),
    "post_training": Option("post_training", _steps),
    "fp16_check": Option("fp16_check", _text),
    "workers": Option("workers", _whole),
    "seed": Option("seed", _whole),
    "threads": Option("threads", _whole),
    "batch": Option("batch", _whole),
    "host": Option("host", _text),
    "provider": Option("provider", _text),
    "host_python": Option("host_python", _text),
    "host_trtexec": Option("host_trtexec", _text),
    "tensorboard": Option("tensorboard", _path),
    "out": Option("out", _path),
    "resume": Option("resume", _flag),
}
"""By the option's name, with underscores; on the command line and in the file dashes stand for them."""


def read_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ExportSettings by name from options by name; None, an option that was left out, stays None.

    Raises UserError, which names the option, for a value that cannot be read.
    """
    return {OPTIONS[name].field: None if value is None else _read(name, value) for name, value in given.items()}


def export_settings(given: Mapping[str, Any], file: Path | None = None) -> ExportSettings:
    """The settings that the command line (`given`, None where an option was left out) and a TOML file make.

    Raises UserError for an unknown key of the file, with the nearest one, for a value that cannot be read, with its
    key, and for a required option that neither has.
    """
    in_file = {} if file is None else _in_file(file)
    on_line = {name: value for name, value in given.items() if value is not None}
    values = read_options(in_file | on_line)
    for field in fields(ExportSettings):
        if field.default is MISSING and field.name not in values:
            raise UserError(
                f"{field.name} is missing",
                fix=f'give --{field.name}, or {field.name} = "…" in the file that --config names',
            )
    return ExportSettings(**values)


def _in_file(file: Path) -> dict[str, Any]:
    """What a TOML file gives, by the options' names."""
    found: dict[str, Any] = {}
    for key, value in read_toml(file).items():
        name = _known(key, file)
        if name in found:
            raise UserError(f"{file} says {key} twice, with a dash and with an underscore", fix="leave one of them out")
        found[name] = value
    return found


def _known(key: str, file: Path) -> str:
    name = key.replace("-", "_")
    if name not in OPTIONS:
        meant = nearest(name, OPTIONS).replace("_", "-")
        known = ", ".join(OPTIONS).replace("_", "-")
        raise UserError(f"{file} has an unknown key {key!r}", fix=f"did you mean {meant}? The keys are {known}")
    return name


def _read(key: str, value: object) -> Any:
    try:
        return OPTIONS[key].read(value)
    except UserError as error:
        raise UserError(f"{key.replace('_', '-')}: {error.what}", fix=error.fix) from error
