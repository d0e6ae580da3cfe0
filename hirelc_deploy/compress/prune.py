"""Channels physically gone: exactly the units that a policy says, and whole branches where it says none."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hirelc_deploy.copying import copied
from hirelc_deploy.errors import UserError
from hirelc_deploy.graph.calling import forward
from hirelc_deploy.graph.model_graph import Group, ModelGraph
from hirelc_deploy.graph.proof import remove
from hirelc_deploy.graph.shapes import check_keep, nearest, parameters_after, shapes_after
from hirelc_deploy.graph.trial import shapes
from hirelc_deploy.graph.vanish import vanish
from hirelc_deploy.policy import Policy

Kept = Mapping[str, tuple[int, ...]]
"""For every group the units that stay, ascending, numbered as in the original."""


@dataclass(frozen=True)
class Pruned:
    """A physical copy with fewer channels, and which of the original ones it has."""

    model: nn.Module
    kept: Kept


def prune(
    model: nn.Module,
    graph: ModelGraph,
    policy: Policy,
    scores: Mapping[str, Tensor],
    *,
    before: Callable[[nn.Module, Kept], None] = lambda *_: None,
) -> Pruned:
    """A copy that keeps, of every group, as many units as the policy says: those with the highest scores.

    Equal scores go by position, the first stays.  The paths of all modules stay.  `before` may change the copy's
    weights for what will be gone.  Raises UserError for names that the network does not have and counts that are not
    legal; AssertionError if the result is not what was counted.
    """
    _check(graph, policy)
    keep = {group.name: policy.keep.get(group.name, group.total) for group in graph.groups}
    kept = {group.name: best(group, keep[group.name], scores) for group in graph.groups}
    shrinking = [
        (group, set(range(group.total)) - set(kept[group.name]))
        for group in graph.groups
        if 0 < keep[group.name] < group.total
    ]
    going = [group.vanishing for group in graph.groups if keep[group.name] == 0 and group.vanishing is not None]

    pruned = copied(model)
    before(pruned, kept)
    remove(pruned, shrinking)
    vanish(pruned, going)
    _verify(pruned, model, graph, keep)
    return Pruned(pruned, kept)


def best(group: Group, count: int, scores: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The `count` units of a group with the highest scores, ascending.  A group that keeps all needs no scores."""
    if count in (0, group.total):
        return tuple(range(count))
    score = scores[group.name]
    if score.shape != (group.total,):
        raise ValueError(f"{group.name} has {group.total} units, but scores of shape {tuple(score.shape)}")
    order = torch.argsort(score, descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


def _check(graph: ModelGraph, policy: Policy) -> None:
    check_keep(graph, policy.keep)
    for name in policy.precisions:
        if name not in graph.layer:
            raise UserError(
                f"the policy gives a precision to {name!r}, which is no layer of this network",
                fix=nearest(name, graph.layer) or "was the policy written for another network?",
            )


@torch.no_grad()
def _verify(pruned: nn.Module, original: nn.Module, graph: ModelGraph, keep: Mapping[str, int]) -> None:
    """What was cut is what was counted: every shape, the number of parameters, and outputs of unchanged shape."""
    expected = shapes_after(graph, keep)
    found = shapes(pruned.state_dict())
    assert found == expected, f"cut to other shapes: {sorted(set(found.items()) ^ set(expected.items()))[:4]}"
    parameters = sum(parameter.numel() for parameter in pruned.parameters())
    counted = parameters_after(graph, keep)
    assert parameters == counted, f"{parameters} parameters, not the {counted} that were counted"
    device = next(original.parameters()).device
    # ones, since identifiers may begin with one
    example = {
        signature.name: torch.ones((1, *signature.shape), dtype=getattr(torch, signature.dtype), device=device)
        for signature in graph.inputs
    }
    before, after = (shapes(_in_eval(network, example)) for network in (original, pruned))
    assert before == after, f"outputs of other shapes: {after}, not {before}"


def _in_eval(model: nn.Module, example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A forward pass in eval mode on a copy, since modes are set module by module and must all come back."""
    return forward(copied(model).eval(), example)
