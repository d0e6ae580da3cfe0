"""Cutting channels out of a network: which axes of which tensors a module's channels lie on, and the cut itself."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase as StatisticsNorm

from hirelc_deploy.graph.layers import Conv, TransposedConv

Cuts = Mapping[tuple[str, int], Collection[int]]
"""(State-dict name, axis) -> the positions that go."""


@dataclass(frozen=True)
class Place:
    """An axis of one of a module's tensors on which its channels lie."""

    tensor: str
    """The module's own name of it: weight, bias, running_mean …"""
    axis: int
    period: int | None = None
    """Of a grouped convolution: channels a group; the axis holds the offset within a group only."""


class UnsupportedError(Exception):
    """A module whose channels this file cannot cut."""


def places(module: nn.Module, role: Literal["out", "in"]) -> tuple[Place, ...]:
    """Where the channels that a module makes (or reads) lie.  Raises UnsupportedError."""
    if isinstance(module, Conv):
        found = _convolution(module, role)
    elif isinstance(module, nn.Linear):
        found = (Place("weight", 0), Place("bias", 0)) if role == "out" else (Place("weight", 1),)
    elif isinstance(module, nn.Embedding):
        found = (Place("weight", 1),)
    elif isinstance(module, StatisticsNorm):
        found = tuple(Place(tensor, 0) for tensor in ("weight", "bias", "running_mean", "running_var"))
    elif isinstance(module, nn.GroupNorm) or (isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1):
        found = (Place("weight", 0), Place("bias", 0))
    elif isinstance(module, nn.PReLU):
        found = (Place("weight", 0),) if module.num_parameters > 1 else ()
    elif next(module.parameters(), None) is None:
        found = ()
    else:
        raise UnsupportedError(f"the channels of a {type(module).__name__} cannot be cut")
    own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    if isinstance(module, Conv | nn.Linear | nn.Embedding) and "weight" not in own:
        raise UnsupportedError("its weight is computed from other parameters")
    return tuple(place for place in found if place.tensor in own)


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, Conv) and 1 < module.groups == module.out_channels == module.in_channels


def reads(module: nn.Module, role: Literal["out", "in"]) -> bool:
    """Whether the module mixes the channels that it reads: only then does it make them superfluous when cut."""
    return role == "in" and isinstance(module, Conv | nn.Linear) and not is_depthwise(module)


def bound_period(module: nn.Module, role: Literal["out", "in"]) -> int | None:
    """Channels a group, for a module that has the same number in each of several groups; None for all others."""
    if isinstance(module, nn.GroupNorm):
        return module.num_channels // module.num_groups if module.num_groups > 1 else None
    if isinstance(module, Conv) and module.groups > 1 and not is_depthwise(module):
        return (module.out_channels if role == "out" else module.in_channels) // module.groups
    return None


def _convolution(module: Conv, role: Literal["out", "in"]) -> tuple[Place, ...]:
    if is_depthwise(module):
        return Place("weight", 0), Place("bias", 0)
    transposed = isinstance(module, TransposedConv)
    period = bound_period(module, role)
    if role == "in":
        # weight: (out, in / groups, …), transposed: (in, out / groups, …)
        return (Place("weight", 0) if transposed else Place("weight", 1, period),)
    return Place("weight", 1, period) if transposed else Place("weight", 0), Place("bias", 0)


def first_names(model: nn.Module) -> dict[str, str]:
    """Every parameter's and buffer's state-dict name -> the first name of that very tensor."""
    first: dict[int, str] = {}
    everything = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in everything}


def cut(model: nn.Module, cuts: Cuts) -> None:
    """Remove positions of axes, in place; shared tensors stay shared, and modules learn their new widths.

    Names are first names (`first_names`).  Raises KeyError for a tensor that the network does not have.
    """
    first = first_names(model)
    names: dict[str, list[str]] = defaultdict(list)
    for name, tensor_name in first.items():
        names[tensor_name].append(name)

    shrunk: dict[str, Tensor] = {}
    for (name, axis), gone in cuts.items():
        tensor = shrunk[name] if name in shrunk else _tensor(model, name)
        positions = set(gone)
        kept = [i for i in range(tensor.shape[axis]) if i not in positions]
        index = torch.tensor(kept, dtype=torch.long, device=tensor.device)
        shrunk[name] = tensor.detach().index_select(axis, index)

    changed: dict[nn.Module, bool] = {}
    for name, tensor in shrunk.items():
        old = _tensor(model, name)
        new = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        for alias in names[name]:
            owner, key = _owner(model, alias)
            changed.setdefault(owner, is_depthwise(owner))
            setattr(owner, key, new)
    for module, depthwise in changed.items():
        _learn_widths(module, depthwise)


def _learn_widths(module: nn.Module, depthwise: bool) -> None:
    """Set a module's own record of its widths from its tensors."""
    if isinstance(module, Conv):
        rows, columns = module.weight.shape[:2]
        if depthwise:
            module.in_channels = module.out_channels = module.groups = rows
        elif isinstance(module, TransposedConv):
            module.in_channels, module.out_channels = rows, columns * module.groups
        else:
            module.in_channels, module.out_channels = columns * module.groups, rows
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, StatisticsNorm):
        module.num_features = len(next(t for t in (module.weight, module.running_mean) if t is not None))
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, key = _owner(model, name)
    tensor = getattr(owner, key)
    assert isinstance(tensor, Tensor)
    return tensor
