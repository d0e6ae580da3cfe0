"""Zero and powers of two: 3 bits give 1, 2, 4 with both signs, 4 bits 1 to 64 (E2M0 and E3M0 of the small floats)."""

from typing import TYPE_CHECKING

from hirelc_deploy.kernels._base import Grid
from hirelc_deploy.kernels._levels import Levels
from hirelc_deploy.policy import PerChannel, PerTensor, Storage

if TYPE_CHECKING:
    from torch import Tensor


class Log(Levels):
    name = "log"
    bits = (3, 4)
    granularities = (PerChannel, PerTensor)
    native = None

    def levels(self, storage: Storage, grid: Grid, *, largest: int) -> "Tensor":
        """The largest is 64, which two products of 8-bit inputs still hold in 16 bits: 2 * 255 * 64 < 2 ** 15."""
        import torch

        powers = 2.0 ** torch.arange(2 ** (storage.bits - 1) - 1)
        return torch.cat([-powers.flip(0), torch.zeros(1), powers])


FORMAT = Log()
