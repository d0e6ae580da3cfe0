"""Ranges of activations: what the histogram keeps, and that each method's range is what its name says."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, strategies as st

from hirelc_deploy.exporters._calibrate import BINS, ONE_OUTSIDE_IN, Histogram, Method, Range, range_of, squared_error

MANY = 50_000

# Bins are an eighth to a quarter of a step wide; the density that changes within one is all that the estimate misses.
ESTIMATE_TOLERANCE = 0.03

KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "gaussian": lambda random, size: random.normal(0.3, 1.0, size),
    "heavy-tailed": lambda random, size: random.standard_t(2, size),
    "one-sided": lambda random, size: random.exponential(size=size),
    "relu": lambda random, size: np.maximum(random.normal(size=size), 0),
    "clipped": lambda random, size: np.clip(random.normal(0, 4, size), 0, 6),
    "negative": lambda random, size: -random.exponential(size=size),
    "pixels": lambda random, size: random.integers(0, 256, size) / 255,
    "far from zero": lambda random, size: random.normal(1000, 1e-3, size),
    "constant": lambda random, size: np.full(size, 0.7),
    "zeros": lambda random, size: np.zeros(size),
    "one below": lambda random, size: np.append(random.exponential(size=size - 1), -1),
    "one above": lambda random, size: np.append(-random.exponential(size=size - 1), 1),
    "outlier": lambda random, size: np.append(random.normal(size=size - 1), 1000),
    "huge outlier": lambda random, size: np.append(random.normal(size=size - 1), -1e30),
}


def sample(kind: str, size: int, seed: int = 0) -> np.ndarray:
    return KINDS[kind](np.random.default_rng(seed), size).astype(np.float32)


@st.composite
def tensors(draw: st.DrawFn) -> np.ndarray:
    """Of one of the kinds at any scale, in an order in which the span may grow at any time."""
    values = sample(draw(st.sampled_from(list(KINDS))), draw(st.integers(1, 3000)), draw(st.integers(0, 2**32 - 1)))
    values *= np.float32(10.0 ** draw(st.integers(-8, 8)))
    if draw(st.booleans()):
        values = values[np.argsort(np.abs(values))]
    return values


def histogram_of(*batches: np.ndarray) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch)
    return histogram


def mean_squared_error(values: np.ndarray, found: Range, *, nonnegative: bool) -> float:
    """Of the values in the file: through QuantizeLinear and back."""
    scale, zero = found.grid(nonnegative=nonnegative)
    exact = values.astype(np.float64)
    codes = np.clip(np.rint(exact / float(scale)) + int(zero), 0, 255)
    return float(np.mean((exact - (codes - int(zero)) * float(scale)) ** 2))


@given(values=tensors(), cuts=st.lists(st.integers(0, 3000), max_size=8), nonnegative=st.booleans())
def test_nothing_depends_on_how_the_data_is_cut_into_batches(
    values: np.ndarray, cuts: list[int], nonnegative: bool
) -> None:
    whole, parts = histogram_of(values), histogram_of(*np.split(values, sorted(cuts)))
    assert np.array_equal(parts.edges, whole.edges)
    assert np.array_equal(parts.counts, whole.counts)
    assert parts.zeros == whole.zeros
    for method in Method:
        assert range_of(parts, method, nonnegative=nonnegative) == range_of(whole, method, nonnegative=nonnegative)


@given(values=tensors())
def test_every_value_is_counted_in_its_bin_and_the_extremes_are_exact(values: np.ndarray) -> None:
    histogram = histogram_of(values)
    assert (histogram.low, histogram.high) == (values.min(), values.max())
    bins = np.searchsorted(histogram.edges, values, side="right") - 1
    assert np.array_equal(histogram.counts, np.bincount(bins, minlength=BINS))
    assert histogram.zeros == np.count_nonzero(values == 0)


@given(values=tensors())
def test_the_bins_are_as_narrow_as_a_grid_needs(values: np.ndarray) -> None:
    """A step of the widest grid is four bins at least."""
    histogram = histogram_of(values)
    found = range_of(histogram, Method.MIN_MAX, nonnegative=False)
    if values.any():
        assert float(found.grid(nonnegative=False)[0]) > 4 * histogram.width


@given(values=tensors(), method=st.sampled_from(Method), nonnegative=st.booleans())
def test_a_range_holds_zero_and_is_within_the_extremes(values: np.ndarray, method: Method, nonnegative: bool) -> None:
    found = range_of(histogram_of(values), method, nonnegative=nonnegative)
    assert min(values.min(), 0) <= found.low <= 0 <= found.high <= max(values.max(), 0)
    if nonnegative:
        assert found.low == 0
    elif method is Method.MIN_MAX:
        assert (found.low, found.high) == (min(values.min(), 0), max(values.max(), 0))


@pytest.mark.parametrize("size", [999, MANY, 10 * MANY])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_percentile_is_that_of_the_values_within_a_bin(kind: str, size: int) -> None:
    values = sample(kind, size)
    histogram = histogram_of(*np.array_split(values, 7))
    found = range_of(histogram, Method.PERCENTILE, nonnegative=False)
    ends = 2 if values.min() < 0 < values.max() else 1
    inside = 100 - 100 / ONE_OUTSIDE_IN / ends
    low, high = (sign * np.percentile(sign * values, inside, method="inverted_cdf") for sign in (-1, 1))
    assert found.low == pytest.approx(min(low, 0), rel=1e-6, abs=histogram.width)
    assert found.high == pytest.approx(max(high, 0), rel=1e-6, abs=histogram.width)
    assert np.mean((values < found.low) | (values > found.high)) <= 1 / ONE_OUTSIDE_IN


def test_the_percentile_leaves_a_single_outlier_outside() -> None:
    histogram = histogram_of(sample("outlier", MANY))
    assert range_of(histogram, Method.PERCENTILE, nonnegative=False).high < 5 + histogram.width


@given(values=tensors(), nonnegative=st.booleans())
def test_the_least_error_is_no_more_than_that_of_the_extremes(values: np.ndarray, nonnegative: bool) -> None:
    """Moving a value within its bin changes its distance to the grid by less than a bin: once for either range."""
    histogram = histogram_of(values)
    least, widest = (
        mean_squared_error(values, range_of(histogram, method, nonnegative=nonnegative), nonnegative=nonnegative)
        for method in (Method.MSE, Method.MIN_MAX)
    )
    assert least**0.5 <= widest**0.5 + 2 * histogram.width


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_least_error_is_nearly_that_of_the_best_of_many_ranges(kind: str) -> None:
    values = sample(kind, MANY)
    nonnegative = bool(values.min() >= 0)
    histogram = histogram_of(values)
    widest = range_of(histogram, Method.MIN_MAX, nonnegative=nonnegative)
    parts = np.linspace(0.04, 1, 25)
    best = min(
        mean_squared_error(values, Range(widest.low * low, widest.high * high), nonnegative=nonnegative)
        for low in (parts if widest.low < 0 else [1.0])
        for high in (parts if widest.high > 0 else [1.0])
    )
    found = range_of(histogram, Method.MSE, nonnegative=nonnegative)
    rounding = (1e-6 * max(-widest.low, widest.high)) ** 2  # of a float32 scale, where the values are on the grid
    error = mean_squared_error(values, found, nonnegative=nonnegative)
    assert error <= best * (1 + ESTIMATE_TOLERANCE) + rounding


@pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed", "one-sided", "relu", "negative"])
@pytest.mark.parametrize("part", [1.0, 0.5, 0.02])
def test_the_error_is_that_of_the_values(kind: str, part: float) -> None:
    """Whether bins are narrower than a step or wider, and whether values are rounded or cut off."""
    values = sample(kind, MANY)
    histogram = histogram_of(values)
    widest = range_of(histogram, Method.MIN_MAX, nonnegative=False)
    candidate = Range(widest.low * part, widest.high * part)
    found = squared_error(histogram, candidate) / values.size
    real = mean_squared_error(values, candidate, nonnegative=False)
    assert found == pytest.approx(real, rel=ESTIMATE_TOLERANCE)


@pytest.mark.parametrize("kind", ["pixels", "constant", "zeros"])
def test_values_that_lie_on_the_widest_grid_keep_it(kind: str) -> None:
    histogram = histogram_of(sample(kind, MANY))
    assert range_of(histogram, Method.MSE, nonnegative=True) == range_of(histogram, Method.MIN_MAX, nonnegative=True)


def test_counts_do_not_overflow_at_32_bits() -> None:
    histogram = histogram_of(np.ones(4, np.float32))
    histogram.counts *= 2**31
    histogram.add(np.full(4, 3.0, np.float32))
    assert histogram.counts.sum() == 2**33 + 4


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("value", [1e-45, -1e-45, 1e-38, 3e38, -3e38])
def test_a_range_at_the_limits_of_float32_has_a_grid(value: float, method: Method) -> None:
    found = range_of(histogram_of(np.array([0, value], np.float32)), method, nonnegative=False)
    scale, _ = found.grid(nonnegative=False)
    assert np.finfo(np.float32).tiny <= scale < np.inf


def test_values_at_both_limits_of_float32_fit() -> None:
    limits = np.finfo(np.float32)
    values = np.array([limits.smallest_subnormal, limits.min, limits.max], np.float32)
    assert np.array_equal(histogram_of(*values).counts, histogram_of(values).counts)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_and_not_counted(value: float) -> None:
    histogram = histogram_of(np.ones(3, np.float32))
    with pytest.raises(ValueError, match="not finite"):
        histogram.add(np.array([[1.0, value]], np.float32))
    assert histogram.counts.sum() == 3


def test_a_range_needs_values() -> None:
    with pytest.raises(ValueError, match="no values"):
        range_of(histogram_of(np.zeros(0, np.float32)), Method.MSE, nonnegative=False)
