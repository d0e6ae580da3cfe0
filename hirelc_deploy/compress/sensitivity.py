"""How much a network minds what may be done to it: Fisher information, and what single choices do to its outputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hirelc_deploy.compress.grids import fitted, put_on
from hirelc_deploy.compress.simulate import simulated
from hirelc_deploy.copying import copied
from hirelc_deploy.errors import UserError
from hirelc_deploy.graph import forward
from hirelc_deploy.graph.calling import tensors
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.kernels._base import largest_integer
from hirelc_deploy.layout import channels_last
from hirelc_deploy.policy import Compute, Precision, Storage

Outputs = Mapping[str, Tensor]
Divergence = Callable[[Outputs, Outputs], float]
"""Of outputs from the original's."""


def fisher(
    model: nn.Module,
    graph: ModelGraph,
    batches: Iterable[tuple[Mapping[str, Tensor], Tensor]],
    loss: Callable[[dict[str, Tensor], Tensor], Tensor],
) -> dict[str, float]:
    """Mean squared gradient of the loss over a layer's weights, by layer: the trace of the empirical Fisher
    information, a weight (HiReLC, eq. for S_b).

    One gradient a batch: the more examples a batch has, the smaller it is, alike for all layers.  Raises UserError if
    the loss is not finite or there is no batch.
    """
    own = copied(model).eval().requires_grad_(True)
    weights = {layer.name: own.get_parameter(layer.weight) for layer in graph.layers}
    total = dict.fromkeys(weights, 0.0)
    count = 0
    for inputs, target in batches:
        value = loss(forward(own, tensors(inputs)), target)
        if not bool(torch.isfinite(value)):
            raise UserError(
                f"the loss is {value.item():g} on batch {count}",
                fix="look for NaN in the data and in the checkpoint's weights",
            )
        gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                total[name] += float(gradient.square().mean())
        count += 1
    if not count:
        raise UserError("there is no batch to take sensitivities from", fix="give at least one batch of training data")
    return {name: each / count for name, each in total.items()}


class Perturbations:
    """What one choice alone does to the outputs of a network whose norms are folded; batches are looked at again
    for each, one in memory at a time."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Tensor]],
        energies: Mapping[str, Tensor],
        divergence: Divergence,
        *,
        largest: int,
        is_symmetric: bool,
    ) -> None:
        """`energies` as `compress.inputs` has them; `largest` bounds the integers of int8 layers, and `is_symmetric`
        says that their activations are on grids about zero."""
        self._model = channels_last(model, tensors(batches[0], 1))
        self._batches = batches
        self._energies = energies
        self._divergence = divergence
        self._largest = largest
        self._is_symmetric = is_symmetric
        self._original = _outputs(model, batches)

    def of_model(self, other: nn.Module) -> float:
        """Of another network on the same inputs: a pruned one."""
        other = channels_last(other, tensors(self._batches[0], 1))
        return self._from_original(_outputs(other, self._batches))

    def of_storage(self, layer: str, precision: Precision) -> float:
        """A layer's weights on their grid, and nothing else changed."""
        with self.stored({layer: precision}) as model:
            return self._from_original(_outputs(model, self._batches))

    def of_input(self, layer: str, compute: Compute, storage: Storage) -> float:
        """What a layer reads on a grid of 8 bits, and nothing else changed."""
        precisions = {layer: Precision(storage, compute)}
        with simulated(
            self._model, precisions, {}, largest=self._largest, is_symmetric=self._is_symmetric
        ) as simulation:
            simulation.calibrate(self._batches)
            return self._from_original(_outputs(self._model, self._batches))

    def error(self, layer: str, precision: Precision) -> float:
        """What rounding does to a layer's own output, as a part of its energy: told without running the network."""
        weight = self._model.get_submodule(layer).get_parameter("weight")
        before = weight.detach().clone()
        energy = self._energies.get(layer, torch.ones(()))
        with self.stored({layer: precision}):
            off = (weight.detach() - before).flatten(1).square() * energy
        return float(off.sum() / (before.flatten(1).square() * energy).sum().clamp(min=torch.finfo(torch.float32).tiny))

    @contextmanager
    def stored(self, precisions: Mapping[str, Precision]) -> Iterator[nn.Module]:
        """The network with the weights of some layers on their grids, until the end of the block."""
        weights = [self._model.get_submodule(layer).get_parameter("weight") for layer in precisions]
        before = [weight.detach().clone() for weight in weights]
        grids = fitted(self._model, precisions, self._energies, largest=self._largest)
        try:
            put_on(self._model, precisions, grids, largest=self._largest)
            yield self._model
        finally:
            with torch.no_grad():
                for weight, kept in zip(weights, before, strict=True):
                    weight.copy_(kept)

    def _from_original(self, outputs: Sequence[Outputs]) -> float:
        each = [self._divergence(now, before) for now, before in zip(outputs, self._original, strict=True)]
        return sum(each) / len(each)


def rounds_alike(precision: Precision, largest: int) -> tuple[Storage, int]:
    """What a weight's grid depends on: precisions with the same change the weight in the same way."""
    return precision.storage, largest_integer(precision.compute, largest)


@torch.no_grad()
def _outputs(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[Outputs]:
    return [forward(model, inputs) for inputs in batches]
