"""What may be decided for a network on a target, and policies held against it."""

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from hirelc_deploy.config import nearest
from hirelc_deploy.errors import UserError
from hirelc_deploy.graph.shapes import check_keep
from hirelc_deploy.kernels import every_storage, load_format
from hirelc_deploy.policy import (
    FP16,
    FP32,
    INT8,
    PRUNE_FIRST,
    QUANTIZE_FIRST,
    Compute,
    PerGroup,
    Policy,
    Precision,
)
from hirelc_deploy.search.space import SearchSpace

if TYPE_CHECKING:
    from hirelc_deploy.graph.model_graph import Group, Layer, ModelGraph
    from hirelc_deploy.profiles import Target


def search_space(graph: "ModelGraph", target: "Target") -> SearchSpace:
    """The choices for a network that this target can run."""
    by_op = {op: _precisions(op, target) for op in {layer.op for layer in graph.layers}}
    in_pairs = target.gpu is not None and target.gpu.int4_in_pairs
    decodes = target.precisions is None
    return SearchSpace(
        layers={
            layer.name: by_op[layer.op] if decodes else _fitting(layer, by_op[layer.op], in_pairs=in_pairs)
            for layer in graph.layers
        },
        groups={group.name: _counts(group, target.channel_multiple) for group in graph.groups},
        totals={group.name: group.total for group in graph.groups},
        blocks={block.name: block.layers for block in graph.blocks},
    )


def _precisions(op: str, target: "Target") -> tuple[Precision, ...]:
    """As trained first, then in halves, then 8 bits in each compute of integers, then what else the target holds."""
    computes, held = target.computes_for(op), target.precisions_for(op)
    floats = [FP32, *([FP16] if Compute.FP16 in computes else [])]
    if held is None:
        held = tuple(
            Precision(storage, compute)
            for compute in computes
            for storage in every_storage()
            if compute in load_format(storage.format).computes
        )
    in_floats = {precision.compute for precision in floats}
    in_8_bits = [Precision(INT8.storage, compute) for compute in computes if compute not in in_floats]
    return tuple(dict.fromkeys([*floats, *(each for each in in_8_bits if each in held), *held]))


def _fitting(layer: "Layer", precisions: tuple[Precision, ...], *, in_pairs: bool) -> tuple[Precision, ...]:
    """Those that a weight of this shape can have where it is stored as it is computed with.

    Groups are all of one size, and 4-bit codes may have to lie in pairs: along which axis is the file's matter, and so
    both have to be even.
    """

    def fits(precision: Precision) -> bool:
        storage, columns = precision.storage, prod(layer.weight_shape[1:])
        if in_pairs and storage.bits == 4 and any(size % 2 for size in layer.weight_shape):
            return False
        return not isinstance(storage.granularity, PerGroup) or columns % storage.granularity.size == 0

    return tuple(precision for precision in precisions if fits(precision))


def _counts(group: "Group", multiple: int) -> tuple[int, ...]:
    """The legal counts on the target's multiples, and none and all of them; where no count is, all legal ones."""
    on_grid = {n for n in group.legal if n > 0 and n * group.unit % multiple == 0}
    if not on_grid:
        return group.legal
    return tuple(n for n in group.legal if n in on_grid or n in (0, group.total))


def completed(policy: Policy, graph: "ModelGraph", target: "Target") -> Policy:
    """The policy with what it leaves out: layers as they were trained, groups whole.

    Raises UserError, naming the first entry, if this network on this target cannot have it.
    """
    check_keep(graph, policy.keep)
    offered = search_space(graph, target).layers
    for name, precision in policy.precisions.items():
        if name not in offered:
            raise UserError(
                f"the policy gives a precision to {name!r}, which is no layer of this network",
                fix=f"did you mean {nearest(name, offered)}?",
            )
        if precision not in offered[name]:
            raise UserError(
                f"the policy stores and computes {name} as {precision}, which {target.name} cannot",
                fix=f"there is {', '.join(map(str, offered[name]))}",
            )
    for layer in graph.layers:
        for twin in layer.shares_weight_with:
            asked, other = (policy.precisions.get(name, FP32) for name in (layer.name, twin))
            if not _share(asked, other, of_one_kind=twin in graph.alike(layer.name)):
                raise UserError(
                    f"the policy stores {layer.name} as {asked} and {twin} as {other}, and they share one weight",
                    fix="give both the same precision",
                )
    if policy.order not in (PRUNE_FIRST, QUANTIZE_FIRST):
        raise UserError(
            f"the policy's order is {' then '.join(policy.order)}",
            fix=f"there is {' then '.join(PRUNE_FIRST)}, and {' then '.join(QUANTIZE_FIRST)}",
        )
    return replace(
        policy,
        precisions=dict.fromkeys(offered, FP32) | dict(policy.precisions),
        keep={group.name: group.total for group in graph.groups} | dict(policy.keep),
    )


def _share(one: Precision, other: Precision, *, of_one_kind: bool) -> bool:
    """Whether layers that share a weight can have these.

    Those of different kinds (an embedding and a head) may compute in different ways, and one may read floats.
    """
    if of_one_kind:
        return one == other
    return one.storage == other.storage or one.storage.is_float or other.storage.is_float
