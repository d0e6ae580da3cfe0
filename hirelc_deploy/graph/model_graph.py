"""A network as the rest of the pass sees it: layers, blocks and what can be removed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class Layer:
    """One operator with weights.  Shapes are those of one example: the batch axis is left out."""

    name: str
    """Dotted module path."""
    op: str
    """The module's class: Conv1d, Conv2d, ConvTranspose2d, Linear, Embedding …"""
    weight_shape: tuple[int, ...]
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    """() for Linear and Embedding."""
    stride: tuple[int, ...]
    conv_groups: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    """Multiply-accumulates for one example, all calls together."""
    parameters: int
    """Weight and bias."""
    calls: int
    """How often one forward pass runs it."""
    shares_weight_with: tuple[str, ...] = ()
    """Other layers that hold the very same parameter."""

    @property
    def weight(self) -> str:
        """The parameter's name in the state dict."""
        return f"{self.name}.weight"

    @property
    def depthwise(self) -> bool:
        return self.conv_groups > 1 and self.conv_groups == self.in_channels == self.out_channels


@dataclass(frozen=True)
class Member:
    """One axis of one module that shrinks when a group shrinks."""

    module: str
    role: Literal["out", "in"]
    """out: it makes the channels (or normalises them); in: it reads them."""
    size: int
    """Entries of the axis; a Linear behind a flatten has several a channel."""


@dataclass(frozen=True)
class Axis:
    """What a group's units hold of one axis of one tensor: where to cut."""

    tensor: str
    """State-dict name; for a shared tensor the first of its names (`ModelGraph.aliases` has the others)."""
    axis: int
    role: Literal["out", "in"]
    """As in Member: an `in` axis holds the weights that read the channels."""
    entries: tuple[tuple[int, ...], ...]
    """For every unit its positions along the axis, the same number for each."""

    @property
    def per_unit(self) -> int:
        return len(self.entries[0])


@dataclass(frozen=True)
class Counter:
    """A module's own number that a group's units are counted in, which its forward pass relies on."""

    module: str
    attribute: str
    per_unit: int
    """1 of heads, a head's channels of a width of all heads together."""


@dataclass(frozen=True)
class Vanishing:
    """The modules that are replaced when a branch goes: nothing of theirs stays in the network."""

    silenced: tuple[str, ...]
    """They read the group; each becomes a `Gone`, whose result an addition leaves out."""
    bypassed: tuple[str, ...]
    """They lie before or behind the silenced ones and serve nothing else; each becomes a `Bypass`."""

    @property
    def modules(self) -> tuple[str, ...]:
        return self.silenced + self.bypassed


@dataclass(frozen=True)
class Group:
    """What can only be removed together, counted in units of `unit` channels (or heads)."""

    name: str
    """Its first producing member in sorted order: independent of how the groups were found."""
    kind: Literal["channels", "heads"]
    unit: int
    """Channels that one unit holds."""
    total: int
    """Units before anything is removed."""
    legal: tuple[int, ...]
    """Counts of units that may stay, ascending; 0 where the whole branch can go."""
    members: tuple[Member, ...]
    blocks: tuple[str, ...]
    """The blocks it touches: one, and that block's agent decides; several, and the level above does."""
    gone_at_zero: tuple[str, ...] = ()
    """Layers that leave the network with the last unit."""
    axes: tuple[Axis, ...] = ()
    vanishing: Vanishing | None = None
    """How the branch goes; None where 0 is not legal."""
    counters: tuple[Counter, ...] = ()
    """What else shrinks with it, beside axes."""


@dataclass(frozen=True)
class Block:
    """The layers that one low-level agent decides for."""

    name: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class LeftOut:
    """Something that could not be offered, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Signature:
    """One input of the network: its shape without the batch axis, and its torch dtype by name (`float32`)."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ModelGraph:
    """Everything about a network that can be decided, in the order of its forward pass."""

    layers: tuple[Layer, ...]
    blocks: tuple[Block, ...]
    groups: tuple[Group, ...]
    left_out: tuple[LeftOut, ...] = ()
    """Groups that failed their proof, layers that cannot be quantised; shown to the user."""
    parameter_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Every parameter and buffer of the network by its state-dict name."""
    buffers: frozenset[str] = frozenset()
    """The names in `parameter_shapes` that no optimiser moves."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """For a shared tensor: each further name -> its first name."""
    inputs: tuple[Signature, ...] = ()

    @cached_property
    def layer(self) -> Mapping[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def group(self) -> Mapping[str, Group]:
        return {group.name: group for group in self.groups}

    def alike(self, layer: str) -> tuple[str, ...]:
        """The layers of its kind that share its weight: they compute alike, and others may not."""
        op = self.layer[layer].op
        return tuple(name for name in self.layer[layer].shares_weight_with if self.layer[name].op == op)

    @cached_property
    def block_of(self) -> Mapping[str, str]:
        """Block name by layer name."""
        return {layer: block.name for block in self.blocks for layer in block.layers}
