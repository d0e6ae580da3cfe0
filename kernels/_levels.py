"""What the formats have in common that store one code a weight: a table of levels, and scales chosen by error."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from hirelc_deploy.kernels._base import (
    INT8_MAX,
    LARGE,
    Format,
    Grid,
    Layout,
    Nodes,
    Packed,
    floored,
    scale_shape,
    scaled_alike,
)
from hirelc_deploy.kernels._planes import code_type, in_byte
from hirelc_deploy.policy import Granularity, PerChannel, PerGroup, Storage

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

SHRINKS = tuple(2 ** (-step / 4) for step in range(20))
"""Ranges that are tried, as parts of the largest weight: down to a thirtieth, in steps of a fifth."""

REFINEMENTS = 4
"""Rounds of: codes for these scales, then the scales with the least error for those codes."""

NOTHING = 1e-5
"""The scale of a weight that is zero throughout, where zero is no level: it becomes this instead.

Not smaller, since the layer's bias is stored in steps of it, as int32.
"""


class Levels(Format):
    """weight = levels[code] * scale; with groups, weight = levels[code] * multiplier of the group * scale.

    The multiplier is an integer, so that the weight still is an int8 with one scale a channel.
    """

    @abstractmethod
    def levels(self, storage: Storage, grid: Grid, *, largest: int) -> "Tensor":
        """The integers that codes stand for, ascending, as float32 (levels,)."""

    def nearest(self, steps: "Tensor", levels: "Tensor") -> "Tensor":
        """The code of the level that is nearest to each value: int64, same shape.

        Levels are integers, so that codes change at multiples of a half: a table look-up is three times as fast as a
        search, and fits are made of little else.
        """
        import torch

        low, high = float(levels[0]), float(levels[-1])
        halves = torch.arange(2 * low, 2 * high + 1) / 2
        code_at = torch.searchsorted((levels[1:] + levels[:-1]) / 2, halves, right=True)
        return code_at[((steps.clamp(low, high) - low) * 2).long()]

    def fit(self, rows: "Tensor", storage: Storage, *, largest: int, energy: "Tensor | None" = None) -> Grid:
        rows = rows.detach()
        cost = rows.new_ones(()) if energy is None else energy
        levels = self.levels(storage, {}, largest=largest)
        if isinstance(storage.granularity, PerGroup):
            return self._fit_groups(rows, levels, cost, storage.granularity, largest)
        return {"scale": self._fit_scale(rows, levels, cost, storage.granularity)}

    def integers(self, rows: "Tensor", grid: Grid, storage: Storage, *, largest: int) -> "Tensor":
        levels = self.levels(storage, grid, largest=largest)
        multiplier = grid.get("multiplier")
        steps = _in_steps(rows, grid)
        table = levels.detach()
        on_level = levels[self.nearest(steps.detach(), table)]
        # no gradient beyond the outermost levels, where only scale and levels can lower the error
        passing = steps.clamp(float(table[0]), float(table[-1]))
        integers = on_level + (passing - passing.detach())
        return integers if multiplier is None else integers * multiplier

    def layout(self, channels: int, columns: int, storage: Storage) -> Layout:
        tables = {}
        if isinstance(storage.granularity, PerGroup):
            tables["multiplier"] = (channels, columns // group_size(columns, storage.granularity))
        weights = channels * columns
        together = codes_in_one(weights, storage.bits)
        return Layout(weights // together, together * storage.bits, scale_shape(channels, storage.granularity), tables)

    def pack(self, rows: "Tensor", grid: Grid, storage: Storage, *, largest: int) -> Packed:
        rows = rows.detach()
        levels = self.levels(storage, grid, largest=largest).detach()
        multiplier = grid.get("multiplier")
        tables = {}
        if multiplier is not None:
            assert isinstance(storage.granularity, PerGroup)
            every = group_size(rows.shape[1], storage.granularity)
            tables["multiplier"] = multiplier[:, ::every].numpy().astype(np.int8)
        together = codes_in_one(rows.numel(), storage.bits)
        codes = self.nearest(_in_steps(rows, grid), levels).reshape(-1, together).numpy()
        return Packed(
            codes=_merged(codes, storage.bits),
            code_bits=together * storage.bits,
            tables=tables,
            scale=grid["scale"].detach().numpy().reshape(scale_shape(len(rows), storage.granularity)),
            integers=self.integers(rows, grid, storage, largest=largest).detach().numpy().astype(np.int8),
        )

    def unpack(
        self,
        codes: "ir.Value",
        tables: Mapping[str, "ir.Value"],
        shape: tuple[int, int],
        storage: Storage,
        nodes: Nodes,
    ) -> "ir.Value":
        import onnx_ir as ir

        together = codes_in_one(shape[0] * shape[1], storage.bits)
        integers = nodes.op("Gather", self._table(tables.get("levels"), storage, together, nodes), codes)
        if "multiplier" not in tables:
            return integers
        assert isinstance(storage.granularity, PerGroup)
        size = group_size(shape[1], storage.granularity)
        grouped = nodes.op("Reshape", integers, nodes.constant(np.array([shape[0], shape[1] // size, size], np.int64)))
        columns = nodes.op("Unsqueeze", tables["multiplier"], nodes.constant(np.array([2], np.int64)))
        # there is no product of int8 in ONNX Runtime
        wide = [nodes.op("Cast", x, to=int(ir.DataType.INT32)) for x in (grouped, columns)]
        return nodes.op("Cast", nodes.op("Mul", *wide), to=int(ir.DataType.INT8))

    def as_read(self, packed: Packed, storage: Storage, shape: tuple[int, ...], axis: int) -> "np.ndarray | None":
        if "multiplier" in packed.tables:
            return None
        together = codes_in_one(packed.integers.size, storage.bits)
        places = _places(storage.bits, together)
        each = (packed.codes[:, None] >> places) & (2**storage.bits - 1)
        moved = np.moveaxis(each.reshape(shape[axis], *np.delete(shape, axis)), 0, axis)
        return _merged(moved.reshape(-1, together), storage.bits)

    def _table(self, levels: "ir.Value | None", storage: Storage, together: int, nodes: Nodes) -> "ir.Value":
        """What a code stands for: one level, or as many as it holds codes, (codes, together)."""
        import onnx_ir as ir

        per_byte = min(together, in_byte(storage.bits))
        digits = _digits(storage.bits, per_byte)
        if levels is None:
            known = self.levels(storage, {}, largest=INT8_MAX).numpy().astype(np.int8)
            known = np.pad(known, (0, 2**storage.bits - len(known)))  # a code that is never used stands for 0
            table = nodes.constant(known[digits] if together > 1 else known)
        elif together == 1:
            return levels
        else:
            table = nodes.op("Gather", levels, nodes.op("Cast", nodes.constant(digits), to=int(ir.DataType.INT32)))
        return table if together == per_byte else _twice(table, len(digits), per_byte, nodes)

    def part(self, grid: Grid, columns: slice) -> Grid:
        if "multiplier" not in grid:
            return grid
        return {**grid, "multiplier": grid["multiplier"][:, columns]}

    def _fit_scale(self, rows: "Tensor", levels: "Tensor", cost: "Tensor", granularity: Granularity) -> "Tensor":
        """(channels, 1), or (1, 1) for one scale a tensor."""
        import torch

        axes = scaled_alike(granularity)
        widest = rows.abs().amax(axes, keepdim=True) / levels.abs().max()
        if not widest.any() and levels.all():
            return torch.full_like(widest, NOTHING)
        best = widest
        least = torch.full_like(widest, torch.inf)
        for shrink in SHRINKS:
            best, least = self._better(rows, levels, cost, floored(widest * shrink), best, least, axes)
        for _ in range(REFINEMENTS):
            on_level = levels[self.nearest(rows / floored(best), levels)]
            fitted = (cost * on_level * rows).sum(axes, keepdim=True) / (cost * on_level.square()).sum(
                axes, keepdim=True
            ).clamp(min=torch.finfo(torch.float32).tiny)
            best, least = self._better(rows, levels, cost, floored(fitted), best, least, axes)
        return floored(best)

    def _better(
        self,
        rows: "Tensor",
        levels: "Tensor",
        cost: "Tensor",
        scale: "Tensor",
        best: "Tensor",
        least: "Tensor",
        axes: list[int],
    ) -> tuple["Tensor", "Tensor"]:
        """`best` and its error `least`, with `scale` in their places where it does better."""
        import torch

        off = levels[self.nearest(rows / scale, levels)] * scale - rows
        error = (cost * off.square()).sum(axes, keepdim=True)
        is_better = error < least
        return torch.where(is_better, scale, best), torch.where(is_better, error, least)

    def _fit_groups(
        self, rows: "Tensor", levels: "Tensor", cost: "Tensor", granularity: PerGroup, largest: int
    ) -> dict[str, "Tensor"]:
        """A scale for each group, then a channel's scale and integers that come close to its groups' scales."""
        import torch

        channels, columns = rows.shape
        size = group_size(columns, granularity)
        groups = rows.reshape(-1, size)
        costs = cost.broadcast_to(rows.shape).reshape(-1, size)
        wanted = self._fit_scale(groups, levels, costs, PerChannel()).reshape(channels, -1)
        most = largest // int(levels.abs().max())
        scale = floored(wanted.amax(1, keepdim=True) / most)
        coarse = (wanted / scale).round().clamp(1, most)
        choices = torch.stack([coarse - 1, coarse, coarse + 1]).clamp(1, most)  # rounding alone ignores the error
        errors = torch.stack([self._group_errors(rows, levels, cost, scale, each, size) for each in choices])
        multiplier = choices.gather(0, errors.argmin(0, keepdim=True))[0]
        return {"scale": scale, "multiplier": multiplier.repeat_interleave(size, 1)}

    def _group_errors(
        self, rows: "Tensor", levels: "Tensor", cost: "Tensor", scale: "Tensor", multiplier: "Tensor", size: int
    ) -> "Tensor":
        """(channels, groups)."""
        step = scale * multiplier.repeat_interleave(size, 1)
        off = levels[self.nearest(rows / step, levels)] * step - rows
        return (cost * off.square()).broadcast_to(rows.shape).reshape(len(rows), -1, size).sum(2)


def _in_steps(rows: "Tensor", grid: Grid) -> "Tensor":
    """Weights in units of what one level is worth."""
    multiplier = grid.get("multiplier")
    return rows / (grid["scale"] if multiplier is None else grid["scale"] * multiplier)


def _twice(table: "ir.Value", codes: int, levels: int, nodes: Nodes) -> "ir.Value":
    """From what a code stands for to what two of them do that make one, the first in its lower bits.

    Made when a session loads, since it is as large as the file of a small network: (codes, levels) to
    (codes * codes, 2 * levels).
    """
    whole = nodes.constant(np.array([codes, codes, levels], np.int64))
    first, second = (
        nodes.op("Expand", nodes.op("Reshape", table, nodes.constant(np.array(shape, np.int64))), whole)
        for shape in ([1, codes, levels], [codes, 1, levels])
    )
    together = nodes.op("Concat", first, second, axis=2)
    return nodes.op("Reshape", together, nodes.constant(np.array([codes * codes, 2 * levels], np.int64)))


def codes_in_one(weights: int, bits: int) -> int:
    """How many neighbouring codes of a large weight are stored as one of up to 16 bits.

    A look-up takes as long for several levels as for one: 10 ns on an AMD EPYC, so that a file with 25 million 4-bit
    weights would load a quarter of a second later.
    """
    if weights < LARGE or bits == 8:
        return 1
    return next((together for together in (2 * in_byte(bits), in_byte(bits)) if weights % together == 0), 1)


def _places(bits: int, together: int) -> np.ndarray:
    """The first bit of each code within one that holds several."""
    return bits * np.arange(together)


def _merged(codes: np.ndarray, bits: int) -> np.ndarray:
    """One code of each row of them, (rows, together): the first in the lowest bits."""
    together = codes.shape[1]
    return (codes << _places(bits, together)).sum(1).astype(code_type(together * bits))


def _digits(bits: int, together: int) -> np.ndarray:
    """The codes within each one that holds several, (2 ** (bits * together), together)."""
    every = np.arange(2 ** (bits * together))[:, None]
    return ((every >> _places(bits, together)) & (2**bits - 1)).astype(np.uint8)


def group_size(columns: int, granularity: PerGroup) -> int:
    """The largest divisor of a row that is no more than the size asked for, so that all groups are alike.

    A row without a divisor of at least half that size is one group.
    """
    sizes = [size for size in range(granularity.size, 0, -1) if columns % size == 0]
    return sizes[0] if 2 * sizes[0] >= granularity.size else columns
