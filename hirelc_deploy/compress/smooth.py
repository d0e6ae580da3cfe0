"""Channels scaled between a norm and the layers that read it, so that rounding spoils less of what they compute.

A norm's scale and shift may make a channel s times as large if all its readers have weights 1 / s as large.
Activations with a few wide channels are evened out so (SmoothQuant, arXiv 2211.10438), and weights that much is read
through get finer steps (AWQ, arXiv 2306.00978).  How far either should go is tried: whichever factors leave the least
error behind the readers, rounded as they will be, are taken.  That nothing else reads a norm is proved by running the
network.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hirelc_deploy.compress.inputs import SEED, Batches, columns_at, watch
from hirelc_deploy.compress.scaling import MOST_OCTAVES, proved
from hirelc_deploy.compress.simulate import ActivationGrid
from hirelc_deploy.graph import PROOF_EXAMPLES
from hirelc_deploy.graph.layers import OPERATORS, storage_of
from hirelc_deploy.kernels import load_format
from hirelc_deploy.kernels._base import largest_integer
from hirelc_deploy.policy import Compute, Precision

Propose = Callable[[nn.Module, Iterable[Mapping[str, Tensor]]], Mapping[str, Mapping[str, Tensor]]]
"""Factors that somebody else would take for a model, seen on these examples: by what they are made by and by layer that
reads them, each (channels,)."""

STRENGTHS = (0.25, 0.5, 0.75)
"""Exponents that are tried: 0 leaves everything as it is."""

MOST_ROWS = 256
"""Of a batch, drawn at random, by which factors are compared; ranges are those of all."""

DEAD = 1e-5
"""Of the widest channel: one below it is taken to be so wide."""


@dataclass(frozen=True)
class Pair:
    """A norm and the Linear layers that read it, and nothing else does."""

    name: str
    """The norm's."""
    readers: tuple[str, ...]
    vectors: tuple[str, ...]
    """The norm's parameters."""
    channels: int

    @property
    def shape(self) -> tuple[int]:
        """Of the octaves of what the norm writes."""
        return (self.channels,)

    def scale(self, tensors: Mapping[str, Tensor], octaves: Tensor) -> None:
        """In place, parameters by name; the factor of what the norm writes is 2 to the power of `octaves`."""
        factor = octaves.exp2()
        for vector in self.vectors:
            tensors[vector].mul_(factor)
        for reader in self.readers:
            tensors[f"{reader}.weight"].div_(factor)


@torch.no_grad()
def smooth(
    model: nn.Module,
    precisions: Mapping[str, Precision],
    batches: Batches,
    *,
    largest: int,
    is_symmetric: bool,
    propose: Propose | None = None,
) -> dict[str, str]:
    """Scale in place, in a model that has its BatchNorms folded; by norm, what the factors were made by.

    `batches` gives the calibration examples, `largest` bounds the integers of int8 layers, and `is_symmetric` says
    whether the runtime has activations around nought.  What is proposed is tried beside what is made here.
    """
    example = {name: tensor[:PROOF_EXAMPLES] for name, tensor in next(iter(batches())).items()}
    stored = {name for name, precision in precisions.items() if not precision.storage.is_float}
    found = [pair for pair in pairs(model, example) if stored & set(pair.readers)]
    if not found:
        return {}
    proposed = {} if propose is None else propose(model, batches())
    seen = _watched(model, [name for pair in found for name in pair.readers if name in stored], batches)
    tensors = dict(model.named_parameters())
    taken = {}
    for pair in found:
        readers = [
            _Reader(model.get_submodule(name).get_parameter("weight"), precisions[name], seen[name])
            for name in pair.readers
            if name in stored
        ]
        trial = _Trial(readers, largest=largest, is_symmetric=is_symmetric)
        factors = {**trial.candidates(), **_for_pair(proposed, pair)}
        errors = {by: trial.error(factor) for by, factor in factors.items()}
        best = min(errors, key=errors.__getitem__)
        if errors[best] < trial.error(torch.zeros(pair.shape)):
            pair.scale(tensors, factors[best])
            taken[pair.name] = best
    return taken


@torch.no_grad()
def pairs(model: nn.Module, example: Mapping[str, Tensor]) -> list[Pair]:
    """Those that any factor can be moved across, in the order in which the norms are called."""
    return proved(model, _found(model, example), example)


def _found(model: nn.Module, example: Mapping[str, Tensor]) -> list[Pair]:
    """Norms whose very output Linear layers are called with, whoever else may read it."""
    written: dict[int, str] = {}
    held: list[Tensor] = []  # no other tensor may get the storage of one that is gone
    sources: dict[str, set[str | None]] = defaultdict(set)

    def write(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                written[storage_of(output)] = name
                held.append(output)

        return hook

    def read(name: str, _layer: nn.Module, x: Tensor) -> None:
        held.append(x)
        sources[name].add(written.get(storage_of(x)))

    modules = dict(model.named_modules())
    hooks = [module.register_forward_hook(write(name)) for name, module in modules.items() if _is_norm(module)]
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    holders = Counter(id(each) for module in modules.values() for each in module.parameters(recurse=False))
    try:
        watch(model, linear, [example], read)
    finally:
        for hook in hooks:
            hook.remove()
    readers: dict[str, list[str]] = {name: [] for name in written.values()}
    for name, (source, *others) in sources.items():
        if source is not None and not others and holders[id(linear[name].weight)] == 1:
            readers[source].append(name)
    return [
        _pair(norm, modules[norm], names)
        for norm, names in readers.items()
        if names and all(linear[name].in_features == len(modules[norm].get_parameter("weight")) for name in names)
    ]


def _pair(name: str, norm: nn.Module, readers: Iterable[str]) -> Pair:
    vectors = tuple(f"{name}.{key}" for key, _ in norm.named_parameters(recurse=False))
    return Pair(name, tuple(readers), vectors, len(norm.get_parameter("weight")))


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has a scale of its own, and nothing but vectors as long."""
    weight = module._parameters.get("weight")
    own = list(module.parameters(recurse=False))
    return weight is not None and not isinstance(module, OPERATORS) and all(p.shape == (len(weight),) for p in own)


@dataclass
class _Seen:
    """What a layer read."""

    low: Tensor
    """The least of each channel, (channels,), and none above nought."""
    high: Tensor
    sample: list[Tensor] = field(default_factory=list)
    """Rows, (MOST_ROWS, channels) of each batch."""

    @cached_property
    def rows(self) -> Tensor:
        return torch.cat(self.sample)


def _watched(model: nn.Module, layers: Iterable[str], batches: Batches) -> dict[str, _Seen]:
    random = torch.Generator().manual_seed(SEED)
    seen: dict[str, _Seen] = {}

    def read(name: str, layer: nn.Module, x: Tensor) -> None:
        rows = x.flatten(0, -2)
        each = seen.setdefault(name, _Seen(*torch.zeros(2, rows.shape[1])))
        each.low = each.low.minimum(rows.amin(0))
        each.high = each.high.maximum(rows.amax(0))
        each.sample.append(columns_at(layer, x, MOST_ROWS, random)[0])

    watch(model, layers, batches(), read)
    return seen


@dataclass(frozen=True)
class _Reader:
    weight: Tensor
    precision: Precision
    seen: _Seen


class _Trial:
    """How far the readers' outputs are off, for one norm and any factors."""

    def __init__(self, readers: Sequence[_Reader], *, largest: int, is_symmetric: bool) -> None:
        self._readers = readers
        self._largest = largest
        self._is_symmetric = is_symmetric

    def candidates(self) -> dict[str, Tensor]:
        """Octaves that may be tried, by what they are made by."""
        seen = [reader.seen for reader in self._readers]
        reach = _alive(torch.stack([torch.maximum(-each.low, each.high) for each in seen]).amax(0))
        size = _alive(torch.stack([each.rows.abs().mean(0) for each in seen]).mean(0))
        weights = _alive(torch.stack([reader.weight.abs().amax(0) for reader in self._readers]).amax(0))
        found = {}
        for strength in STRENGTHS:
            found[f"SmoothQuant, {strength}"] = _centred(weights ** (1 - strength) / reach**strength)
            found[f"AWQ, {strength}"] = _centred(size**-strength)
        return found

    def error(self, octaves: Tensor) -> float:
        """Squared, relative to the outputs, summed over the readers."""
        factor = octaves.exp2()
        return sum(self._error_of(reader, factor) for reader in self._readers)

    def _error_of(self, reader: _Reader, factor: Tensor) -> float:
        storage, compute, seen = reader.precision.storage, reader.precision.compute, reader.seen
        numbers, most = load_format(storage.format), largest_integer(compute, self._largest)
        read = seen.rows * factor
        scaled = reader.weight / factor
        grid = numbers.fit(scaled, storage, largest=most, energy=read.square().mean(0, keepdim=True))
        on_grid = numbers.quantise(scaled, grid, storage, largest=most)
        if compute in (Compute.INT8, Compute.INT8_DYNAMIC):
            low, high = (seen.low * factor).min(), (seen.high * factor).max()
            read = ActivationGrid(low, high, is_symmetric=self._is_symmetric).round(read)
        expected = seen.rows @ reader.weight.T
        off = read @ on_grid.T - expected
        return float(off.square().sum() / expected.square().sum().clamp(min=torch.finfo(torch.float32).tiny))


def _for_pair(proposed: Mapping[str, Mapping[str, Tensor]], pair: Pair) -> dict[str, Tensor]:
    """The geometric mean of what is proposed for layers that read the same norm."""
    found = {}
    for by, factors in proposed.items():
        given = [_alive(factors[name]).log2() for name in pair.readers if name in factors]
        if given:
            found[by] = _centred(torch.stack(given).mean(0).exp2())
    return found


def _alive(sizes: Tensor) -> Tensor:
    """Positive, whatever is zero."""
    return sizes.clamp(min=float(sizes.max()) * DEAD) if sizes.any() else torch.ones_like(sizes)


def _centred(factor: Tensor) -> Tensor:
    """The octaves, with a mean of nought and no channel beyond MOST_OCTAVES."""
    octaves = factor.log2()
    return (octaves - octaves.mean()).clamp(-MOST_OCTAVES, MOST_OCTAVES)
