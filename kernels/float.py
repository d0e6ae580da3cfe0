"""Small floats with a sign, two bits of exponent and the rest mantissa: E2M1, E2M2 and E2M3 (4, 5 and 6 bits).

Without infinities, with subnormals, in units of the smallest one.  Those without a mantissa are the format `log`.
"""

from typing import TYPE_CHECKING

from hirelc_deploy.kernels._base import Grid
from hirelc_deploy.kernels._levels import Levels
from hirelc_deploy.policy import PerChannel, PerTensor, Storage

if TYPE_CHECKING:
    from torch import Tensor

EXPONENTS = 4


class Float(Levels):
    name = "float"
    bits = (4, 5, 6)
    granularities = (PerChannel, PerTensor)
    native = None

    def levels(self, storage: Storage, grid: Grid, *, largest: int) -> "Tensor":
        import torch

        steps = 2 ** (storage.bits - 3)  # of the mantissa
        subnormal = torch.arange(steps)
        normal = [(steps + torch.arange(steps)) * 2**exponent for exponent in range(EXPONENTS - 1)]
        magnitudes = torch.cat([subnormal, *normal]).float()
        return torch.cat([-magnitudes[1:].flip(0), magnitudes])


FORMAT = Float()
