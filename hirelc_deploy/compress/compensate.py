"""What channels that go have told is told by those that stay, as far as it can be.

Channels of one layer are like one another, so that those that stay foretell most of those that go.  The map with the
least squared error on what a layer has read is multiplied into its weights before they are cut (as in He et al., 2017,
arXiv 1707.06168), and what is constant of the rest is added to its bias: no training, a few small linear systems.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hirelc_deploy.compress.fold import Pairs
from hirelc_deploy.compress.inputs import watch
from hirelc_deploy.graph.model_graph import Axis, Group, ModelGraph

RIDGE = 1e-3
"""Of the mean variance of the channels that stay, added to each of them: what is seen on few examples is not followed
to the end."""

MOST_CHANNELS = 4096
"""Layers that read more (a Linear behind a flatten) are left alone: their moments would take more than 128 MB."""


@dataclass
class Moments:
    """Of what a layer has read, over examples and places."""

    mean: Tensor
    """(channels,), float64."""
    products: Tensor
    """Mean products of two channels, (channels, channels), float64."""

    @property
    def covariance(self) -> Tensor:
        return self.products - torch.outer(self.mean, self.mean)


@torch.no_grad()
def moments(model: nn.Module, graph: ModelGraph, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Moments]:
    """By layer, of those that read channels which can go and that mix what they read: dense Conv and Linear layers.

    A layer that shares its weight is left out, since others read something else.
    """
    modules = dict(model.named_modules())
    able = [name for name in _readers(graph) if _mixes(modules[name]) and not graph.layer[name].shares_weight_with]
    sums: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}
    counts: dict[str, int] = defaultdict(int)

    def read(name: str, layer: nn.Module, x: Tensor) -> None:
        seen = x.reshape(1, -1, x.shape[-1]).mT if isinstance(layer, nn.Linear) else x.flatten(2)  # (_, channels, _)
        channels = seen.shape[1]
        if name not in sums:
            sums[name] = x.new_zeros(channels, dtype=torch.float64)
            products[name] = x.new_zeros(channels, channels, dtype=torch.float64)
        for each in seen:  # nothing as large as all of a batch's channels squared
            sums[name] += each.sum(1)
            products[name] += each @ each.mT
        counts[name] += len(seen) * seen.shape[2]

    watch(model, able, batches, read)
    return {name: Moments(total / counts[name], products[name] / counts[name]) for name, total in sums.items()}


@torch.no_grad()
def compensate(
    model: nn.Module,
    graph: ModelGraph,
    kept: Mapping[str, tuple[int, ...]],
    seen: Mapping[str, Moments],
    norms: Pairs,
) -> None:
    """Change weights in place, of a model whose channels are all there, for those that will be gone.

    `kept` gives the units of each group that stay, `seen` what `moments` found, and `norms` the BatchNorms that can be
    folded, by layer: without a bias, the mean of such a norm takes its place.  Groups of which no unit stays are left,
    as they go with the branch that reads them.
    """
    modules = dict(model.named_modules())
    for name, gone in _entries_gone(graph, kept).items():
        if name in seen:
            layer = modules[name]
            norm = modules[norms[name]] if name in norms else None
            _spread(layer, _Told.by(seen[name], gone, with_mean=_holds_a_mean(layer, norm)), norm)


@dataclass(frozen=True)
class _Told:
    """Channels that go, as those that stay foretell them: gone = weights.T @ stay + constant."""

    gone: Tensor
    stay: Tensor
    weights: Tensor
    """(channels that stay, channels that go)."""
    constant: Tensor

    @classmethod
    def by(cls, seen: Moments, gone: Iterable[int], *, with_mean: bool) -> "_Told":
        """With the least squared error; without a mean, through the origin."""
        goes = torch.zeros(len(seen.mean), dtype=torch.bool)
        goes[list(gone)] = True
        out, stay = goes.nonzero()[:, 0], (~goes).nonzero()[:, 0]
        products = seen.covariance if with_mean else seen.products
        own = products[stay][:, stay]
        variance = own.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        ridge = RIDGE * variance * torch.eye(len(stay), dtype=own.dtype)
        weights = torch.linalg.solve(own + ridge, products[stay][:, out])
        constant = seen.mean[out] - weights.T @ seen.mean[stay] if with_mean else torch.zeros_like(seen.mean[out])
        return cls(out, stay, weights, constant)


def _spread(layer: nn.Module, told: _Told, norm: nn.Module | None) -> None:
    weight = layer.get_parameter("weight")
    by_input = weight if isinstance(layer, nn.modules.conv._ConvTransposeNd) else weight.transpose(0, 1)
    lost = by_input[told.gone].double()  # (channels that go, outputs, *places)
    by_input[told.stay] += torch.tensordot(told.weights, lost, dims=1).to(weight.dtype)
    shift = torch.tensordot(told.constant, lost.flatten(2).sum(2) if lost.dim() > 2 else lost, dims=1)
    bias = layer._parameters.get("bias")
    if bias is not None:
        bias.add_(shift.to(bias.dtype))
    elif norm is not None:
        norm.get_buffer("running_mean").sub_(shift)


def _holds_a_mean(layer: nn.Module, norm: nn.Module | None) -> bool:
    return layer._parameters.get("bias") is not None or getattr(norm, "running_mean", None) is not None


def _readers(graph: ModelGraph) -> list[str]:
    """Layers that read channels which can go."""
    found = (axis.tensor.removesuffix(".weight") for group in graph.groups for axis in _read(group))
    return [name for name in dict.fromkeys(found) if name in graph.layer]


def _read(group: Group) -> list[Axis]:
    return [axis for axis in group.axes if axis.role == "in" and axis.tensor.endswith(".weight")]


def _entries_gone(graph: ModelGraph, kept: Mapping[str, tuple[int, ...]]) -> dict[str, set[int]]:
    """By layer, the inputs that will be cut; several groups may be read by one."""
    found: dict[str, set[int]] = defaultdict(set)
    for group in graph.groups:
        gone = set(range(group.total)) - set(kept[group.name])
        if 0 < len(gone) < group.total:
            for axis in _read(group):
                found[axis.tensor.removesuffix(".weight")] |= {at for unit in gone for at in axis.entries[unit]}
    return found


def _mixes(layer: nn.Module) -> bool:
    """Whether each of its outputs is made of all its inputs."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.groups == 1 and layer.in_channels <= MOST_CHANNELS
    return isinstance(layer, nn.Linear) and layer.in_features <= MOST_CHANNELS
