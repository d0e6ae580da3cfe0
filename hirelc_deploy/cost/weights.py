"""The weights of a network's files, as far as their bytes depend on policies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from hirelc_deploy.graph.model_graph import Layer, ModelGraph
from hirelc_deploy.kernels import load_format
from hirelc_deploy.kernels._base import LARGE
from hirelc_deploy.policy import Precision

BITS_A_BYTE = 8

Kind = tuple[object, ...]
"""What overheads go by."""


@dataclass(frozen=True)
class Positions:
    """Policies as positions in lists of options, (policies,) each."""

    options: Mapping[str, np.ndarray]
    """By layer."""
    counts: Mapping[str, np.ndarray]
    """By prune group."""

    def __len__(self) -> int:
        return len(next(iter(self.options.values())))


class Weight:
    """One weight of the file: its bytes by option and shape, overhead included once that is known."""

    def __init__(
        self, layer: Layer, options: tuple[Precision, ...], graph: ModelGraph, counts: Mapping[str, np.ndarray]
    ) -> None:
        self._name = layer.name
        self._options = options
        self._counts = counts
        self._vanishes_with = [g.name for g in graph.groups if g.vanishing and layer.name in g.vanishing.modules]
        self._extents = [_Extent(layer, axes, graph, counts) for axes in ([_output(layer)], _columns(layer))]
        shape = (len(options), *(len(extent.sizes) for extent in self._extents))
        # filled as shapes are asked for: a wide network has more of them than a search will see
        self._bytes = np.full(shape, np.nan)
        self._large = np.multiply.outer(*(extent.sizes for extent in self._extents)) >= LARGE
        self._overhead = np.zeros((len(options), 2))
        self._kinds = [[_kinds(layer.op, o, large) for large in (False, True)] for o in options]
        self.kinds = [kind for each in self._kinds for some in each for kind in some]

    def bytes_of(self, chosen: Positions) -> np.ndarray:
        """(policies,); nothing where the layer is gone."""
        taken, rows, columns = self._places(chosen)
        found = self._bytes[taken, rows, columns]
        if np.isnan(found).any():
            for place in set(zip(taken.tolist(), rows.tolist(), columns.tolist(), strict=True)):
                if np.isnan(self._bytes[place]):
                    self._bytes[place] = self._stored_bytes(*place)
            found = self._bytes[taken, rows, columns]
        return self.there(chosen) * (found + self._overhead[taken, self._is_large(rows, columns)])

    def elements(self, chosen: Positions) -> np.ndarray:
        """Of the weight, (policies,); none where the layer is gone."""
        _, rows, columns = self._places(chosen)
        channels, read = (extent.sizes for extent in self._extents)
        found: np.ndarray = self.there(chosen) * channels[rows] * read[columns]
        return found

    def table(self, by_kind: Mapping[Kind, float]) -> np.ndarray:
        """The sum of what the weight's kinds are given, by option and whether it is LARGE: (options, 2)."""
        return np.array([[sum(by_kind[kind] for kind in some) for some in each] for each in self._kinds])

    def look_up(self, table: np.ndarray, chosen: Positions) -> np.ndarray:
        """In such a table, or one with further axes: (policies, ...)."""
        taken, rows, columns = self._places(chosen)
        found: np.ndarray = table[taken, self._is_large(rows, columns)]
        return found

    def there(self, chosen: Positions) -> np.ndarray:
        """Whether the layer is still in the network, (policies,)."""
        here = np.ones(len(chosen), bool)
        for group in self._vanishes_with:
            here &= self._counts[group][chosen.counts[group]] > 0
        return here

    def count(self, kinds: Mapping[Kind, int], chosen: Positions) -> np.ndarray:
        """How many of each kind there are, (policies, kinds)."""
        table = np.zeros((len(self._options), 2, len(kinds)))
        for option, each in enumerate(self._kinds):
            for large, some in enumerate(each):
                table[option, large, [kinds[kind] for kind in some]] = 1
        return self.look_up(table, chosen) * self.there(chosen)[:, None]

    def overheads(self, by_kind: Mapping[Kind, float]) -> None:
        """Bytes of what decodes and surrounds the weight."""
        self._overhead = self.table(by_kind)

    def _is_large(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """As 0 or 1, (policies,)."""
        return self._large[rows, columns].astype(int)

    def _places(self, chosen: Positions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, columns = (extent.positions(chosen) for extent in self._extents)
        return chosen.options[self._name], rows, columns

    def _stored_bytes(self, option: int, row: int, column: int) -> float:
        channels, columns = (int(e.sizes[i]) for e, i in zip(self._extents, (row, column), strict=True))
        storage = self._options[option].storage
        if storage.is_float:
            return storage.bits // BITS_A_BYTE * channels * columns
        return load_format(storage.format).packed_bytes(channels, columns, storage) if channels * columns else 0.0


def _kinds(op: str, option: Precision, large: bool) -> tuple[Kind, ...]:
    """Nodes are those of a width and a format, of a granularity, and of a compute; LARGE weights have other ones."""
    storage = option.storage
    return (
        (storage.format, storage.bits, large),
        (str(storage.granularity), option.compute),
        (op, option.compute),
    )


class _Extent:
    """How long some axes of a weight are together, by what stays of the groups that cut them."""

    def __init__(self, layer: Layer, axes: Sequence[int], graph: ModelGraph, counts: Mapping[str, np.ndarray]) -> None:
        weight = graph.aliases.get(layer.weight, layer.weight)
        self._full = [layer.weight_shape[axis] for axis in axes]
        self._cuts: list[tuple[int, str, np.ndarray]] = [
            (axes.index(axis.axis), group.name, axis.per_unit * (group.total - counts[group.name]))
            for group in graph.groups
            for axis in group.axes
            if axis.tensor == weight and axis.axis in axes
        ]
        reachable = [{full} for full in self._full]
        for i, _, cuts in self._cuts:
            reachable[i] = {length - int(cut) for length in reachable[i] for cut in cuts}
        self.sizes = np.array(sorted({prod(lengths) for lengths in product(*reachable)}))
        """Every length that can occur, ascending."""

    def positions(self, chosen: Positions) -> np.ndarray:
        """In `sizes`, (policies,)."""
        lengths: list[np.ndarray | int] = [*self._full]
        for i, group, cuts in self._cuts:
            lengths[i] = lengths[i] - cuts[chosen.counts[group]]
        return np.broadcast_to(np.searchsorted(self.sizes, prod(lengths)), len(chosen))


def column_counts(layer: Layer, graph: ModelGraph, counts: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Every number of columns, of weights that one output channel reads, that a layer can come to have; ascending."""
    return _Extent(layer, _columns(layer), graph, {name: np.asarray(options) for name, options in counts.items()}).sizes


def _output(layer: Layer) -> int:
    return 1 if layer.op.startswith("ConvTranspose") else 0


def _columns(layer: Layer) -> list[int]:
    return [axis for axis in range(len(layer.weight_shape)) if axis != _output(layer)]


def weights_of(
    graph: ModelGraph, precisions: Mapping[str, Sequence[Precision]], counts: Mapping[str, Sequence[int]]
) -> list[Weight]:
    """Those of a file, by the options of each layer and group; counts ascend.

    Layers that share a weight have it once in the file: that of the first of them.
    """
    seen: dict[str, Layer] = {}
    for layer in graph.layers:
        seen.setdefault(graph.aliases.get(layer.weight, layer.weight), layer)
    arrays = {name: np.asarray(options) for name, options in counts.items()}
    return [Weight(layer, tuple(precisions[layer.name]), graph, arrays) for layer in seen.values()]


def kinds_of(weights: Sequence[Weight]) -> dict[Kind, int]:
    """All kinds that the weights can have, numbered."""
    return {kind: i for i, kind in enumerate(dict.fromkeys(kind for weight in weights for kind in weight.kinds))}


HELD_OUT = 4
"""Every so many-th sample judges a fit and is no part of it."""


def judging(samples: int) -> np.ndarray:
    """Which samples judge a fit, (samples,)."""
    return np.arange(samples) % HELD_OUT == HELD_OUT - 1


def mean_error(told: np.ndarray, exact: np.ndarray) -> float:
    """Relative, the mean of the absolute values; NaN of no samples."""
    return float(np.abs((told - exact) / exact).mean()) if len(exact) else float("nan")
