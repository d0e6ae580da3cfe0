"""The grid of every layer's weight, fitted to the network as it stands, and weights put on it."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hirelc_deploy.compress.fold import Pairs, along_channels, channel_factor
from hirelc_deploy.kernels import load_format
from hirelc_deploy.kernels._base import Grid, from_rows, largest_integer, rows_of
from hirelc_deploy.policy import Precision, Storage


def output_axis(layer: nn.Module) -> int:
    """The axis of a weight's output channels, as PyTorch has it."""
    return 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0


@torch.no_grad()
def fitted(
    model: nn.Module,
    precisions: Mapping[str, Precision],
    energies: Mapping[str, Tensor],
    *,
    largest: int,
    norms: Pairs | None = None,
) -> dict[str, Grid]:
    """A grid for every layer of the model that is stored in a number format, with its BatchNorm folded in.

    `energies` gives, by layer, how much each weight's error counts (`inputs.energies`); without, all count alike.
    """
    norms = norms or {}
    modules = dict(model.named_modules())
    rows: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    sharing: dict[int, list[str]] = defaultdict(list)
    for name, precision in precisions.items():
        weight = getattr(modules.get(name), "weight", None)
        if isinstance(weight, Tensor) and not precision.storage.is_float:
            weights[name] = weight
            sharing[id(weight)].append(name)
    alike: dict[tuple[Storage, int], list[str]] = defaultdict(list)
    # layers that share a weight share its grid, fitted to what the first one reads, and to the least that one bears
    for first, *others in sharing.values():
        layer, weight = modules[first], weights[first]
        if first in norms:
            weight = weight * along_channels(channel_factor(modules[norms[first]]), layer)
        rows[first] = rows_of(weight, output_axis(layer))
        most = min(largest_integer(precisions[name].compute, largest) for name in (first, *others))
        alike[precisions[first].storage, most].append(first)
    grids: dict[str, Grid] = {}
    for (storage, most), names in alike.items():
        found = load_format(storage.format).fit_all(
            [rows[name] for name in names], storage, largest=most, energies=[energies.get(name) for name in names]
        )
        grids |= dict(zip(names, found, strict=True))
    return grids | {name: grids[first] for first, *others in sharing.values() for name in others}


@torch.no_grad()
def put_on(model: nn.Module, precisions: Mapping[str, Precision], grids: Mapping[str, Grid], *, largest: int) -> None:
    """Replace each weight by the value on its grid: the numbers that the file decodes to."""
    modules = dict(model.named_modules())
    for name, grid in grids.items():
        layer, precision = modules[name], precisions[name]
        weight = layer.get_parameter("weight")
        axis = output_axis(layer)
        on_grid = load_format(precision.storage.format).quantise(
            rows_of(weight, axis), grid, precision.storage, largest=largest_integer(precision.compute, largest)
        )
        weight.copy_(from_rows(on_grid, tuple(weight.shape), axis))
