"""What a runtime makes of a network, as far as it depends on the policy: kernels, and when each of them runs.

A runtime says once, for a network, which kernels can run, under which decisions and with how many channels
(`exporters`); any number of policies are then priced without building a file.  Decisions are variables: what each
layer computes in, and the count of each prune group.  Between them stand states, which follow from decisions: whether
a tensor comes from integer kernels, whether it is held in blocks of channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal as OneOf

from hirelc_deploy.cost.kernel import Kernel
from hirelc_deploy.policy import Compute

Value = Compute | bool
"""Of a variable: what a layer computes in, or whether a state holds."""


@dataclass(frozen=True)
class Condition:
    """A layer's compute is one of these, or a state holds or does not."""

    variable: str
    """A layer's name, or a state's."""
    values: frozenset[Value]


@dataclass(frozen=True)
class State:
    """Something that follows from decisions: all of the conditions hold, or any of them."""

    name: str
    of: OneOf["all", "any"]
    conditions: tuple[Condition, ...]
    """About layers and earlier states."""


@dataclass(frozen=True)
class Channels:
    """How many channels of an axis stay: those of the whole network less what groups have cut away."""

    full: int
    cut_per_unit: Mapping[str, int]
    """By group: channels of this axis that go with each of its units."""

    def __hash__(self) -> int:
        return hash((self.full, tuple(sorted(self.cut_per_unit.items()))))


@dataclass(frozen=True)
class Term:
    """A kernel that runs where all conditions hold; its time is part of the sum."""

    kernel: Kernel
    """As it is in the whole network."""
    inputs: Channels
    outputs: Channels
    when: tuple[Condition, ...] = ()
    scales: bool = True
    """Whether `inputs` and `outputs` are the kernel's own channels.  If not, they say what part of its work is left:
    the heads of an attention, say, whose tensors have no axis of channels."""
    part: float = 1.0
    """Of the kernel's time: what is saved where another kernel does this one's work on the way."""
    place: str = ""
    """The layer or tensor that it belongs to, for people."""


@dataclass(frozen=True)
class Held:
    """A tensor that lies in memory for a while where all conditions hold."""

    elements: int
    """In the whole network."""
    channels: Channels
    """How many of them stay: as many a channel."""
    element_bytes: int
    first: int
    last: int
    """Moments, in the order of the forward pass."""
    when: tuple[Condition, ...] = ()


@dataclass(frozen=True)
class Network:
    """Kernels of a network on one runtime, by decision."""

    computes: Mapping[str, tuple[Compute, ...]]
    """By layer, what it can compute in."""
    totals: Mapping[str, int]
    """Units of each group before anything is cut."""
    counts: Mapping[str, tuple[int, ...]]
    """Units that may stay, by group, ascending."""
    states: tuple[State, ...]
    """In an order in which each follows from earlier ones."""
    terms: tuple[Term, ...]
    alike: tuple[tuple[str, str], ...] = ()
    """Pairs of layers of one kind that share a weight: they compute alike."""
    held: tuple[Held, ...] = ()
    """What lies in memory while it runs, beside weights."""

    def with_counts(self, keep: Mapping[str, int]) -> "Network":
        """The same where the counts of units are decided already; groups that `keep` does not name stay whole."""
        return replace(self, counts={group: (keep.get(group, total),) for group, total in self.totals.items()})
