"""What a number format is: one file in this folder, with a `FORMAT`.

A format has three functions that agree bit for bit: `quantise` puts weights on its grid (torch, with a
straight-through gradient, for fine-tuning), `pack` writes the codes of those very values as the tensors of a
file, and `unpack` writes the ONNX nodes that turn the tensors back into int8 codes when a session loads.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from hirelc_deploy.policy import Compute, Granularity, PerChannel, PerTensor, Storage

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """A weight as it lies in a file: weight = unpack(tensors) * scale along the output channels."""

    tensors: Mapping[str, np.ndarray]
    """By role; `codes` is always one of them."""
    scale: np.ndarray | None
    """float32, () or (output channels,); None where the values are stored as they are."""


class Format(ABC):
    """A number format.

    `axis` is the weight's axis of output channels: 0 for Conv and Linear as PyTorch has them, 1 for a Linear
    that is written as MatMul.  `largest` bounds the magnitude of int8 codes: 127, or 63 where 8-bit products
    would saturate.
    """

    name: str
    encoding: str
    """How its tensors lie in a file, in words."""
    bits: tuple[int, ...]
    granularities: tuple[type[Granularity], ...]
    computes: frozenset[Compute]
    native: Literal["int8", "int4", "fp8"] | None
    """What a runtime that cannot decode in the graph stores instead; None where it cannot hold the format."""

    @abstractmethod
    def quantise(self, weight: "Tensor", storage: Storage, *, axis: int, largest: int) -> "Tensor":
        """The nearest weights on the grid, of the same shape; the gradient passes straight through."""

    @abstractmethod
    def pack(self, weight: "Tensor", storage: Storage, *, axis: int, largest: int) -> Packed:
        """The tensors whose decoded values are bit for bit `quantise` of the same weight."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, "ir.Value"]) -> tuple["list[ir.Node]", "ir.Value"]:
        """The nodes that decode the packed tensors and the value that holds the codes (or the weights)."""

    @abstractmethod
    def packed_bytes(self, shape: tuple[int, ...], storage: Storage, *, axis: int) -> int:
        """Bytes of the packed tensors, scales included, for a weight of this shape."""


SCALE_FLOOR = 1e-3
"""A channel's scale is at least this part of the largest one.

A channel that is all but zero would otherwise get a scale so small that its bias, stored as int32 in steps of
input scale times weight scale, overflows.
"""


def scales(weight: "Tensor", granularity: Granularity, *, axis: int, largest: int) -> "Tensor":
    """max |w| / largest over each channel or over the tensor, of the weight's rank with 1 where reduced."""
    magnitude = weight.detach().abs()
    match granularity:
        case PerTensor():
            peak = magnitude.amax(list(range(weight.dim())), keepdim=True)
        case PerChannel():
            peak = magnitude.amax([a for a in range(weight.dim()) if a != axis], keepdim=True)
        case _:
            raise ValueError(f"no scales are defined for {granularity}")
    floor = peak.max() * SCALE_FLOOR if peak.max() > 0 else 1.0
    return peak.clamp(min=floor).float() / largest


def scale_shape(shape: tuple[int, ...], granularity: Granularity, *, axis: int) -> tuple[int, ...]:
    """The shape in which the scales of a weight of `shape` are stored."""
    match granularity:
        case PerTensor():
            return ()
        case PerChannel():
            return (shape[axis],)
        case _:
            raise ValueError(f"no scales are defined for {granularity}")
