"""What a network on a target may choose, what is refused by name, and sizes that are known before a file is written."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exporting import hasten
from torch import Tensor, nn

from hirelc_deploy import workbench
from hirelc_deploy.compress.distil import FineTuning
from hirelc_deploy.console import Advance
from hirelc_deploy.errors import UserError
from hirelc_deploy.graph import ModelGraph, trace
from hirelc_deploy.graph.model_graph import Group
from hirelc_deploy.graph.trial import jitter
from hirelc_deploy.policy import FP32, INT8, Compute, PerTensor, Policy, Precision, Storage
from hirelc_deploy.profiles import Target, load_target
from hirelc_deploy.rundir import RunFolder
from hirelc_deploy.task import ArraySource, Classification, Task
from hirelc_deploy.workbench import Workbench, completed, search_space

hasten()

HOST = load_target("host")
ANY_COUNT = HOST.model_copy(update={"channel_multiple": 1})
CLASSES = 5
SEEDS = range(10)


class Convolutions(nn.Module):
    """A stem of 16 channels, a residual branch that is 24 wide inside, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 24, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.outer = nn.Conv2d(24, 16, 1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.outer(F.relu(self.norm(self.inner(x)))))
        return self.head(x.mean((2, 3)))


class Tokens(nn.Module):
    """Three tokens, a residual MLP that is 6 wide inside, and a flatten: a unit is several columns of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 12)
        self.inner = nn.Linear(12, 6)
        self.outer = nn.Linear(6, 12)
        self.last = nn.Linear(12, 7)
        self.head = nn.Linear(21, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.outer(F.relu(self.inner(x)))
        return self.head(F.relu(self.last(x)).flatten(1))


NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "convolutions": (Convolutions, (3, 6, 6)),
    "tokens": (Tokens, (3, 4)),
    "tied": (networks.TiedTwice, (6,)),
}
"""Networks and the shape of one example."""

STEM = "outer"
"""The group of the stem's channels, which the residual branch is added to."""


def task(shape: tuple[int, ...]) -> Task:
    images = np.random.default_rng(0).normal(size=(40, *shape)).astype(np.float32)
    source = ArraySource({"x": images}, np.arange(40) % CLASSES)
    return Classification(source, source, source, batch=20)


@cache
def traced(name: str) -> tuple[nn.Module, ModelGraph]:
    """A network that no test changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind, shape = NETWORKS[name]
        model = jitter(kind()).eval()
    return model, trace(model, {"x": torch.zeros(2, *shape)})


@contextmanager
def silent(what: str, total: int) -> Iterator[Advance]:
    yield lambda detail="": None


@contextmanager
def opened(name: str, folder: Path, *, target: Target = ANY_COUNT, epochs: int = 0) -> Iterator[Workbench]:
    model, graph = traced(name)
    with RunFolder.open(folder, {"model": name}, resume=True) as run:
        yield Workbench(
            model,
            task(graph.inputs[0].shape),
            graph,
            target,
            run,
            importance="l2",
            fine_tuning=FineTuning(epochs=epochs),
            threads=1,
            batch=1,
            progress=silent,
        )


# -- what may be chosen --------------------------------------------------------------------------------------


def test_counts_are_on_the_targets_multiples_beside_all_and_none() -> None:
    graph = traced("convolutions")[1]
    space = search_space(graph, HOST)
    assert HOST.channel_multiple == 8
    assert space.groups == {STEM: (8, 16), "inner": (0, 8, 16, 24)}
    assert space.totals == {STEM: 16, "inner": 24}
    assert search_space(graph, ANY_COUNT).groups == {group.name: group.legal for group in graph.groups}


@pytest.mark.parametrize(
    ("unit", "legal", "multiple", "offered"),
    [
        (4, (1, 2, 3), 8, (2, 3)),  # heads of four channels: two fill a multiple, and three are all there are
        (4, (0, 1, 2, 3, 4), 8, (0, 2, 4)),
        (64, (1, 2, 3), 8, (1, 2, 3)),
        (1, (4, 8, 12, 16, 20), 16, (16, 20)),
        (1, (0, 1, 2, 3), 8, (0, 1, 2, 3)),  # too narrow for a multiple: all, not none
    ],
)
def test_a_multiple_counts_channels_not_units(
    unit: int, legal: tuple[int, ...], multiple: int, offered: tuple[int, ...]
) -> None:
    group = Group("heads", "heads", unit, legal[-1], legal, (), ())
    target = HOST.model_copy(update={"channel_multiple": multiple})
    assert search_space(ModelGraph((), (), (group,)), target).groups == {"heads": offered}


def test_precisions_are_those_that_the_target_runs() -> None:
    graph = traced("convolutions")[1]
    floats_only = HOST.model_copy(update={"computes": {"Linear": (Compute.FP32,), "Conv2d": (Compute.FP32,)}})
    convolutions = HOST.model_copy(update={"computes": {"Conv2d": (Compute.FP32, Compute.INT8)}})
    assert set(search_space(graph, HOST).layers.values()) == {(FP32, INT8)}
    assert set(search_space(graph, floats_only).layers.values()) == {(FP32,)}
    assert search_space(graph, convolutions).layers == {
        layer.name: (FP32,) if layer.op == "Linear" else (FP32, INT8) for layer in graph.layers
    }


def test_every_layer_belongs_to_one_block() -> None:
    graph = traced("convolutions")[1]
    layers = [layer for members in search_space(graph, HOST).blocks.values() for layer in members]
    assert sorted(layers) == sorted(layer.name for layer in graph.layers)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "what", "fix"),
    [
        (Policy({"haed": INT8}, {}), "'haed', which is no layer", "did you mean head?"),
        (Policy({}, {"iner": 8}), "'iner', which is no prune group", "did you mean 'inner'?"),
        (Policy({}, {STEM: 17}), "cannot keep 17 of its 16", "the nearest legal count is 16"),
        (Policy({}, {STEM: 0}), "cannot keep 0 of its 16", "the nearest legal count is 1"),
        (
            Policy({"head": Precision(Storage("int", 8, PerTensor()), Compute.INT8)}, {}),
            "head as int8/tensor->int8, which host cannot",
            "there is fp32/tensor->fp32, int8/channel->int8",
        ),
        (
            Policy({"head": replace(INT8, compute=Compute.FP16)}, {}),
            "head as int8/channel->fp16, which host cannot",
            "there is fp32/tensor->fp32, int8/channel->int8",
        ),
        (Policy({}, {}, ("quantize", "prune")), "the policy's order is quantize then prune", "prune then quantize"),
    ],
)
def test_what_a_network_cannot_have_is_refused_by_name(policy: Policy, what: str, fix: str) -> None:
    graph = traced("convolutions")[1]
    with pytest.raises(UserError) as raised:
        completed(policy, graph, HOST)
    assert what in raised.value.what
    assert fix in raised.value.fix


def test_a_precision_that_only_another_target_has_is_refused_with_the_targets_name() -> None:
    graph = traced("convolutions")[1]
    floats_only = HOST.model_copy(update={"computes": {}, "name": "floats-only"})
    with pytest.raises(UserError, match="which floats-only cannot"):
        completed(Policy({"head": INT8}, {}), graph, floats_only)


def test_what_a_policy_leaves_out_stays_as_it_was_trained() -> None:
    graph = traced("convolutions")[1]
    whole = completed(Policy({"head": INT8}, {STEM: 8}), graph, HOST)
    assert whole.precisions == {layer.name: INT8 if layer.name == "head" else FP32 for layer in graph.layers}
    assert whole.keep == {group.name: 8 if group.name == STEM else group.total for group in graph.groups}
    assert completed(whole, graph, HOST) == whole


# -- sizes ---------------------------------------------------------------------------------------------------


def random_policy(bench: Workbench, seed: int) -> Policy:
    """Counts down to vanished branches, and int8 and fp32 layers in any mixture."""
    draw = random.Random(seed)
    return Policy(
        {layer: draw.choice(choices) for layer, choices in bench.space.layers.items()},
        {
            group: 0 if 0 in counts and draw.random() < 0.3 else draw.choice(counts)
            for group, counts in bench.space.groups.items()
        },
    )


@pytest.mark.parametrize("name", ["convolutions", "tokens"])
def test_the_size_is_known_before_anything_is_pruned(name: str, tmp_path: Path) -> None:
    with opened(name, tmp_path) as bench:
        policies = [random_policy(bench, seed) for seed in SEEDS]
        predicted = [bench.predicted_bytes(policy) for policy in policies]
        written = [len(bench.write(bench.compressed(policy).model, policy).data) for policy in policies]
    assert predicted == written
    assert {0 in policy.keep.values() for policy in policies} == {True, False}
    assert len(set(written)) > len(policies) / 2


def test_the_whole_network_in_fp32_is_predicted_to_weigh_what_the_baseline_weighs(tmp_path: Path) -> None:
    with opened("convolutions", tmp_path) as bench:
        assert bench.predicted_bytes(Policy({}, {})) == len(bench.write_baseline().data)


# -- a policy made real --------------------------------------------------------------------------------------


def small_policy(bench: Workbench) -> Policy:
    """Everything in int8, half of the stem, without the branch."""
    return completed(Policy(dict.fromkeys(bench.graph.layer, INT8), {STEM: 8, "inner": 0}), bench.graph, bench.target)


def test_an_evaluation_is_replayed_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("convolutions", tmp_path, epochs=1) as bench:
        policy = small_policy(bench)
        first = bench.evaluate(policy)
        weights = bench.compressed(policy).model.state_dict()
    monkeypatch.setattr(workbench, "distil", None)  # a replay computes nothing
    monkeypatch.setattr(workbench.timing, "interleave", None)
    with opened("convolutions", tmp_path, epochs=1) as again:
        assert again.evaluate(policy) == first
        replayed = again.compressed(policy).model.state_dict()
        assert first.figures.drop == again.original_score - first.score
        assert first.figures.size_bytes == again.predicted_bytes(policy)
    assert replayed.keys() == weights.keys()
    assert all(torch.equal(replayed[key], tensor) for key, tensor in weights.items())
    assert not list((tmp_path / "states").iterdir())


def test_the_original_is_never_changed(tmp_path: Path) -> None:
    model = traced("convolutions")[0]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with opened("convolutions", tmp_path, epochs=1) as bench:
        bench.compressed(small_policy(bench))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert not any(module.training or module._forward_pre_hooks for module in model.modules())


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    with opened("tied", tmp_path, epochs=1) as bench:
        policy = completed(Policy(dict.fromkeys(bench.graph.layer, INT8), {}), bench.graph, HOST)
        model = bench.compressed(policy).model
    assert isinstance(model, networks.TiedTwice)
    assert model.one.weight is model.other.weight
