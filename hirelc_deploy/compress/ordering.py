"""Which step comes first: the one that perturbs the network less (Progressive Intensity Hypothesis, arXiv 2603.18426).

Two measures of each step, taken alone on the network as it was trained: how far it moves the outputs, and how far it
moves the weights.  The outputs decide.  `benchmarks/order.py` says how often they are right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.kernels._base import rows_of
from hirelc_deploy.policy import PRUNE_FIRST, QUANTIZE_FIRST, Step


@dataclass(frozen=True)
class Strength:
    """How strongly one step perturbs a network."""

    outputs: float
    """Divergence of the outputs from the original's (`Task.divergence`): nats, for a classifier."""
    weights: float
    """Spectral norm of the change of a weight over that of the weight, the mean over layers."""


@dataclass(frozen=True)
class Strengths:
    """Of both steps of a policy."""

    prune: Strength
    quantize: Strength

    @property
    def weaker_first(self) -> tuple[Step, ...]:
        """The order that the hypothesis asks for; of equals, pruning first."""
        return PRUNE_FIRST if self.prune.outputs <= self.quantize.outputs else QUANTIZE_FIRST


def spectral_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Mean over weights of |after - before| / |before|, spectral norms of their matrices; both by layer.

    A weight is (output channels, columns), as it is multiplied.
    """
    ratios = [
        float(
            torch.linalg.matrix_norm(rows_of(after[name] - weight, 0), ord=2)
            / torch.linalg.matrix_norm(rows_of(weight, 0), ord=2).clamp(min=torch.finfo(weight.dtype).tiny)
        )
        for name, weight in before.items()
    ]
    return sum(ratios) / len(ratios) if ratios else 0.0


def weights(model: nn.Module, graph: ModelGraph) -> dict[str, Tensor]:
    """By layer."""
    return {layer.name: model.get_parameter(layer.weight).detach().clone() for layer in graph.layers}


def silenced(model: nn.Module, graph: ModelGraph, kept: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Weights by layer, nought where a unit goes: pruning as a change of weights that keeps their shape."""
    found = weights(model, graph)
    of_tensor = {graph.aliases.get(layer.weight, layer.weight): layer.name for layer in graph.layers}
    for group in graph.groups:
        gone = set(range(group.total)) - set(kept[group.name])
        for axis in group.axes:
            if axis.tensor in of_tensor and gone:
                weight = found[of_tensor[axis.tensor]]
                entries = torch.tensor([entry for unit in sorted(gone) for entry in axis.entries[unit]])
                weight.index_fill_(axis.axis, entries, 0.0)
    return found
