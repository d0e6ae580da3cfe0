"""Which kernels have to be timed so that a network's policies can be priced, and in what order.

A family of kernels is a function of two numbers of channels.  It is measured on the two lines through its largest
kernel, from coarse to fine, and at a few places off the lines.  Each new point is first told from those that are
there: where that is good enough over a whole level, finer ones are left out.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import numpy as np

from hirelc_deploy.cost.kernel import Kernel
from hirelc_deploy.cost.latency import values_of
from hirelc_deploy.cost.network import Network
from hirelc_deploy.cost.prices import Surface

GOOD_ENOUGH = 0.03
"""Relative error of a point told from its neighbours: about what a measurement repeats to."""

NEGLIGIBLE = 5e-4
"""Of the time of one kernel of each family together: an error that no policy would notice."""

PROBES = 4
"""Points of a level that are measured to find out whether its others have to be."""

GRID = 3
"""Counts of each axis that are measured off the two lines, if those first measured there are not told well enough."""

T = TypeVar("T")

Place = tuple[int, int]
"""Input and output channels."""


@dataclass
class Family:
    """Kernels that differ in their channels, what is known of them and what is still to be measured."""

    kernel: Kernel
    """One of them."""
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    """The channels that policies can ask for, ascending."""
    work: float = 0.0
    """Of the network's kernels of this family, in multiply-accumulates and bytes: which family comes first."""
    known: dict[Place, float] = field(default_factory=dict)
    negligible_us: float = 0.0
    """An error that does not count, however large it is beside the kernel's own time."""

    @property
    def is_one(self) -> bool:
        """Whether inputs and outputs are the same number."""
        return self.kernel.has_one_count

    @property
    def reference(self) -> Place:
        return self.inputs[-1], self.outputs[-1]

    def at(self, place: Place) -> Kernel:
        return self.kernel.with_channels(*place)

    def told(self, *places: Place) -> list[float]:
        """Microseconds, from what is known."""
        surface = Surface([(inputs, outputs, us) for (inputs, outputs), us in self.known.items()], self.is_one)
        return [float(surface.grid([inputs], [outputs])[0, 0]) for inputs, outputs in places]

    def plan(self) -> Iterator[list[Place]]:
        """Places to measure, a list at a time; the caller writes the times to `known` before it asks for more.

        What is asked for depends on times alone: with those of a table, a run that was stopped goes the same way again.
        """
        (read, written) = self.reference
        corners = [self.reference, (read, self.outputs[0]), (self.inputs[0], written)]
        if self.is_one:
            corners = [self.reference, (self.inputs[0], self.inputs[0])]
        yield self._new(corners)
        if self.is_one:
            yield from self._refined([(count, count) for count in self.inputs])
            return
        yield from self._refined([(read, count) for count in self.outputs])
        yield from self._refined([(count, written) for count in self.inputs])
        yield from self._off_the_lines()

    def _refined(self, line: Sequence[Place]) -> Iterator[list[Place]]:
        """Ever finer levels of a line, until one is told well enough from those before."""
        while level := self._between(line):
            probes = _spread(level, PROBES)
            error = yield from self._measured(probes)
            if error <= GOOD_ENOUGH:
                return
            yield self._new(level)

    def _between(self, line: Sequence[Place]) -> list[Place]:
        """Of each stretch between known places the middle one, now on an even, now on an odd place of the line."""
        at = [i for i, place in enumerate(line) if place in self.known]
        found = []
        for number, (low, high) in enumerate(pairwise(at)):
            if high - low < 2:
                continue
            middle = (low + high) // 2
            # latency goes up and down with even and odd multiples: look at both
            if middle % 2 == number % 2 and middle + 1 < high:
                middle += 1
            found.append(line[middle])
        return found

    def _off_the_lines(self) -> Iterator[list[Place]]:
        """Where both are small the axes multiply least; then, if that was not told well, a coarse grid."""
        (read, *_), (written, *_) = self.inputs, self.outputs
        inner = self.inputs[len(self.inputs) // 2], self.outputs[len(self.outputs) // 2]
        first = [(read, written), (read, inner[1]), (inner[0], written), inner]
        error = yield from self._measured(first)
        if error > GOOD_ENOUGH:
            yield self._new((i, o) for i in _spread(self.inputs[:-1], GRID) for o in _spread(self.outputs[:-1], GRID))

    def _measured(self, places: Sequence[Place]) -> Generator[list[Place], None, float]:
        """Have places measured; the largest relative error of what was told of them."""
        new = self._new(places)
        told = dict(zip(new, self.told(*new), strict=True))
        yield new
        off_us = {place: abs(told[place] - self.known[place]) for place in new if place in self.known}
        counted = [off / self.known[place] for place, off in off_us.items() if off > self.negligible_us]
        return max(counted, default=0.0)

    def _new(self, places: Iterable[Place]) -> list[Place]:
        return [place for place in dict.fromkeys(places) if place not in self.known]


def families(network: Network) -> list[Family]:
    """What a network needs, the families with most work first."""
    found: dict[str, Family] = {}
    for term in network.terms:
        kernel = term.kernel
        if term.scales:
            inputs = _positive(values_of(network, term.inputs))
            outputs = _positive(values_of(network, term.outputs))
        else:
            inputs, outputs = ((size,) for size in kernel.channels)
        if not inputs or not outputs:
            continue  # the branch is gone
        before = found.get(kernel.family)
        if before is not None:
            inputs, outputs = _merged(before.inputs, inputs), _merged(before.outputs, outputs)
        work = (before.work if before else 0.0) + kernel.macs + kernel.bytes
        found[kernel.family] = Family(kernel, inputs, outputs, work)
    return sorted(found.values(), key=lambda family: -family.work)


def neglect(wanted: Sequence[Family]) -> None:
    """Say in each family which error is too small to matter, now that the largest kernel of each is known."""
    total_us = sum(family.known.get(family.reference, 0.0) for family in wanted)
    for family in wanted:
        family.negligible_us = NEGLIGIBLE * total_us


def _positive(counts: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted({count for count in counts if count > 0}))


def _merged(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted({*one, *other}))


def _spread(items: Sequence[T], count: int) -> list[T]:
    """So many, evenly over the sequence."""
    if len(items) <= count:
        return list(items)
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, count + 2).round()[1:-1]]
