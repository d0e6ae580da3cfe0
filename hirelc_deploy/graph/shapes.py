"""What a network's tensors will be after a policy's counts, known exactly before anything is cut."""

import difflib
from collections.abc import Iterable, Mapping
from math import prod

from hirelc_deploy.errors import UserError
from hirelc_deploy.graph.model_graph import ModelGraph

Keep = Mapping[str, int]
"""Units that stay, by group name; a group that is not named keeps all."""


def shapes_after(graph: ModelGraph, keep: Keep) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and buffer that stays, by state-dict name; those of branches that go are absent.

    Raises UserError for an unknown group or a count that is not legal.
    """
    check_keep(graph, keep)
    first = {name: [*shape] for name, shape in graph.parameter_shapes.items()}
    gone: set[str] = set()
    for name, count in keep.items():
        group = graph.group[name]
        if count == 0 and group.vanishing is not None:
            gone.update(group.vanishing.modules)
            continue
        for axis in group.axes:
            first[axis.tensor][axis.axis] -= axis.per_unit * (group.total - count)
    return {
        name: tuple(first[graph.aliases.get(name, name)])
        for name in graph.parameter_shapes
        if name.rpartition(".")[0] not in gone
    }


def parameters_after(graph: ModelGraph, keep: Keep) -> int:
    """Parameters that stay, a shared one counted once; buffers are none.  Raises as `shapes_after`."""
    shapes = shapes_after(graph, keep)
    own = {graph.aliases.get(name, name): shape for name, shape in shapes.items() if name not in graph.buffers}
    return sum(prod(shape) for shape in own.values())


def check_keep(graph: ModelGraph, keep: Keep) -> None:
    """Raises UserError, with the nearest name or count, unless every group exists and every count is legal."""
    for name, count in keep.items():
        if name not in graph.group:
            raise UserError(
                f"the policy counts the units of {name!r}, which is no prune group of this network",
                fix=nearest(name, graph.group) or "see the groups that `hirelc-deploy export` lists",
            )
        group = graph.group[name]
        if count not in group.legal:
            closest = min(group.legal, key=lambda legal: (abs(legal - count), legal))
            raise UserError(
                f"{name} cannot keep {count} of its {group.total} units; legal are {group.legal[0]} to {group.total}",
                fix=f"the nearest legal count is {closest}",
            )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """`did you mean …?` for a mistyped name, or None where nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else None
