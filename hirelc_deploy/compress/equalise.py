"""Channels scaled between layers, so that what a grid has to span is even (Data-Free Quantization, arXiv 1906.04721).

Where only what is positively homogeneous (a ReLU, a pool) lies between two layers, a channel may leave the first one s
times as large if the second one reads it with weights 1 / s as large.  Which channels of which tensors belong together
is what a network's prune groups say; that nothing else is between is proved by running it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hirelc_deploy.compress.scaling import MOST_OCTAVES, proved
from hirelc_deploy.graph.layers import Conv
from hirelc_deploy.graph.model_graph import Group, ModelGraph
from hirelc_deploy.graph.proof import cuts_of
from hirelc_deploy.graph.slicing import is_depthwise

ROUNDS = 10
"""The last layer of a chain is the first one of the next: ranges settle in a few rounds."""

Kept = Mapping[str, Sequence[int]]
"""By group the units that a pruned network still has, as `Pruned.kept`."""


@dataclass(frozen=True)
class _Place:
    """Where a chain's units lie on one axis of one tensor."""

    tensor: str
    axis: int
    entries: Tensor
    """(units, entries a unit)."""


@dataclass(frozen=True)
class _Stage:
    """One layer of a chain, or all that read the channels of the last one."""

    weights: tuple[_Place, ...]
    bias: _Place | None = None


@dataclass(frozen=True)
class _Chain:
    """Layers that hand on the same channels: one that makes them, depthwise convolutions as they are called, readers.

    The channels that stage i writes are scaled by c[i]; so its weight is by c[i] / c[i - 1], where c is 1 at both ends.
    """

    name: str
    """The prune group's."""
    stages: tuple[_Stage, ...]

    @property
    def units(self) -> int:
        return len(self.stages[0].weights[0].entries)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the octaves of c, which is 1 behind the last stage."""
        return len(self.stages) - 1, self.units

    def scale(self, tensors: Mapping[str, Tensor], octaves: Tensor) -> None:
        """Scale in place; `octaves` is log2 c, (stages - 1, units)."""
        ends = octaves.new_zeros(1, self.units)
        by_weight = torch.cat([octaves, ends]).diff(dim=0, prepend=ends).exp2()
        for stage, factor in zip(self.stages, by_weight, strict=True):
            for place in stage.weights:
                _scale(tensors[place.tensor], place, factor)
        for stage, factor in zip(self.stages, octaves.exp2(), strict=False):
            if stage.bias is not None:
                _scale(tensors[stage.bias.tensor], stage.bias, factor)

    def even(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The octaves that give a channel's weights the same range in all stages; 0 for a channel that is dead."""
        ranges = torch.stack(
            [torch.stack([_ranges(tensors[p.tensor], p) for p in stage.weights]).amax(0) for stage in self.stages]
        )
        alive = (ranges > 0).all(0)
        octaves = torch.where(alive, ranges, 1.0).log2()
        return (octaves.mean(0) - octaves).cumsum(0)[:-1]


@torch.no_grad()
def equalise(
    model: nn.Module, graph: ModelGraph, example: Mapping[str, Tensor], *, kept: Kept | None = None
) -> list[str]:
    """Even out ranges in place, in a model that has its norms folded; the names of the groups whose channels were.

    `graph` is that of the model before norms were folded and, where it was pruned, before `kept` was what it has.
    """
    tensors = dict(model.named_parameters())
    chains = proved(model, _chains(model, graph, kept), example)
    reached = {chain.name: torch.zeros(chain.shape) for chain in chains}
    for _ in range(ROUNDS):
        for chain in chains:
            before = reached[chain.name]
            reached[chain.name] = (before + chain.even(tensors)).clamp(-MOST_OCTAVES, MOST_OCTAVES)
            chain.scale(tensors, reached[chain.name] - before)
    return list(reached)


def _chains(model: nn.Module, graph: ModelGraph, kept: Kept | None) -> list[_Chain]:
    """Of the groups that may be scaled: one layer makes the channels, others read them, none shares a weight."""
    shared = set(graph.aliases.values())
    chains = []
    for group, axes in _axes_left(graph, kept):
        chain = _chain(model, graph, group, axes)
        if chain is not None and not shared & {place.tensor for stage in chain.stages for place in stage.weights}:
            chains.append(chain)
    return chains


def _chain(model: nn.Module, graph: ModelGraph, group: Group, axes: Sequence[_Place]) -> _Chain | None:
    modules = dict(model.named_modules())
    roles = {(axis.tensor, axis.axis): axis.role for axis in group.axes}
    makers, between, readers = [], {}, []
    for place in axes:
        owner, _, key = place.tensor.rpartition(".")
        layer = modules.get(owner)
        if key != "weight" or not isinstance(layer, Conv | nn.Linear):
            continue  # norms are folded; a bias goes with its weight; if there is anything else, the proof fails
        if roles[place.tensor, place.axis] == "in":
            readers.append(place)
        elif is_depthwise(layer):
            between[owner] = place
        else:
            makers.append(place)
    if len(makers) != 1 or not readers:
        return None
    inner = [_stage(modules, between[name]) for name in graph.layer if name in between]
    return _Chain(group.name, (_stage(modules, makers[0]), *inner, _Stage(tuple(readers))))


def _stage(modules: Mapping[str, nn.Module], weight: _Place) -> _Stage:
    """A layer that writes the channels, with the bias that it may only have since its norm was folded."""
    owner = weight.tensor.rpartition(".")[0]
    bias = None if modules[owner].bias is None else _Place(f"{owner}.bias", 0, weight.entries)
    return _Stage((weight,), bias)


def _axes_left(graph: ModelGraph, kept: Kept | None) -> Iterator[tuple[Group, list[_Place]]]:
    """Every group that a pruned network still has, with where its units lie now."""
    stay = {group.name: (kept or {}).get(group.name, range(group.total)) for group in graph.groups}
    left = [group for group in graph.groups if stay[group.name]]
    cuts = cuts_of((group, set(range(group.total)) - set(stay[group.name])) for group in left)
    for group in left:
        places = []
        for axis in group.axes:
            gone = torch.tensor(sorted(cuts[axis.tensor, axis.axis]), dtype=torch.long)
            before = torch.tensor([axis.entries[unit] for unit in stay[group.name]])
            places.append(_Place(axis.tensor, axis.axis, before - torch.searchsorted(gone, before)))
        yield group, places


def _scale(tensor: Tensor, place: _Place, factor: Tensor) -> None:
    """Multiply in place, unit by unit."""
    every = torch.ones(tensor.shape[place.axis])
    every[place.entries] = factor[:, None].expand_as(place.entries)
    tensor.mul_(every.reshape(-1, *[1] * (tensor.dim() - 1 - place.axis)))


def _ranges(tensor: Tensor, place: _Place) -> Tensor:
    """The largest absolute value that each unit has: (units,)."""
    by_entry = tensor.abs().movedim(place.axis, 0).flatten(1).amax(1)
    return by_entry[place.entries].amax(1)
