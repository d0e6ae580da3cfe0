"""Groups of whole heads: what could be offered of an attention, if its proof succeeds.

torch-pruning follows channels, and arbitrary channels of queries, keys and values break the reshape into heads.  So an
attention is found by the numbers that its module knows: as many heads as it says, of equal parts of its projections.
How a fused projection is laid out, and which of its numbers have to shrink with it, no number says: each way is a
candidate, and the first that is proved is the right one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hirelc_deploy.graph.candidates import claimed
from hirelc_deploy.graph.model_graph import Axis, Block, Counter, Group, Layer, Member
from hirelc_deploy.graph.slicing import first_names

FUSED = (3, 2)
"""Queries, keys and values of one projection, or keys and values."""

MOST_MAKERS = 6
"""Projections of one attention: queries, keys, values, what positions are told by, gates."""

NAMES_A_SIZE = ("dim", "size", "width")
"""In the name of a number: of what a head is large, not of how many there are."""


@dataclass(frozen=True)
class _Attention:
    """A module that knows of heads, with the projections around them."""

    name: str
    module: nn.Module
    makers: tuple[Layer, ...]
    """What heads are made by, in the order of the forward pass."""
    reader: Layer
    """What reads all of them, side by side."""

    @property
    def width(self) -> int:
        """Channels of all heads together, as they are read."""
        return self.reader.in_channels


def head_candidates(
    model: nn.Module, layers: Sequence[Layer], blocks: Sequence[Block], taken: Sequence[Group]
) -> list[list[Group]]:
    """For every attention the groups that its heads may be, the likelier first; none of what is `taken` is in them."""
    first = first_names(model)
    theirs = {claim for group in taken for claim in claimed(group)}
    found = []
    for attentions in _attentions(model, layers):
        ways = [
            _group(attention, heads, fused, counters, blocks, first)
            for attention in attentions
            for heads, fused, counters in _ways(attention)
        ]
        free = [way for way in dict.fromkeys(ways) if theirs.isdisjoint(claimed(way))]
        if free:
            found.append(free)
    return found


def _attentions(model: nn.Module, layers: Sequence[Layer]) -> Iterator[list[_Attention]]:
    """For each of the innermost modules with a number of heads what may read them: its layers, from the last one on,
    and the first one behind it of the module around it (BERT)."""
    modules = dict(model.named_modules())
    knowing = [name for name, module in modules.items() if any("head" in each for each in _numbers(module))]
    for name in knowing:
        if any(_is_below(other, name) for other in knowing):
            continue
        own = _linear_below(name, layers)
        around = _linear_below(name.rpartition(".")[0], layers)
        behind = [layer for layer in around[around.index(own[-1]) + 1 :] if layer not in own] if own else []
        ways = [(own[:i], own[i]) for i in reversed(range(1, len(own)))] + [(own, layer) for layer in behind[:1]]
        found = [
            _Attention(name, modules[name], tuple(makers), reader)
            for makers, reader in ways
            if len(makers) <= MOST_MAKERS and _is_read(makers, reader)
        ]
        if found:
            yield found


def _is_below(name: str, other: str) -> bool:
    """Whether a module lies in another; all lie in the network itself, which has no name."""
    return name != other and (not other or name.startswith(f"{other}."))


def _linear_below(name: str, layers: Sequence[Layer]) -> list[Layer]:
    """In the order of the forward pass."""
    return [layer for layer in layers if layer.op == "Linear" and _is_below(layer.name, name)]


def _is_read(makers: Sequence[Layer], reader: Layer) -> bool:
    """Whether a layer may read what comes of others: one of them is as wide, or makes several parts as wide."""
    widths = {layer.out_channels for layer in makers}
    return any(times * reader.in_channels in widths for times in (1, *FUSED))


def _numbers(holder: object) -> dict[str, int]:
    """Whole numbers that a module or its configuration holds, by name."""
    entries = holder if isinstance(holder, Mapping) else getattr(holder, "__dict__", {})
    return {name: value for name, value in entries.items() if type(value) is int and value > 1}


def _ways(attention: _Attention) -> Iterator[tuple[int, bool, tuple[Counter, ...]]]:
    """Numbers of heads, whether a projection holds queries, keys and values one behind the other, and what shrinks."""
    own, configured = _numbers(attention.module), _numbers(getattr(attention.module, "config", None))
    of_heads = _of_heads(own) | _of_heads(configured)
    sizes = {value for name, value in own.items() if "head" in name and _names_a_size(name)}
    numbers = {*of_heads.values(), *(attention.width // size for size in sizes if attention.width % size == 0)}
    for heads in sorted(numbers, reverse=True):
        if heads < 2 or attention.width % heads or any(maker.out_channels % heads for maker in attention.makers):
            continue
        for fused in (True, False) if any(_parts(attention, maker) > 1 for maker in attention.makers) else (True,):
            yield heads, fused, _counters(attention, heads, every_width=False)
            yield heads, fused, _counters(attention, heads, every_width=True)


def _of_heads(numbers: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in numbers.items() if "head" in name and not _names_a_size(name)}


def _names_a_size(name: str) -> bool:
    return any(part in name for part in NAMES_A_SIZE)


def _parts(attention: _Attention, maker: Layer) -> int:
    """How many of queries, keys and values a projection makes."""
    return next((times for times in FUSED if maker.out_channels == times * attention.width), 1)


def _counters(attention: _Attention, heads: int, *, every_width: bool) -> tuple[Counter, ...]:
    """The module's own numbers that shrink: those of heads, and the width of all heads together where it has a name of
    its own; `every_width`: whatever it is called."""
    found = []
    for name, value in _numbers(attention.module).items():
        is_count = "head" in name and not _names_a_size(name) and value % heads == 0
        is_width = value == attention.width and (every_width or any(part in name for part in ("head", "attn", "inner")))
        if is_count or is_width:
            found.append(Counter(attention.name, name, value // heads))
    return tuple(found)


def _group(
    attention: _Attention,
    heads: int,
    fused: bool,
    counters: tuple[Counter, ...],
    blocks: Sequence[Block],
    first: Mapping[str, str],
) -> Group:
    axes: dict[tuple[str, int], Axis] = {}
    for maker in attention.makers:
        parts = _parts(attention, maker) if fused else 1
        entries = _shares(maker.out_channels, heads, parts)
        for tensor in (f"{maker.name}.weight", f"{maker.name}.bias"):
            if tensor in first:
                axes[first[tensor], 0] = Axis(first[tensor], 0, "out", entries)
    reader = attention.reader
    weight = first[reader.weight]
    axes[weight, 1] = Axis(weight, 1, "in", _shares(reader.in_channels, heads, 1))
    for name, axis in _tables(attention, heads):
        axes.setdefault((first[name], axis), Axis(first[name], axis, "out", _shares(heads, heads, 1)))
    made = [Member(maker.name, "out", maker.out_channels) for maker in attention.makers]
    members = (*made, Member(reader.name, "in", reader.in_channels))
    around = {member.module for member in members}
    return Group(
        name=min(member.module for member in made),
        kind="heads",
        unit=attention.width // heads,
        total=heads,
        legal=tuple(range(1, heads + 1)),
        members=members,
        blocks=tuple(block.name for block in blocks if not around.isdisjoint(block.layers)),
        axes=tuple(axes.values()),
        counters=counters,
    )


def _shares(channels: int, heads: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """For every head its channels, where as many parts lie one behind the other and each has all heads in turn."""
    part = channels // parts
    own = part // heads
    return tuple(
        tuple(each * part + head * own + i for each in range(parts) for i in range(own)) for head in range(heads)
    )


def _tables(attention: _Attention, heads: int) -> Iterator[tuple[str, int]]:
    """Other tensors of the module with one entry a head along one axis: biases of positions, temperatures."""
    projections = {f"{layer.name}." for layer in (*attention.makers, attention.reader)}
    tensors: list[tuple[str, Tensor]] = [*attention.module.named_parameters(), *attention.module.named_buffers()]
    for key, tensor in tensors:
        name = f"{attention.name}.{key}" if attention.name else key
        along = [axis for axis, size in enumerate(tensor.shape) if size == heads]
        if tensor.is_floating_point() and len(along) == 1 and not any(name.startswith(each) for each in projections):
            yield name, along[0]
