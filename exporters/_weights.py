"""How weights lie in a file, and the nodes that turn them back when a session loads.

A layer's integers are stored as they are (plain) or as codes of fewer bits.  Codes of one width are decoded together
where layers are small: a bank is one run of codes, decoded once and then split, since ten nodes a layer would cost more
than some layers' weights.  All of it is a function of shapes, formats and bits, so that sizes can be told beforehand;
decoded values never depend on it.  Everything here is folded into constants by ONNX Runtime 1.16 and later.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx_ir as ir

from hirelc_deploy.kernels import load_format
from hirelc_deploy.kernels._base import LARGE, Nodes, Packed
from hirelc_deploy.kernels._planes import join, padded, plane_bytes, planes, split
from hirelc_deploy.policy import Compute, PerGroup, Precision

BANK_BYTES = 150
"""What the nodes of a bank cost, about, for each of its planes: they have to be saved first."""

MEMBER_BYTES = 96
"""What each member costs beside its codes: a Reshape with its shape, a name and a size in the Split."""

TABLE_BYTES, GROUPS_BYTES = 40, 200
"""What the nodes cost that read a table, and those that multiply groups by their multipliers."""


@dataclass(frozen=True)
class Weight:
    """One weight on its way into the file."""

    shape: tuple[int, ...]
    """As the operator reads it."""
    axis: int
    """Of its output channels."""
    precision: Precision
    packed: Packed
    shares: Hashable = None
    """Weights for which this is the same have the same shared tables; with None a weight has its own."""
    is_as_read: bool = False
    """Whether the codes lie as the operator reads them, and not row behind row."""

    @property
    def is_integer(self) -> bool:
        """Whether the operator computes with the integers themselves."""
        return self.precision.compute is not Compute.FP32


@dataclass(frozen=True)
class Decoded:
    """Where a weight's integers are, as int8 or as float32, in the operator's shape."""

    value: ir.Value
    encoding: str
    bytes: int
    """Of codes, tables and scales; a table that layers share counts for the first of them."""


Constant = Callable[[np.ndarray], ir.Value]


def decode(weights: Sequence[Weight], tensor: Constant, shared: Constant) -> tuple[list[ir.Node], list[Decoded]]:
    """Store weights; the nodes that decode them, in order, and one value each.

    `tensor` makes an initializer of its own, `shared` one for all equal arrays.
    """
    nodes = Nodes(shared)
    tables = _Tables(tensor)
    found: dict[int, Decoded] = {}
    for members in _banks(weights):
        found |= _bank([(i, weights[i]) for i in members], tensor, tables, nodes)
    for i, weight in enumerate(weights):
        if i not in found:
            found[i] = _plain(weight, tensor, nodes)
    return nodes.made, [found[i] for i in range(len(weights))]


def _banks(weights: Sequence[Weight]) -> list[list[int]]:
    """Positions of weights that are decoded together; those in no bank are stored plainly."""
    alike: dict[tuple[int, object, int], list[int]] = defaultdict(list)
    for i, weight in enumerate(weights):
        packed, precision = weight.packed, weight.precision
        if _saved(weight) <= 0:
            continue
        is_alone = prod(weight.shape) >= LARGE
        # tables are read after the split; without them all integers of a bank are decoded at once
        kind = "codes" if packed.tables else (precision.storage.format, weight.is_integer)
        alike[packed.code_bits, kind, i if is_alone else -1].append(i)
    return [
        bank
        for (bits, *_), bank in alike.items()
        if sum(_saved(weights[i]) for i in bank) > _overhead(bits, [weights[i] for i in bank])
    ]


def _overhead(bits: int, bank: Sequence[Weight]) -> int:
    """Bytes of a bank that are not its members' own."""
    return BANK_BYTES * (1 + len(planes(bits))) + _shared(bank)


def _saved(weight: Weight) -> int:
    """Bytes that codes and tables, and what reads them, need less than plain integers."""
    in_groups = isinstance(weight.precision.storage.granularity, PerGroup)
    of_nodes = GROUPS_BYTES if in_groups else TABLE_BYTES * len(weight.packed.tables)
    return prod(weight.shape) - _stored(weight) - MEMBER_BYTES - of_nodes


def _stored(weight: Weight) -> int:
    """Bytes of codes and of those tables that are its own."""
    packed = weight.packed
    own = (table for role, table in packed.tables.items() if role not in _roles_shared(weight))
    return plane_bytes(len(packed.codes), packed.code_bits) + sum(table.nbytes for table in own)


def _shared(weights: Sequence[Weight]) -> int:
    """Bytes of the tables that are not."""
    tables = {
        (weight.shares, role): weight.packed.tables[role].nbytes for weight in weights for role in _roles_shared(weight)
    }
    return sum(tables.values())


def _roles_shared(weight: Weight) -> tuple[str, ...]:
    return () if weight.shares is None else load_format(weight.precision.storage.format).shared


class _Tables:
    """Initializers of tables, those that are shared made once."""

    def __init__(self, tensor: Constant) -> None:
        self._tensor = tensor
        self._made: dict[tuple[Hashable, str], tuple[ir.Value, np.ndarray]] = {}

    def of(self, weight: Weight) -> tuple[dict[str, ir.Value], int]:
        """By role, and the bytes of those that were not there before."""
        found, added = {}, 0
        for role, table in weight.packed.tables.items():
            key = (weight.shares, role)
            if role not in _roles_shared(weight):
                found[role] = self._tensor(table)
                added += table.nbytes
                continue
            if key not in self._made:
                self._made[key] = (self._tensor(table), table)
                added += table.nbytes
            found[role], made = self._made[key]
            assert np.array_equal(made, table), f"layers that share their {role} have different ones"
        return found, added


def _bank(members: Sequence[tuple[int, Weight]], tensor: Constant, tables: _Tables, nodes: Nodes) -> dict[int, Decoded]:
    members = [(i, _as_read(weight)) for i, weight in members]
    first = members[0][1]
    bits = first.packed.code_bits
    codes = np.concatenate([weight.packed.codes for _, weight in members])
    stored = [tensor(plane) for plane in split(codes, bits)]
    value = join(stored, bits, nodes)
    is_one = len(members) == 1
    at_once = not is_one and not first.packed.tables
    if at_once:
        value = _typed(_unpack(first, value, {}, nodes), first, nodes)
    sizes = [len(weight.packed.codes) for _, weight in members]
    filling = padded(sum(sizes), bits) - sum(sizes)
    pieces = _split(value, [*sizes, filling] if filling else sizes, nodes)
    found = {}
    for (i, weight), piece in zip(members, pieces, strict=False):  # the filling is nobody's
        integers, table_bytes = piece, 0
        if not at_once:
            own, table_bytes = tables.of(weight)
            integers = _unpack(weight, piece, own, nodes)
        shaped = _in_shape(integers, weight, nodes)
        found[i] = Decoded(
            shaped if at_once else _typed(shaped, weight, nodes),
            _in_words(weight) + ("" if is_one else f", {len(members)} layers together"),
            plane_bytes(len(weight.packed.codes), bits) + table_bytes + weight.packed.scale.nbytes,
        )
    return found


def _in_words(weight: Weight) -> str:
    """4-bit codes, or 16-bit codes of 4 weights."""
    together = prod(weight.shape) // len(weight.packed.codes)
    return f"{weight.packed.code_bits}-bit codes" + (f" of {together} weights" if together > 1 else "")


def _plain(weight: Weight, tensor: Constant, nodes: Nodes) -> Decoded:
    moved = [size for a, size in enumerate(weight.shape) if a != weight.axis]
    channels = weight.shape[weight.axis]
    integers = np.moveaxis(weight.packed.integers.reshape(channels, *moved), 0, weight.axis)
    value = tensor(np.ascontiguousarray(integers))
    return Decoded(_typed(value, weight, nodes), "int8", integers.nbytes + weight.packed.scale.nbytes)


def _unpack(weight: Weight, codes: ir.Value, tables: dict[str, ir.Value], nodes: Nodes) -> ir.Value:
    storage = weight.precision.storage
    channels = weight.shape[weight.axis]
    columns = prod(weight.shape) // channels
    return load_format(storage.format).unpack(codes, tables, (channels, columns), storage, nodes)


def _typed(integers: ir.Value, weight: Weight, nodes: Nodes) -> ir.Value:
    """int8 for the operators that compute with integers.

    Cast last, since each node copies its tensor when a session loads, or early if one node serves many small layers.
    """
    return integers if weight.is_integer else nodes.op("Cast", integers, to=int(ir.DataType.FLOAT))


def _split(value: ir.Value, sizes: Sequence[int], nodes: Nodes) -> Sequence[ir.Value]:
    if len(sizes) == 1:
        return [value]
    first = nodes.op("Split", value, nodes.constant(np.array(sizes, np.int64)), outputs=len(sizes))
    producer = first.producer()
    assert producer is not None
    return producer.outputs


def _as_read(weight: Weight) -> Weight:
    """With its codes in the operator's own order, if they can be: nothing is transposed when a session loads."""
    if weight.axis == 0:  # rows are that order
        return weight
    storage = weight.precision.storage
    codes = load_format(storage.format).as_read(weight.packed, storage, weight.shape, weight.axis)
    return weight if codes is None else replace(weight, packed=replace(weight.packed, codes=codes), is_as_read=True)


def _shaped(integers: ir.Value, shape: Sequence[int], nodes: Nodes) -> ir.Value:
    return nodes.op("Reshape", integers, nodes.constant(np.array(shape, np.int64)))


def _in_shape(integers: ir.Value, weight: Weight, nodes: Nodes) -> ir.Value:
    """From rows, one output channel each, or from the operator's own order, to the operator's shape."""
    if weight.axis == 0 or weight.is_as_read:
        return _shaped(integers, weight.shape, nodes)
    rest = [size for a, size in enumerate(weight.shape) if a != weight.axis]
    shaped = _shaped(integers, [weight.shape[weight.axis], *rest], nodes)
    order = list(range(1, len(weight.shape)))
    order.insert(weight.axis, 0)
    return nodes.op("Transpose", shaped, perm=order)
