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


def integer_bounds(
    modules: Mapping[str, nn.Module], precisions: Mapping[str, Precision], *, largest: int
) -> dict[str, int]:
    """By layer, what bounds the integers of its weight: of layers that share one, the least that any of them bears."""
    weights = {name: modules[name].weight for name in precisions}
    bounds: dict[int, int] = {}
    for name, precision in precisions.items():
        key, bound = id(weights[name]), largest_integer(precision.compute, largest)
        bounds[key] = min(bound, bounds.get(key, bound))
    return {name: bounds[id(weight)] for name, weight in weights.items()}


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
    bounds = integer_bounds(modules, {name: precisions[name] for name in weights}, largest=largest)
    # layers that share a weight share its grid, fitted to what the first one reads
    for first, *_ in sharing.values():
        layer, weight = modules[first], weights[first]
        if first in norms:
            weight = weight * along_channels(channel_factor(modules[norms[first]]), layer)
        rows[first] = rows_of(weight, output_axis(layer))
        alike[precisions[first].storage, bounds[first]].append(first)
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
    bounds = integer_bounds(modules, {name: precisions[name] for name in grids}, largest=largest)
    for name, grid in grids.items():
        layer, storage = modules[name], precisions[name].storage
        weight = layer.get_parameter("weight")
        axis = output_axis(layer)
        on_grid = load_format(storage.format).quantise(rows_of(weight, axis), grid, storage, largest=bounds[name])
        weight.copy_(from_rows(on_grid, tuple(weight.shape), axis))
