"""FP8, E4M3: four bits of exponent, three of mantissa, up to 448, without infinities; computed with as it is stored.

Its values span five orders of magnitude and fit into no int8, so nothing decodes it: it is for runtimes that multiply
such numbers (TensorRT from compute capability 8.9 on), which read activations on the same grid.
"""

from typing import TYPE_CHECKING, Any

from hirelc_deploy.kernels._base import Format, Grid, Layout, Packed, floored, scale_shape, scaled_alike
from hirelc_deploy.policy import Compute, PerChannel, PerTensor, Storage

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

LARGEST = 448.0
"""Of E4M3."""

OCTAVE = tuple(2 ** (step / 8) for step in range(-2, 8))
"""Scales that are tried, in units of the one that just holds the largest weight.

An octave higher everything is rounded alike, but for what is subnormal; a little lower cuts off the largest.
"""


def rounded(steps: "Tensor") -> "Tensor":
    """The nearest numbers of E4M3; what is beyond them becomes the last, and passes no gradient."""
    import torch

    inside = steps.clamp(-LARGEST, LARGEST)
    nearest = inside.detach().to(torch.float8_e4m3fn).to(inside.dtype)
    return nearest + (inside - inside.detach())


class Fp8(Format):
    name = "fp8"
    bits = (8,)
    granularities = (PerChannel, PerTensor)
    computes = frozenset({Compute.FP8})
    native = "fp8"

    def fit(self, rows: "Tensor", storage: Storage, *, largest: int, energy: "Tensor | None" = None) -> Grid:
        import torch

        rows = rows.detach()
        cost = rows.new_ones(()) if energy is None else energy
        axes = scaled_alike(storage.granularity)
        widest = rows.abs().amax(axes, keepdim=True) / LARGEST
        scales = torch.stack([floored(widest * times) for times in OCTAVE])
        errors = torch.stack(
            [(cost * (rounded(rows / scale) * scale - rows).square()).sum(axes, keepdim=True) for scale in scales]
        )
        return {"scale": floored(scales.gather(0, errors.argmin(0, keepdim=True))[0])}

    def integers(self, rows: "Tensor", grid: Grid, storage: Storage, *, largest: int) -> "Tensor":
        """Numbers of E4M3."""
        return rounded(rows / grid["scale"])

    def layout(self, channels: int, columns: int, storage: Storage) -> Layout:
        return Layout(channels * columns, 8, scale_shape(channels, storage.granularity))

    def pack(self, rows: "Tensor", grid: Grid, storage: Storage, *, largest: int) -> Packed:
        import torch

        numbers = self.integers(rows.detach(), grid, storage, largest=largest).detach()
        return Packed(
            codes=numbers.to(torch.float8_e4m3fn).view(torch.uint8).flatten().numpy(),
            code_bits=8,
            tables={},
            scale=grid["scale"].detach().numpy().reshape(scale_shape(len(rows), storage.granularity)),
            integers=numbers.numpy(),
        )

    def unpack(self, *_: Any, **__: Any) -> "ir.Value":
        raise ValueError("fp8 is computed with as it is stored")


FORMAT = Fp8()
