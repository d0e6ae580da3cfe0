"""The contract of a number format, over every file in kernels/: three functions that agree bit for bit."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from hirelc_deploy.errors import UserError
from hirelc_deploy.kernels import format_names, load_format
from hirelc_deploy.kernels._base import Packed
from hirelc_deploy.policy import PerChannel, PerTensor, Storage

LARGEST = (127, 63)


def storages() -> Iterator[Storage]:
    """Every storage of every format."""
    for name in format_names():
        numbers = load_format(name)
        for bits in numbers.bits:
            for granularity in numbers.granularities:
                yield Storage(name, bits, granularity())


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Of one to four axes, odd sizes, with zeros, a dead channel or one huge outlier."""
    shape = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = random.normal(size=shape).astype(np.float32)
    match draw(st.sampled_from(["plain", "zeros", "dead channel", "outlier", "tiny"])):
        case "zeros":
            weight[:] = 0
        case "dead channel":
            weight[0] = 0
        case "outlier":
            weight.flat[0] = 1e4
        case "tiny":
            weight *= 1e-20
    return torch.from_numpy(weight)


def decoded(packed: Packed, axis: int, rank: int) -> np.ndarray:
    """What the file's nodes compute: codes times scale, in float32."""
    codes = packed.tensors["codes"]
    if packed.scale is None:
        return codes
    shape = [-1 if a == axis and packed.scale.ndim else 1 for a in range(rank)]
    return codes.astype(np.float32) * packed.scale.reshape(shape)


@pytest.mark.parametrize("storage", list(storages()), ids=str)
@given(weight=weights(), axis=st.integers(0, 1), largest=st.sampled_from(LARGEST))
def test_what_is_trained_is_what_is_stored(storage: Storage, weight: torch.Tensor, axis: int, largest: int) -> None:
    numbers = load_format(storage.format)
    on_grid = numbers.quantise(weight, storage, axis=axis, largest=largest)
    packed = numbers.pack(weight, storage, axis=axis, largest=largest)
    assert np.array_equal(decoded(packed, axis, weight.dim()), on_grid.numpy())


@pytest.mark.parametrize("storage", list(storages()), ids=str)
@given(weight=weights(), axis=st.integers(0, 1))
def test_packed_bytes_are_exact(storage: Storage, weight: torch.Tensor, axis: int) -> None:
    numbers = load_format(storage.format)
    packed = numbers.pack(weight, storage, axis=axis, largest=127)
    stored = sum(array.nbytes for array in packed.tensors.values())
    stored += 0 if packed.scale is None else packed.scale.nbytes
    assert numbers.packed_bytes(tuple(weight.shape), storage, axis=axis) == stored


@pytest.mark.parametrize("storage", list(storages()), ids=str)
def test_the_gradient_passes_straight_through(storage: Storage) -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    direction = torch.randn(4, 3)
    numbers = load_format(storage.format)
    (numbers.quantise(weight, storage, axis=0, largest=127) * direction).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, direction)


@given(weight=weights(), axis=st.integers(0, 1), largest=st.sampled_from(LARGEST))
def test_int8_codes_stay_in_their_range_and_err_by_half_a_step(weight: torch.Tensor, axis: int, largest: int) -> None:
    numbers, storage = load_format("int"), Storage("int", 8, PerChannel())
    packed = numbers.pack(weight, storage, axis=axis, largest=largest)
    assert np.abs(packed.tensors["codes"].astype(int)).max() <= largest
    assert packed.scale is not None
    steps = packed.scale.reshape([-1 if a == axis else 1 for a in range(weight.dim())])
    error = np.abs(decoded(packed, axis, weight.dim()).astype(np.float64) - weight.numpy())
    assert (error <= 0.5 * steps * (1 + 1e-5)).all()


def test_a_dead_channel_does_not_get_a_scale_that_its_bias_overflows() -> None:
    weight = torch.ones(2, 4)
    weight[1] = 1e-30
    packed = load_format("int").pack(weight, Storage("int", 8, PerChannel()), axis=0, largest=127)
    assert packed.scale is not None
    assert packed.scale.min() > 1e-6


def test_one_scale_a_tensor_is_a_scalar() -> None:
    packed = load_format("int").pack(torch.randn(3, 4), Storage("int", 8, PerTensor()), axis=0, largest=127)
    assert packed.scale is not None
    assert packed.scale.shape == ()


def test_an_unknown_format_offers_the_nearest() -> None:
    with pytest.raises(UserError, match="number format 'itn'") as raised:
        load_format("itn")
    assert "int" in raised.value.fix
