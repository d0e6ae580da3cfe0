"""Whether the kernels that are priced are those that a session really runs, for random policies."""

from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from exporting import hasten
from torch import Tensor, nn

from hirelc_deploy.choices import search_space
from hirelc_deploy.compress.grids import fitted, put_on
from hirelc_deploy.cost.kernel import Kernel
from hirelc_deploy.cost.latency import decisions_of
from hirelc_deploy.cost.memory import Activations
from hirelc_deploy.cost.needs import families
from hirelc_deploy.cost.network import Network
from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters._base import NoKernelError
from hirelc_deploy.exporters._float import FloatGraph
from hirelc_deploy.exporters._plan import MOVES
from hirelc_deploy.exporters.onnxruntime import RUNTIME, optimised
from hirelc_deploy.graph import trace
from hirelc_deploy.policy import INT8, Compute, Policy, Precision
from hirelc_deploy.profiles import load_target
from hirelc_deploy.verify.machines import Here
from hirelc_deploy.verify.profiling import makers

hasten()

HOST = load_target("host")


class Stages(nn.Module):
    """Residual blocks with and without a shortcut of their own, pooling, depthwise and grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.down, self.deep = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.side = nn.Conv2d(16, 32, 1, stride=2)
        self.depthwise, self.point = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 24, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(x + self.b(F.relu(self.a(x))))
        x = F.relu(self.deep(F.relu(self.down(x))) + self.side(x))
        x = F.relu6(self.point(F.relu6(self.depthwise(x))))
        return self.head(x.mean((2, 3)))


class Mixer(nn.Module):
    """Linear layers on tokens, with norms and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


def signal() -> nn.Module:
    """One axis, brought down and up again."""
    return nn.Sequential(
        nn.Conv1d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv1d(16, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose1d(24, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def decoder() -> nn.Module:
    """An image brought down and up again."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 16, 2, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 5, 3, padding=1),
    )


def perceptron() -> nn.Module:
    """Linear layers whose activations are read by what is no layer."""
    return nn.Sequential(
        nn.Linear(12, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16), nn.Softmax(-1)
    )


class Coder(nn.Module):
    """A product that another one reads, and floats as well."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.mean = nn.Linear(12, 32), nn.Linear(32, 8)
        self.decode, self.out = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(F.relu(self.code(x)))
        return self.out(F.relu(self.decode(mean))) * torch.tanh(mean)


def clipped() -> nn.Module:
    """A Clip that a convolution takes along, one that begins above nought, and a Tanh: integers end before both."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Hardtanh(0.0, 6.0),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Hardtanh(0.5, 6.0),
        nn.Conv2d(16, 16, 1),
        nn.Tanh(),
        nn.Conv2d(16, 5, 1),
    )


NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "stages": (Stages, (3, 16, 16)),
    "mixer": (Mixer, (3, 16, 16)),
    "signal": (signal, (3, 32)),
    "perceptron": (perceptron, (12,)),
    "coder": (Coder, (12,)),
    "clipped": (clipped, (3, 16, 16)),
    "decoder": (decoder, (3, 16, 16)),
}

SAME = {
    "FusedConv": "Conv",
    "QLinearConv": "Conv int8",
    "FusedGemm": "Gemm",
    "QGemm": "Gemm int8",
    "FusedMatMul": "MatMul",
    "MatMulIntegerToFloat": "MatMul int8",
    "QLinearAdd": "Add int8",
    "NhwcMaxPool": "MaxPool int8",
    "QLinearGlobalAveragePool": "GlobalAveragePool int8",
    "DynamicQuantizeMatMul": "Linear int8_dynamic",
}
"""A session's operators by what the kernels of a network are called."""

UNSAID = {"Transpose", "Relu", "Clip", "Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Shape", "Slice", "Concat"}
"""Part of a border, or next to no work: how many there are is not held."""


@cache
def lowered(name: str) -> tuple[nn.Module, Network, FloatGraph]:
    kind, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind().eval()
    graph = trace(model, {"input": torch.zeros(2, *shape)})
    space = search_space(graph, HOST)
    computes = {layer: tuple(dict.fromkeys(p.compute for p in each)) for layer, each in space.layers.items()}
    floats = RUNTIME.float_graph(model, {"input": np.zeros((2, *shape), np.float32)}, opset=18)
    return model, RUNTIME.network(floats, graph, computes, space.groups, batch=1), floats


def kernels(network: Network, computes: Mapping[str, Compute]) -> Counter[str]:
    """What runs where layers compute so, by the network's terms."""
    known: dict[str, Compute | bool] = dict(computes)
    for state in network.states:
        each = [known[condition.variable] in condition.values for condition in state.conditions]
        known[state.name] = all(each) if state.of == "all" else any(each)
    found: Counter[str] = Counter()
    for term in network.terms:
        if all(known[condition.variable] in condition.values for condition in term.when):
            found[_name(term.kernel) if term.part == 1 else "fused Add"] += 1
    return found


def _name(kernel: Kernel) -> str:
    if kernel.compute is Compute.INT8_DYNAMIC:
        return "Linear int8_dynamic"
    has_twin = kernel.compute is Compute.INT8 and kernel.op not in MOVES - {"MaxPool"}
    return f"{kernel.op} int8" if has_twin else kernel.op


def session(name: str, computes: Mapping[str, Compute], folder: Path) -> Counter[str]:
    """What a session makes of the file with these computes."""
    original, _, graph = lowered(name)
    model = deepcopy(original)  # weights are put on grids
    chosen = {layer: Precision(INT8.storage, c) for layer, c in computes.items() if c is not Compute.FP32}
    grids = fitted(model, chosen, {}, largest=63)
    put_on(model, chosen, grids, largest=63)
    example = {"input": np.random.default_rng(0).standard_normal((1, *NETWORKS[name][1])).astype(np.float32)}
    seen = RUNTIME.observe(graph, chosen, [example])
    path = folder / "model.onnx"
    path.write_bytes(RUNTIME.write(graph, chosen, grids, seen=seen, largest=63).data)
    found: Counter[str] = Counter()
    for node in optimised(path, threads=1).node:
        found[SAME.get(node.op_type, node.op_type)] += 1
        found["fused Add"] += node.op_type == "Conv" and len(node.input) > 3
    return +found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_priced_is_what_runs(name: str, seed: int, tmp_path: Path) -> None:
    _, network, _ = lowered(name)
    random = np.random.default_rng(seed)
    computes = {
        layer: able[min(seed, len(able) - 1) if seed < 2 else random.integers(len(able))]
        for layer, able in network.computes.items()
    }
    wanted, found = kernels(network, computes), session(name, computes, tmp_path)
    borders = {"QuantizeLinear", "DequantizeLinear", "ReorderInput", "ReorderOutput"}
    off = {op: (wanted[op], found[op]) for op in wanted | found if wanted[op] != found[op] and op not in UNSAID}
    if seed < 2:  # all layers alike: exact
        assert not off
    # mixed: every layer and operator, and borders but for one that a session moves about
    assert not off.keys() - borders
    assert all(abs(told - real) <= 1 for told, real in off.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kernel_that_a_policy_can_ask_for_runs(name: str) -> None:
    """At the ends of the counts that may stay, each by itself, as a profile times it."""
    wanted = [
        family.at(place)
        for family in families(lowered(name)[1])
        for place in {family.reference, (family.inputs[0], family.outputs[0])}
    ]
    made = makers(wanted, Here(RUNTIME, threads=1))
    assert made.keys() == set(wanted)
    for kernel in wanted:
        maker = made[kernel]
        assert not isinstance(maker, NoKernelError), f"{kernel}: {maker}"
        RUNTIME.kernel_session(maker.file(1), threads=1).run({})


def test_what_lies_in_memory_at_once() -> None:
    """In floats most behind the stem: its output, whose activation is in place, and what pooling makes of it.  In
    integers most in the stem itself, with the image in floats and as it is quantised."""
    _, network, _ = lowered("stages")
    channels, places, pooled = 16, 16 * 16, 8 * 8
    policies = [Policy({}, {}), Policy(dict.fromkeys(network.computes, INT8), {})]
    in_floats, in_integers = Activations(network)(decisions_of(network, policies))
    assert in_floats == 4 * channels * (places + pooled)
    assert in_integers == ((4 + 1) * 3 + channels) * places


class Bags(nn.Module):
    """Means of embedded words: PyTorch's exporter writes a Loop over the bags."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.bag(ids))


def test_what_has_a_body_is_refused_by_name() -> None:
    """And bodies that were folded away are no longer among those that read a value."""
    model, ids = Bags().eval(), np.arange(8).reshape(2, 4)
    floats = RUNTIME.float_graph(model, {"ids": ids}, opset=18)
    there = set(ir.traversal.RecursiveGraphIterator(floats.model.graph))
    values = [*floats.model.graph.inputs, *(output for node in there for output in node.outputs)]
    assert all(use.node in there for value in values for use in value.uses())
    with pytest.raises(UserError, match=r"is written with a Loop, \w+, which cannot"):
        RUNTIME.network(floats, trace(model, {"ids": torch.from_numpy(ids)}), {}, {}, batch=1)
