"""What a search is offered: of every choice that network and target allow, those that are worth trying.

Storages that smaller ones round as well as, and integers where 8 bits do not hold the inputs, are left out.
"""

import math
from functools import cached_property
from typing import TYPE_CHECKING

from hirelc_deploy.cost.weights import column_counts
from hirelc_deploy.effects import Effects
from hirelc_deploy.kernels import load_format
from hirelc_deploy.policy import FP16, FP32, Compute, PerChannel, PerGroup, Policy, Precision, Storage
from hirelc_deploy.search.problem import GroupVariable, LayerVariable, Variable
from hirelc_deploy.search.recipe import Recipe

if TYPE_CHECKING:
    from hirelc_deploy.cost.predictor import Predictor
    from hirelc_deploy.graph.model_graph import Layer
    from hirelc_deploy.workbench import Workbench

RECIPE_BITS = (8, 6, 4, 3, 2)
"""Of a recipe's weights."""

RECIPE_KEEP_PERCENT = (100.0, 75.0, 62.5, 50.0, 37.5, 25.0, 18.75, 12.5)

TIMED_KEEP_PERCENT = (100.0, 50.0, 25.0)
"""Of the recipes whose files correct the predicted latency."""

MENU_LAYERS = 3
"""The largest ones: what their weights are stored in is most of a file."""

LEAST_GAIN = 0.4
"""A storage is offered if its squared error is less by this part than that of each smaller one; a bit makes it a
quarter."""


class Offers:
    """Of one workbench's network."""

    def __init__(self, bench: "Workbench", effects: Effects) -> None:
        self._bench = bench
        self._graph = bench.graph
        self._effects = effects

    @cached_property
    def variables(self) -> tuple[Variable, ...]:
        """Layers first, in the order of the forward pass, then groups."""
        space, graph = self._bench.space, self._graph
        layers = [
            LayerVariable(name, self._options(name), (graph.block_of[name],), graph.layer[name].shares_weight_with)
            for name in space.layers
        ]
        groups = [
            GroupVariable(
                f"units of {group.name}", space.groups[group.name], group.blocks, group.name, group.gone_at_zero
            )
            for group in graph.groups
        ]
        return (*layers, *groups)

    def _options(self, layer: str) -> tuple[Precision, ...]:
        """Of layers that share a weight what all of them may take, in one order."""
        space, together = self._bench.space, {layer, *self._graph.layer[layer].shares_weight_with}
        first, *others = (name for name in space.layers if name in together)
        return tuple(
            option
            for option in space.layers[first]
            if self._is_offered(first, option)
            and all(option in space.layers[name] and self._is_offered(name, option) for name in others)
        )

    def _is_offered(self, layer: str, option: Precision) -> bool:
        if option.storage.is_float:
            return True
        return (
            option.storage in self.menu
            and option.compute in self._bench.latencies.computes_allowed[layer]
            and self._has_whole_groups(layer, option)
        )

    def _has_whole_groups(self, layer: str, option: Precision) -> bool:
        """Where weights are held as they are computed with, their groups have to come out even, however few
        channels stay."""
        granularity = option.storage.granularity
        if self._bench.target.precisions is None or not isinstance(granularity, PerGroup):
            return True
        columns = column_counts(self._graph.layer[layer], self._graph, self._bench.space.groups)
        return not (columns % granularity.size).any()

    @cached_property
    def menu(self) -> frozenset[Storage]:
        """Storages that are the best of their size in the largest layers, and those of recipes.

        Formats whose tables all layers share are left out: what such a table costs depends on how many read it.  A
        target that holds weights as it computes with them has few storages, and offers all of them.
        """
        if self._bench.target.precisions is not None:
            return frozenset(option.storage for each in self._bench.space.layers.values() for option in each)
        found = self._bench.run.step("search/menu", self._menu)
        known = {str(option.storage): option.storage for each in self._bench.space.layers.values() for option in each}
        return frozenset(known[name] for name in found)

    def _menu(self) -> list[str]:
        space = self._bench.space
        layers = sorted(self._graph.layers, key=lambda layer: layer.parameters)[-MENU_LAYERS:]
        in_common = {
            o.storage: o
            for o in space.layers[layers[0].name]
            if o.compute is Compute.FP32 and all(o in space.layers[layer.name] for layer in layers)
        }
        size, error = {}, {}
        looking = self._effects.perturbations
        with self._bench.progress("rounding weights", len(in_common)) as advance:
            for storage, option in in_common.items():
                if not storage.is_float and not load_format(storage.format).shared:
                    size[storage] = sum(_packed_bytes(layer, storage) for layer in layers)
                    error[storage] = math.prod(looking.error(layer.name, option) for layer in layers)
                advance(str(storage))
        found: list[Storage] = []
        for storage in sorted(size, key=lambda s: (size[s], error[s])):
            # from small to large: each has to be more exact than all that are smaller
            if all(error[storage] < (1 - LEAST_GAIN) ** len(layers) * error[smaller] for smaller in found):
                found.append(storage)
        return sorted({str(s) for s in found} | {str(Storage("int", bits, PerChannel())) for bits in RECIPE_BITS})

    def recipes(self, predictor: "Predictor") -> dict[str, Policy]:
        """Uniform recipes by name, each policy once; the predictor says what is fastest."""
        space = self._bench.space
        found: dict[str, Policy] = {}
        known: set[str] = set()
        for keep in RECIPE_KEEP_PERCENT:
            fastest = predictor.fastest(Recipe(keep, None).counts(space), self._bench.latencies.computes_allowed)
            for storage, compute in self._recipe_precisions:
                recipe = Recipe(keep, compute, storage)
                policy = self.offered(recipe.policy(space, fastest))
                if policy.digest() not in known:
                    known.add(policy.digest())
                    found[str(recipe)] = policy
        return found

    @property
    def _recipe_precisions(self) -> "list[tuple[str | None, Compute | None]]":
        """Storage and compute of recipes; where weights are packed, every width in every compute, and the fastest."""
        if self._bench.target.precisions is None:
            return [(f"int{bits}", each) for bits in RECIPE_BITS for each in (*self._uniform_computes, None)]
        options = {option for each in self._bench.space.layers.values() for option in each}
        pairs: set[tuple[str | None, Compute | None]] = {(str(each.storage), each.compute) for each in options}
        return sorted(pairs | {(None, None)}, key=str)

    def offered(self, policy: Policy) -> Policy:
        """The policy with integers left to the layers whose inputs 8 bits hold, and groups to those that have whole
        ones: the others keep their storage where it can be, and are computed in floats."""
        options = {v.name: v.options for v in self.variables if isinstance(v, LayerVariable)}

        def nearest(name: str, wanted: Precision) -> Precision:
            instead = (wanted, Precision(wanted.storage, Compute.FP32), FP16, FP32)
            return next(each for each in instead if each in options[name])

        return Policy({name: nearest(name, each) for name, each in policy.precisions.items()}, policy.keep)

    @property
    def _uniform_computes(self) -> tuple[Compute, ...]:
        """What all layers of a recipe can compute in."""
        offered = {compute for each in self._bench.space.computes.values() for compute in each}
        return tuple(compute for compute in (Compute.FP32, Compute.INT8) if compute in offered)

    def timed_policies(self) -> list[Policy]:
        """Those whose files correct the predicted latency: uniform ones, wide and narrow, in each compute."""
        return [
            self.offered(Recipe(keep, compute, "int8").policy(self._bench.space))
            for keep in TIMED_KEEP_PERCENT
            for compute in self._uniform_computes
        ]


def _packed_bytes(layer: "Layer", storage: Storage) -> int:
    channels, *rest = layer.weight_shape
    return load_format(storage.format).packed_bytes(channels, math.prod(rest), storage)
