"""What a target's TOML may say.  A device that cannot do something says so here; no code asks for a device's name."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from hirelc_deploy.config import nearest
from hirelc_deploy.cpu import has_dot_product, stands_for
from hirelc_deploy.errors import UserError
from hirelc_deploy.policy import Compute, Precision

OPERATORS = (
    *("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
    *("Linear", "Embedding"),
)
"""What a layer can be (`hirelc_deploy.graph.layers`): a rule for anything else would be one that no layer follows."""


def _known_operator(name: str) -> str:
    if name not in OPERATORS:
        raise ValueError("no operator that a layer can be")
    return name


Operator = Annotated[str, AfterValidator(_known_operator)]


class _Table(BaseModel):
    """A table of the TOML: fixed once read, and without keys that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RuntimeNeeds(_Table):
    """What loads the file."""

    name: str
    """A file in exporters/."""
    min_version: str
    opset: int = Field(ge=13)
    """The newest that `min_version` loads; a file is written at the lowest that its policy needs."""
    ir_version: int = Field(ge=7)


class Int8Bits(_Table):
    """Widest weights whose INT8 products cannot saturate."""

    vnni: int = Field(ge=2, le=8)
    """With VNNI or Arm's dot product."""
    otherwise: int = Field(ge=2, le=8)


class Weights(_Table):
    """Which weights are safe to use."""

    int8_bits: Int8Bits


class Cpu(_Table):
    """The processor of a target that is not simply the machine at hand."""

    flags: tuple[str, ...]
    """Instruction sets that decide which kernels run, as `hirelc_deploy.cpu` names them."""


FIRST_WITH_FP8 = (8, 9)
"""Compute capability: Ada."""


class Gpu(_Table):
    """The graphics processor of a target."""

    compute_capability: str = Field(pattern=r"^\d+\.\d$")
    """What engines are built for: 8.7."""
    software: str
    """What brings the runtime with it there: JetPack 6.2, TensorRT 10.3."""
    int4_in_pairs: bool = False
    """Whether its TensorRT packs INT4 weights in pairs along their last axis, which then has to be even."""

    @property
    def has_fp8(self) -> bool:
        """Whether it multiplies matrices of FP8."""
        return tuple(map(int, self.compute_capability.split("."))) >= FIRST_WITH_FP8


class Estimate(_Table):
    """What latencies are told from where nothing was measured: a roofline with a floor a kernel.

        us = floor + max(macs / rate, bytes / bandwidth)

    Where the runtime fuses operators, a kernel is what it makes of several.  `benchmarks/estimates.py` fits it to
    published figures.
    """

    gmacs_per_s: Mapping[Compute, float]
    """Multiply-accumulates that layers reach, by compute: a part of the peak.  fp32 is needed."""
    gb_per_s: float = Field(gt=0)
    """Of memory."""
    floor_us: float = Field(ge=0)
    """Of any kernel, however small."""
    channel_tile: int = Field(ge=1)
    """Channels that are worked on together: others are filled up."""
    image_tile: int | None = Field(default=None, ge=1)
    """The same for the few channels of an image, where kernels of their own read it; None: they are no exception."""
    error_pct: float = Field(gt=0)
    """Mean absolute error on published figures that were held out."""
    sources: tuple[str, ...] = Field(min_length=1)
    """Where the figures are from, with those held out named."""


class Timing(_Table):
    """How long a latency is taken; `hirelc_deploy.verify.timing` says how."""

    warmup_rounds: int = Field(ge=1)
    min_seconds: float = Field(gt=0)
    """For all files that are timed side by side, together."""


class Target(_Table):
    """A device with a runtime: what it can run and how it is timed."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    description: str
    kind: Literal["cpu", "gpu"]
    runtime: RuntimeNeeds
    computes: Mapping[Operator, tuple[Compute, ...]]
    """By operator (`Layer.op`), the arithmetic it can run in, fp32 or the like first.  What is not named stays fp32."""
    weights: Weights
    channel_multiple: int = Field(ge=1)
    """Kept channels are rounded to it: other counts are slower or are padded."""
    threads: int = Field(ge=1)
    batch: int = Field(ge=1)
    timing: Timing
    basis: Literal["measured", "simulated", "estimate"]
    """What a latency of this target rests on; an estimate is never judged unless the user allows it."""
    cpu: Cpu | None = None
    """None: the machine's own."""
    gpu: Gpu | None = None
    precisions: Mapping[Operator, tuple[str, ...]] | None = None
    """By operator, how a layer's weights may be stored for what it computes in, as `int4/group64->fp16`; floats are not
    named.  None: in every number format, as the runtime decodes them when a file is loaded."""
    estimate: Estimate | None = None

    @model_validator(mode="after")
    def _has_what_its_basis_needs(self) -> "Target":
        if self.basis == "estimate" and self.estimate is None:
            raise ValueError("a target whose basis is an estimate needs a table [estimate]")
        return self

    @model_validator(mode="after")
    def _has_precisions_that_it_computes_in(self) -> "Target":
        for op in self.precisions or {}:
            for precision in self.precisions_for(op) or ():
                if precision.compute not in self.computes_for(op):
                    raise ValueError(f"{op} is stored as {precision}, and computes.{op} lacks {precision.compute}")
        return self

    @model_validator(mode="after")
    def _has_fp8_where_it_computes_in_it(self) -> "Target":
        ops = self.ops_by_compute.get(Compute.FP8, ())
        if ops and (self.gpu is None or not self.gpu.has_fp8):
            what = "a CPU" if self.gpu is None else f"compute capability {self.gpu.compute_capability}"
            raise ValueError(f"{ops[0]} computes in fp8, which {what} does not: it came with 8.9")
        return self

    def precisions_for(self, op: str) -> tuple[Precision, ...] | None:
        """How an operator such as Linear may be stored and computed, floats left out; None: in every format."""
        if self.precisions is None:
            return None
        try:
            return tuple(Precision.parse(text) for text in self.precisions.get(op, ()))
        except UserError as error:
            raise ValueError(f"precisions.{op}: {error.what}") from error

    def flags(self, here: frozenset[str]) -> frozenset[str]:
        """The instruction sets of its processor; `here` are those of this machine."""
        return here if self.cpu is None else frozenset(self.cpu.flags)

    def is_here(self, here: frozenset[str]) -> bool:
        """Whether a machine with these instruction sets can stand for the target: its latencies are then measured."""
        if self.basis == "estimate":
            return False
        return stands_for(here, self.flags(here))

    def computes_for(self, op: str) -> tuple[Compute, ...]:
        """The arithmetic that an operator such as Conv2d can run in."""
        return self.computes.get(op, (Compute.FP32,))

    @property
    def ops_by_compute(self) -> dict[Compute, tuple[str, ...]]:
        """`computes` the other way round, in the order of `Compute`."""
        return {
            compute: ops
            for compute in Compute
            if (ops := tuple(op for op, able in self.computes.items() if compute in able))
        }

    def int8_weight_bits(self, flags: frozenset[str]) -> int:
        """Bits that an INT8 layer's weights may have on a CPU with these flags (`hirelc_deploy.cpu.cpu_flags`)."""
        bits = self.weights.int8_bits
        return bits.vnni if has_dot_product(flags) else bits.otherwise

    def largest_code(self, flags: frozenset[str]) -> int:
        """The magnitude that an INT8 weight may have there: 127 with 8 bits, 63 with 7."""
        return 2 ** (self.int8_weight_bits(flags) - 1) - 1


def parse_target(data: Mapping[str, Any], source: str) -> Target:
    """The target that a TOML holds.  Raises UserError for the first entry that is wrong, with its place."""
    try:
        return Target.model_validate(data)
    except ValidationError as error:
        raise _explained(error, source) from error


def _explained(error: ValidationError, source: str) -> UserError:
    # a misspelt key is two errors, unknown and missing: the first is the one that helps
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    place = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if "[key]" in first["loc"]:
        return UserError(
            f"{source} has an unknown operator {place!r}",
            fix=f"did you mean {nearest(str(first['input']), OPERATORS)}? The operators are {', '.join(OPERATORS)}",
        )
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"][:-1])
        return UserError(
            f"{source} has an unknown key {place!r}",
            fix=f"did you mean {nearest(str(first['loc'][-1]), known)}? The keys there are {', '.join(known)}",
        )
    if first["type"] == "missing":
        return UserError(f"{source} lacks {place}", fix="add it; profiles/host.toml shows what every target needs")
    return UserError(f"{source}: {place} is {first['input']!r}: {first['msg']}", fix="profiles/host.toml is an example")


def _keys_at(place: tuple[int | str, ...]) -> tuple[str, ...]:
    """The keys of the table at a place such as ("weights", "int8_bits")."""
    table: Any = Target
    for part in place:
        table = _without_none(table.model_fields[part].annotation)
    return tuple(table.model_fields)


def _without_none(annotation: Any) -> Any:
    """Cpu of Cpu | None."""
    return next((each for each in get_args(annotation) if each is not type(None)), annotation)
