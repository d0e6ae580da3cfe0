"""Uniform symmetric integers: value = code * scale, codes from -largest to largest.

At 8 bits the codes are the int8 tensor itself: there is nothing to unpack.
"""

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from hirelc_deploy.kernels._base import Format, Packed, scale_shape, scales
from hirelc_deploy.policy import Compute, PerChannel, PerTensor, Storage

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor


class Int(Format):
    """Round to nearest (half to even, as ONNX's QuantizeLinear does) on a symmetric grid."""

    name = "int"
    encoding = "int8 codes and scales"
    bits = (8,)
    granularities = (PerTensor, PerChannel)
    computes = frozenset({Compute.INT8, Compute.FP32})
    native = "int8"

    def quantise(self, weight: "Tensor", storage: Storage, *, axis: int, largest: int) -> "Tensor":
        scale = scales(weight, storage.granularity, axis=axis, largest=largest)
        on_grid = _codes(weight, scale, largest) * scale
        return on_grid + (weight - weight.detach())  # exactly on_grid: the bracket is zero and passes the gradient

    def pack(self, weight: "Tensor", storage: Storage, *, axis: int, largest: int) -> Packed:
        scale = scales(weight, storage.granularity, axis=axis, largest=largest)
        stored = scale_shape(tuple(weight.shape), storage.granularity, axis=axis)
        codes = _codes(weight, scale, largest).numpy().astype(np.int8)
        return Packed({"codes": codes}, scale.numpy().reshape(stored))

    def unpack(self, tensors: Mapping[str, "ir.Value"]) -> tuple["list[ir.Node]", "ir.Value"]:
        return [], tensors["codes"]

    def packed_bytes(self, shape: tuple[int, ...], storage: Storage, *, axis: int) -> int:
        return prod(shape) + 4 * prod(scale_shape(shape, storage.granularity, axis=axis))


def _codes(weight: "Tensor", scale: "Tensor", largest: int) -> "Tensor":
    return (weight.detach() / scale).round().clamp(-largest, largest)


FORMAT = Int()
