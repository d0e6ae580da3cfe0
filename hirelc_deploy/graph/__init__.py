"""A network as the rest of the pass sees it: `trace` turns an `nn.Module` into a `ModelGraph`."""

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from hirelc_deploy.errors import UserError
from hirelc_deploy.graph.blocks import blocks
from hirelc_deploy.graph.branches import with_vanishing
from hirelc_deploy.graph.calling import Inputs, forward, tensors
from hirelc_deploy.graph.candidates import candidates, in_order, without_overlaps
from hirelc_deploy.graph.heads import head_candidates
from hirelc_deploy.graph.idle import idle
from hirelc_deploy.graph.layers import observe
from hirelc_deploy.graph.model_graph import Block, Group, Layer, LeftOut, ModelGraph, Signature
from hirelc_deploy.graph.proof import prove
from hirelc_deploy.graph.pruning import LIMIT_BYTES, LIMIT_S, UntraceableError, first_line, list_groups
from hirelc_deploy.graph.shapes import shapes_after
from hirelc_deploy.graph.slicing import first_names
from hirelc_deploy.graph.trial import jitter, private_copy

__all__ = ["ModelGraph", "forward", "shapes_after", "tensors", "trace"]

PROOF_EXAMPLES = 2
"""So that a network that treats examples alike by mistake (a batch axis in a reshape) is seen."""


def trace(
    model: nn.Module,
    example: Mapping[str, np.ndarray | Tensor],
    *,
    limit_s: float = LIMIT_S,
    limit_bytes: int = LIMIT_BYTES,
) -> ModelGraph:
    """Layers, blocks and proved prune groups of a network.

    `example` is one batch of inputs by name, first axis the example; two examples suffice.  The limits bound the
    search for groups in CPU time and memory: beyond them no group is offered, and `left_out` says so.  The model, its
    mode, gradients and hooks, and torch's random state are left as they were.
    Raises UserError if the model does not run on the example, or has no layer.
    """
    batch = tensors(example, PROOF_EXAMPLES)
    one = tensors(example, 1)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            own = private_copy(model)
            layers, left_out = observe(own, one)
            forward(own, batch)
            jittered = jitter(own)
            for_nothing = idle(own, jittered, one, layers)
        except UserError:
            raise
        except Exception as error:  # the model is the user's, and so is whatever it raises
            raise UserError(
                f"the model does not run on the task's example: {first_line(error)}",
                fix="an example is a mapping of input name to array, as `forward` takes them, first axis the example",
            ) from error
        if not layers:
            raise UserError("the model calls no layer with weights", fix="a network with Conv, Linear or Embedding")
        gone = {each.name for each in for_nothing}
        layers = tuple(layer for layer in layers if layer.name not in gone)
        found = blocks(own, [layer.name for layer in layers])
        groups, without = _groups(own, jittered, one, batch, layers, found, limit_s, limit_bytes)
        groups = tuple(group for group in groups if not _is_only_of(gone, group, layers))
    state = own.state_dict()
    return ModelGraph(
        layers=layers,
        blocks=found,
        groups=groups,
        left_out=(*left_out, *for_nothing, *without),
        parameter_shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        buffers=frozenset(state) - {name for name, _ in own.named_parameters(remove_duplicate=False)},
        aliases={name: first for name, first in first_names(own).items() if name != first and name in state},
        inputs=tuple(
            Signature(name, tuple(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for name, t in one.items()
        ),
    )


def _groups(
    model: nn.Module,
    jittered: nn.Module,
    one: Inputs,
    batch: Inputs,
    layers: tuple[Layer, ...],
    found: tuple[Block, ...],
    limit_s: float,
    limit_bytes: int,
) -> tuple[tuple[Group, ...], tuple[LeftOut, ...]]:
    """Found, proved, and tried without: the groups to offer, and the others with their reasons."""
    failed = None
    try:
        touched, unfollowed = list_groups(model, one, limit_s=limit_s, limit_bytes=limit_bytes)
    except UntraceableError as error:
        touched, unfollowed, failed = [], [], str(error)
    groups, unfit = candidates(model, touched, layers, found)
    proved, wrong = prove(jittered, batch, groups)
    proved, wrong_together = _with_heads(model, jittered, batch, layers, found, proved)
    heads = [group for group in proved if group.kind == "heads"]
    made = {member.module for group in heads for member in group.members if member.role == "out"}
    without = [left for left in (*unfollowed, *unfit, *wrong) if left.name.partition(":")[0] not in made]
    if failed is not None:
        without.append(LeftOut("model", f"no channels{' but heads' * bool(heads)} can be removed: {failed}"))
    return with_vanishing(jittered, batch, proved, layers), (*without, *wrong_together)


def _with_heads(
    model: nn.Module,
    jittered: nn.Module,
    batch: Inputs,
    layers: tuple[Layer, ...],
    found: tuple[Block, ...],
    proved: tuple[Group, ...],
) -> tuple[tuple[Group, ...], tuple[LeftOut, ...]]:
    """The groups with those of heads that are proved; of a head that is not, its channels are told of already."""
    waiting, heads = head_candidates(model, layers, found, proved), list[Group]()
    while waiting:
        right, _ = prove(jittered, batch, [ways[0] for ways in waiting])
        heads += right
        waiting = [ways[1:] for ways in waiting if ways[0] not in right and ways[1:]]
    heads, _ = without_overlaps(heads)
    if not heads:
        return proved, ()
    return prove(jittered, batch, in_order([*proved, *heads], layers))


def _is_only_of(gone: Collection[str], group: Group, layers: tuple[Layer, ...]) -> bool:
    """Whether the channels are those of layers that are called for nothing, and of no other."""
    members = {member.module for member in group.members}
    return not members.isdisjoint(gone) and members.isdisjoint(layer.name for layer in layers)
