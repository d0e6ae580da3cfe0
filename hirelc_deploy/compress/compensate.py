"""What channels that go have told is told by those that stay, as far as it can be.

Channels of one layer are like one another, so that those that stay foretell most of those that go.  The map with the
least squared error on what a layer has read is multiplied into its weights before they are cut (as in He et al., 2017,
arXiv 1707.06168), and what is constant of the rest is added to its bias: no training, a few small linear systems.
Which channels go is told by the same error, one after the other: Optimal Brain Surgeon for structures, as in ZipLM
(arXiv 2302.04089).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
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


STEPS = 128
"""In which the units of a group go; of more units several go at once."""


@dataclass
class Moments:
    """Of what a layer has read, over examples and places."""

    mean: Tensor
    """(channels,), float64."""
    products: Tensor
    """Mean products of two channels, (channels, channels), float64."""

    def about(self, *, with_mean: bool) -> Tensor:
        """Mean products, of deviations from the mean if that can be held by a constant."""
        return self.products - torch.outer(self.mean, self.mean) if with_mean else self.products


@torch.no_grad()
def moments(model: nn.Module, graph: ModelGraph, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Moments]:
    """By layer, of those that read channels which can go and that mix what they read: dense Conv and Linear layers.

    A layer that shares its weight is left out, since others read something else, and so is one that has read what is
    not finite.
    """
    modules = dict(model.named_modules())
    able = [name for name in _readers(graph) if _mixes(modules[name]) and not graph.layer[name].shares_weight_with]
    sums: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}
    counts: dict[str, int] = defaultdict(int)

    def read(name: str, layer: nn.Module, x: Tensor) -> None:
        if not isinstance(layer, nn.Linear) and x.dim() < layer.get_parameter("weight").dim():
            return  # one example without its axis
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
    return {
        name: Moments(total / counts[name], products[name] / counts[name])
        for name, total in sums.items()
        if products[name].isfinite().all()
    }


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


@torch.no_grad()
def staying(
    model: nn.Module,
    graph: ModelGraph,
    seen: Mapping[str, Moments],
    norms: Pairs,
    *,
    advance: Callable[[str], None] = lambda _: None,
) -> dict[str, Tensor]:
    """By group, how long each of its units stays where always the one goes that the others tell best: (units,).

    What it costs that a unit goes is what all layers that read it then err by, in parts of what they write.  Groups of
    whose readers nothing was `seen` are left out.  `advance` is called after each group.
    """
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}
    for group in graph.groups:
        readers = []
        for axis in _read(group):
            name = axis.tensor.removesuffix(".weight")
            if name in seen:
                layer = modules[name]
                with_mean = _holds_a_mean(layer, modules[norms[name]] if name in norms else None)
                readers.append(_Reader.of(layer, seen[name].about(with_mean=with_mean), axis))
        if readers:
            found[group.name] = _staying(readers, group.total)
        advance(group.name)
    return found


@dataclass
class _Reader:
    """A layer whose inputs go one after the other, its weights changed for each that is gone."""

    weights: Tensor
    """(inputs, outputs x places)."""
    inverse: Tensor
    """Of the mean products of the inputs that are left, (inputs, inputs); noughts for the others."""
    written: Tensor
    """Mean square of what it writes."""
    entries: Tensor
    """Inputs of each unit, (units, inputs of one)."""

    @classmethod
    def of(cls, layer: nn.Module, products: Tensor, axis: Axis) -> "_Reader":
        weights = _by_input(layer).double().flatten(1).clone()
        written = (products @ weights * weights).sum().clamp(min=torch.finfo(torch.float32).tiny)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(_ridged(products)))
        return cls(weights, inverse, written, torch.tensor(axis.entries))

    @property
    def costs(self) -> Tensor:
        """What it errs by for each unit that goes next."""
        own = self.inverse.diagonal().clamp(min=torch.finfo(torch.float64).tiny)
        return (self.weights.square().sum(1) / own)[self.entries].sum(1) / self.written

    def without(self, units: Tensor) -> None:
        gone = self.entries[units].flatten()
        columns = self.inverse[:, gone]
        told = torch.linalg.solve(columns[gone], columns.mT).mT
        self.weights -= told @ self.weights[gone]
        self.inverse -= told @ columns.mT
        self.weights[gone] = 0.0


def _staying(readers: list[_Reader], units: int) -> Tensor:
    steps = torch.full((units,), torch.inf, dtype=torch.float64)
    at_once = -(-units // STEPS)
    for step in range(0, units, at_once):
        left = steps.isinf()
        costs = torch.stack([reader.costs for reader in readers]).sum(0)
        order = torch.where(left, costs, torch.inf).argsort(stable=True)
        going = order[: min(at_once, int(left.sum()))]
        steps[going] = step + torch.arange(len(going), dtype=torch.float64)
        for reader in readers:
            reader.without(going)
    return steps


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
        goes = torch.zeros_like(seen.mean, dtype=torch.bool)
        goes[list(gone)] = True
        out, stay = goes.nonzero()[:, 0], (~goes).nonzero()[:, 0]
        products = seen.about(with_mean=with_mean)
        weights = torch.linalg.solve(_ridged(products[stay][:, stay]), products[stay][:, out])
        constant = seen.mean[out] - weights.T @ seen.mean[stay] if with_mean else torch.zeros_like(seen.mean[out])
        return cls(out, stay, weights, constant)


def _ridged(products: Tensor) -> Tensor:
    variance = products.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return products + (RIDGE * variance * torch.ones_like(products.diagonal())).diag()


def _spread(layer: nn.Module, told: _Told, norm: nn.Module | None) -> None:
    by_input = _by_input(layer)
    lost = by_input[told.gone].double()  # (channels that go, outputs, *places)
    by_input[told.stay] += torch.tensordot(told.weights, lost, dims=1).to(by_input.dtype)
    shift = torch.tensordot(told.constant, lost.flatten(2).sum(2) if lost.dim() > 2 else lost, dims=1)
    bias = layer._parameters.get("bias")
    if bias is not None:
        bias.add_(shift.to(bias.dtype))
    elif norm is not None:
        norm.get_buffer("running_mean").sub_(shift)


def _by_input(layer: nn.Module) -> Tensor:
    """A view of a layer's weight with its inputs first."""
    weight = layer.get_parameter("weight")
    return weight if isinstance(layer, nn.modules.conv._ConvTransposeNd) else weight.transpose(0, 1)


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
