"""Which kernels TensorRT is taken to make of a network, by policy, and what is told of them."""

from collections import Counter

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from trt_files import OPSET, RUNTIME, Residual, noise

from hirelc_deploy import graph
from hirelc_deploy.choices import search_space
from hirelc_deploy.compress.fold import fold, foldable
from hirelc_deploy.compress.simulate import ActivationGrid, Fp8Grid
from hirelc_deploy.cost.estimate import EstimatedPrices
from hirelc_deploy.cost.kernel import Kernel
from hirelc_deploy.cost.network import Network
from hirelc_deploy.cost.predictor import Predictor
from hirelc_deploy.exporters._trt_qdq import scale_of
from hirelc_deploy.kernels import fp8
from hirelc_deploy.policy import FP16, INT8, Compute, Policy, Precision
from hirelc_deploy.profiles import Estimate, Target, load_target

ORIN, ADA = load_target("jetson-orin"), load_target("rtx-ada")
assert ORIN.estimate is not None


def lowered(model: nn.Module, inputs: dict[str, np.ndarray], target: Target = ORIN) -> Network:
    torch.manual_seed(0)
    model = model.eval()
    traced = graph.trace(model, inputs)
    space = search_space(traced, target)
    folded = fold(model, foldable(model, {name: torch.from_numpy(array) for name, array in inputs.items()})).eval()
    floats = RUNTIME.float_graph(folded, inputs, opset=OPSET)
    return RUNTIME.network(floats, traced, space.computes, space.groups, batch=1)


@pytest.fixture(scope="module")
def residual() -> Network:
    return lowered(Residual(), {"x": noise(3, 8, 8)})


def policy_of(network: Network, precision: Precision | None) -> Policy:
    return Policy({} if precision is None else dict.fromkeys(network.computes, precision), {})


def running(network: Network, compute: Compute) -> Counter[str]:
    """The kernels that run where every layer computes so, by operator and compute."""
    chosen = dict.fromkeys(network.computes, compute)
    states: dict[str, bool] = {}
    for state in network.states:
        each = [{**chosen, **states}[condition.variable] in condition.values for condition in state.conditions]
        states[state.name] = all(each) if state.of == "all" else any(each)
    known: dict[str, object] = {**chosen, **states}
    return Counter(
        f"{term.kernel.op} {term.kernel.compute}"
        for term in network.terms
        if all(known[condition.variable] in condition.values for condition in term.when)
    )


def test_a_layer_takes_along_what_works_value_by_value(residual: Network) -> None:
    # five convolutions and a Linear with their activations and additions, and a pool
    assert running(residual, Compute.FP16) == {"Conv fp16": 5, "Gemm fp16": 1, "MaxPool fp16": 1}
    assert running(residual, Compute.FP32) == {"Conv fp32": 5, "Gemm fp32": 1, "MaxPool fp32": 1}


def test_only_what_no_layer_writes_is_quantised_by_a_kernel_of_its_own(residual: Network) -> None:
    found = running(residual, Compute.INT8)
    assert found["Conv int8"] == 5
    assert found["Gemm int8"] == 1
    # the image, and what the pool has written
    assert found["QuantizeLinear fp32"] == 2


def test_what_is_read_in_fp8_is_quantised_on_the_way_out_of_a_layer_in_8_bits() -> None:
    network = lowered(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), {"x": noise(32)}, ADA)
    assert running(network, Compute.FP8) == {"Gemm fp8": 2, "QuantizeLinear fp32": 1}
    assert running(network, Compute.FP16) == {"Gemm fp16": 2}


def test_the_fp32_original_is_slower_and_the_baseline_is_told_in_fp32(residual: Network) -> None:
    assert ORIN.estimate is not None
    predictor = Predictor(residual.with_counts({}), EstimatedPrices(ORIN.estimate))
    told = predictor.foretell([policy_of(residual, each) for each in (None, FP16, INT8)])
    assert told.ms[0] > told.ms[1] > 0
    assert (told.error > 0).all()
    # it can be asked which is fastest: few decisions meet anywhere
    assert set(predictor.fastest({}).values()) <= {Compute.FP16, Compute.INT8, Compute.FP32}


def test_the_few_channels_of_an_image_are_no_whole_tile() -> None:
    common = {
        "gmacs_per_s": {Compute.FP32: 10.0},
        "gb_per_s": 1e6,
        "floor_us": 0.0,
        "channel_tile": 32,
        "error_pct": 20.0,
        "sources": ("a data sheet",),
    }
    stem = Kernel.parse("Conv", "", "x:1x3x16x16 w:32x3x3x3 w:32", "fp32")
    whole, image = (EstimatedPrices(Estimate(**common, image_tile=tile))(stem) for tile in (None, 4))  # type: ignore[arg-type]
    assert whole == pytest.approx(8 * image)


def test_the_simulated_grid_of_fp8_is_that_of_the_file() -> None:
    x = torch.linspace(-3.0, 2.0, 1001)
    found = Fp8Grid(x.amin(), x.amax()).round(x).numpy()
    step = float(scale_of(3.0, fp8.LARGEST))
    wanted = (x.numpy() / step).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * step
    # the file's step is a half, so that a value between two numbers may fall to the other: a step is a sixteenth to an
    # eighth of it
    np.testing.assert_allclose(found, wanted, rtol=0.13)
    assert np.mean(np.abs(found - wanted) > 2e-3 * np.abs(wanted)) < 0.02
    assert found.max() == pytest.approx(2.0, rel=0.0625)


def test_the_simulated_grid_is_that_of_the_file() -> None:
    """Fine-tuning rounds activations as the file will."""
    x = torch.linspace(-3.0, 2.0, 1001)
    grid = ActivationGrid(x.amin(), x.amax(), is_symmetric=True)
    step = float(scale_of(3.0))
    wanted = np.clip(np.rint(x.numpy() / step), -128, 127) * step
    # the file's step is a half: eleven bits
    np.testing.assert_allclose(grid.round(x).numpy(), wanted, rtol=2e-3, atol=1.01 * step)
    assert len(np.unique(grid.round(x).numpy())) <= 255
    assert float(grid.round(torch.zeros(1))) == 0.0
