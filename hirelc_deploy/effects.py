"""What single choices do to a network's outputs, measured on a few hundred train examples before a search begins.

Everything that takes long is a step of the run folder, so that a search that was killed goes on with the same figures.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hirelc_deploy.compress.distil import loss_of
from hirelc_deploy.compress.inputs import energies
from hirelc_deploy.compress.ordering import Strength, Strengths, silenced, spectral_change, weights
from hirelc_deploy.compress.sensitivity import Perturbations, fisher, rounds_alike
from hirelc_deploy.graph.calling import tensors
from hirelc_deploy.policy import Compute, Policy
from hirelc_deploy.search.problem import GroupVariable, LayerVariable, Sensitivity, Variable

if TYPE_CHECKING:
    from hirelc_deploy.workbench import Workbench

LOOKED_AT, LOOKED_AT_BATCH = 256, 32
"""Train examples on which single choices are tried: at most, and in a batch."""

LOOKING_MACS = 8e9
"""Of one choice on all these examples.  Hundreds of choices are tried, so a large network is shown fewer of them."""

FISHER_BATCHES = 8

COUNTS_TRIED = 8
"""Of each group; what lies between is interpolated."""


class Effects:
    """Of one workbench's network."""

    def __init__(self, bench: "Workbench") -> None:
        self._bench = bench
        self._graph = bench.graph

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

    def sensitivity(self, variables: Sequence[Variable]) -> Sensitivity:
        """The damage of each option alone, and the Fisher information of each block."""
        found = self._bench.run.step("search/sensitivity", lambda: self._sensitivity(variables))
        return Sensitivity({name: np.array(each) for name, each in found["damage"].items()}, found["fisher"])

    def _sensitivity(self, variables: Sequence[Variable]) -> dict[str, Any]:
        bench, graph = self._bench, self._graph
        information = fisher(
            bench.model,
            graph,
            [
                (tensors(inputs), torch.as_tensor(target))
                for (inputs, target), _ in zip(bench.task.train, range(FISHER_BATCHES), strict=False)
            ],
            partial(loss_of, bench.task),
        )
        by_block = {
            block.name: sum(information[layer] * graph.layer[layer].parameters for layer in block.layers)
            for block in graph.blocks
        }
        with bench.progress("sensitivity", len(variables)) as advance:
            damage = {}
            for variable in variables:
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
