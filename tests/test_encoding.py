"""How weights are encoded in a file: whatever is chosen, the same values, no more bytes, and as many as were told."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod

import numpy as np
import one_layer
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from hirelc_deploy.compress.grids import fitted
from hirelc_deploy.exporters._compact import shorten, to_bytes
from hirelc_deploy.exporters._float import FloatGraph
from hirelc_deploy.exporters._weights import Decoded, Weight, decode
from hirelc_deploy.kernels import load_format
from hirelc_deploy.kernels._base import INT8_MAX, Grid, Nodes, from_rows, rows_of
from hirelc_deploy.policy import FP32, Compute, PerChannel, Precision, Storage

PRECISIONS = [precision for name in one_layer.DECODED for precision in one_layer.precisions(name)]

# The nodes of a decoding take the short names, so those of the rest can get longer by a letter.
SLACK_BYTES = 64

# Of the nodes of one decoding, of a table with four levels for each of 256 codes, and of the file around them.
DECODING_BYTES = 2500

ENCODINGS: dict[str, dict[str, int]] = {
    "chosen": {},
    "codes": one_layer.CODES,
    "together": one_layer.TOGETHER,
    "each alone": one_layer.EACH_ALONE,
    "plain": one_layer.PLAIN,
}


# -- values ------------------------------------------------------------------------------------------------------

SHAPES = [
    ((6, 5, 3, 3), 0),
    ((8, 1, 3, 3), 0),
    ((5, 6, 2, 2), 1),
    ((14, 9), 0),
    ((9, 14), 1),
    ((4, 64), 0),
    ((2, 5), 0),
    ((1, 3), 0),
]
"""Of weights, and the axis of their output channels."""


@dataclass(frozen=True)
class Noise:
    """A weight with noise in it."""

    shape: tuple[int, ...]
    axis: int
    precision: Precision

    @property
    def rows(self) -> Tensor:
        return rows_of(torch.randn(self.shape, generator=torch.Generator().manual_seed(prod(self.shape))), self.axis)

    def stored(self) -> Weight:
        storage, grid = self.precision.storage, fit(self)
        packed = load_format(storage.format).pack(self.rows, grid, storage, largest=INT8_MAX)
        return Weight(self.shape, self.axis, self.precision, packed)

    def integers(self) -> np.ndarray:
        """In the weight's own shape."""
        storage, grid = self.precision.storage, fit(self)
        integers = load_format(storage.format).integers(self.rows, grid, storage, largest=INT8_MAX)
        return from_rows(integers, self.shape, self.axis).numpy()


@cache
def fit(noise: Noise) -> Grid:
    storage = noise.precision.storage
    return load_format(storage.format).fit(noise.rows, storage, largest=INT8_MAX)


def decoded(weights: Sequence[Noise], limits: dict[str, int]) -> tuple[list[np.ndarray], list[str]]:
    """The values that a session decodes, and how each was encoded."""
    found: list[Decoded] = []

    def build(nodes: Nodes) -> list[ir.Value]:
        made, values = decode([weight.stored() for weight in weights], nodes.constant, nodes.constant)
        nodes.made += made
        found.extend(values)
        return [each.value for each in values]

    with one_layer.encoded(limits):
        return one_layer.evaluate(build), [each.encoding for each in found]


NOISE = st.builds(
    lambda shape, precision: Noise(*shape, precision), st.sampled_from(SHAPES), st.sampled_from(PRECISIONS)
)


@settings(max_examples=40)
@given(weights=st.lists(NOISE, min_size=1, max_size=6))
def test_decoded_values_do_not_depend_on_the_encoding(weights: list[Noise]) -> None:
    for limits in ENCODINGS.values():
        values, _ = decoded(weights, limits)
        for weight, value in zip(weights, values, strict=True):
            assert value.dtype == (np.float32 if weight.precision.compute is Compute.FP32 else np.int8)
            assert np.array_equal(value, weight.integers())


def test_the_encodings_that_are_compared_are_different_ones() -> None:
    weights = [Noise(*shape, Precision(Storage("int", 4, PerChannel()), Compute.FP32)) for shape in SHAPES]
    found = {name: decoded(weights, limits)[1] for name, limits in ENCODINGS.items()}
    assert found["together"] == ["4-bit codes, 8 layers together"] * len(weights)
    assert set(found["each alone"]) == {"8-bit codes of 2 weights", "16-bit codes of 4 weights", "4-bit codes"}
    assert found["plain"] == ["int8"] * len(weights)
    assert set(found["codes"]) == {
        "4-bit codes, 3 layers together",
        "8-bit codes of 2 weights",
        "16-bit codes of 4 weights",
    }


# -- sizes -------------------------------------------------------------------------------------------------------


def file_bytes(weights: Sequence[Weight]) -> int:
    """Of a file that holds these weights and hands them out."""
    initializers: list[ir.Value] = []
    known: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def tensor(array: np.ndarray) -> ir.Value:
        name = f"constant {len(initializers)}"
        initializers.append(ir.Value(name=name, const_value=ir.Tensor(np.ascontiguousarray(array), name=name)))
        return initializers[-1]

    def shared(array: np.ndarray) -> ir.Value:
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in known:
            known[key] = tensor(array)
        return known[key]

    made, values = decode(weights, tensor, shared)
    outputs = [ir.node("Identity", [each.value]) for each in values]
    nodes = [*made, *outputs]
    for i, value in enumerate(value for node in nodes for value in node.outputs):
        value.name = f"value {i}"
    graph = ir.Graph(
        [],
        [node.outputs[0] for node in outputs],
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": one_layer.OPSET},
        name="g",
    )
    model = ir.Model(graph, ir_version=one_layer.IR_VERSION)
    shorten(model)
    return len(to_bytes(model, ir_version=one_layer.IR_VERSION, metadata={}))


def blank(shape: tuple[int, ...], axis: int, precision: Precision) -> Weight:
    channels, storage = shape[axis], precision.storage
    packed = load_format(storage.format).blank(channels, prod(shape) // channels, storage)
    return Weight(shape, axis, precision, packed)


SIDES = st.sampled_from([1, 3, 8, 16, 24, 27, 32, 64, 72, 144, 288])
BLANKS = st.builds(blank, st.tuples(SIDES, SIDES), st.sampled_from([0, 0, 1]), st.sampled_from(PRECISIONS))


@st.composite
def networks(draw: st.DrawFn) -> list[Weight]:
    """Weights of any precisions, or of one, as a recipe gives them."""
    weights = draw(st.lists(BLANKS, min_size=1, max_size=12))
    if draw(st.booleans()):
        precision = weights[0].precision
        weights = [blank(weight.shape, weight.axis, precision) for weight in weights]
    return weights


@settings(max_examples=150)
@given(weights=networks())
def test_no_file_is_larger_than_with_plain_integers(weights: list[Weight]) -> None:
    chosen = file_bytes(weights)
    with one_layer.encoded(one_layer.PLAIN):
        plain = file_bytes(weights)
    assert chosen <= plain + SLACK_BYTES


@pytest.mark.parametrize("storage", [s for name in one_layer.DECODED for s in one_layer.storages(name)], ids=str)
def test_a_large_weight_takes_the_bytes_that_its_format_says(storage: Storage) -> None:
    """Its codes are chosen, unless they and the tables beside them are larger than plain integers."""
    channels, columns = 256, 400
    weight = blank((channels, columns), 0, Precision(storage, Compute.FP32))
    codes = load_format(storage.format).packed_bytes(channels, columns, storage) - weight.packed.scale.nbytes
    assert file_bytes([weight]) < min(codes, channels * columns) + DECODING_BYTES


# -- files -------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Convolutions of all kinds, a Linear whose weight is written transposed, and two pairs with a weight in common."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.unbiased = nn.Linear(8, 24, bias=False)
        self.first = nn.Linear(24, 24)
        self.second = nn.Linear(24, 24)
        self.second.weight = self.first.weight
        self.words = nn.Embedding(40, 24)
        self.head = nn.Linear(24, 40, bias=False)
        self.head.weight = self.words.weight

    def forward(self, image: Tensor, word: Tensor) -> Tensor:
        x = F.relu(self.up(F.relu(self.depthwise(F.relu(self.stem(image))))))
        x = self.unbiased(x.flatten(2).transpose(1, 2)).mean(1) + self.words(word)
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


@dataclass(frozen=True)
class Case:
    model: nn.Module
    inputs: dict[str, np.ndarray]
    graph: FloatGraph


@cache
def mixed() -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mixed().eval()
    random = np.random.default_rng(0)
    inputs: dict[str, np.ndarray] = {
        "image": random.normal(size=(2, 3, 8, 8)).astype(np.float32),
        "word": random.integers(0, 40, 2),
    }
    return Case(model, inputs, one_layer.RUNTIME.float_graph(model, inputs, opset=one_layer.OPSET))


@cache
def grids_of(precision: Precision, largest: int) -> dict[str, Grid]:
    """By layer, whether it can have that precision or not."""
    layers = [name for name, module in mixed().model.named_modules() if hasattr(module, "weight")]
    return fitted(mixed().model, dict.fromkeys(layers, precision), {}, largest=largest)


@st.composite
def policies(draw: st.DrawFn) -> dict[str, Precision]:
    """A precision for each layer that it can run, one for those that have a weight in common."""
    by_weight: dict[Tensor, Precision] = {}
    policy = {}
    layers = {n: m for n, m in mixed().model.named_modules() if isinstance(getattr(m, "weight", None), Tensor)}
    for name, layer in layers.items():
        readers = [other for other in layers.values() if other.weight is layer.weight]
        offered = [FP32, *(each for each in PRECISIONS if all(one_layer.is_able(r, each.compute) for r in readers))]
        if layer.weight not in by_weight:
            by_weight[layer.weight] = draw(st.sampled_from(offered), label=name)
        policy[name] = by_weight[layer.weight]
    return policy


@pytest.mark.parametrize("encoding", ["chosen", "codes"])
@settings(max_examples=20)
@given(policy=policies(), largest=st.sampled_from([INT8_MAX, 63]))
def test_the_size_of_a_file_is_known_before_it_is_written(
    policy: dict[str, Precision], largest: int, encoding: str
) -> None:
    network = mixed()
    grids = {name: grids_of(each, largest)[name] for name, each in policy.items() if not each.storage.is_float}
    shapes = {name: tuple(tensor.shape) for name, tensor in network.model.state_dict().items()}
    with one_layer.encoded(ENCODINGS[encoding]):
        seen = one_layer.RUNTIME.observe(network.graph, policy, [network.inputs])
        written = one_layer.RUNTIME.write(network.graph, policy, grids, seen=seen, largest=largest)
        assert len(one_layer.RUNTIME.foreseen(network.graph, shapes, policy)) == len(written.data)


def test_a_table_that_layers_share_is_in_the_file_once() -> None:
    layers = 6
    shared = Storage("shared_vector", 1, PerChannel())
    one, all_of_them = (
        [replace(blank((64, 128), 0, Precision(shared, Compute.FP32)), shares="all") for _ in range(count)]
        for count in (1, layers)
    )
    codes_bytes = 64 * 128 // 8
    with one_layer.encoded(one_layer.CODES):
        grows = file_bytes(all_of_them) - file_bytes(one)
    assert grows < (layers - 1) * (codes_bytes + 64 * 4 + 300)  # a book has 2,048


def test_large_weights_read_one_table_that_is_made_once() -> None:
    """A table of all 16-bit codes is 256 KB, and takes two milliseconds to make."""
    initializers: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def constant(array: np.ndarray) -> ir.Value:
        key = (array.dtype.name, array.shape, array.tobytes())
        return initializers.setdefault(key, ir.Value(const_value=ir.Tensor(np.ascontiguousarray(array))))

    shapes = [((256, 400), 0), ((300, 256), 1), ((256, 512), 0)]
    weights = [blank(*shape, Precision(Storage("int", 4, PerChannel()), Compute.FP32)) for shape in shapes]
    nodes, values = decode(weights, constant, constant)
    assert {value.encoding for value in values} == {"16-bit codes of 4 weights"}
    looked_up = [node for node in nodes if node.op_type == "Gather"]
    assert len(looked_up) == len(weights)
    assert len({node.inputs[0] for node in looked_up}) == 1
    assert sum(node.op_type == "Expand" for node in nodes) == 2
    assert all(node.op_type != "Transpose" for node in nodes), "codes lie in the order in which operators read them"
