"""What a network on a target may choose, what is refused by name, and sizes that are known before a file is written."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from exporting import hasten
from neighbour import beside_a_neighbour
from torch import Tensor, nn

from hirelc_deploy import latencies, trainer
from hirelc_deploy.choices import completed, search_space
from hirelc_deploy.compress.distil import FineTuning
from hirelc_deploy.compress.grids import put_on
from hirelc_deploy.compress.posttraining import PostTraining
from hirelc_deploy.config import POST_TRAINING_STEPS
from hirelc_deploy.console import Advance
from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters._base import Exported, RoundingErrors
from hirelc_deploy.graph import ModelGraph, trace
from hirelc_deploy.graph.model_graph import Group
from hirelc_deploy.graph.trial import jitter
from hirelc_deploy.kernels import every_storage, load_format
from hirelc_deploy.policy import FP32, INT8, Compute, PerChannel, PerGroup, PerTensor, Policy, Precision, Storage
from hirelc_deploy.profiles import Target, load_target
from hirelc_deploy.rundir import RunFolder
from hirelc_deploy.search.recipe import Recipe
from hirelc_deploy.task import ArraySource, Classification, Task
from hirelc_deploy.workbench import Workbench

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


class Volumes(nn.Module):
    """Convolutions of three dimensions, inputs (N, 1, 4, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv3d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm3d(16)
        self.last = nn.Conv3d(16, 8, 3)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(F.relu(self.norm(self.inner(x))))).mean((2, 3, 4)))


NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "convolutions": (Convolutions, (3, 6, 6)),
    "tokens": (Tokens, (3, 4)),
    "tied": (networks.TiedTwice, (6,)),
    "volumes": (Volumes, (1, 4, 4, 4)),
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
def opened(
    name: str,
    folder: Path,
    *,
    target: Target = ANY_COUNT,
    epochs: int = 0,
    post_training: Sequence[str] = POST_TRAINING_STEPS,
) -> Iterator[Workbench]:
    model, graph = traced(name)
    with RunFolder.open(folder, {"model": name}, resume=True) as run:
        yield Workbench(
            model,
            task(graph.inputs[0].shape),
            graph,
            target,
            run,
            importance="obs",
            fine_tuning=FineTuning(epochs=epochs),
            post_training=PostTraining.of(post_training),
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
    both = HOST.model_copy(update={"computes": dict.fromkeys(("Conv2d", "Linear"), (Compute.FP32, Compute.INT8))})
    floats_only = HOST.model_copy(update={"computes": {"Linear": (Compute.FP32,), "Conv2d": (Compute.FP32,)}})
    convolutions = HOST.model_copy(update={"computes": {"Conv2d": (Compute.FP32, Compute.INT8)}})
    decoded = [storage for storage in every_storage() if load_format(storage.format).native != "fp8"]
    in_floats = {FP32, *(Precision(storage, Compute.FP32) for storage in decoded)}
    in_integers = {Precision(storage, Compute.INT8) for storage in decoded}

    def offered(target: Target) -> dict[str, set[Precision]]:
        return {layer: set(choices) for layer, choices in search_space(graph, target).layers.items()}

    assert offered(both) == {layer.name: in_floats | in_integers for layer in graph.layers}
    assert offered(floats_only) == {layer.name: in_floats for layer in graph.layers}
    assert offered(convolutions) == {
        layer.name: in_floats if layer.op == "Linear" else in_floats | in_integers for layer in graph.layers
    }
    assert all(choices >= in_floats | in_integers for choices in offered(HOST).values())


def test_formats_are_offered_in_the_order_in_which_an_engineer_would_try_them() -> None:
    """As trained, then INT8: what a recipe without a storage takes."""
    graph = traced("convolutions")[1]
    for choices in search_space(graph, HOST).layers.values():
        assert choices[:2] == (FP32, INT8)
        assert len(set(choices)) == len(choices)


def test_a_format_that_cannot_be_computed_in_integers_is_offered_in_floats_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = traced("convolutions")[1]
    monkeypatch.setattr(load_format("log"), "computes", frozenset({Compute.FP32}))
    for choices in search_space(graph, HOST).layers.values():
        assert {choice.compute for choice in choices if choice.storage.format == "log"} == {Compute.FP32}
        assert Compute.INT8 in {choice.compute for choice in choices if choice.storage.format == "int"}


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
            Policy({"head": Precision(Storage("log", 3, PerGroup(32)), Compute.INT8)}, {}),
            "head as log3/group32->int8, which host cannot",
            "there is fp32/tensor->fp32, int8/channel->int8",
        ),
        (
            Policy({"head": Precision(Storage("int", 9, PerChannel()), Compute.INT8)}, {}),
            "head as int9/channel->int8, which host cannot",
            "there is fp32/tensor->fp32, int8/channel->int8",
        ),
        (
            Policy({"head": replace(INT8, compute=Compute.FP16)}, {}),
            "head as int8/channel->fp16, which host cannot",
            "there is fp32/tensor->fp32, int8/channel->int8",
        ),
        (Policy({}, {}, ("quantize",)), "the policy's order is quantize", "prune then quantize"),
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


def test_layers_that_share_a_weight_are_stored_alike() -> None:
    """What they compute in may differ where they are of different kinds: no embedding has an integer kernel."""
    case = networks.build("tied_head")
    graph = trace(case.model, case.example)
    stored = Precision(INT8.storage, Compute.FP32)
    for head in (INT8, replace(INT8, compute=Compute.INT8_DYNAMIC), stored):
        asked = {"tokens": stored, "head": head}
        assert completed(Policy(asked, {}), graph, HOST).precisions.items() >= asked.items()
    coarse = Precision(Storage("int", 4, PerChannel()), Compute.INT8)
    with pytest.raises(UserError, match="they share one weight"):
        completed(Policy({"tokens": stored, "head": coarse}, {}), graph, HOST)

    twice = traced("tied")[1]
    with pytest.raises(UserError, match="they share one weight"):
        completed(Policy({"one": INT8, "other": stored}, {}), twice, HOST)


def test_what_a_policy_leaves_out_stays_as_it_was_trained() -> None:
    graph = traced("convolutions")[1]
    whole = completed(Policy({"head": INT8}, {STEM: 8}), graph, HOST)
    assert whole.precisions == {layer.name: INT8 if layer.name == "head" else FP32 for layer in graph.layers}
    assert whole.keep == {group.name: 8 if group.name == STEM else group.total for group in graph.groups}
    assert completed(whole, graph, HOST) == whole


# -- sizes ---------------------------------------------------------------------------------------------------


def random_policy(bench: Workbench, seed: int) -> Policy:
    """Counts down to vanished branches, and layers as trained or in any format and arithmetic, in any mixture."""
    draw = random.Random(seed)
    return Policy(
        {layer: draw.choice(choices) for layer, choices in bench.space.layers.items()},
        {
            group: 0 if 0 in counts and draw.random() < 0.3 else draw.choice(counts)
            for group, counts in bench.space.groups.items()
        },
    )


def written_file(bench: Workbench, policy: Policy) -> Exported:
    made = bench.compressed(policy)
    return bench.files.write(made.model, policy, made.grids).file


@pytest.mark.parametrize("name", ["convolutions", "tokens"])
def test_the_size_is_known_before_anything_is_pruned(name: str, tmp_path: Path) -> None:
    with opened(name, tmp_path) as bench:
        policies = [random_policy(bench, seed) for seed in SEEDS]
        predicted = [bench.files.predicted_bytes(policy) for policy in policies]
        written = [len(written_file(bench, policy).data) for policy in policies]
    assert predicted == written
    assert {0 in policy.keep.values() for policy in policies} == {True, False}
    assert len(set(written)) > len(policies) / 2


def test_the_whole_network_in_fp32_is_predicted_to_weigh_what_the_baseline_weighs(tmp_path: Path) -> None:
    with opened("convolutions", tmp_path) as bench:
        assert bench.files.predicted_bytes(Policy({}, {})) == len(bench.files.baseline().data)


# -- a policy made real --------------------------------------------------------------------------------------


def small_policy(bench: Workbench) -> Policy:
    """Everything in int8, half of the stem, without the branch."""
    return completed(Policy(dict.fromkeys(bench.graph.layer, INT8), {STEM: 8, "inner": 0}), bench.graph, bench.target)


def test_an_evaluation_is_replayed_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("convolutions", tmp_path, epochs=1) as bench:
        policy = small_policy(bench)
        first = bench.evaluate(policy)
        made = bench.compressed(policy)
        weights = made.model.state_dict()
        file = written_file(bench, policy)
    monkeypatch.setattr(trainer, "distil", None)  # a replay computes nothing
    monkeypatch.setattr(latencies.timing, "interleave", None)
    with opened("convolutions", tmp_path, epochs=1) as again:
        assert again.evaluate(policy) == first
        made_again = again.compressed(policy)
        replayed = made_again.model.state_dict()
        assert written_file(again, policy).data == file.data
        assert first.figures.drop == again.scoring.original - first.score
        assert first.figures.size_bytes == again.files.predicted_bytes(policy)
    assert replayed.keys() == weights.keys()
    assert all(torch.equal(replayed[key], tensor) for key, tensor in weights.items())
    assert made.grids.keys() == {layer for layer in policy.precisions if layer not in ("inner", "outer")}
    assert made_again.grids.keys() == made.grids.keys()
    for layer, grid in made.grids.items():
        assert made_again.grids[layer].keys() == grid.keys()
        assert all(torch.equal(made_again.grids[layer][role], values) for role, values in grid.items())
    assert not list((tmp_path / "states").iterdir())


MIXED = {
    "stem": Precision(Storage("vector", 2, PerChannel()), Compute.FP32),
    "inner": Precision(Storage("codebook", 3, PerTensor()), Compute.INT8),
    "outer": FP32,
    "head": Precision(Storage("int", 4, PerGroup(16)), Compute.INT8),
}


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_compressed_network_has_its_norms_folded_and_its_weights_on_their_grids(epochs: int, tmp_path: Path) -> None:
    """What is written is then what was trained and scored, with or without fine-tuning."""
    with opened("convolutions", tmp_path, epochs=epochs) as bench:
        policy = completed(Policy(MIXED, {"inner": 16}), bench.graph, bench.target)
        made = bench.compressed(policy)
        largest = bench.largest
    assert not any(isinstance(part, nn.BatchNorm2d) for part in made.model.modules())
    assert made.grids.keys() == MIXED.keys() - {"outer"}
    before = {key: tensor.clone() for key, tensor in made.model.state_dict().items()}
    put_on(made.model, policy.precisions, made.grids, largest=largest)
    after = made.model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    for layer, most in {"stem": 256 * 4, "inner": 8}.items():
        scale = made.grids[layer]["scale"].flatten()
        steps = made.model.get_parameter(f"{layer}.weight").flatten(1) / scale[:, None]
        assert len(steps.round().unique()) <= most
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)  # whole steps, but for a 32-bit division


THREE_BITS = Precision(Storage("int", 3, PerTensor()), Compute.FP32)


def post_trained(folder: Path, steps: Sequence[str], keep: Mapping[str, int]) -> tuple[nn.Module, float]:
    """The network at three bits without fine-tuning, and how far its outputs are from the same one in fp32."""
    with opened("convolutions", folder, post_training=steps) as bench:
        chosen, floats = (
            completed(Policy(dict.fromkeys(bench.graph.layer, precision), keep), bench.graph, bench.target)
            for precision in (THREE_BITS, FP32)
        )
        made, original = bench.compressed(chosen), bench.compressed(floats)
        x = torch.from_numpy(bench.task.example["x"])
        with torch.no_grad():
            return made.model, float((made.model(x) - original.model(x)).square().mean())


def test_each_step_of_post_training_can_be_switched_on_alone(tmp_path: Path) -> None:
    steps = [step for step in POST_TRAINING_STEPS if step != "smooth"]  # no norm is read by Linear here
    alone = {step: post_trained(tmp_path / step, [step], {"inner": 16})[0] for step in steps}
    nearest = post_trained(tmp_path / "none", [], {"inner": 16})[0].state_dict()
    for step, model in alone.items():
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, nearest[name])}
        assert moved, step
        if step == "biases":
            assert all(name.endswith("bias") for name in moved)


@pytest.mark.parametrize("keep", [{}, {"inner": 16}, {"inner": 0}, {STEM: 8}], ids=str)
def test_without_fine_tuning_all_steps_together_come_nearer_to_the_floats(
    keep: Mapping[str, int], tmp_path: Path
) -> None:
    steps = [step for step in POST_TRAINING_STEPS if step != "statistics"]  # it would move what is compared against
    corrected, nearest = (post_trained(tmp_path / str(len(each)), each, keep)[1] for each in (steps, []))
    assert corrected < 0.7 * nearest


def test_statistics_stay_as_they_were_trained_where_no_channel_is_gone(tmp_path: Path) -> None:
    for keep, same in (({}, True), ({"inner": 16}, False)):
        found = []
        for steps in ([], ["statistics"]):
            with opened("convolutions", tmp_path / f"{keep}{steps}", post_training=steps) as bench:
                policy = completed(Policy({}, keep), bench.graph, bench.target)
                found.append(bench.compressed(policy).model.state_dict())
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0]) is same


@pytest.mark.parametrize("best", ["min-max", "percentile", "mse"])
def test_ranges_of_activations_are_those_that_score_best_on_the_search_split(
    best: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened("convolutions", tmp_path) as bench:
        policy = small_policy(bench)
        made = bench.compressed(policy)
        methods = bench.runtime.range_methods
        scores = {method: 80.0 if method == best else 70.0 for method in methods}
        assert best in methods
        monkeypatch.setattr(
            bench.files, "_file", lambda graph, policy, grids, seen, ranges: Exported(ranges.encode(), {})
        )
        monkeypatch.setattr(bench.files, "_score", lambda file: scores[file.data.decode()])
        written = bench.files.write(made.model, policy, made.grids)
        assert written.file.data == best.encode()
        assert written.scores_by_ranges == scores
        assert f"{best} 80.00" in str(written.note)
        monkeypatch.setattr(bench.files, "_score", None)  # journalled: a resumed run scores nothing again
        assert bench.files.write(made.model, policy, made.grids) == written


def test_files_that_were_timed_beside_a_neighbour_tell_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("tokens", tmp_path) as bench:
        monkeypatch.setattr(bench.pricing, "unit", lambda: 2.0)
        policies = [Policy({}, {}), Policy({}, {})]
        times_ms = bench.latencies.times_ms(policies)
        assert times_ms is not None
        assert len(times_ms) == 2
        assert min(times_ms) > 0
        with beside_a_neighbour():
            assert bench.latencies.times_ms(policies) is None


def test_what_is_fastest_is_measured_once_and_can_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("tokens", tmp_path) as bench:
        keep = {group.name: group.total for group in bench.graph.groups}
        found = bench.latencies.fastest_computes(keep)
        assert found.keys() == bench.graph.layer.keys()
        monkeypatch.setattr(bench.latencies, "_timed", None)
        assert bench.latencies.fastest_computes(keep) == found
        policy = Recipe(100, None).policy(bench.space, found)
        assert {name: precision.compute for name, precision in policy.precisions.items()} == found
        made = bench.compressed(policy)
        file = tmp_path / "model.onnx"
        file.write_bytes(bench.files.write(made.model, policy, made.grids).file.data)
        tensors = bench.files.write(made.model, policy, made.grids).file.tensors
        assert bench.runtime.runs_as(file, tensors, threads=1) == {name: str(each) for name, each in found.items()}


def test_integers_are_no_choice_for_a_layer_whose_input_rounds_badly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened("tokens", tmp_path) as bench:
        monkeypatch.setattr(bench.files, "rounding_errors", RoundingErrors({}, {"inner": 0.5, "outer": 1e-6}))
        offered = bench.latencies.computes_allowed
    assert offered["inner"] == (Compute.FP32,)
    assert set(offered["outer"]) == {Compute.FP32, Compute.INT8, Compute.INT8_DYNAMIC}


class OneLargeChannel(nn.Module):
    """A residual stream of which one channel is a thousand times as large as the others, and never looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, CLASSES)
        with torch.no_grad():
            self.stem.bias[0] = 3000.0
            self.inner.weight[:, 0] = 0.0
            self.head.weight[:, 0] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.inner(x)).mean((2, 3)))


def test_an_activation_that_rounds_badly_stays_in_float_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, "one large channel", (OneLargeChannel, (3, 6, 6)))
    monkeypatch.setitem(globals(), "jitter", lambda model: model)  # noise on every weight would let it be looked at
    with opened("one large channel", tmp_path) as bench:
        whole = {group.name: group.total for group in bench.graph.groups}
        int8, floats = (
            completed(Policy(dict.fromkeys(bench.graph.layer, precision), whole), bench.graph, bench.target)
            for precision in (INT8, FP32)
        )
        made = bench.compressed(int8)
        written = bench.files.write(made.model, int8, made.grids)
        assert bench.files.predicted_bytes(int8) == len(written.file.data)
        operators = [node.op_type for node in onnx.load_from_string(written.file.data).graph.node]
        notes = bench.files.notes_on_rounding(int8)
        assert bench.files.notes_on_rounding(floats) == ()
    assert "QuantizeLinear" not in operators[operators.index("Add") : operators.index("Flatten")]
    assert any(note.startswith("Add of inner, stem stays in float: ") for note in notes)
    assert any(note.startswith("what inner reads would be better off in float") for note in notes)


def test_without_integer_layers_there_are_no_ranges_to_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("convolutions", tmp_path) as bench:
        monkeypatch.setattr(bench.files, "_score", None)
        in_floats = Precision(Storage("int", 4, PerChannel()), Compute.FP32)
        policy = completed(Policy(dict.fromkeys(bench.graph.layer, in_floats), {}), bench.graph, bench.target)
        made = bench.compressed(policy)
        written = bench.files.write(made.model, policy, made.grids)
    assert written.scores_by_ranges == {}
    assert written.note is None


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
    """And lie on one grid: in the file they are stored once."""
    with opened("tied", tmp_path, epochs=1) as bench:
        coarse = Precision(Storage("codebook", 2, PerChannel()), Compute.FP32)
        policy = completed(Policy(dict.fromkeys(bench.graph.layer, coarse), {}), bench.graph, HOST)
        made = bench.compressed(policy)
    assert isinstance(made.model, networks.TiedTwice)
    assert made.model.one.weight is made.model.other.weight
    assert all(torch.equal(made.grids["other"][role], values) for role, values in made.grids["one"].items())
