"""The contract of a number format, over every file in kernels/: what is trained is what is stored is what is run."""

import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import ml_dtypes
import numpy as np
import one_layer
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from hirelc_deploy import graph, kernels
from hirelc_deploy.errors import UserError
from hirelc_deploy.kernels import format_names, fp8, load_format
from hirelc_deploy.kernels._base import INT8_MAX, LARGE, SCALE_FLOOR, Nodes, Packed, from_rows, rows_of
from hirelc_deploy.kernels._planes import code_type, join, padded, plane_bytes, split
from hirelc_deploy.policy import Compute, PerChannel, PerTensor, Precision, Storage

STORAGES = [storage for name in format_names() for storage in one_layer.storages(name)]
DECODED = [storage for name in one_layer.DECODED for storage in one_layer.storages(name)]
PRECISIONS = [precision for name in one_layer.DECODED for precision in one_layer.precisions(name)]

SATURATES_NOWHERE = 63
MOST_THAT_SATURATES_NOWHERE = (2**15 - 1) // (2 * 255)  # 64: two products with the largest uint8, added in 16 bits
LARGEST = {INT8_MAX: INT8_MAX, SATURATES_NOWHERE: MOST_THAT_SATURATES_NOWHERE}
"""What a format is asked to stay within, and what it may reach: a power of two has no use for 63."""

# A step that is divided by and multiplied with again: a rounding of 32-bit floats each.
STRAIGHT_THROUGH_TOLERANCE = 1e-6

# Sums of up to forty products of 32-bit floats, in another order.
FLOAT_TOLERANCE = 1e-5

EXAMPLES = 12  # of every storage; a fit takes 20 ms


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """(channels, columns), of sizes that fill no byte, with zeros, a dead channel, an outlier or tiny values."""
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 70))
    rows = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).normal(size=shape).astype(np.float32)
    match draw(st.sampled_from(["normal", "zeros", "dead channel", "outlier", "tiny", "all the same"])):
        case "zeros":
            rows[:] = 0
        case "dead channel":
            rows[0] = 0
        case "outlier":
            rows.flat[-1] = 1e4
        case "tiny":
            rows *= 1e-20
        case "all the same":
            rows[:] = -0.3
    return torch.from_numpy(rows)


ENERGIES = (None, "by column", "by weight", "nothing is read")


def energy_of(rows: Tensor, kind: str | None) -> Tensor | None:
    """How much each weight's error counts."""
    random = torch.Generator().manual_seed(0)
    match kind:
        case "by column":
            return torch.rand(1, rows.shape[1], generator=random)
        case "by weight":
            return torch.rand(rows.shape, generator=random)
        case "nothing is read":
            return torch.zeros(1, rows.shape[1])
    return None


def keeps_the_contract(storage: Storage, rows: Tensor, *, largest: int, energy: Tensor | None = None) -> None:
    """Whatever the weight: training, packing and a loaded file have the same values, and sizes are told exactly."""
    numbers = load_format(storage.format)
    assert numbers.name == storage.format  # a policy names the format, and the file is found by it
    grid = numbers.fit(rows, storage, largest=largest, energy=energy)
    on_grid = numbers.quantise(rows, grid, storage, largest=largest)
    packed = numbers.pack(rows, grid, storage, largest=largest)
    assert torch.isfinite(on_grid).all()
    assert (grid["scale"] > 0).all()
    assert np.abs(packed.integers.astype(int)).max() <= LARGEST[largest]
    assert packed.codes.max() < 2**packed.code_bits
    assert np.array_equal(values(packed), on_grid.numpy())
    assert np.array_equal(unpacked(packed, storage), packed.integers)
    # weights are on their grid before they are packed
    again = numbers.pack(on_grid, grid, storage, largest=largest)
    assert np.array_equal(values(again), on_grid.numpy())
    channels, columns = rows.shape
    assert form(numbers.blank(channels, columns, storage)) == form(packed)
    assert numbers.packed_bytes(channels, columns, storage) == stored_bytes(packed)


def trains(storage: Storage, rows: Tensor, *, largest: int) -> None:
    """Gradients pass straight through to weights inside the range, and reach all of the grid that is to be trained."""
    numbers = load_format(storage.format)
    fitted = numbers.fit(rows, storage, largest=largest)
    inside = 0.9 * numbers.quantise(rows, fitted, storage, largest=largest)
    inside.requires_grad_()
    grid = {role: entries.clone().requires_grad_(role in numbers.trained) for role, entries in fitted.items()}
    direction = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    (numbers.quantise(inside, grid, storage, largest=largest) * direction).sum().backward()
    assert inside.grad is not None
    assert torch.allclose(inside.grad, direction, rtol=STRAIGHT_THROUGH_TOLERANCE, atol=0)
    assert set(numbers.trained) <= set(grid)
    for role in numbers.trained:
        gradient = grid[role].grad
        assert gradient is not None, role
        assert torch.isfinite(gradient).all()
        assert gradient.any(), role


def runs_as_plain_initializers_would(precision: Precision, folder: Path, *, encoding: dict[str, int]) -> None:
    """A file computes, bit for bit and with the same kernels, what it would with nothing to decode."""
    with one_layer.encoded(encoding):
        written = one_layer.write(one_layer.chosen(precision))
    ran, twin = one_layer.run(written.exported.data, folder), one_layer.run(written.twin, folder)
    assert one_layer.left_to_decode(ran.optimised) == []
    assert ran.operators == twin.operators
    assert one_layer.runs_as(written, ran) == {name: each.compute for name, each in written.precisions.items()}
    for layer, outputs in twin.outputs.items():
        assert np.array_equal(ran.outputs[layer], outputs), layer
    if precision.compute is Compute.FP32:
        with torch.no_grad():
            inputs = {name: torch.from_numpy(array) for name, array in one_layer.case().inputs.items()}
            expected = graph.forward(written.model, inputs)
        for layer, outputs in ran.outputs.items():
            assert torch.allclose(torch.from_numpy(outputs), expected[layer], atol=FLOAT_TOLERANCE), layer


def values(packed: Packed) -> np.ndarray:
    """What the file's nodes compute: integers times scale, in float32."""
    return packed.integers.astype(np.float32) * packed.scale.reshape(-1, 1)


def unpacked(packed: Packed, storage: Storage) -> np.ndarray:
    """The integers that ONNX Runtime decodes the codes to."""

    def build(nodes: Nodes) -> list[ir.Value]:
        tables = {role: nodes.constant(table) for role, table in packed.tables.items()}
        codes = nodes.constant(packed.codes.astype(np.int32))
        return [load_format(storage.format).unpack(codes, tables, packed.integers.shape, storage, nodes)]

    return one_layer.evaluate(build)[0].reshape(packed.integers.shape)


def form(packed: Packed) -> dict[str, object]:
    """All that the size of a file depends on: types and shapes."""
    arrays = {field.name: getattr(packed, field.name) for field in fields(packed) if field.name != "tables"}
    tables = {f"table {role}": table for role, table in packed.tables.items()}
    return {
        name: (array.dtype, array.shape) if isinstance(array, np.ndarray) else array
        for name, array in (arrays | tables).items()
    }


def stored_bytes(packed: Packed) -> int:
    """Of the arrays that would be written, codes as planes."""
    stored = [*split(packed.codes, packed.code_bits), *packed.tables.values(), packed.scale]
    return sum(array.nbytes for array in stored)


@pytest.mark.parametrize("storage", DECODED, ids=str)
@settings(max_examples=EXAMPLES)
@given(rows=weights(), largest=st.sampled_from(list(LARGEST)), energy=st.sampled_from(ENERGIES), is_large=st.booleans())
def test_what_is_trained_is_what_is_stored(
    storage: Storage, rows: Tensor, largest: int, energy: str | None, is_large: bool
) -> None:
    with one_layer.encoded({"LARGE": 1 if is_large else LARGE}):
        keeps_the_contract(storage, rows, largest=largest, energy=energy_of(rows, energy))


@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_format_can_be_trained(storage: Storage, largest: int) -> None:
    trains(storage, torch.randn(5, 36, generator=torch.Generator().manual_seed(0)), largest=largest)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_codes_run_as_plain_initializers_would(precision: Precision, tmp_path: Path) -> None:
    runs_as_plain_initializers_would(precision, tmp_path, encoding=one_layer.CODES)


@pytest.mark.parametrize("compute", [Compute.INT8, Compute.INT8_DYNAMIC, Compute.FP32])
@pytest.mark.parametrize("name", one_layer.DECODED)
def test_plain_integers_run_as_plain_initializers_would(name: str, compute: Compute, tmp_path: Path) -> None:
    precision = Precision(next(one_layer.storages(name)), compute)
    runs_as_plain_initializers_would(precision, tmp_path, encoding=one_layer.PLAIN)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_part_of_a_weight_is_on_the_grid_of_the_whole(storage: Storage) -> None:
    """Columns that codes begin and end at can be rounded one after the other."""
    for columns in (36, 35):
        rows = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
        numbers = load_format(storage.format)
        grid = numbers.fit(rows, storage, largest=INT8_MAX)
        on_grid = numbers.quantise(rows, grid, storage, largest=INT8_MAX)
        together = numbers.codes_together(columns, storage)
        for start in range(0, columns, together):
            part = slice(start, start + together)
            alone = numbers.quantise(on_grid[:, part], numbers.part(grid, part), storage, largest=INT8_MAX)
            assert torch.equal(alone, on_grid[:, part])


WORDS = [storage for storage in STORAGES if load_format(storage.format).codes_together(15, storage) > 1]


@pytest.mark.parametrize("storage", WORDS, ids=str)
def test_a_code_word_that_is_cut_off_by_the_end_is_found_again(storage: Storage) -> None:
    """Only what is left of it may count: packed again, the last weights would otherwise get another word's values."""
    numbers = load_format(storage.format)
    for seed in range(60):
        rows = torch.randn(5, 15, generator=torch.Generator().manual_seed(seed))
        rows[-1, -1] = 4.0
        grid = numbers.fit(rows, storage, largest=INT8_MAX)
        on_grid = numbers.quantise(rows, grid, storage, largest=INT8_MAX)
        assert torch.equal(numbers.quantise(on_grid, grid, storage, largest=INT8_MAX), on_grid)


@pytest.mark.parametrize("name", format_names())
def test_more_bits_err_less(name: str) -> None:
    rows = torch.randn(32, 288, generator=torch.Generator().manual_seed(0))  # many times as many as a book has words
    errors: dict[str, list[float]] = {}
    for storage in one_layer.storages(name):  # from few bits to many
        grid = load_format(name).fit(rows, storage, largest=INT8_MAX)
        on_grid = load_format(name).quantise(rows, grid, storage, largest=INT8_MAX)
        errors.setdefault(str(storage.granularity), []).append(float((on_grid - rows).norm() / rows.norm()))
    for by_bits in errors.values():
        assert by_bits == sorted(by_bits, reverse=True)
        assert len(set(by_bits)) == len(by_bits)


@pytest.mark.parametrize("storage", list(one_layer.storages("fp8")), ids=str)
@settings(max_examples=EXAMPLES)
@given(rows=weights(), energy=st.sampled_from(ENERGIES))
def test_fp8_is_stored_as_the_numbers_that_were_trained(storage: Storage, rows: Tensor, energy: str | None) -> None:
    numbers = load_format("fp8")
    grid = numbers.fit(rows, storage, largest=INT8_MAX, energy=energy_of(rows, energy))
    on_grid = numbers.quantise(rows, grid, storage, largest=INT8_MAX)
    packed = numbers.pack(rows, grid, storage, largest=INT8_MAX)
    assert torch.isfinite(on_grid).all()
    assert (grid["scale"] > 0).all()
    assert np.array_equal(packed.codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32), packed.integers.flatten())
    assert np.array_equal(values(packed), on_grid.numpy())
    assert np.array_equal(values(numbers.pack(on_grid, grid, storage, largest=INT8_MAX)), on_grid.numpy())
    assert numbers.packed_bytes(*rows.shape, storage) == stored_bytes(packed)


def test_fp8_rounds_to_three_bits_of_mantissa_and_ends_at_448() -> None:
    steps = torch.tensor([0.0, 2**-9, 0.4 * 2**-9, 1.06, 1.07, 17.0, 440.0, 500.0, -1e6], requires_grad=True)
    found = fp8.rounded(steps)
    assert found.tolist() == [0.0, 2**-9, 0.0, 1.0, 1.125, 16.0, 448.0, 448.0, -448.0]
    found.sum().backward()
    assert steps.grad is not None
    assert steps.grad.tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 0]


def test_a_scale_of_fp8_errs_less_than_that_of_the_largest_weight() -> None:
    rows, storage = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)), Storage("fp8", 8, PerChannel())
    widest = rows.abs().amax(1, keepdim=True) / fp8.LARGEST
    fitted = load_format("fp8").fit(rows, storage, largest=INT8_MAX)

    def error(scale: Tensor) -> Tensor:
        return (fp8.rounded(rows / scale) * scale - rows).square().sum(1)

    assert (error(fitted["scale"]) <= error(widest)).all()
    assert (error(fitted["scale"]) < error(widest)).any()


def test_a_dead_channel_does_not_get_a_scale_that_its_bias_overflows() -> None:
    rows = torch.ones(2, 4)
    rows[1] = 1e-30
    storage = Storage("int", 8, PerChannel())
    scale = load_format("int").fit(rows, storage, largest=INT8_MAX)["scale"]
    assert scale.min() >= SCALE_FLOOR * scale.max()


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_weight_that_is_zero_throughout_stays_next_to_nothing(storage: Storage) -> None:
    """Where zero is no level, the codes stand for something, whatever the scale is."""
    numbers, rows = load_format(storage.format), torch.zeros(5, 36)
    on_grid = numbers.quantise(rows, numbers.fit(rows, storage, largest=INT8_MAX), storage, largest=INT8_MAX)
    assert on_grid.abs().max() < 1e-4


def test_one_scale_a_tensor_is_stored_as_a_scalar() -> None:
    rows, storage = torch.randn(3, 4), Storage("int", 8, PerTensor())
    numbers = load_format("int")
    packed = numbers.pack(rows, numbers.fit(rows, storage, largest=INT8_MAX), storage, largest=INT8_MAX)
    assert packed.scale.shape == ()


@given(shape=st.lists(st.integers(1, 4), min_size=2, max_size=4), axis=st.integers(0, 1))
def test_a_weight_is_made_of_its_rows_again(shape: list[int], axis: int) -> None:
    weight = torch.arange(float(np.prod(shape))).reshape(shape)
    rows = rows_of(weight, axis)
    assert rows.shape[0] == shape[axis]
    assert torch.equal(from_rows(rows, tuple(shape), axis), weight)


# -- planes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 17))
@settings(max_examples=50)
@given(data=st.data())
def test_planes_are_joined_to_the_codes_that_were_split(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=70))
    stored = split(np.array(codes, code_type(bits)), bits)
    assert sum(plane.nbytes for plane in stored) == plane_bytes(len(codes), bits)
    (joined,) = one_layer.evaluate(lambda nodes: [join([nodes.constant(plane) for plane in stored], bits, nodes)])
    assert joined.tolist() == codes + [0] * (padded(len(codes), bits) - len(codes))
    assert plane_bytes(len(codes), bits) * 8 < (len(codes) + 8) * bits


# -- formats of one's own ----------------------------------------------------------------------------------------

TERNARY = """
import torch

from hirelc_deploy.kernels._levels import Levels
from hirelc_deploy.policy import PerChannel, PerGroup


class Ternary(Levels):
    name = "ternary"
    bits = (2,)
    granularities = (PerChannel, PerGroup)
    native = None

    def levels(self, storage, grid, *, largest):
        return torch.tensor([-1.0, 0.0, 1.0])


FORMAT = Ternary()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for formats, which is forgotten again."""
    monkeypatch.setattr(kernels, "__path__", list(kernels.__path__))
    loaded = set(sys.modules)
    made = tmp_path / "formats"
    made.mkdir()
    yield made
    for name in set(sys.modules) - loaded:
        if name.startswith("hirelc_deploy.kernels."):
            del sys.modules[name]


def test_a_format_in_a_folder_of_ones_own_keeps_the_contract(folder: Path, tmp_path: Path) -> None:
    (folder / "ternary.py").write_text(TERNARY, encoding="utf-8")
    kernels.add_folder(folder)
    assert "ternary" in format_names()
    rows = torch.randn(5, 36, generator=torch.Generator().manual_seed(0))
    for storage in one_layer.storages("ternary"):
        for largest in LARGEST:
            keeps_the_contract(storage, rows, largest=largest)
            trains(storage, rows, largest=largest)
    for precision in one_layer.precisions("ternary"):
        runs_as_plain_initializers_would(precision, tmp_path, encoding=one_layer.CODES)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("int.py", TERNARY, "has a format 'int', and so has this program"),
        ("ternary.py", "", "has no FORMAT"),
        ("ternary.py", "raise OSError('no such table')", "OSError: no such table"),
        ("ternary.py", TERNARY.replace('"ternary"', '"log"'), "called 'log'"),
        ("_helper.py", "", "is no folder with number formats"),
    ],
)
def test_a_folder_that_cannot_be_added_changes_nothing(folder: Path, file: str, text: str, said: str) -> None:
    (folder / file).write_text(text, encoding="utf-8")
    before = format_names()
    with pytest.raises(UserError, match=said):
        kernels.add_folder(folder)
    assert format_names() == before


def test_an_unknown_format_offers_the_nearest() -> None:
    with pytest.raises(UserError, match="number format 'itn'") as raised:
        load_format("itn")
    assert "int" in raised.value.fix
