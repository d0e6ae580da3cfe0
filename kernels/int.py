"""Uniform symmetric integers of 2 to 8 bits.

From 4 bits on zero is a level, as in -7 ... 7.  With 2 and 3 bits it is not: levels at all odd numbers of half steps,
as in -3, -1, 1, 3, use the one code that would be left over, which lowers the squared error of normal weights by a
third and by a fifth (at 2 bits also ParetoQ, arXiv 2502.02631).
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hirelc_deploy.kernels._base import INT8_MAX, Grid, Packed
from hirelc_deploy.kernels._levels import Levels
from hirelc_deploy.policy import PerChannel, PerGroup, PerTensor, Storage

if TYPE_CHECKING:
    from torch import Tensor

WITHOUT_ZERO = 3
"""Bits up to which zero is no level."""


class Int(Levels):
    name = "int"
    bits = (2, 3, 4, 5, 6, 7, 8)
    granularities = (PerChannel, PerTensor, PerGroup)
    native = "int8"

    def levels(self, storage: Storage, grid: Grid, *, largest: int) -> "Tensor":
        import torch

        if storage.bits <= WITHOUT_ZERO:
            most = 2**storage.bits - 1
            return torch.arange(-most, most + 1, 2, dtype=torch.float32)
        most = min(2 ** (storage.bits - 1) - 1, largest)
        return torch.arange(-most, most + 1, dtype=torch.float32)

    def pack(self, rows: "Tensor", grid: Grid, storage: Storage, *, largest: int) -> Packed:
        """Codes count from the lowest level that there is without `largest`: decoding does not know of it."""
        packed = super().pack(rows, grid, storage, largest=largest)
        most, allowed = (len(self.levels(storage, grid, largest=bound)) for bound in (INT8_MAX, largest))
        unused = (most - allowed) // 2
        return replace(packed, codes=packed.codes + np.uint8(unused)) if unused else packed

    def nearest(self, steps: "Tensor", levels: "Tensor") -> "Tensor":
        """As for any table, but faster: all gaps are alike."""
        gap = float(levels[1] - levels[0])
        return ((steps - float(levels[0])) / gap).round().clamp(0, len(levels) - 1).long()


FORMAT = Int()
