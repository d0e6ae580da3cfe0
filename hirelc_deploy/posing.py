"""A network on its target as a problem for a search: what can be chosen, what it costs, what it does to the outputs.

Everything that takes long is a step of the run folder, so that a search that was killed goes on with the same figures.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hirelc_deploy.budget import Budget, Figures
from hirelc_deploy.compress.inputs import energies
from hirelc_deploy.compress.ordering import Strength, Strengths, silenced, spectral_change, weights
from hirelc_deploy.compress.sensitivity import Perturbations, fisher, rounds_alike
from hirelc_deploy.cost.latency import Decisions
from hirelc_deploy.cost.size import Positions, SizePredictor, column_counts
from hirelc_deploy.graph.calling import tensors
from hirelc_deploy.kernels import load_format
from hirelc_deploy.policy import (
    FP16,
    FP32,
    PRUNE_FIRST,
    QUANTIZE_FIRST,
    Compute,
    PerChannel,
    PerGroup,
    Policy,
    Precision,
    Step,
    Storage,
)
from hirelc_deploy.search.problem import (
    GroupVariable,
    LayerFacts,
    LayerVariable,
    Prices,
    Problem,
    Rows,
    Sensitivity,
    Variable,
    policy_of,
)
from hirelc_deploy.search.recipe import Recipe
from hirelc_deploy.search.space import Evaluation

if TYPE_CHECKING:
    from hirelc_deploy.cost.predictor import Predictor
    from hirelc_deploy.graph.model_graph import Layer
    from hirelc_deploy.workbench import Workbench

RECIPE_BITS = (8, 6, 4, 3, 2)
"""Of a recipe's weights."""

RECIPE_KEEP_PERCENT = (100.0, 75.0, 62.5, 50.0, 37.5, 25.0, 18.75, 12.5)

TIMED_KEEP_PERCENT = (100.0, 50.0, 25.0)
"""Of the recipes whose files correct the predicted latency."""

LOOKED_AT, LOOKED_AT_BATCH = 256, 32
"""Train examples on which single choices are tried: at most, and in a batch."""

LOOKING_MACS = 8e9
"""Of one choice on all these examples.  Hundreds of choices are tried, so a large network is shown fewer of them."""

FISHER_BATCHES = 8

COUNTS_TRIED = 8
"""Of each group; what lies between is interpolated."""

SIZE_SAMPLES = 160
"""Files whose size is told exactly; the additive prediction is fitted to them."""

MENU_LAYERS = 3
"""The largest ones: what their weights are stored in is most of a file."""

LEAST_GAIN = 0.4
"""A storage is offered if its squared error is less by this part than that of each smaller one; a bit makes it a
quarter."""


class Posing:
    """The problem that one workbench's network is."""

    def __init__(self, bench: "Workbench", budget: Budget, *, order: str = "prune-first") -> None:
        """`order` is one of `config.ORDERS`."""
        self._bench = bench
        self._order = order
        self._budget = budget
        self._graph = bench.graph

    def problem(self) -> Problem:
        """Measures what is not known yet."""
        graph, bench = self._graph, self._bench
        return Problem(
            variables=self.variables,
            blocks={block.name: block.layers for block in graph.blocks},
            budget=self._budget,
            before=self.before,
            costs=self.costs,
            sensitivity=self.sensitivity,
            layers={layer.name: LayerFacts(layer.macs, layer.parameters) for layer in graph.layers},
            evaluate=self.evaluate,
            prepare=self.prepare,
            # a run that goes on with another number of processes chooses as it did before
            at_once=bench.run.step("search/at once", lambda: bench.engine.at_once),
            recipes=self.recipes,
            score_error=bench.scoring.error(bench.task.search.examples),
            test_error=bench.scoring.error(bench.task.test.examples),
        )

    # -- what can be chosen ----------------------------------------------------------------------------------

    @cached_property
    def variables(self) -> tuple[Variable, ...]:
        """Layers first, in the order of the forward pass, then groups."""
        space, graph = self._bench.space, self._graph
        layers = [
            LayerVariable(name, self._options(name), (graph.block_of[name],), graph.layer[name].shares_weight_with)
            for name in space.layers
        ]
        groups = [
            GroupVariable(f"units of {group.name}", space.groups[group.name], group.blocks, group.name)
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
        with self._bench.progress("rounding weights", len(in_common)) as advance:
            for storage, option in in_common.items():
                if not storage.is_float and not load_format(storage.format).shared:
                    size[storage] = sum(_packed_bytes(layer, storage) for layer in layers)
                    error[storage] = math.prod(self.perturbations.error(layer.name, option) for layer in layers)
                advance(str(storage))
        found: list[Storage] = []
        for storage in sorted(size, key=lambda s: (size[s], error[s])):
            # from small to large: each has to be more exact than all that are smaller
            if all(error[storage] < (1 - LEAST_GAIN) ** len(layers) * error[smaller] for smaller in found):
                found.append(storage)
        return sorted({str(s) for s in found} | {str(Storage("int", bits, PerChannel())) for bits in RECIPE_BITS})

    @cached_property
    def recipes(self) -> dict[str, Policy]:
        """Uniform recipes by name, each policy once."""
        space = self._bench.space
        found: dict[str, Policy] = {}
        known: set[str] = set()
        for keep in RECIPE_KEEP_PERCENT:
            fastest = self.predictor.fastest(Recipe(keep, None).counts(space), self._bench.latencies.computes_allowed)
            for storage, compute in self._recipe_precisions:
                recipe = Recipe(keep, compute, storage)
                policy = self._offered(recipe.policy(space, fastest))
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

    def _offered(self, policy: Policy) -> Policy:
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

    # -- what it costs ---------------------------------------------------------------------------------------

    @cached_property
    def predictor(self) -> "Predictor":
        """Latencies of all policies; kernels that no table has are measured now, where this is the target.

        There some files of this very network correct the sum over kernels as well.
        """
        bench = self._bench
        known = bench.run.step("search/table", lambda: bench.pricing.known(bench.latencies.network))
        told = bench.pricing.told_by(bench.latencies.network, known)
        if not bench.pricing.is_device or told.unknown:
            return told
        policies = self._timed_policies()
        times_ms: list[float] | None = bench.run.step("search/times", lambda: bench.latencies.times_ms(policies))
        if times_ms is None:
            return told
        pairs = zip(policies, times_ms, strict=True)
        own = [told.artifact(policy, latency_ms) for policy, latency_ms in pairs]
        return bench.pricing.told_by(bench.latencies.network, known, own)

    def _timed_policies(self) -> list[Policy]:
        """Uniform ones, wide and narrow, in each compute."""
        return [
            self._offered(Recipe(keep, compute, "int8").policy(self._bench.space))
            for keep in TIMED_KEEP_PERCENT
            for compute in self._uniform_computes
        ]

    @cached_property
    def before(self) -> Figures:
        """Of the network as it was trained."""
        return Figures(
            latency_ms=float(self.predictor.foretell([Policy({}, {})]).ms[0]),
            speedup=1.0,
            size_bytes=len(self._bench.files.baseline().data),
            drop=0.0,
        )

    @cached_property
    def costs(self) -> "TableCosts":
        return TableCosts(self.variables, self.predictor, self.sizes)

    @cached_property
    def sizes(self) -> SizePredictor:
        precisions, counts = options_of(self.variables)
        lengths = [len(variable.options) for variable in self.variables]
        rows = np.random.default_rng(0).integers(lengths, size=(SIZE_SAMPLES, len(lengths)))
        rows[0] = [variable.as_trained for variable in self.variables]
        policies = [policy_of(self.variables, row) for row in rows]
        exact: list[int] = self._bench.run.step("search/sizes", lambda: self._exact_sizes(policies))
        return SizePredictor(self._graph, precisions, counts, positions(self.variables, rows), exact)

    def _exact_sizes(self, policies: Sequence[Policy]) -> list[int]:
        found = []
        with self._bench.progress("sizes of files", len(policies)) as advance:
            for policy in policies:
                found.append(self._bench.files.predicted_bytes(policy))
                advance("")
        return found

    # -- what it does ----------------------------------------------------------------------------------------

    @cached_property
    def perturbations(self) -> Perturbations:
        bench = self._bench
        of_a_batch = LOOKED_AT_BATCH * max(1, sum(layer.macs for layer in self._graph.layers))
        # whole batches, since each counts the same
        count = max(1, min(LOOKED_AT // LOOKED_AT_BATCH, round(LOOKING_MACS / of_a_batch)))
        batches = bench.look_at(count * LOOKED_AT_BATCH, LOOKED_AT_BATCH)
        model = bench.trainer.original
        met = energies(model, bench.space.layers, batches)
        return Perturbations(
            model,
            batches,
            met,
            bench.task.divergence,
            largest=bench.largest,
            is_symmetric=bench.runtime.is_symmetric,
        )

    @cached_property
    def sensitivity(self) -> Sensitivity:
        found = self._bench.run.step("search/sensitivity", self._sensitivity)
        return Sensitivity({name: np.array(each) for name, each in found["damage"].items()}, found["fisher"])

    def _sensitivity(self) -> dict[str, Any]:
        bench, graph = self._bench, self._graph
        information = fisher(
            bench.model,
            graph,
            [
                (tensors(inputs), torch.as_tensor(target))
                for (inputs, target), _ in zip(bench.task.train, range(FISHER_BATCHES), strict=False)
            ],
            bench.task.loss,
        )
        by_block = {
            block.name: sum(information[layer] * graph.layer[layer].parameters for layer in block.layers)
            for block in graph.blocks
        }
        with bench.progress("sensitivity", len(self.variables)) as advance:
            damage = {}
            for variable in self.variables:
                each = self._of_layer(variable) if isinstance(variable, LayerVariable) else self._of_group(variable)
                damage[variable.name] = each
                advance(variable.name)
        return {"damage": damage, "fisher": by_block}

    def _of_layer(self, variable: LayerVariable) -> list[float]:
        largest = self._bench.largest
        of_storage: dict[Any, float] = {}
        of_input: dict[Compute, float] = {Compute.FP32: 0.0}
        found = []
        for option in variable.options:
            if option.storage.is_float:
                found.append(0.0)
                continue
            key = rounds_alike(option, largest)
            if key not in of_storage:
                of_storage[key] = self.perturbations.of_storage(variable.name, option)
            if option.compute not in of_input:
                of_input[option.compute] = self.perturbations.of_input(variable.name, option.compute, option.storage)
            found.append(of_storage[key] + of_input[option.compute])
        return found

    def _of_group(self, variable: GroupVariable) -> list[float]:
        """Fewer units never do less; between counts that are tried the logarithm is interpolated."""
        counts = variable.options
        if len(counts) == 1:
            return [0.0]
        tried = sorted({int(i) for i in np.linspace(0, len(counts) - 2, min(COUNTS_TRIED, len(counts) - 1)).round()})
        cuts = [Policy({}, {variable.in_policy: counts[i]}) for i in tried]
        seen = [self.perturbations.of_model(self._bench.trainer.settled(cut)) for cut in cuts]
        falling = np.minimum.accumulate(np.maximum(seen, np.finfo(np.float32).tiny))
        between = np.exp(np.interp(range(len(counts) - 1), tried, np.log(falling)))
        return [*between.tolist(), 0.0]

    def ordered(self, policy: Policy) -> Policy:
        """The policy with its steps in the order that was asked for."""
        if self._order != "auto":
            return replace(policy, order=QUANTIZE_FIRST if self._order == "quantize-first" else PRUNE_FIRST)
        return replace(policy, order=self._weaker_first(policy)) if policy.keep and policy.precisions else policy

    def _weaker_first(self, policy: Policy) -> tuple[Step, ...]:
        """The order in which the step that moves the network less comes first."""
        key = f"order/{replace(policy, order=PRUNE_FIRST).digest()}"
        found: list[Step] = self._bench.run.step(key, lambda: list(self.strengths(policy).weaker_first))
        return tuple(found)

    def strengths(self, policy: Policy) -> Strengths:
        """How far pruning alone and formats alone move the network that was trained."""
        bench, graph, looking = self._bench, self._graph, self.perturbations
        model, cut = bench.trainer.original, Policy({}, policy.keep)
        before = weights(model, graph)
        kept = bench.trainer.kept(cut)
        pruned = Strength(
            looking.of_model(bench.trainer.settled(cut)), spectral_change(before, silenced(model, graph, kept))
        )
        with looking.stored(policy.precisions) as rounded:
            return Strengths(
                prune=pruned,
                quantize=Strength(looking.of_model(rounded), spectral_change(before, weights(rounded, graph))),
            )

    # -- the expensive step ----------------------------------------------------------------------------------

    def prepare(self, policies: Sequence[Policy]) -> None:
        """Scores of what is evaluated next, side by side if there are processes for it."""
        self._bench.recovered_scores([self.ordered(policy) for policy in policies])

    def evaluate(self, policy: Policy) -> Evaluation:
        """Made real on a copy, shortly trained and scored on the search split (`Workbench.recovered_scores`)."""
        bench, policy = self._bench, self.ordered(policy)
        (score,) = bench.recovered_scores([policy])
        ms = float(self.predictor.foretell([policy]).ms[0])
        assert self.before.latency_ms is not None
        figures = Figures(
            latency_ms=ms,
            speedup=self.before.latency_ms / ms,
            size_bytes=bench.files.predicted_bytes(policy),
            drop=bench.scoring.drop(score),
        )
        return Evaluation(policy, figures, score)


class TableCosts:
    """Prices of rows: tables of kernels, and sizes that add up."""

    def __init__(self, variables: Sequence[Variable], predictor: "Predictor", sizes: SizePredictor) -> None:
        self._variables = variables
        self._predictor = predictor
        self._sizes = sizes
        layers = {v.name: i for i, v in enumerate(variables) if isinstance(v, LayerVariable)}
        groups = {v.in_policy: i for i, v in enumerate(variables) if isinstance(v, GroupVariable)}
        precisions, _ = options_of(variables)
        network = predictor.latency.network
        self._layers = [layers[name] for name in predictor.latency.layers]
        self._groups = [groups[name] for name in predictor.latency.groups]
        self._computes = [
            np.array([network.computes[name].index(o.compute) for o in precisions[name]])
            for name in predictor.latency.layers
        ]

    def __call__(self, rows: Rows) -> Prices:
        computes = np.stack([of[rows[:, i]] for of, i in zip(self._computes, self._layers, strict=True)], axis=1)
        told = self._predictor.of(Decisions(computes.astype(np.int16), rows[:, self._groups].astype(np.int32)))
        return Prices(self._sizes(positions(self._variables, rows)), told.ms)


def _packed_bytes(layer: "Layer", storage: Storage) -> int:
    channels, *rest = layer.weight_shape
    return load_format(storage.format).packed_bytes(channels, math.prod(rest), storage)


def options_of(variables: Sequence[Variable]) -> tuple[dict[str, Sequence[Precision]], dict[str, Sequence[int]]]:
    """Those of layers and those of groups, by name."""
    return (
        {v.name: v.options for v in variables if isinstance(v, LayerVariable)},
        {v.in_policy: v.options for v in variables if isinstance(v, GroupVariable)},
    )


def positions(variables: Sequence[Variable], rows: Rows) -> Positions:
    """Rows as sizes are told of them."""
    columns = list(zip(variables, rows.T, strict=True))
    return Positions(
        {v.name: column for v, column in columns if isinstance(v, LayerVariable)},
        {v.in_policy: column for v, column in columns if isinstance(v, GroupVariable)},
    )
