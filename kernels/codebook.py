"""Learned levels: 2 to 4 bits, a table for each weight, found by k-means in one dimension and trained on."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hirelc_deploy.kernels._base import Grid, Layout, Packed, spread
from hirelc_deploy.kernels._levels import Levels
from hirelc_deploy.policy import PerChannel, PerTensor, Storage

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 40
"""Of Lloyd's algorithm; on weights of networks the levels have settled by then."""


class Codebook(Levels):
    """The grid's `levels` are in units of the largest integer, so that training moves them at a sensible rate."""

    name = "codebook"
    bits = (2, 3, 4)
    granularities = (PerChannel, PerTensor)
    native = None
    trained = ("scale", "levels")

    def levels(self, storage: Storage, grid: Grid, *, largest: int) -> "Tensor":
        table = (grid["levels"] * largest).clamp(-largest, largest).sort().values
        return table + (table.round() - table).detach()

    def fit(self, rows: "Tensor", storage: Storage, *, largest: int, energy: "Tensor | None" = None) -> Grid:
        rows = rows.detach()
        cost = rows.new_ones(()) if energy is None else energy
        unit = spread(rows, storage.granularity)
        centres = _lloyd(rows / unit, cost * unit.square(), 2**storage.bits)
        widest = float(centres.abs().max()) or 1.0
        grid = {"levels": centres / widest, "scale": unit * widest / largest}
        levels = self.levels(storage, grid, largest=largest)
        # the scales again, for levels that are rounded to int8
        return {**grid, "scale": self._fit_scale(rows, levels, cost, storage.granularity)}

    def layout(self, channels: int, columns: int, storage: Storage) -> Layout:
        return replace(super().layout(channels, columns, storage), tables={"levels": (2**storage.bits,)})

    def pack(self, rows: "Tensor", grid: Grid, storage: Storage, *, largest: int) -> Packed:
        levels = self.levels(storage, grid, largest=largest).detach().numpy().astype(np.int8)
        tables: Mapping[str, np.ndarray] = {"levels": levels}
        return replace(super().pack(rows, grid, storage, largest=largest), tables=tables)


def _lloyd(values: "Tensor", cost: "Tensor", count: int) -> "Tensor":
    """`count` centres with the least squared error, each value's counted by its cost; ascending, (count,).

    Values are sorted once: a cluster is then a stretch, and its mean a difference of running sums.
    """
    import torch

    ordered, order = values.flatten().double().sort()
    weight = cost.broadcast_to(values.shape).flatten().double()[order]
    zero = weight.new_zeros(1)
    mass = torch.cat([zero, weight.cumsum(0)])
    moment = torch.cat([zero, (weight * ordered).cumsum(0)])
    positions = (torch.arange(count) + 0.5) / count * (len(ordered) - 1)
    centres = ordered[positions.long()]
    for _ in range(ROUNDS):
        borders = torch.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        ends = torch.cat([borders.new_zeros(1), borders, borders.new_full((1,), len(ordered))])
        held = mass[ends[1:]] - mass[ends[:-1]]
        means = (moment[ends[1:]] - moment[ends[:-1]]) / held.clamp(min=1e-300)
        centres = torch.where(held > 0, means, centres).sort().values
    return centres.float()


FORMAT = Codebook()
