"""Weights of 8 bits on a CPU that adds pairs of products in 16 bits: what goes wrong, and that ours does not.

Without VNNI, x86 multiplies uint8 by int8 and adds neighbouring pairs in int16, where 2 * 255 * 127 does not fit.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from hirelc_deploy.compress.grids import fitted, put_on
from hirelc_deploy.compress.simulate import simulated
from hirelc_deploy.cpu import cpu_flags, has_dot_product
from hirelc_deploy.exporters import load_runtime
from hirelc_deploy.policy import Compute, PerChannel, Precision, Storage
from hirelc_deploy.profiles import load_target

RUNTIME = load_runtime("onnxruntime")
EIGHT_BITS, SEVEN_BITS = 127, 63
INT16_MAX = 32767
CHANNELS = 4
FLOAT_TOLERANCE = 1e-5

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(64, CHANNELS), (64,)),
    "linear without bias": (lambda: nn.Linear(64, CHANNELS, bias=False), (64,)),
    "conv": (lambda: nn.Conv2d(16, CHANNELS, 3), (16, 3, 3)),
}
COMPUTES = [(name, Compute.INT8) for name in LAYERS] + [("linear", Compute.INT8_DYNAMIC)]


def worst_case(name: str) -> tuple[nn.Module, np.ndarray]:
    """A layer whose weights are the largest integer throughout, of either sign, and inputs that are all 255."""
    make, shape = LAYERS[name]
    model = nn.Sequential(make()).eval()
    signs = torch.tensor([1.0, -1.0]).repeat(CHANNELS // 2)
    with torch.no_grad():
        model[0].weight.copy_(signs.reshape(-1, *[1] * (model[0].weight.dim() - 1)).expand_as(model[0].weight))
        if model[0].bias is not None:
            model[0].bias.zero_()
    return model, np.ones((2, *shape), np.float32)


def written(name: str, compute: Compute, largest: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """What the file and its simulation give for the worst case, the latter as whole steps."""
    model, x = worst_case(name)
    precisions = {"0": Precision(Storage("int", 8, PerChannel()), compute)}
    graph = RUNTIME.float_graph(model, {"x": x}, opset=18)
    grids = fitted(model, precisions, {}, largest=largest)
    seen = RUNTIME.observe(graph, precisions, [{"x": x}])
    exported = RUNTIME.write(graph, precisions, grids, seen=seen, largest=largest)
    path = folder / "model.onnx"
    path.write_bytes(exported.data)
    assert RUNTIME.runs_as(path, exported.tensors, threads=1) == {"0": str(compute)}
    assert largest in decoded_integers(path)
    put_on(model, precisions, grids, largest=largest)
    with torch.no_grad(), simulated(model, precisions, {}, largest=largest) as simulation:
        simulation.calibrate([{"x": torch.from_numpy(x)}])
        expected = model(torch.from_numpy(x)).numpy()
    (found,) = RUNTIME.load(path, threads=1).run({"x": x}).values()
    return found, expected


def decoded_integers(path: Path) -> set[int]:
    """Of the layer's weight, which is small enough to be stored plainly."""
    stored = (onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer)
    return set(np.abs(np.concatenate([array.ravel() for array in stored if array.dtype == np.int8])).tolist())


def share_left(largest: int) -> float:
    """Of a sum of products of the worst case, once pairs were cut off at the largest int16."""
    pair = 2 * 255 * largest
    return min(pair, INT16_MAX) / pair


def rounded_by(name: str, outputs: np.ndarray) -> float:
    """Half a step of the grid that a convolution's outputs are rounded to; a Linear writes floats."""
    return float(np.ptp(outputs)) / 255 / 2 if name == "conv" else 0.0


@pytest.mark.parametrize(("name", "compute"), COMPUTES)
def test_weights_of_seven_bits_are_exact_on_every_cpu(name: str, compute: Compute, tmp_path: Path) -> None:
    assert share_left(SEVEN_BITS) == 1
    found, expected = written(name, compute, SEVEN_BITS, tmp_path)
    np.testing.assert_allclose(found, expected, rtol=FLOAT_TOLERANCE, atol=rounded_by(name, expected))


@pytest.mark.parametrize(("name", "compute"), COMPUTES)
def test_weights_of_eight_bits_are_cut_off_where_the_cpu_cannot_add_them(
    name: str, compute: Compute, tmp_path: Path
) -> None:
    found, expected = written(name, compute, EIGHT_BITS, tmp_path)
    left = 1.0 if has_dot_product(cpu_flags()) else share_left(EIGHT_BITS)
    assert share_left(EIGHT_BITS) < 0.51
    # of negative sums less is cut off, by one part in 32768
    np.testing.assert_allclose(found, left * expected, rtol=1e-4, atol=rounded_by(name, expected))


def test_a_target_has_the_range_that_is_exact_unless_its_file_says_otherwise() -> None:
    host = load_target("host")
    assert host.largest_code(frozenset()) == SEVEN_BITS
    assert host.largest_code(frozenset({"avx512_vnni"})) == EIGHT_BITS
