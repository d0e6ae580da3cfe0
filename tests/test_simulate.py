"""What is trained under is what the file computes; taking it off leaves the float weights and nothing else."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from exporting import hasten, relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hirelc_deploy.compress.batchnorm import reestimate
from hirelc_deploy.compress.fold import along_channels, channel_factor, fold, foldable
from hirelc_deploy.compress.grids import fitted, put_on
from hirelc_deploy.compress.inputs import energies
from hirelc_deploy.compress.prune import prune
from hirelc_deploy.compress.simulate import RANGE_MOMENTUM, ActivationGrid, Simulation, StoredWeight, simulated
from hirelc_deploy.exporters import load_runtime
from hirelc_deploy.exporters._base import Exported
from hirelc_deploy.exporters._float import FloatGraph
from hirelc_deploy.exporters._plan import plan
from hirelc_deploy.graph import forward, trace
from hirelc_deploy.graph.trial import jitter
from hirelc_deploy.graph.vanish import Bypass, Gone
from hirelc_deploy.kernels._base import Grid
from hirelc_deploy.policy import INT8, Compute, PerChannel, PerGroup, PerTensor, Policy, Precision, Storage

hasten()

RUNTIME = load_runtime("onnxruntime")
LARGEST = 63  # codes that saturate on no CPU, so that the file computes the same on all of them
INT8_STORED = Precision(Storage("int", 8, PerChannel()), Compute.FP32)
EXAMPLES = 32
FILES = ["residual", "inverted", "attention", "mlp", "called_twice", "tied_twice"]

STORED = [
    Precision(Storage(name, bits, granularity), compute)
    for name, bits, granularity in (
        ("int", 2, PerChannel()),
        ("int", 4, PerGroup(16)),
        ("float", 4, PerTensor()),
        ("log", 3, PerChannel()),
        ("codebook", 3, PerChannel()),
        ("vector", 1, PerChannel()),
    )
    for compute in (Compute.INT8, Compute.FP32)
]
"""A precision of every format, coarse enough for a wrong grid to show."""

COARSE = [*(("residual", precision) for precision in STORED), *(("tied_twice", precision) for precision in STORED[-4:])]
"""Networks and what all their layers are stored as."""

DYNAMIC = [
    (name, Precision(Storage("int", bits, PerChannel()), Compute.INT8_DYNAMIC))
    for name in ("mlp", "attention", "called_twice")
    for bits in (4, 8)
]

# The file also rounds biases, and what a convolution writes before an addition; INT8 itself is off by 0.01 to 0.02.
SIMULATION_TOLERANCE = 0.005

# Extremes of the same values, summed in another order by another library.
FLOAT_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A network with BatchNorm statistics worth folding, one batch for it, and the layers that can be int8."""

    model: nn.Module
    inputs: dict[str, Tensor]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {name: tensor.numpy() for name, tensor in self.inputs.items()}

    @property
    def int8(self) -> dict[str, Precision]:
        return self.all(INT8)

    def all(self, precision: Precision) -> dict[str, Precision]:
        able = (nn.Conv1d, nn.Conv2d, nn.Linear)
        return {name: precision for name, module in self.model.named_modules() if isinstance(module, able)}


def build(name: str) -> Case:
    if name == "mlp":
        model: nn.Module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5))
        small = networks.Case(model, {"input": torch.zeros(2, 6)})
    else:
        small = networks.build(name)
    random = torch.Generator().manual_seed(3)
    inputs = {n: torch.randn(EXAMPLES, *x.shape[1:], generator=random) for n, x in small.example.items()}
    return Case(jitter(small.model).eval(), inputs)


def under(
    model: nn.Module, precisions: Mapping[str, Precision], *, largest: int = LARGEST
) -> AbstractContextManager[Simulation]:
    """A simulation with grids that are fitted to the model as it stands, norms left alone."""
    return simulated(model, precisions, fitted(model, precisions, {}, largest=largest), largest=largest)


@dataclass(frozen=True)
class Compressed:
    """What becomes of a case: norms folded, weights on their grids; and the float graph that is written from it."""

    model: nn.Module
    pairs: dict[str, str]
    precisions: dict[str, Precision]
    grids: dict[str, Grid]
    graph: FloatGraph

    def write(self, case: Case) -> Exported:
        seen = RUNTIME.observe(self.graph, self.precisions, [case.arrays])
        return RUNTIME.write(self.graph, self.precisions, self.grids, seen=seen, largest=LARGEST)


@cache
def compressed(name: str, precision: Precision = INT8) -> tuple[Case, Compressed]:
    """A case that no test changes; the graph takes a second or two."""
    case = build(name)
    pairs = foldable(case.model, case.inputs)
    model = fold(case.model, pairs).eval()
    precisions = case.all(precision)
    grids = fitted(model, precisions, energies(model, precisions, [case.inputs]), largest=LARGEST)
    put_on(model, precisions, grids, largest=LARGEST)
    return case, Compressed(model, pairs, precisions, grids, RUNTIME.float_graph(model, case.arrays, opset=18))


def run_simulated(
    case: Case, model: nn.Module, precisions: Mapping[str, Precision], grids: Mapping[str, Grid], pairs: dict[str, str]
) -> dict[str, np.ndarray]:
    model = copy.deepcopy(model)
    with torch.no_grad(), simulated(model, precisions, grids, largest=LARGEST, norms=pairs) as simulation:
        simulation.calibrate([case.inputs])
        return {name: output.numpy() for name, output in forward(model, case.inputs).items()}


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, INT8) for name in FILES), *COARSE, *DYNAMIC],
    ids=str,
)
def test_the_simulation_computes_what_the_file_computes(name: str, precision: Precision, tmp_path: Path) -> None:
    """Both of it: the network in training, with its norms, and the compressed one that is scored."""
    case, made = compressed(name, precision)
    path = tmp_path / "model.onnx"
    path.write_bytes(made.write(case).data)
    from_file = RUNTIME.load(path, threads=1).run(case.arrays)
    with torch.no_grad():
        floats = {n: output.numpy() for n, output in forward(case.model, case.inputs).items()}

    in_training = run_simulated(case, case.model, made.precisions, made.grids, made.pairs)
    scored = run_simulated(case, made.model, made.precisions, {}, {})
    tolerance = FLOAT_TOLERANCE if precision.compute is Compute.FP32 else SIMULATION_TOLERANCE
    assert relative_error(scored, from_file) < tolerance
    # nearer to the file than the float model is
    assert relative_error(scored, from_file) < relative_error(floats, from_file) / 2
    # ranges are those of float weights while training
    assert relative_error(in_training, from_file) < (tolerance if precision.compute is Compute.FP32 else 0.02)


def inputs_of_layers(graph: FloatGraph) -> dict[str, str]:
    """Name of a simulated grid -> the tensor of the float graph that is read there."""
    layers = defaultdict(list)
    for layer, stored in sorted(graph.weights.items()):  # tied ones by name, as they are called
        layers[stored].append(layer)
    read = {}
    calls: dict[str, int] = defaultdict(int)
    for node in graph.model.graph:
        second = node.inputs[1] if len(node.inputs) > 1 else None
        weight = second.name if second is not None else None
        if weight is None or weight not in layers:
            continue
        calls[weight] += 1
        tied = layers[weight][1:]
        again = f"#{calls[weight]}" if calls[weight] > 1 and not tied else ""
        source = node.inputs[0]
        assert source is not None
        assert source.name is not None
        read[layers[weight][calls[weight] - 1 if tied else 0] + again] = source.name
    return read


@pytest.mark.parametrize("name", FILES)
def test_ranges_are_those_that_the_exporter_calibrates(name: str) -> None:
    """Of the network with its weights as they are stored and activations in floats, over all batches."""
    case, made = compressed(name)
    layout = plan(made.graph, made.precisions)
    halves = [{n: x[:20] for n, x in case.inputs.items()}, {n: x[20:] for n, x in case.inputs.items()}]
    arrays = [{n: x.numpy() for n, x in half.items()} for half in halves]
    seen = RUNTIME.observe(made.graph, made.precisions, arrays)
    model = copy.deepcopy(made.model)
    with simulated(model, made.precisions, {}, largest=LARGEST) as simulation:
        simulation.calibrate(halves)
    read = inputs_of_layers(made.graph)
    assert simulation.grids.keys() == read.keys()
    for grid, tensor in read.items():
        histogram = seen[layout.tensors[tensor].same_grid_as or tensor]
        low, high = min(histogram.low, 0), max(histogram.high, 0)
        found = (min(simulation.grids[grid].low.item(), 0), max(simulation.grids[grid].high.item(), 0))
        assert found == pytest.approx((low, high), rel=FLOAT_TOLERANCE, abs=FLOAT_TOLERANCE), grid


def test_ranges_in_training_begin_as_those_of_the_float_model() -> None:
    case = build("inverted")
    seen: dict[str, tuple[float, float]] = {}

    def note(name: str) -> None:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            seen[name] = (args[0].min().item(), args[0].max().item())

        case.model.get_submodule(name).register_forward_pre_hook(hook)

    plain = copy.deepcopy(case.model)
    for name in case.int8:
        note(name)
    with torch.no_grad():
        forward(case.model, case.inputs)
    with under(plain, case.int8) as simulation:
        simulation.calibrate([case.inputs])
    assert {name: (grid.low.item(), grid.high.item()) for name, grid in simulation.grids.items()} == seen


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, INT8) for name in ("residual", "inverted", "attention")), *COARSE],
    ids=str,
)
def test_weights_are_those_that_the_file_decodes_to(name: str, precision: Precision) -> None:
    """Those put on their grids bit for bit; those under a norm but for the order of two multiplications."""
    case, made = compressed(name, precision)
    written = made.write(case)
    decoded = decoded_weights(written, case.arrays)
    assert decoded.keys() == made.precisions.keys()
    model = copy.deepcopy(case.model)
    with torch.no_grad(), simulated(model, made.precisions, made.grids, largest=LARGEST, norms=made.pairs):
        for layer, found in decoded.items():
            on_grid = made.model.get_parameter(f"{layer}.weight").detach().numpy()
            if not np.array_equal(found, on_grid):
                np.testing.assert_array_equal(found.T, on_grid, err_msg=layer)  # a MatMul's is transposed
            module = model.get_submodule(layer)
            assert isinstance(module.weight, Tensor)
            factor = channel_factor(model.get_submodule(made.pairs[layer])) if layer in made.pairs else torch.ones(1)
            np.testing.assert_allclose(module.weight * along_channels(factor, module), on_grid, rtol=FLOAT_TOLERANCE)
    assert bool(made.pairs) == (name in ("residual", "inverted"))


def decoded_weights(written: Exported, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By layer what its operator reads for a weight, asked from a session that runs the file."""
    model = onnx.load_from_string(written.data)
    readers = {
        node.input[0]: node.output[0] for node in model.graph.node if node.op_type in ("DequantizeLinear", "Mul")
    }
    values = {layer: readers[tensor] for layer, tensor in written.tensors.items()}
    for name in values.values():
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(values, session.run(list(values.values()), dict(inputs)), strict=True))


def leftovers(model: nn.Module) -> list[str]:
    """Modules with a hook or a parametrization."""
    return [
        name
        for name, module in model.named_modules()
        if module._forward_pre_hooks or module._forward_hooks or parametrize.is_parametrized(module)
    ]


@pytest.mark.parametrize("name", ["inverted", "tied_twice"])
def test_what_stays_is_the_trained_float_weights_and_nothing_else(name: str) -> None:
    case = build(name)
    before = {key: tensor.clone() for key, tensor in case.model.state_dict().items()}
    types = [type(module) for module in case.model.modules()]
    with under(case.model, case.int8) as simulation:
        simulation.calibrate([case.inputs])
        assert leftovers(case.model)
        with torch.no_grad():
            for parameter in case.model.parameters():
                parameter.add_(1e-4)  # less than a step of the grid
    after = case.model.state_dict()
    assert not leftovers(case.model)
    assert [type(module) for module in case.model.modules()] == types
    assert after.keys() == before.keys()
    for key in dict(case.model.named_parameters()):
        assert torch.equal(after[key], before[key] + 1e-4), key


def test_the_simulation_goes_even_if_training_fails() -> None:
    case = build("mlp")
    with pytest.raises(KeyError), under(case.model, case.int8):
        raise KeyError
    assert not leftovers(case.model)


def test_tied_weights_stay_tied_and_train_as_one() -> None:
    case = build("tied_twice")
    model = case.model
    assert isinstance(model, networks.TiedTwice)
    parameters = len(list(model.parameters()))
    with under(model, case.int8) as simulation:
        simulation.calibrate([case.inputs])
        of_grids = {p for part in model.modules() if isinstance(part, StoredWeight) for p in part.parameters()}
        assert of_grids
        assert len(set(model.parameters()) - of_grids) == parameters
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        forward(model, case.inputs)["output"].square().sum().backward()
        optimizer.step()
        assert torch.equal(model.one.weight, model.other.weight)
    assert model.one.weight is model.other.weight


def test_a_shared_weight_is_fitted_to_the_reader_that_bears_the_least() -> None:
    """Without VNNI integers have 7 bits where a layer computes with them, and 8 where it is looked up or decoded."""
    torch.manual_seed(0)
    words, head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
    head.weight = words.weight
    model = nn.Sequential(words, head)
    before = words.weight.detach().clone()
    precisions = {"0": Precision(INT8.storage, Compute.FP32), "1": INT8}
    put_on(model, precisions, fitted(model, precisions, {}, largest=63), largest=63)
    steps = before.abs().amax(1, keepdim=True) / 63
    assert ((words.weight - before).abs() <= 1.01 * steps).all()


def test_each_call_of_a_layer_has_a_range_of_its_own() -> None:
    """A mean of both ranges, which is what one grid would come to in training, cuts off the wider."""
    case = build("called_twice")
    with under(case.model, case.int8) as simulation:
        simulation.calibrate([case.inputs])
        simulation.train(True)
        first, second = (simulation.grids[name].high.item() for name in ("again", "again#2"))
        for _ in range(20):
            forward(case.model, case.inputs)
        assert simulation.grids.keys() == {"first", "again", "again#2", "wide", "head"}
        # the weights are on their grid now, and the ranges with them
        assert simulation.grids["again"].high.item() == pytest.approx(first, rel=0.02)
        assert simulation.grids["again#2"].high.item() == pytest.approx(second, rel=0.02)
        assert first > 1.5 * second


def test_gradients_reach_every_weight_and_the_inputs() -> None:
    case = build("inverted")
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in case.inputs.items()}
    with under(case.model, case.int8) as simulation:
        simulation.calibrate([case.inputs])
        forward(case.model, inputs)["output"].square().sum().backward()
    for name, tensor in (*case.model.named_parameters(), *inputs.items()):
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.abs().sum() > 0, name


def test_ranges_follow_in_training_and_are_held_outside() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with under(model, {"0": INT8}) as simulation:
        simulation.calibrate([{"input": torch.linspace(-1, 1, 8).reshape(2, 4)}])
        wide = {"input": torch.linspace(-3, 5, 8).reshape(2, 4)}
        forward(model, wide)
        model.train()
        forward(model, wide)  # the model's own mode is BatchNorm's and Dropout's, not the ranges'
        grid = simulation.grids["0"]
        assert (grid.low.item(), grid.high.item()) == (-1, 1)
        simulation.train(True)
        forward(model, wide)
        moved = (-1 + RANGE_MOMENTUM * (-3 - -1), 1 + RANGE_MOMENTUM * (5 - 1))
        assert (grid.low.item(), grid.high.item()) == pytest.approx(moved)
        simulation.train(False)
        forward(model, wide)
        assert (grid.low.item(), grid.high.item()) == pytest.approx(moved)


def test_calibrating_again_forgets_what_was_seen() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with under(model, {"0": INT8}) as simulation:
        simulation.calibrate([{"input": 100 * torch.ones(2, 4)}])
        simulation.calibrate([{"input": torch.linspace(-1, 1, 8).reshape(2, 4)}])
        assert (simulation.grids["0"].low, simulation.grids["0"].high) == (-1, 1)


def test_a_range_that_was_never_seen_is_no_range() -> None:
    """A grid of no width would make every input zero, and the score a wrong number."""
    model = nn.Sequential(nn.Linear(4, 3))
    with (
        under(model, {"0": INT8}),
        pytest.raises(ValueError, match="calibrate first"),
    ):
        forward(model, {"input": torch.ones(2, 4)})


def test_activations_are_rounded_to_256_values() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    model = nn.Sequential(layer)
    x = torch.linspace(-1, 3, 10_001)[:, None]
    with torch.no_grad(), under(model, {"0": INT8}, largest=127) as simulation:
        simulation.calibrate([{"input": x}])
        rounded = forward(model, {"input": x})["output"]
        outside = forward(model, {"input": torch.tensor([[-9.0], [0.0], [9.0]])})["output"].flatten()
    step = 4 / 255
    # half a step, and the zero point's own rounding at the ends
    assert (rounded - x).abs().max() <= step
    assert len(rounded.unique()) == 256
    assert outside[1] == 0
    assert outside.tolist() == pytest.approx([-1, 0, 3], abs=step)


@pytest.mark.parametrize(("low", "high"), [(0.0, 2.5), (-1.0, 3.0), (-2.0, 0.0), (0.3, 0.7), (0.0, 0.0)])
@pytest.mark.parametrize("is_symmetric", [False, True])
def test_activations_and_their_gradients_are_those_of_torch(low: float, high: float, is_symmetric: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 50, 50).mul_(3).to(memory_format=torch.channels_last)
    gradient = torch.randn_like(x)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    rounded = ActivationGrid(torch.tensor(low), torch.tensor(high), is_symmetric=is_symmetric).round(ours)
    if is_symmetric:
        step, zero, bounds = max(-low, high) / 127, 0, (-128, 127)
    else:
        step = (max(high, 0) - min(low, 0)) / 255
        zero, bounds = round(-min(low, 0) / step) if step else 0, (0, 255)
    expected = torch.fake_quantize_per_tensor_affine(theirs, max(step, torch.finfo(torch.float32).tiny), zero, *bounds)
    torch.testing.assert_close(rounded, expected)
    rounded.backward(gradient)
    expected.backward(gradient)
    assert 0 < (ours.grad == 0).sum() < x.numel() or high == low
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_stored_in_int8_and_computed_in_fp32_rounds_weights_alone() -> None:
    case = build("mlp")
    precisions = dict.fromkeys(case.int8, INT8_STORED)
    floats = {name: case.model.get_submodule(name).weight for name in precisions}
    with torch.no_grad(), under(case.model, precisions) as simulation:
        found = forward(case.model, case.inputs)["output"]
        assert not simulation.grids
        rounded = {name: case.model.get_submodule(name).weight for name in precisions}
    for name, weight in rounded.items():
        assert isinstance(weight, Tensor)
        assert 0 < (weight - floats[name]).abs().max() < weight.abs().max() / LARGEST  # type: ignore[operator]
        case.model.get_submodule(name).weight = nn.Parameter(weight)
    with torch.no_grad():
        assert torch.equal(found, forward(case.model, case.inputs)["output"])


def test_ranges_come_back_from_a_checkpoint() -> None:
    case = build("called_twice")
    with (
        torch.no_grad(),
        under(case.model, case.int8) as simulation,
    ):
        simulation.calibrate([case.inputs])
        state = {key: tensor.clone() for key, tensor in simulation.state_dict().items()}
        before = forward(case.model, case.inputs)["output"]
    with torch.no_grad(), under(case.model, case.int8) as again:
        again.load_state_dict(state)
        assert torch.equal(forward(case.model, case.inputs)["output"], before)
        assert again.state_dict() == state


def test_layers_that_are_gone_are_passed_over() -> None:
    """The policy names every layer of the original; what stands in a branch's place has no weight to round."""
    case = build("residual")
    graph = trace(case.model, case.inputs)
    keep = {group.name: 0 for group in graph.groups if 0 in group.legal}
    model = prune(case.model, graph, Policy({}, keep), {}).model
    gone = {layer for name in keep for layer in graph.group[name].gone_at_zero}
    assert {type(model.get_submodule(name)) for name in gone} == {Gone, Bypass}
    with torch.no_grad(), under(model, case.int8) as simulation:
        simulation.calibrate([case.inputs])
        output = forward(model, case.inputs)["output"]
    assert simulation.grids.keys() == case.int8.keys() - gone
    assert output.isfinite().all()
    assert not leftovers(model)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


def test_a_layer_that_is_called_by_keyword_is_rounded_as_well() -> None:
    model = ByKeyword()
    inputs = {"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(0))}
    with (
        torch.no_grad(),
        under(model, {"layer": INT8}) as simulation,
    ):
        simulation.calibrate([inputs])
        by_keyword = forward(model, inputs)["output"]
        assert torch.equal(
            by_keyword, F.linear(simulation.grids["layer"].round(inputs["x"]), model.layer.weight, model.layer.bias)
        )


# -- statistics of BatchNorm ---------------------------------------------------------------------------------


def batches(channels: int = 3) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [{"input": 2 * torch.randn(n, channels, 4, 4, generator=random) + n} for n in (6, 5, 5)]


def test_statistics_are_the_average_over_all_batches() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3, momentum=0.3), nn.Conv2d(3, 2, 1))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.train()
    reestimate(model, batches())
    norm = model[1]
    inputs = [batch["input"] for batch in batches()]
    mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.momentum == 0.3
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_deeper_norm_sees_what_the_norms_before_it_make_of_each_batch() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    reestimate(model, batches())
    torch.testing.assert_close(model[1].running_mean, torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(model[1].running_var, torch.ones(3), atol=0.02, rtol=0)


def test_a_model_without_statistics_is_not_run() -> None:
    unread = iter(batches())
    reestimate(nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)), unread)
    assert len(list(unread)) == len(batches())


def test_statistics_under_a_simulation_are_those_of_rounded_weights() -> None:
    """As fine-tuning leaves them: the file's weights are rounded, and its BatchNorm is folded from these."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    coarse = {"0": Precision(Storage("int", 2, PerChannel()), Compute.FP32)}
    before = model[0].weight.detach().clone()
    simulation = Simulation(model, coarse, fitted(model, coarse, {}, largest=LARGEST), largest=LARGEST)
    reestimate(model, batches())
    with torch.no_grad():
        means = [model[0](batch["input"]).mean((0, 2, 3)) for batch in batches()]
        assert relative_error({"weight": model[0].weight.numpy()}, {"weight": before.numpy()}) > 0.1
    simulation.remove()
    torch.testing.assert_close(model[1].running_mean, torch.stack(means).mean(0))


def test_layers_that_share_a_book_train_it_together_and_store_it_once() -> None:
    """Its bytes are in the file once, and after training all layers still decode from the same one."""
    case = build("mlp")
    storage = Storage("shared_vector", 1, PerChannel())
    precisions = case.all(Precision(storage, Compute.FP32))
    grids = fitted(case.model, precisions, {}, largest=LARGEST)
    books = [grid["book"] for grid in grids.values()]
    assert len(books) == 3
    assert all(torch.equal(book, books[0]) for book in books)
    model = copy.deepcopy(case.model)
    with simulated(model, precisions, grids, largest=LARGEST) as simulation:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for output in forward(model, case.inputs).values():
            output.square().sum().backward()
        optimizer.step()
        trained = [grid["book"] for grid in simulation.weight_grids().values()]
    assert not torch.equal(trained[0], books[0])
    assert all(torch.equal(book, trained[0]) for book in trained)
