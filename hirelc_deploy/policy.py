"""What was decided for a network: a precision for every layer, a count for every prune group, and the order.

A policy holds only decisions.  Words such as `fastest` are resolved before one exists.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from hirelc_deploy.errors import UserError


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole weight."""

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale an output channel."""

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True)
class PerGroup:
    """One scale for every `size` consecutive weights of an output channel."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a group of {self.size} weights")

    def __str__(self) -> str:
        return f"group{self.size}"


Granularity = PerTensor | PerChannel | PerGroup


def parse_granularity(text: str) -> Granularity:
    """The inverse of `str`: tensor, channel or group64.  Raises UserError for anything else."""
    if text == "tensor":
        return PerTensor()
    if text == "channel":
        return PerChannel()
    size = text.removeprefix("group")
    if text.startswith("group") and size.isdigit() and int(size) > 0:
        return PerGroup(int(size))
    raise UserError(f"{text!r} is no granularity", fix="write tensor, channel or group64 (any size)")


class Compute(StrEnum):
    """In what arithmetic a layer runs."""

    INT8 = "int8"
    INT8_DYNAMIC = "int8_dynamic"
    FP32 = "fp32"
    FP16 = "fp16"
    FP8 = "fp8"


CALIBRATED = frozenset({Compute.INT8, Compute.FP8})
"""What reads a layer's input on a grid of 8 bits that calibration has chosen."""


@dataclass(frozen=True)
class Storage:
    """How a layer's weights lie in the file; `format` is the name of a file in kernels/, or fp32 or fp16: values.

    A format of one width may have that in its name: fp8.
    """

    format: str
    bits: int
    granularity: Granularity

    @property
    def is_float(self) -> bool:
        """Whether the values are stored as they are."""
        return self.format in ("fp32", "fp16")

    @classmethod
    def parse(cls, text: str) -> "Storage":
        """The inverse of `str`: int4/group64.  Raises UserError for anything else."""
        name, _, granularity = text.partition("/")
        found = re.fullmatch(r"([a-z_]+)(\d+)", name)
        if found is None:
            raise UserError(f"{text!r} is no storage", fix="write a format with its bits and granularity: int4/channel")
        has_width = name in ("fp32", "fp16", "fp8")
        return cls(name if has_width else found[1], int(found[2]), parse_granularity(granularity))

    def __str__(self) -> str:
        name = self.format if self.format.endswith(str(self.bits)) else f"{self.format}{self.bits}"
        return f"{name}/{self.granularity}"


@dataclass(frozen=True)
class Precision:
    """Storage and compute of one layer: two choices, each with its own price."""

    storage: Storage
    compute: Compute

    @classmethod
    def parse(cls, text: str) -> "Precision":
        """The inverse of `str`: int4/channel->fp16.  Raises UserError for anything else."""
        storage, _, compute = text.partition("->")
        if compute not in [str(each) for each in Compute]:
            raise UserError(f"{text!r} is no precision", fix="write storage and compute: int8/channel->int8")
        return cls(Storage.parse(storage), Compute(compute))

    def __str__(self) -> str:
        return f"{self.storage}->{self.compute}"


FP32 = Precision(Storage("fp32", 32, PerTensor()), Compute.FP32)
"""A layer left as it was trained."""

FP16 = Precision(Storage("fp16", 16, PerTensor()), Compute.FP16)
"""Half the bits, nothing on a grid that has to be fitted."""

INT8 = Precision(Storage("int", 8, PerChannel()), Compute.INT8)
"""Integer arithmetic on 8-bit weights, one scale an output channel."""

FP8 = Precision(Storage("fp8", 8, PerChannel()), Compute.FP8)
"""Weights and activations as floats of 8 bits (E4M3), one scale an output channel."""

Step = Literal["prune", "quantize"]
PRUNE_FIRST: tuple[Step, ...] = ("prune", "quantize")
QUANTIZE_FIRST: tuple[Step, ...] = ("quantize", "prune")


@dataclass(frozen=True)
class Policy:
    """Precision by layer name, units kept by group name, and the steps in the order they are applied.

    A group that is not named keeps all its units.  Zero units means that the branch is gone.
    """

    precisions: Mapping[str, Precision]
    keep: Mapping[str, int]
    order: tuple[Step, ...] = PRUNE_FIRST

    def to_json(self) -> bytes:
        """The content of a policy file."""
        return (json.dumps(self.to_dict(), indent=2) + "\n").encode()

    def to_dict(self) -> dict[str, Any]:
        """As written to policy.json: plain data, keys sorted."""
        return {
            "order": list(self.order),
            "keep": {name: self.keep[name] for name in sorted(self.keep)},
            "precisions": {
                name: {
                    "format": p.storage.format,
                    "bits": p.storage.bits,
                    "granularity": str(p.storage.granularity),
                    "compute": str(p.compute),
                }
                for name, p in sorted(self.precisions.items())
            },
        }

    @classmethod
    def from_dict(cls, data: Any) -> "Policy":
        """The inverse of `to_dict`.  Raises UserError, naming the entry, for data of another shape."""
        try:
            keep = {str(name): _whole(f"keep[{name!r}]", count) for name, count in data["keep"].items()}
            precisions = {
                str(name): Precision(
                    Storage(str(p["format"]), _whole("bits", p["bits"]), parse_granularity(p["granularity"])),
                    Compute(p["compute"]),
                )
                for name, p in data["precisions"].items()
            }
            order: tuple[Any, ...] = tuple(map(str, data.get("order", PRUNE_FIRST)))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"the policy cannot be read: {type(error).__name__}: {error}",
                fix="a policy is a JSON object with keep, precisions and order, as policy.json in an artifact",
            ) from error
        if not order or not set(order) <= {"prune", "quantize"}:
            raise UserError(f"the policy's order is {list(order)}", fix="it is a list of 'prune' and 'quantize'")
        return cls(precisions, keep, order)

    def digest(self) -> str:
        """SHA-256 of the policy's canonical JSON; equal policies have equal digests."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _whole(name: str, number: Any) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"{name} is {number!r}, not a whole number")
    return number
