"""The weights as they are: 32-bit floats, no codes, no scale."""

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from hirelc_deploy.kernels._base import Format, Packed
from hirelc_deploy.policy import Compute, PerTensor, Storage

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor


class Fp32(Format):
    """What a layer has before anything is decided."""

    name = "fp32"
    encoding = "fp32 values"
    bits = (32,)
    granularities = (PerTensor,)
    computes = frozenset({Compute.FP32})
    native = None

    def quantise(self, weight: "Tensor", storage: Storage, *, axis: int, largest: int) -> "Tensor":
        return weight

    def pack(self, weight: "Tensor", storage: Storage, *, axis: int, largest: int) -> Packed:
        return Packed({"codes": weight.detach().numpy().astype(np.float32)}, None)

    def unpack(self, tensors: Mapping[str, "ir.Value"]) -> tuple["list[ir.Node]", "ir.Value"]:
        return [], tensors["codes"]

    def packed_bytes(self, shape: tuple[int, ...], storage: Storage, *, axis: int) -> int:
        return 4 * prod(shape)


FORMAT = Fp32()
