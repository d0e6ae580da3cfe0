"""From channels that belong together to groups with units: what could be offered, if its proof succeeds."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from hirelc_deploy.graph.layers import OPERATORS
from hirelc_deploy.graph.model_graph import Axis, Block, Group, Layer, LeftOut, Member
from hirelc_deploy.graph.pruning import Touch
from hirelc_deploy.graph.slicing import Place, UnsupportedError, bound_period, first_names, places, reads


@dataclass(frozen=True)
class _Part:
    """A touch as far as one group's units reach: for every unit the entries of the module's axis."""

    name: str
    role: Literal["out", "in"]
    places: tuple[Place, ...]
    entries: tuple[tuple[int, ...], ...]


def candidates(
    model: nn.Module, found: Sequence[Sequence[Touch]], layers: Sequence[Layer], blocks: Sequence[Block]
) -> tuple[tuple[Group, ...], tuple[LeftOut, ...]]:
    """Groups in the order of the forward pass, and those that cannot even be tried, with the reason."""
    groups: list[Group] = []
    left_out: list[LeftOut] = []
    builder = _Builder(model, blocks)
    for touches in found:
        try:
            groups.extend(builder.groups(touches))
        except UnsupportedError as error:
            left_out.append(LeftOut(touches[0].name, str(error)))
    groups, overlapping = without_overlaps(groups)
    return tuple(in_order(groups, layers)), (*left_out, *overlapping)


def in_order(groups: Sequence[Group], layers: Sequence[Layer]) -> list[Group]:
    """As their first members come in the forward pass."""
    position = {layer.name: i for i, layer in enumerate(layers)}
    return sorted(groups, key=lambda group: min(position.get(each.module, len(position)) for each in group.members))


class _Builder:
    """What one network's groups are built from; remembers the names that are taken."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self.modules = dict(model.named_modules())
        self.first = first_names(model)
        self.blocks = tuple(block.name for block in blocks)
        self.block_of = {layer: block.name for block in blocks for layer in block.layers}
        self.taken: set[str] = set()

    def groups(self, touches: Sequence[Touch]) -> Iterator[Group]:
        """One group for every set of modules that channels have in common; usually all channels have the same.

        Behind a concatenation or a split, some channels of a layer may have other companions than the rest:
        these fall apart into groups of their own, since a count must say what it removes.
        """
        if any(root is None for touch in touches for root, _ in touch.entries):
            raise UnsupportedError("torch-pruning cannot say which of its channels belong together")
        entries = [_entries_by_root(touch) for touch in touches]
        units = self._units(touches)
        alike: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
        for unit in units:
            alike[tuple(len({e for root in unit for e in by_root[root]}) for by_root in entries)].append(unit)
        for members in alike.values():
            yield self._group(touches, entries, members)

    def _units(self, touches: Sequence[Touch]) -> list[tuple[int, ...]]:
        """Root channels that can only go together, because a module needs equally many in each of its groups."""
        parent = {root: root for root, _ in touches[0].entries}

        def leader(root: int) -> int:
            while parent[root] != root:
                root = parent[root]
            return root

        for touch in touches:
            module = self.modules.get(touch.name)
            period = bound_period(module, touch.role) if module is not None else None
            if module is None or period is None:
                continue
            self._require_whole(touch, module)
            at_offset: dict[int, int] = {}
            for root, entry in touch.entries:
                one, other = leader(root), leader(at_offset.setdefault(entry % period, root))
                parent[max(one, other)] = min(one, other)
        units: dict[int, list[int]] = defaultdict(list)
        for root in sorted(parent):
            units[leader(root)].append(root)
        return [tuple(unit) for unit in units.values()]

    def _require_whole(self, touch: Touch, module: nn.Module) -> None:
        channels = module.num_channels if isinstance(module, nn.GroupNorm) else None
        if channels is None:
            channels = getattr(module, "out_channels" if touch.role == "out" else "in_channels")
        if len({entry for _, entry in touch.entries}) != channels:
            raise UnsupportedError(f"{touch.name} works in groups, and some of its channels come from elsewhere")

    def _group(
        self, touches: Sequence[Touch], entries: Sequence[Mapping[int, Sequence[int]]], units: Sequence[tuple[int, ...]]
    ) -> Group:
        parts = []
        for touch, by_root in zip(touches, entries, strict=True):
            per_unit = tuple(tuple(sorted({e for root in unit for e in by_root[root]})) for unit in units)
            if per_unit[0]:
                parts.append(_Part(touch.name, touch.role, self._places(touch), per_unit))
        members = tuple(Member(part.name, part.role, sum(map(len, part.entries))) for part in parts)
        within = {self.block_of[part.name] for part in parts if part.name in self.block_of}
        return Group(
            name=self._name(parts),
            kind="channels",
            unit=len(units[0]),
            total=len(units),
            legal=tuple(range(1, len(units) + 1)),
            members=members,
            blocks=tuple(block for block in self.blocks if block in within),
            axes=self._axes(parts),
        )

    def _places(self, touch: Touch) -> tuple[Place, ...]:
        if touch.axis is not None:
            return (Place("", touch.axis),)
        try:
            return places(self.modules[touch.name], touch.role)
        except UnsupportedError as error:
            raise UnsupportedError(f"{touch.name}: {error}") from error

    def _name(self, parts: Sequence[_Part]) -> str:
        producers = sorted(
            part.name for part in parts if part.role == "out" and isinstance(self.modules.get(part.name), OPERATORS)
        )
        free = next((name for name in producers if name not in self.taken), None)
        name = free or f"{producers[0]}:{parts[0].entries[0][0]}"
        self.taken.add(name)
        return name

    def _axes(self, parts: Sequence[_Part]) -> tuple[Axis, ...]:
        """Every tensor axis once, though a shared tensor or a module called twice is touched several times."""
        axes: dict[tuple[str, int], Axis] = {}
        for part in parts:
            module = self.modules.get(part.name)
            role: Literal["out", "in"] = "in" if module is not None and reads(module, part.role) else "out"
            for place in part.places:
                tensor = self.first[f"{part.name}.{place.tensor}" if place.tensor else part.name]
                axis = Axis(tensor, place.axis, role, _positions(part.entries, place.period))
                known = axes.setdefault((tensor, place.axis), axis)
                if known.entries != axis.entries:
                    raise UnsupportedError(f"{part.name} shares {tensor}, but not channel for channel")
                if role == "in":  # an embedding tied to a reading layer counts as read
                    axes[tensor, place.axis] = axis
        return tuple(axes.values())


def _entries_by_root(touch: Touch) -> Mapping[int, Sequence[int]]:
    by_root: dict[int, list[int]] = defaultdict(list)
    for root, entry in touch.entries:
        by_root[root].append(entry)
    return by_root


def _positions(entries: tuple[tuple[int, ...], ...], period: int | None) -> tuple[tuple[int, ...], ...]:
    if period is None:
        return entries
    return tuple(tuple(sorted({entry % period for entry in unit})) for unit in entries)


def claimed(group: Group) -> Iterator[tuple[str, int, int]]:
    """Tensor, axis and position of all that a group cuts."""
    return ((axis.tensor, axis.axis, at) for axis in group.axes for unit in axis.entries for at in unit)


def without_overlaps(groups: Sequence[Group]) -> tuple[list[Group], list[LeftOut]]:
    """Leave out groups that claim the same weights: a tied weight cannot follow two decisions."""
    claims: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    for group in groups:
        for claim in claimed(group):
            claims[claim].append(group.name)
    rivals: dict[str, LeftOut] = {}
    for (tensor, _, _), names in claims.items():
        for name in names:
            if len(names) > 1 and name not in rivals:
                other = next(other for other in names if other != name)
                rivals[name] = LeftOut(name, f"it shares the weight {tensor} with the group {other}")
    return [group for group in groups if group.name not in rivals], list(rivals.values())
