"""Times of kernels from a target's table: measured ones as they are, others between those of their family.

Kernels of one family differ in their channels alone.  Latency over channels has steps (a kernel works on so many
channels at once), so no curve is laid through them: between two measured counts the time goes in a straight line, and
`hirelc-deploy profile` measures each count where that is not good enough.  What a table knows nothing of is answered
by a roofline through all kernels of its kind, and named.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from scipy.optimize import nnls

from hirelc_deploy.cost.kernel import Kernel, kind_of
from hirelc_deploy.errors import UserError
from hirelc_deploy.profiles._table import Row

Basis = Literal["measured", "interpolated", "roofline"]

NEIGHBOURS = 4
"""Measured points whose deviations from the two lines of a family count for a point between them."""

FEWEST_FOR_A_ROOFLINE = 6
"""Kernels of a kind; with fewer, those of all kinds together are asked."""

UNKNOWN_ERROR = 0.5
"""Of a roofline with too few points to tell."""


@dataclass(frozen=True)
class Estimate:
    """How long a kernel takes, and how well that is known."""

    us: float
    error: float
    """Relative, one standard deviation."""
    basis: Basis


class MeasuredPrices:
    """The table of a target, asked for any kernel."""

    def __init__(self, times_us: Mapping[Kernel, float]) -> None:
        if not times_us:
            raise ValueError("a table without rows knows no times")
        self._times_us = times_us
        self._points: dict[str, list[tuple[int, int, float]]] = defaultdict(list)
        for kernel, us in times_us.items():
            self._points[kernel.family].append((*kernel.channels, us))
        self._surfaces: dict[str, Surface] = {}
        self.unknown: set[str] = set()
        """Families that were asked for and never measured."""

    @classmethod
    def of(cls, rows: Iterable[Row], *, threads: int = 1) -> "MeasuredPrices":
        """Raises UserError for a row that names no kernel."""
        return cls(times_of(rows, threads=threads))

    def __call__(self, kernel: Kernel) -> float:
        """Microseconds."""
        return self.estimate(kernel).us

    def estimate(self, kernel: Kernel) -> Estimate:
        family = self._surface(kernel)
        if family is not None:
            inputs, outputs = kernel.channels
            known = family.known.get((inputs, outputs))
            if known is not None:
                return Estimate(known, 0.0, "measured")
            return Estimate(float(family.grid([inputs], [outputs])[0, 0]), family.error, "interpolated")
        self.unknown.add(kernel.family)
        return self._roofline(kernel)

    def grid(self, kernel: Kernel, inputs: Sequence[int], outputs: Sequence[int]) -> np.ndarray:
        """Microseconds for all of these channels, (inputs, outputs); none may be zero."""
        family = self._surface(kernel)
        if family is not None:
            return family.grid(inputs, outputs)
        return np.array([[self(kernel.with_channels(i, o)) for o in outputs] for i in inputs])

    def errors(self, kernel: Kernel, inputs: Sequence[int], outputs: Sequence[int]) -> np.ndarray:
        """How well those are known: relative, one standard deviation."""
        family = self._surface(kernel)
        if family is None:
            return np.full((len(inputs), len(outputs)), self._roofline(kernel).error)
        known = [[(i, o) in family.known for o in outputs] for i in inputs]
        return np.where(known, 0.0, family.error)

    def _surface(self, kernel: Kernel) -> "Surface | None":
        """Of its family, made when it is first asked for: a table holds many more families than one network has."""
        family = kernel.family
        if family not in self._surfaces and family in self._points:
            self._surfaces[family] = Surface(self._points[family], kernel.has_one_count)
        return self._surfaces.get(family)

    @cached_property
    def _rooflines(self) -> dict[str, "_Roofline"]:
        return _rooflines(self._times_us)

    def _roofline(self, kernel: Kernel) -> Estimate:
        roofline = self._rooflines.get(kind_of(kernel)) or self._rooflines[""]
        return Estimate(roofline.us(kernel), roofline.error, "roofline")


def kernel_of(row: Row) -> Kernel:
    """The kernel that a row is about.  Raises UserError if its text is none."""
    try:
        return Kernel.parse(row.op, row.attributes, row.operands, row.compute)
    except ValueError as error:
        raise UserError(
            f"a table has a row about {row.op} {row.operands} {row.compute}: {error}",
            fix="mend or delete it; `hirelc-deploy profile` measures it again",
        ) from error


def times_of(rows: Iterable[Row], *, threads: int) -> dict[Kernel, float]:
    """Microseconds by kernel, of a table's rows for so many threads.  Raises UserError for a row without a kernel."""
    return {kernel_of(row): row.p50_us for row in rows if row.threads == threads}


class Surface:
    """Kernels that differ in their channels."""

    def __init__(self, points: Sequence[tuple[int, int, float]], has_one_count: bool) -> None:
        """Inputs, outputs and microseconds of each that was measured; both counts are one where `has_one_count`."""
        self.known = {(inputs, outputs): us for inputs, outputs, us in points}
        self._reference = max(self.known, key=lambda place: (place[0] * place[1], place))
        self._us = self.known[self._reference]
        self._is_one = has_one_count
        by_outputs = sorted((o, us) for (i, o), us in self.known.items() if self._is_one or i == self._reference[0])
        by_inputs = sorted((i, us) for (i, o), us in self.known.items() if o == self._reference[1])
        self._over_outputs = _Line(by_outputs)
        self._over_inputs = _Line(by_inputs if not self._is_one else [by_outputs[-1]])
        self._off = self._deviations()
        self.error = self._leave_one_out()

    def grid(self, inputs: Sequence[int], outputs: Sequence[int]) -> np.ndarray:
        found = self._lines(inputs, outputs) * np.exp(self._deviation(inputs, outputs))
        for i, read in enumerate(inputs):
            for j, written in enumerate(outputs):
                found[i, j] = self.known.get((read, written), found[i, j])
        return found

    def _lines(self, inputs: Sequence[int], outputs: Sequence[int]) -> np.ndarray:
        """The two lines through the reference, as if one axis did not know of the other."""
        over_outputs = self._over_outputs.at(np.asarray(outputs, float))
        if self._is_one:
            return np.broadcast_to(over_outputs, (len(inputs), len(outputs))).copy()
        return np.outer(self._over_inputs.at(np.asarray(inputs, float)) / self._us, over_outputs)

    def _deviations(self) -> np.ndarray:
        """What is measured off the lines: (points, 3) of log2 inputs, log2 outputs and log ratio; the lines' are 0."""
        rows = []
        for (inputs, outputs), us in self.known.items():
            ratio = us / float(self._lines([inputs], [outputs])[0, 0])
            rows.append((math.log2(inputs), math.log2(outputs), math.log(ratio)))
        return np.array(rows)

    def _deviation(self, inputs: Sequence[int], outputs: Sequence[int]) -> np.ndarray:
        """Of any point: the mean of its nearest measured ones, by their distance."""
        off = self._off
        if self._is_one or not np.any(np.abs(off[:, 2]) > 1e-9):
            return np.zeros((len(inputs), len(outputs)))
        read, written = np.log2(np.asarray(inputs, float)), np.log2(np.asarray(outputs, float))
        squared = (read[:, None, None] - off[:, 0]) ** 2 + (written[None, :, None] - off[:, 1]) ** 2
        nearest = np.argsort(squared, axis=-1)[..., :NEIGHBOURS]
        weights = 1 / (np.take_along_axis(squared, nearest, -1) + 1e-6)
        return (weights * off[nearest, 2]).sum(-1) / weights.sum(-1)

    def _leave_one_out(self) -> float:
        """Median relative error of the two lines at inner points that are left out."""
        errors = [*self._over_outputs.errors(), *self._over_inputs.errors()]
        return float(np.median(errors)) if errors else UNKNOWN_ERROR


class _Line:
    """Microseconds over channels: straight between what was measured, and beyond it."""

    def __init__(self, points: Sequence[tuple[int, float]]) -> None:
        self._channels = np.array([channels for channels, _ in points], float)
        self._us = np.array([us for _, us in points])

    def at(self, channels: np.ndarray) -> np.ndarray:
        if len(self._us) == 1:
            return self._us[0] * channels / self._channels[0]
        found = np.interp(channels, self._channels, self._us)
        for here, ends in ((channels < self._channels[0], (0, 1)), (channels > self._channels[-1], (-2, -1))):
            (low, high), (first, last) = self._channels[list(ends)], self._us[list(ends)]
            slope = max((last - first) / (high - low), 0.0)
            beyond = np.where(channels < low, first + slope * (channels - low), last + slope * (channels - high))
            found = np.where(here, np.maximum(beyond, 0.1 * self._us.min()), found)
        return found

    def errors(self) -> list[float]:
        """Relative, of each inner point told from its neighbours."""
        found = []
        for i in range(1, len(self._us) - 1):
            neighbours = [i - 1, i + 1]
            told = np.interp(self._channels[i], self._channels[neighbours], self._us[neighbours])
            found.append(abs(told / self._us[i] - 1))
        return found


@dataclass(frozen=True)
class _Roofline:
    """us = a + macs x b + bytes x c, none of them negative."""

    coefficients: tuple[float, float, float]
    error: float

    def us(self, kernel: Kernel) -> float:
        return float(np.dot(self.coefficients, _features(kernel)))


def _features(kernel: Kernel) -> tuple[float, float, float]:
    return (1.0, kernel.macs / 1e6, kernel.bytes / 1e6)


def _rooflines(times_us: Mapping[Kernel, float]) -> dict[str, _Roofline]:
    """By kind of kernel, and under "" through all kernels."""
    kinds: dict[str, list[tuple[Kernel, float]]] = defaultdict(list)
    for kernel, us in times_us.items():
        for kind in (kind_of(kernel), ""):
            kinds[kind].append((kernel, us))
    return {kind: _fitted(found) for kind, found in kinds.items() if len(found) >= FEWEST_FOR_A_ROOFLINE or not kind}


def _fitted(found: Sequence[tuple[Kernel, float]]) -> _Roofline:
    us = np.array([each for _, each in found])
    features = np.array([_features(kernel) for kernel, _ in found])
    # relative errors count: a kernel of a microsecond is as welcome as one of a millisecond
    coefficients, _ = nnls(features / us[:, None], np.ones(len(us)))
    errors = features @ coefficients / us - 1
    error = float(np.sqrt(np.mean(errors**2))) if len(us) > len(coefficients) else UNKNOWN_ERROR
    return _Roofline(tuple(coefficients), error)
