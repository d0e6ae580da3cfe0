"""How much a network needs each unit of a group: what decides which of them stay."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from hirelc_deploy.copying import copied
from hirelc_deploy.errors import UserError
from hirelc_deploy.graph.calling import forward, tensors
from hirelc_deploy.graph.model_graph import Axis, Group, ModelGraph

Method = Literal["l2", "taylor"]
Measure = Literal["obs", "l2", "taylor"]
"""What a trainer goes by: `obs` is `compensate.staying`, and l2 where that says nothing."""

Loss = Callable[[dict[str, Tensor], Tensor], Tensor]
"""The task's: outputs by name and target to a scalar."""

Scores = dict[str, Tensor]
"""Group name -> (total units,) float64; the higher, the more it is needed."""

Batch = tuple[Mapping[str, np.ndarray | Tensor], np.ndarray | Tensor]
"""Inputs by name, and the target."""


def scores(
    model: nn.Module,
    graph: ModelGraph,
    method: Method,
    batches: Iterable[Batch] = (),
    loss: Loss | None = None,
) -> Scores:
    """One score for every unit of every group; the model is not changed.

    `l2` reads weights alone.  `taylor` takes the gradient of `loss(outputs, target)` over `batches`, outputs by
    name as `graph.forward` gives them.  Raises UserError if the loss is not finite, ValueError if there is none.
    """
    if method == "l2":
        return {group.name: _l2(model, graph, group) for group in graph.groups}
    if loss is None:
        raise ValueError("taylor needs batches and their loss")
    return _taylor(model, graph, batches, loss)


def _l2(model: nn.Module, graph: ModelGraph, group: Group) -> Tensor:
    """Squared norm of each unit's weights, made and read, every tensor on the scale of its mean.

    Without that scale a wide 3x3 convolution would outvote all others that hang on the same channels.
    """
    total = torch.zeros(group.total, dtype=torch.float64)
    for axis in _weight_axes(graph, group):
        weight = model.get_parameter(axis.tensor).detach().cpu().double()
        norms = per_unit(weight.square(), axis)
        mean = norms.mean()
        total += norms / mean if mean > 0 else norms
    return total


def _taylor(model: nn.Module, graph: ModelGraph, batches: Iterable[Batch], loss: Loss) -> Scores:
    """|sum of weight x gradient| over the weights that read a unit, mean over batches.

    First-order Taylor importance (Molchanov et al., 2019, eq. 8), taken where the unit is read: a unit is removed
    by not reading it, so this sum is the first-order change of the loss; where it is made, a BatchNorm behind the
    weights would cancel it.
    """
    own = copied(model).eval().requires_grad_(True)
    total = {group.name: torch.zeros(group.total, dtype=torch.float64) for group in graph.groups}
    read = {group.name: [axis for axis in group.axes if axis.role == "in"] for group in graph.groups}
    weights = {axis.tensor: own.get_parameter(axis.tensor) for axes in read.values() for axis in axes}
    device = next(own.parameters()).device
    count = 0
    for inputs, target in batches:
        outputs = forward(own, {name: tensor.to(device) for name, tensor in tensors(inputs).items()})
        value = loss(outputs, torch.as_tensor(target).to(device))
        if not bool(torch.isfinite(value)):
            raise UserError(
                f"the loss is {value.item():g} on batch {count}",
                fix="look for NaN in the data and in the checkpoint's weights",
            )
        gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        effect = {
            name: (weight * gradient).detach().cpu().double()
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
            if gradient is not None
        }
        for name, axes in read.items():
            change = [per_unit(effect[axis.tensor], axis) for axis in axes if axis.tensor in effect]
            if change:
                total[name] += torch.stack(change).sum(0).abs()
        count += 1
    if not count:
        raise UserError("there is no batch to take the importance from", fix="give at least one batch of training data")
    return {name: score / count for name, score in total.items()}


def per_unit(values: Tensor, axis: Axis) -> Tensor:
    """Sums of a tensor's values over what each unit holds along the axis: (total units,)."""
    along = values.sum([i for i in range(values.ndim) if i != axis.axis]) if values.ndim > 1 else values
    return along[torch.tensor(axis.entries)].sum(1)


def _weight_axes(graph: ModelGraph, group: Group) -> Iterator[Axis]:
    weights = {graph.aliases.get(layer.weight, layer.weight) for layer in graph.layers}
    return (axis for axis in group.axes if axis.tensor in weights)
