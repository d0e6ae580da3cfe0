"""Copies of networks, also of such as keep what they have computed."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, in which a tensor that was computed with gradients no longer has any.

    `copy.deepcopy` refuses such tensors, and networks keep them: LeViT a bias for each resolution, a layer with
    `torch.nn.utils.weight_norm` the weight of its last call.
    """
    computed = {
        id(tensor): tensor.detach().clone()
        for module in model.modules()
        for tensor in _tensors_in(vars(module))
        if tensor.grad_fn is not None
    }
    return copy.deepcopy(model, computed)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Not those of submodules, which are asked themselves."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors_in(item)
