"""How tensors lie in memory."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hirelc_deploy.graph import forward


def channels_last(model: nn.Module, inputs: Mapping[str, Tensor]) -> nn.Module:
    """The model itself, in eval mode, in which convolutions of images run half again as fast, if it bears that.

    What convolutions then return lies in another order, of which `x.view(len(x), -1)` knows nothing: a network that
    fails on these inputs stays as it was.  `Module.to(memory_format=...)` would take the weights of volumes, which have
    five axes, for those of images.
    """
    _lay(model.eval(), torch.channels_last)
    try:
        with torch.no_grad():
            forward(model, inputs)
    except Exception:  # in whatever way it fails: as it was it may run
        _lay(model, torch.contiguous_format)
    return model


def laid_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The same values in the order of another tensor of this shape."""
    if other.dim() != 4 or other.is_contiguous() or not other.is_contiguous(memory_format=torch.channels_last):
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def _lay(model: nn.Module, order: torch.memory_format) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=order)
