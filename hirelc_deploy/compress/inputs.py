"""What the layers of a network read: how much an error in each of their weights would show in their outputs."""

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hirelc_deploy.graph import forward

MOST_PLACES = 128
"""Of an image, drawn at random, whose inputs are looked at: neighbours say the same."""

SEED = 0
"""Of the places that are drawn."""

Batches = Callable[[], Iterable[Mapping[str, Tensor]]]
"""The calibration examples, from the beginning each time."""

Read = Callable[[str, nn.Module, Tensor], None]
"""Takes a layer's name, the layer, and an input that it was called with."""


@torch.no_grad()
def watch(model: nn.Module, layers: Iterable[str], batches: Iterable[Mapping[str, Tensor]], read: Read) -> None:
    """Run the model, in eval mode, and hand on what the layers are called with, one batch in memory at a time."""
    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_pre_hook(_hook(name, read), with_kwargs=True)
        for name in layers
        if name in modules
    ]
    try:
        model.eval()
        for inputs in batches:
            forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()


def energies(model: nn.Module, layers: Iterable[str], batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """By layer the mean square of the input that each weight meets: (1, columns), or (channels, columns) if grouped.

    An error e in a weight adds e * x to an output, so its mean square is e * e times this: the diagonal of the layer's
    Hessian for the squared error of its outputs.  Layers that are neither Conv nor Linear are left out.  What an image
    shows is read at MOST_PLACES of it.
    """
    random = torch.Generator().manual_seed(SEED)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def read(name: str, layer: nn.Module, x: Tensor) -> None:
        if not can_unfold(layer):
            return
        seen = columns_at(layer, x, MOST_PLACES * len(x), random)
        sums[name] = sums.get(name, torch.zeros(())) + seen.square().sum(1).double()
        counts[name] = counts.get(name, 0) + seen.shape[1]

    watch(model, layers, batches, read)
    modules = dict(model.named_modules())
    return {name: _by_channel((total / counts[name]).float(), modules[name]) for name, total in sums.items()}


def can_unfold(layer: nn.Module) -> bool:
    """Whether what its weight's rows are multiplied by can be told from its input."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear)


def columns_at(layer: nn.Module, x: Tensor, most: int, random: torch.Generator) -> Tensor:
    """An input as the columns that a weight's rows are multiplied by: (groups, places, columns).

    Of at most so many places, drawn at random; the layer is one that `can_unfold`.  Only what lies around these
    places is copied: all columns of an image are as many times the image as a kernel has entries.
    """
    if isinstance(layer, nn.Linear):
        rows = x.reshape(1, -1, layer.in_features)
        return rows[:, _draw(rows.shape[1], most, random)]
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    assert not isinstance(layer.padding, str)
    spans = [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    around = F.pad(x, [p for pad in reversed(layer.padding) for p in (pad, pad)])
    for axis, (span, stride) in enumerate(zip(spans, layer.stride, strict=True), start=2):
        around = around.unfold(axis, span, stride)  # (examples, channels, *outputs, *spans): nothing is copied
    outputs = around.shape[2 : 2 + len(spans)]
    picks = _draw(len(x) * prod(outputs), most, random)
    example, *place = torch.unravel_index(picks, (len(x), *outputs))
    met = around.movedim(1, -1 - len(spans))[example, *place]
    for axis, dilation in enumerate(layer.dilation, start=2):
        met = met.index_select(axis, torch.arange(0, met.shape[axis], dilation))
    return met.reshape(len(picks), layer.groups, -1).movedim(1, 0)


def _draw(count: int, most: int, random: torch.Generator) -> Tensor:
    """All of so many, or as many as `most` of them."""
    return torch.arange(count) if count <= most else torch.randperm(count, generator=random)[:most]


def _by_channel(energy: Tensor, layer: nn.Module) -> Tensor:
    """(groups, columns) as it is broadcast to a weight's rows."""
    if len(energy) == 1:
        return energy
    channels = len(layer.get_parameter("weight"))
    return energy.repeat_interleave(channels // len(energy), 0)


def _hook(name: str, read: Read) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read(name, module, (args[0] if args else kwargs["input"]).detach())

    return hook
