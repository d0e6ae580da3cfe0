"""The range of an activation, from one pass over the calibration data and in memory that does not grow with it."""

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import numpy as np

LEVELS = 255
"""Steps of an activation's uint8 grid."""

BINS = 2048
"""At least half are in use, zero always inside: four or more to a step of the grid that spans them."""

FINEST = -160
"""Exponent of bins too narrow for any float32 but zero."""

PART = 1 << 16
"""Values that are binned at a time, so that the copies made on the way stay in the cache."""

ONE_OUTSIDE_IN = 10_000
"""Of so many values PERCENTILE leaves one out: 99.99 % are inside."""

SHRUNK = tuple(np.geomspace(1.0, 1 / 256, num=128).tolist())
"""Parts of an end that MSE tries, down to a step of the widest grid; 4 % apart, as the error is flat at its least."""

NOTHING = 1e-32
"""A span so narrow is taken for zero: the step of a range that MSE tries would be subnormal, or zero, in float32."""


SIGNED_STEPS = 127
"""Of a symmetric int8 grid, on either side of zero."""


@dataclass(frozen=True)
class Range:
    """What the values of a tensor span."""

    low: float
    high: float

    @property
    def span(self) -> float:
        """Zero is always inside."""
        return max(self.high, 0.0) - min(self.low, 0.0)

    def spanning(self, least: float) -> "Range":
        """This one, or one that begins where it does and spans as much as is asked."""
        return self if self.span >= least else Range(self.low, min(self.low, 0.0) + least)

    def grid(self, *, nonnegative: bool) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero point, float32 and uint8 scalars, of a grid that spans the range and holds zero."""
        low = 0.0 if nonnegative else min(self.low, 0.0)
        span = max(self.high, 0.0) - low
        scale = np.array(span / LEVELS if span > 0 else 1 / LEVELS, np.float32)
        if span > 0 and float(scale) * LEVELS > span:  # rounded up: the grid must not end beyond the range
            scale = np.nextafter(scale, np.float32(0))
        return scale, np.array(np.clip(round(-low / float(scale)), 0, LEVELS), np.uint8)


class Method(StrEnum):
    """How the range follows from the values; zero is always inside."""

    MIN_MAX = "min-max"
    PERCENTILE = "percentile"
    MSE = "mse"
    """The range whose grid has the least mean squared error, what it rounds and what it cuts off."""


class Histogram:
    """The values of one tensor, counted.

    A bin begins at a whole multiple of its width, which is a power of two and the least with which all values and
    zero fit.  So wider bins are pairs of narrower ones, and nothing depends on how the data came in batches.
    """

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf  # the extremes, exact
        self.counts = np.zeros(BINS, np.int64)
        self.first = 0  # number of the first bin: the one that begins at zero is number 0
        self.zeros = 0  # how many values are zero; their bin counts them too
        self._exponent = FINEST

    @property
    def width(self) -> float:
        return 2.0**self._exponent

    @property
    def edges(self) -> np.ndarray:
        """Where the bins begin and end, (BINS + 1,); a value on an edge is in the bin above it."""
        return (self.first + np.arange(BINS + 1)) * self.width

    def add(self, values: np.ndarray) -> None:
        """Count the values, of any shape, as float32.  Raises ValueError if one is not finite."""
        flat = np.asarray(values, np.float32).reshape(-1)
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):  # a NaN is both smallest and largest
            raise ValueError("a value is not finite")
        self.low, self.high = min(low, self.low), max(high, self.high)
        self._make_room()
        self.zeros += flat.size - int(np.count_nonzero(flat))
        for start in range(0, flat.size, PART):
            part = flat[start : start + PART].astype(np.float64)
            numbers = np.floor(part / self.width).astype(np.int64)
            self.counts += np.bincount(numbers - self.first, minlength=BINS)

    def _make_room(self) -> None:
        """Merge pairs of bins until the extremes and zero fit, and begin at the lowest."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        exponent = self._exponent
        while math.floor(high / 2.0**exponent) - math.floor(low / 2.0**exponent) >= BINS:
            exponent += 1
        first = math.floor(low / 2.0**exponent)
        used = np.flatnonzero(self.counts)
        counts = np.zeros_like(self.counts)
        np.add.at(counts, ((self.first + used) >> (exponent - self._exponent)) - first, self.counts[used])
        self.counts, self._exponent, self.first = counts, exponent, first


def range_of(histogram: Histogram, method: Method, *, nonnegative: bool) -> Range:
    """The range for a uint8 grid, zero inside; it begins at zero if `nonnegative`.

    Raises ValueError if the histogram has seen nothing.
    """
    if not histogram.counts.any():
        raise ValueError("no values to take a range from")
    widest = Range(0.0 if nonnegative else min(histogram.low, 0.0), max(histogram.high, 0.0))
    if widest.high - widest.low < NOTHING:
        return Range(0.0, 0.0)
    match method:
        case Method.MIN_MAX:
            return widest
        case Method.PERCENTILE:
            return _percentile(histogram, widest)
        case Method.MSE:
            return _least_error(histogram, widest)


def _percentile(histogram: Histogram, widest: Range) -> Range:
    """The share that may be outside is cut off in whole bins, half of it at each end that is not zero anyway."""
    ends = 2 if widest.low < 0 < widest.high else 1
    outside = int(histogram.counts.sum()) // (ONE_OUTSIDE_IN * ends)
    lowest = int(np.argmax(np.cumsum(histogram.counts) > outside))
    behind_highest = BINS - int(np.argmax(np.cumsum(histogram.counts[::-1]) > outside))
    low, high = histogram.edges[[lowest, behind_highest]].tolist()
    return Range(min(max(low, widest.low), 0.0), max(min(high, widest.high), 0.0))


def _least_error(histogram: Histogram, widest: Range) -> Range:
    """Both ends shrunk alike, then each alone; of equal ranges the widest."""
    error = partial(squared_error, histogram)
    best = min((Range(widest.low * part, widest.high * part) for part in SHRUNK), key=error)
    if widest.low < 0 < widest.high:
        best = min((Range(best.low, widest.high * part) for part in SHRUNK), key=error)
        best = min((Range(widest.low * part, best.high) for part in SHRUNK), key=error)
    return best


def magnitude_of(histogram: Histogram, method: Method) -> float:
    """The largest magnitude that a symmetric int8 grid holds, from the values; 0 where there is nothing but zeros.

    Raises ValueError if the histogram has seen nothing.
    """
    found = range_of(histogram, Method.PERCENTILE if method is Method.PERCENTILE else Method.MIN_MAX, nonnegative=False)
    widest = max(-found.low, found.high)
    if method is not Method.MSE or widest == 0:
        return widest
    magnitudes = [widest * part for part in SHRUNK]
    return min(magnitudes, key=lambda magnitude: _signed_error(histogram, magnitude))


def _signed_error(histogram: Histogram, magnitude: float) -> float:
    return _error_on_grid(histogram, magnitude / SIGNED_STEPS, -SIGNED_STEPS - 1, SIGNED_STEPS)


def squared_error(histogram: Histogram, candidate: Range) -> float:
    """What the uint8 grid of the range adds up to over the values: rounded inside, cut off outside."""
    scale, zero = candidate.grid(nonnegative=candidate.low == 0)
    return _error_on_grid(histogram, float(scale), -int(zero), LEVELS - int(zero))


def _error_on_grid(histogram: Histogram, step: float, lowest: int, highest: int) -> float:
    """Squared, of a grid with these codes, summed over the values.

    Values are taken to be spread evenly over their bin, and the error is integrated over it.  At the bin's centre
    it would be chance where bins are wider than a step, after an outlier; a twelfth of the squared step would be
    wrong where they are narrower and the values lie on the grid, as pixels do.
    """
    edges = histogram.edges / step
    codes = np.clip(np.rint(edges), lowest, highest)
    distance = edges - codes
    integral = codes / 12 + distance**2 * distance / 3  # from 0 to an edge, of the squared distance to the nearest code
    counts = histogram.counts.copy()
    counts[-histogram.first] -= histogram.zeros  # often half of the values, and exact on every grid
    return float(counts @ np.diff(integral)) * step**3 / histogram.width
