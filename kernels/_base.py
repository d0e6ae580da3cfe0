"""What a number format is: one file in this folder, with a `FORMAT`.

A weight is seen as a matrix, (channels, columns): a row an output channel.  Every format stores small unsigned
codes and a scale, and decodes to integers that fit into int8: weight = integer * scale.  So a layer can be
computed in int8 or in fp32, whatever it is stored in, and the decoding is done when a session loads.  (`fp8` alone
decodes to no integers, and is computed with as it is.)

Three functions agree bit for bit.  `quantise` puts weights on the grid (torch, with gradients, for fine-tuning);
`pack` gives the codes of those very values; `unpack` writes the ONNX nodes that turn codes into integers.  What they
agree on is the `Grid`: what `fit` has found for one weight and fine-tuning may still move.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Literal

import numpy as np

from hirelc_deploy.kernels._planes import code_type, plane_bytes
from hirelc_deploy.policy import Compute, Granularity, PerTensor, Storage

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

Grid = Mapping[str, "Tensor"]
"""By role: `scale`, (channels, 1) or (1, 1), and whatever else the format needs, as float32."""

INT8_MAX = 127
"""The largest integer that a format may decode to; 63 where products of 8-bit weights would saturate."""

LARGE = 1 << 16
"""A weight with at least so many entries is decoded for speed and memory, a smaller one in few nodes and bytes."""

SCALE_FLOOR = 1e-3
"""A channel's scale is at least this part of the largest one.

A channel that is all but zero would otherwise get a scale so small that its bias, stored as int32 in steps of
input scale times weight scale, overflows.
"""


@dataclass(frozen=True)
class Layout:
    """How much a format stores for a matrix of one shape: known before any weight is."""

    codes: int
    code_bits: int
    """1 to 16."""
    scale: tuple[int, ...]
    """() or (channels,)."""
    tables: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of what lies beside the codes, one byte an entry."""

    @property
    def bytes(self) -> int:
        """Of codes, tables and scales."""
        return plane_bytes(self.codes, self.code_bits) + sum(map(prod, self.tables.values())) + 4 * prod(self.scale)


@dataclass(frozen=True)
class Packed:
    """A weight as it is stored."""

    codes: np.ndarray
    """(codes,), each below 2 ** code_bits; uint8, or uint16 where they have more than 8 bits."""
    code_bits: int
    tables: Mapping[str, np.ndarray]
    """int8 or uint8, by role."""
    scale: np.ndarray
    """float32, () or (channels,)."""
    integers: np.ndarray
    """(channels, columns): what the codes decode to, int8; of fp8 its numbers, float32."""


class Nodes:
    """The ONNX nodes that a decoding is made of, in order."""

    def __init__(self, constant: Callable[[np.ndarray], "ir.Value"]) -> None:
        """`constant` gives an initializer, the same one for equal arrays."""
        self.made: list[ir.Node] = []
        self.constant = constant
        self._known: dict[Hashable, ir.Value] = {}

    def op(self, kind: str, *inputs: "ir.Value", outputs: int = 1, **attributes: int | str | list[int]) -> "ir.Value":
        """The (first) output of a node, which is appended unless there is the same one: layers share their tables."""
        import onnx_ir as ir

        key = (kind, inputs, outputs, tuple((name, str(value)) for name, value in sorted(attributes.items())))
        if key not in self._known:
            self.made.append(ir.node(kind, inputs, attributes, num_outputs=outputs))
            self._known[key] = self.made[-1].outputs[0]
        return self._known[key]


class Format(ABC):
    """A number format.  `rows` is always (channels, columns) in float32; `largest` bounds the decoded integers."""

    name: str
    bits: tuple[int, ...]
    granularities: tuple[type[Granularity], ...]
    computes: frozenset[Compute] = frozenset({Compute.INT8, Compute.INT8_DYNAMIC, Compute.FP32})
    """Whatever decodes to int8 can be computed in all of them."""
    native: Literal["int8", "int4", "fp8"] | None
    """What a runtime that cannot decode in the graph stores instead; None where it cannot hold the format."""
    trained: tuple[str, ...] = ("scale",)
    """Roles of the grid that fine-tuning moves."""
    shared: tuple[str, ...] = ()
    """Roles that all weights stored and computed alike have in common: tables that are stored once."""

    @abstractmethod
    def fit(self, rows: "Tensor", storage: Storage, *, largest: int, energy: "Tensor | None" = None) -> Grid:
        """The grid with the least squared error, each weight's counted by `energy` (broadcast to rows) if given."""

    def fit_all(
        self, weights: "Sequence[Tensor]", storage: Storage, *, largest: int, energies: "Sequence[Tensor | None]"
    ) -> list[Grid]:
        """The grids of weights that are stored alike, each as `rows`; what is `shared` is the same in all of them."""
        return [
            self.fit(rows, storage, largest=largest, energy=energy)
            for rows, energy in zip(weights, energies, strict=True)
        ]

    @abstractmethod
    def integers(self, rows: "Tensor", grid: Grid, storage: Storage, *, largest: int) -> "Tensor":
        """What each weight decodes to, (channels, columns); gradients reach rows and grid."""

    @abstractmethod
    def layout(self, channels: int, columns: int, storage: Storage) -> Layout:
        """How many codes, tables and scales there are for a matrix of this shape."""

    @abstractmethod
    def pack(self, rows: "Tensor", grid: Grid, storage: Storage, *, largest: int) -> Packed:
        """The codes of the values that `quantise` gives for the same weight and grid."""

    @abstractmethod
    def unpack(
        self,
        codes: "ir.Value",
        tables: Mapping[str, "ir.Value"],
        shape: tuple[int, int],
        storage: Storage,
        nodes: Nodes,
    ) -> "ir.Value":
        """Nodes from codes, int32 (codes,), to integers, int8 with channels * columns entries in any shape.

        Without tables the codes may be those of several weights below LARGE, one behind the other.
        """

    def as_read(self, packed: Packed, storage: Storage, shape: tuple[int, ...], axis: int) -> "np.ndarray | None":
        """The codes in the order in which an operator reads a weight of this shape, its channels on `axis`.

        None where only rows have an order: neighbours in them have one code, or share a table.
        """
        return None

    def quantise(self, rows: "Tensor", grid: Grid, storage: Storage, *, largest: int) -> "Tensor":
        """The weights on the grid, as a file decodes them: one product of two float32 each."""
        return self.integers(rows, grid, storage, largest=largest) * grid["scale"]

    def part(self, grid: Grid, columns: slice) -> Grid:
        """The grid of some columns of a matrix; they begin and end where a code does."""
        return grid

    def codes_together(self, columns: int, storage: Storage) -> int:
        """How many neighbouring columns one code decides."""
        return 1

    def packed_bytes(self, channels: int, columns: int, storage: Storage) -> int:
        """Bytes of codes, tables and scales for a matrix of this shape."""
        return self.layout(channels, columns, storage).bytes

    def blank(self, channels: int, columns: int, storage: Storage) -> Packed:
        """Zeros of the shapes that `pack` gives: the size of a file is told with them."""
        layout = self.layout(channels, columns, storage)
        return Packed(
            codes=np.zeros(layout.codes, code_type(layout.code_bits)),
            code_bits=layout.code_bits,
            tables={role: np.zeros(shape, np.int8) for role, shape in layout.tables.items()},
            scale=np.zeros(layout.scale, np.float32),
            integers=np.zeros((channels, columns), np.int8),
        )


def largest_integer(compute: Compute, largest: int) -> int:
    """What bounds the integers that a weight decodes to: only products of integers can saturate."""
    return INT8_MAX if compute in (Compute.FP32, Compute.FP16) else largest


def scaled_alike(granularity: Granularity) -> list[int]:
    """The axes of a matrix along which all weights have one scale."""
    return [0, 1] if isinstance(granularity, PerTensor) else [1]


def spread(rows: "Tensor", granularity: Granularity) -> "Tensor":
    """Root mean square of the weights that have one scale, (channels, 1) or (1, 1)."""
    return floored(rows.square().mean(scaled_alike(granularity), keepdim=True).sqrt())


def scale_shape(channels: int, granularity: Granularity) -> tuple[int, ...]:
    """The shape in which scales are stored: one for the tensor, otherwise one a channel."""
    return () if isinstance(granularity, PerTensor) else (channels,)


def floored(scale: "Tensor") -> "Tensor":
    """Scales that are positive and not smaller than SCALE_FLOOR of the largest; 1 where all weights are zero."""
    largest = scale.detach().amax()
    return scale.clamp(min=float(largest) * SCALE_FLOOR) if largest > 0 else scale.new_ones(scale.shape)


def rows_of(weight: "Tensor", axis: int) -> "Tensor":
    """A weight as a matrix, (channels, columns): `axis` is the one of output channels."""
    return weight.movedim(axis, 0).flatten(1)


def from_rows(rows: "Tensor", shape: tuple[int, ...], axis: int) -> "Tensor":
    """The inverse of `rows_of` for a weight of `shape`."""
    rest = [size for a, size in enumerate(shape) if a != axis]
    return rows.unflatten(1, rest).movedim(0, axis) if rest else rows.flatten()
