"""What channels that go have told is told by those that stay, as far as it can be.

Channels of one layer are like one another, so that those that stay foretell most of those that go.  The map with the
least squared error on what a layer has read is multiplied into its weights before they are cut (as in He et al., 2017,
arXiv 1707.06168), and what is constant of the rest is added to its bias: no training, a few small linear systems.
Which channels go is told by the same error, one after the other: Optimal Brain Surgeon for structures, as in ZipLM
(arXiv 2302.04089).
"""

from collections import Counter, defaultdict
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
"""Layers that read more (a Linear behind a flatten) are left alone: their moments would take more than 64 MB."""

STEPS = 128
"""In which the units of a group go; of more units several go at once."""


@dataclass(frozen=True)
class Moments:
    """Of what a layer has read, over examples and places; in float32, as all layers' are held at once."""

    mean: Tensor
    """(channels,)."""
    covariance: Tensor
    """(channels, channels)."""

    def products(self, *, with_mean: bool) -> Tensor:
        """Mean products of two channels in float64, of deviations from the mean if a constant can hold that."""
        found, mean = self.covariance.double(), self.mean.double()
        return found if with_mean else found + torch.outer(mean, mean)


@dataclass
class _Sums:
    """What has been read so far, less what the first example has on average, or else large means hide what varies."""

    about: Tensor
    total: Tensor
    products: Tensor
    count: int = 0

    @classmethod
    def about_first(cls, example: Tensor) -> "_Sums":
        mean = example.mean(1)
        return cls(mean, torch.zeros_like(mean), torch.zeros_like(torch.outer(mean, mean)))

    def add(self, example: Tensor) -> None:
        """(channels, places)."""
        off = example - self.about[:, None]
        self.total += off.sum(1)
        self.products += off @ off.mT
        self.count += off.shape[1]

    @property
    def moments(self) -> Moments:
        mean = self.total / self.count
        return Moments(self.about + mean, self.products / self.count - torch.outer(mean, mean))


@torch.no_grad()
def moments(model: nn.Module, graph: ModelGraph, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Moments]:
    """By layer, of those that read channels which can go and that mix what they read: dense Conv and Linear layers.

    A layer that shares its weight is left out, since others read something else, and so is one that has read what is
    not finite.
    """
    modules = dict(model.named_modules())
    able = [name for name in _readers(graph) if _mixes(modules[name]) and not graph.layer[name].shares_weight_with]
    sums: dict[str, _Sums] = {}

    def read(name: str, layer: nn.Module, x: Tensor) -> None:
        if not isinstance(layer, nn.Linear) and x.dim() < layer.get_parameter("weight").dim():
            return  # one example without its axis
        seen = x.reshape(1, -1, x.shape[-1]).mT if isinstance(layer, nn.Linear) else x.flatten(2)  # (_, channels, _)
        if name not in sums:
            sums[name] = _Sums.about_first(seen[0])
        for each in seen:  # nothing as large as all of a batch's channels squared
            sums[name].add(each)

    watch(model, able, batches, read)
    found = {name: each.moments for name, each in sums.items()}
    return {name: each for name, each in found.items() if each.covariance.isfinite().all()}


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
            layer, norm = modules[name], _norm_behind(name, norms, modules)
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
    reading = {group.name: [(_layer_of(axis), axis) for axis in _read(group)] for group in graph.groups}
    left = Counter(name for axes in reading.values() for name, _ in axes)
    known: dict[str, _Whole] = {}
    found: dict[str, Tensor] = {}
    for group in graph.groups:
        readers = []
        for name, axis in reading[group.name]:
            left[name] -= 1
            if name in seen:
                norm = _norm_behind(name, norms, modules)
                whole = known.pop(name, None) or _Whole.of(modules[name], seen[name], norm)
                readers.append(whole.part(axis))
                if left[name]:  # another group is read by it as well
                    known[name] = whole
        if readers:
            found[group.name] = _staying(readers, group.total)
        advance(group.name)
    return found


@dataclass(frozen=True)
class _Whole:
    """A layer whose inputs may go."""

    weights: Tensor
    """(inputs, outputs x places)."""
    inverse: Tensor
    """Of the mean products of its inputs, (inputs, inputs)."""
    written: Tensor
    """Mean square of what it writes."""

    @classmethod
    def of(cls, layer: nn.Module, seen: Moments, norm: nn.Module | None) -> "_Whole":
        products = seen.products(with_mean=_holds_a_mean(layer, norm))
        weights = _by_input(layer).double().flatten(1)
        written = (products @ weights * weights).sum().clamp(min=torch.finfo(torch.float32).tiny)
        return cls(weights, torch.cholesky_inverse(_factor(products)), written)

    def part(self, axis: Axis) -> "_Reader":
        """What it reads of one group: what goes there changes the inverse elsewhere, too, which is not asked for."""
        entries = torch.tensor(axis.entries)
        own = entries.flatten()
        places = torch.arange(len(own)).view(entries.shape)
        return _Reader(self.weights[own], self.inverse[own][:, own], self.written, places)


@dataclass
class _Reader:
    """A layer's weights for the units of a group, which go one after the other: those that are left tell those."""

    weights: Tensor
    """(inputs, outputs x places)."""
    inverse: Tensor
    """(inputs, inputs), noughts for those that are gone."""
    written: Tensor
    entries: Tensor
    """Inputs of each unit, (units, inputs of one)."""

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
        products = seen.products(with_mean=with_mean)
        weights = torch.cholesky_solve(products[stay][:, out], _factor(products[stay][:, stay]))
        mean = seen.mean.double() if with_mean else torch.zeros_like(seen.mean, dtype=torch.float64)
        constant = mean[out] - weights.T @ mean[stay]
        return cls(out, stay, weights, constant)


def _factor(products: Tensor) -> Tensor:
    """Of Cholesky, of the products with a ridge: larger than RIDGE where rounding has made some negative."""
    variance = products.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    ridge = RIDGE * variance * torch.ones_like(products.diagonal())
    factor, failed = torch.linalg.cholesky_ex(products + ridge.diag())
    while failed:
        ridge = 10 * ridge
        factor, failed = torch.linalg.cholesky_ex(products + ridge.diag())
    return factor


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


def _norm_behind(layer: str, norms: Pairs, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    return modules[norms[layer]] if layer in norms else None


def _holds_a_mean(layer: nn.Module, norm: nn.Module | None) -> bool:
    return layer._parameters.get("bias") is not None or getattr(norm, "running_mean", None) is not None


def _readers(graph: ModelGraph) -> list[str]:
    """Layers that read channels which can go."""
    found = (_layer_of(axis) for group in graph.groups for axis in _read(group))
    return [name for name in dict.fromkeys(found) if name in graph.layer]


def _read(group: Group) -> list[Axis]:
    return [axis for axis in group.axes if axis.role == "in" and axis.tensor.endswith(".weight")]


def _layer_of(axis: Axis) -> str:
    return axis.tensor.removesuffix(".weight")


def _entries_gone(graph: ModelGraph, kept: Mapping[str, tuple[int, ...]]) -> dict[str, set[int]]:
    """By layer, the inputs that will be cut; several groups may be read by one."""
    found: dict[str, set[int]] = defaultdict(set)
    for group in graph.groups:
        gone = set(range(group.total)) - set(kept[group.name])
        if 0 < len(gone) < group.total:
            for axis in _read(group):
                found[_layer_of(axis)] |= {at for unit in gone for at in axis.entries[unit]}
    return found


def _mixes(layer: nn.Module) -> bool:
    """Whether each of its outputs is made of all its inputs."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.groups == 1 and layer.in_channels <= MOST_CHANNELS
    return isinstance(layer, nn.Linear) and layer.in_features <= MOST_CHANNELS
