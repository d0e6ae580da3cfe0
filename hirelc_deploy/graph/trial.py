"""The ground on which groups are tried: a private copy with weights that hide nothing, and how outputs compare."""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from hirelc_deploy.copying import copied

SEED = 0
"""Of the noise and of the choice of channels; a trial gives the same answer every time."""

TOLERANCE = 1e-3
"""Relative error of the outputs.  Right groups differ by rounding (1e-7 to 1e-5), wrong ones by 0.01 to 1."""

SCALE_NOISE, STATISTIC_SPREAD = 0.3, 0.5


def private_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU in eval mode, all of whose weights take gradients: what a trial may do anything to."""
    own = copied(model).cpu().eval()
    for parameter in own.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return own


@torch.no_grad()
def jitter(model: nn.Module) -> nn.Module:
    """A copy with noise on every weight and norm statistic, so that no branch is silent and no channel is like another.

    Trained networks begin many branches at zero (the last BatchNorm's scale, a LayerScale of 1e-6), and attention
    begins nearly uniform: there a wrong cut would change nothing, and the proof would prove nothing.
    """
    own = copied(model)
    random = torch.Generator().manual_seed(SEED)
    for parameter in own.parameters():
        if parameter.is_floating_point():
            fan_in = prod(parameter.shape[1:])
            spread = fan_in**-0.5 if fan_in > 1 else SCALE_NOISE
            parameter.add_(spread * torch.randn(parameter.shape, generator=random))
    for name, buffer in own.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(SCALE_NOISE * torch.randn(buffer.shape, generator=random))
        elif name.endswith("running_var"):
            buffer.mul_(1 + STATISTIC_SPREAD * (torch.rand(buffer.shape, generator=random) - 0.5))
    return own


def shapes(outputs: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(output.shape) for name, output in outputs.items()}


LEAST_CHANGE = 1e-2
"""Part of an output that a trial is taken to change at least: of less, rounding would be a wrong group."""


def relative_error(
    outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], unchanged: Mapping[str, Tensor] | None = None
) -> float:
    """The largest over all outputs of |output - expected| / |expected| (Frobenius norms); NaN where one is not finite.

    Shapes must be equal.  With the outputs before a change it is held against what the change does, |expected -
    unchanged|, where that is less: a constant that is added in the end (kelvin, hectopascal) would hide any error.
    """
    errors = []
    for name, value in expected.items():
        right = value.detach().double()
        difference, size = _norm(outputs[name].detach().double() - right), _norm(right)
        if unchanged is not None:
            change = _norm(unchanged[name].detach().double() - right)
            size = torch.minimum(size, torch.maximum(change, LEAST_CHANGE * size))
        errors.append(float(difference / size) if difference > 0 or not difference.isfinite() else 0.0)
    return max(errors) if all(error == error for error in errors) else float("nan")


def _norm(values: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(values)
    return found
