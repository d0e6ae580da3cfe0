"""From a checkpoint to a judged artifact: every stage real, on networks that take seconds."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import exporting
import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exporting import (
    ESTIMATE,
    DigitNet,
    digits,
    export,
    needs_linux,
    policy_of,
    quick_target,
    random_task,
    relative_error,
    trained_digit_net,
    write_policy,
)
from neighbour import beside_a_neighbour
from torch import Tensor, nn

from hirelc_deploy import graph, verification
from hirelc_deploy.cli import main
from hirelc_deploy.compress.batchnorm import reestimate
from hirelc_deploy.compress.compensate import compensate, moments, staying
from hirelc_deploy.compress.fold import foldable
from hirelc_deploy.compress.importance import scores
from hirelc_deploy.compress.prune import prune
from hirelc_deploy.config import POST_TRAINING_STEPS
from hirelc_deploy.cost.estimate import EstimatedPrices
from hirelc_deploy.cost.kernel import Kernel
from hirelc_deploy.cost.predictor import read_artifacts
from hirelc_deploy.errors import ExitStatus
from hirelc_deploy.exporters._memory import LOAD_LAW
from hirelc_deploy.latencies import Latencies
from hirelc_deploy.policy import FP32, INT8, Policy
from hirelc_deploy.profiles import load_target
from hirelc_deploy.profiles._table import SHARED, read_table, write_table
from hirelc_deploy.task import ArraySource, Batch
from hirelc_deploy.verify import accuracy, manifest as manifests, profiling
from hirelc_deploy.verify.machines import Machine
from hirelc_deploy.verify.profiling import ANCHOR

# Points between the score that the search believed and the file's, both on the search split.
SCORE_TOLERANCE_POINTS = 0.5
LABELS_ALIKE_PCT = 98.5

# Rounding in 32-bit floats over sums of a few hundred products.
FLOAT_TOLERANCE = 1e-4

# A step of an activation's grid that rounds the other way in the file, carried on through a few layers.
INT8_TOLERANCE = 0.05


class Recorded:
    """Every pass over a split: who ran, on which split, and what came out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[tuple[bool, Iterable[Batch], Mapping[str, np.ndarray]]] = []
        outputs = accuracy.outputs

        def recording(run: Any, batches: Any) -> Any:
            result = outputs(run, batches)
            self.passes.append((callable(run), batches, result[0]))
            return result

        monkeypatch.setattr(accuracy, "outputs", recording)

    def on_search(self, task: Any) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
        """Outputs on the search split of the simulated network and of the file: the last that ran is the one kept."""
        simulated = next(outputs for in_torch, batches, outputs in self.passes if in_torch and batches is task.search)
        files = [outputs for in_torch, batches, outputs in self.passes if not in_torch and batches is task.search]
        return simulated, files[-1]


def run_file(folder: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As somebody would who has nothing but the file and ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def layer(outcome: verification.Outcome, name: str) -> manifests.LayerRecord:
    return next(record for record in outcome.manifest.layers if record.name == name)


# What is asked for is what is built


def test_a_recipe_is_made_real(artifact: verification.Outcome, tmp_path: Path) -> None:
    in_floats = export(tmp_path / "out", DigitNet(16), digits(), recipe="keep=25%,compute=fp32")
    for outcome, compute, kept, of in ((artifact, "int8", 12, 24), (in_floats, "fp32", 8, 32)):
        assert (outcome.status, outcome.manifest.verdict) == (ExitStatus.OK, "pass")
        assert (layer(outcome, "down").kept, layer(outcome, "down").of) == (kept, of)
        assert {record.compute for record in outcome.manifest.layers} == {compute}
    assert in_floats.manifest.search.method == "recipe keep=25%,compute=fp32"
    assert artifact.manifest.training == manifests.TrainingRecord(epochs=1, importance="obs")


def test_what_is_fastest_here_is_resolved_before_it_is_a_policy(tmp_path: Path) -> None:
    """Post-training steps are taken on the way, as nothing is fine-tuned, and the predictor learns from the file."""
    target = quick_target(tmp_path)
    settings = {"target": target, "recipe": "keep=50%,compute=fastest", "epochs": 0}
    outcome = export(tmp_path / "out", DigitNet(8), digits(), **settings)
    table = Path(target).with_suffix(".csv")
    assert read_table(table)
    (learned,) = read_artifacts(table)
    assert learned.measured_us > 0
    assert sum(learned.parts_us.values()) > 0
    assert (outcome.status, outcome.manifest.verdict) == (ExitStatus.OK, "pass")
    training = manifests.TrainingRecord(epochs=0, importance="obs", post_training=POST_TRAINING_STEPS)
    assert outcome.manifest.training == training
    computes = {name: str(each.compute) for name, each in policy_of(outcome).precisions.items()}
    assert set(computes.values()) <= {"fp32", "int8", "int8_dynamic"}
    assert {record.name: record.runs_as for record in outcome.manifest.layers} == computes
    assert {record.name: record.compute for record in outcome.manifest.layers} == computes


def test_what_is_timed_beside_a_neighbour_is_said_and_nothing_is_learned_from_it(tmp_path: Path) -> None:
    target = quick_target(tmp_path)
    with beside_a_neighbour():
        outcome = export(tmp_path / "out", DigitNet(8), digits(), target=target, recipe="compute=fastest", epochs=0)
    table = Path(target).with_suffix(".csv")
    assert {row.core for row in read_table(table)} == {SHARED}
    assert read_artifacts(table) == []
    (on_the_table,) = [note for note in outcome.manifest.notes if "table of quick has" in note]
    assert "`hirelc-deploy profile` measures them again" in on_the_table
    assert any("verify measures again" in note for note in outcome.manifest.notes)


@pytest.mark.parametrize("recipe", ["keep=50%,compute=int8", "compute=fastest"])
def test_a_device_that_is_only_estimated_says_so_wherever_its_latency_stands(recipe: str, tmp_path: Path) -> None:
    target = Path(quick_target(tmp_path))
    target.write_text(target.read_text().replace('basis = "measured"', 'basis = "estimate"') + ESTIMATE)
    settings = {"target": str(target), "recipe": recipe, "max_latency_ms": 50.0}
    outcome = export(tmp_path / "out", DigitNet(8), digits(), **settings)
    assert (outcome.status, outcome.manifest.verdict) == (ExitStatus.UNVERIFIED, "unverified")
    measured = outcome.manifest.measured
    assert measured.basis.latency == "estimate"
    assert not any("roofline" in note for note in outcome.manifest.notes_on_measurement), "all of it is estimated"
    assert measured.latency_ms is not None
    assert measured.latency_ms.p50 == pytest.approx(outcome.manifest.predicted.latency_ms)
    estimate = load_target(str(target)).estimate
    assert estimate is not None
    told_ms = LOAD_LAW((outcome.folder / "model.onnx").read_bytes(), anchor_us=EstimatedPrices(estimate)(ANCHOR))
    assert outcome.manifest.predicted.load_ms == pytest.approx(told_ms, rel=0.01), "this machine's speed is no matter"
    assert main(["gate", str(outcome.folder), "--allow-estimates"]) == ExitStatus.OK
    assert main(["gate", str(outcome.folder)]) == ExitStatus.UNVERIFIED
    assert "estimate" in (outcome.folder / "report.html").read_text(encoding="utf-8")
    again = verification.verify(outcome.folder, task=digits())
    assert again.status == ExitStatus.UNVERIFIED
    assert again.manifest.measured.latency_ms == measured.latency_ms, "this machine is not the device"
    assert not target.with_suffix(".csv").exists(), "nothing of this machine is the device's"


@needs_linux
def test_memory_is_told_measured_and_limited(artifact: verification.Outcome) -> None:
    manifest = artifact.manifest
    figures = (manifest.predicted.memory_bytes, manifest.baseline.memory_bytes, manifest.measured.memory_bytes)
    assert all(figure is not None and 10_000 < figure < 1 << 28 for figure in figures)
    assert manifest.error.memory_pct is not None
    loads = (manifest.predicted.load_ms, manifest.baseline.load_ms, manifest.measured.load_ms)
    assert all(figure is not None and figure > 0 for figure in loads)
    assert manifest.error.load_pct is not None
    assert main(["gate", str(artifact.folder), "--max-memory", "256MiB"]) == ExitStatus.OK
    assert main(["gate", str(artifact.folder), "--max-memory", "10KB"]) == ExitStatus.BUDGET_MISSED
    assert "peak memory" in (artifact.folder / "report.html").read_text(encoding="utf-8")


def test_kernels_that_the_table_of_another_cpu_lacks_are_named(tmp_path: Path) -> None:
    here = Path(quick_target(tmp_path))
    settings = {"recipe": "keep=50%,compute=fastest"}
    export(tmp_path / "here", DigitNet(8), digits(), target=str(here), **settings)  # measures what it needs
    there = tmp_path / "there.toml"
    there.write_text(here.read_text() + '\n[cpu]\nflags = ["nowhere"]\n')
    rows = read_table(here.with_suffix(".csv"))
    write_table(there.with_suffix(".csv"), rows)
    outcome = export(tmp_path / "known", DigitNet(8), digits(), target=str(there), **settings)
    assert outcome.status == ExitStatus.UNVERIFIED
    assert not any("roofline" in note for note in outcome.manifest.notes_on_measurement)
    write_table(there.with_suffix(".csv"), [row for row in rows if row.op not in ("Gemm", "ReduceMean")])
    outcome = export(tmp_path / "unknown", DigitNet(8), digits(), target=str(there), **settings)
    (note,) = [note for note in outcome.manifest.notes_on_measurement if "roofline" in note]
    assert "the table of quick lacks" in note
    assert "Gemm" in note


def test_without_limits_integrity_is_judged_and_nothing_is_traded(tmp_path: Path) -> None:
    outcome = export(tmp_path / "out", DigitNet(8), digits())
    assert (outcome.status, outcome.manifest.verdict) == (ExitStatus.OK, "pass")
    assert all(record.kept == record.of for record in outcome.manifest.layers)
    assert {record.compute for record in outcome.manifest.layers} == {"int8"}
    assert {check.name for check in outcome.manifest.checks} >= {"the file loads", "sha256", "layers run as asked"}


def test_an_exported_policy_exported_again_is_the_same_file(artifact: verification.Outcome, tmp_path: Path) -> None:
    """The policy holds all that was decided; and what it does not hold (seed, data, weights) is deterministic."""
    again = export(tmp_path / "again", trained_digit_net(), digits(), policy=artifact.folder / "policy.json", epochs=1)
    assert again.manifest.artifact.sha256 == artifact.manifest.artifact.sha256
    assert (again.folder / "policy.json").read_bytes() == (artifact.folder / "policy.json").read_bytes()
    assert again.manifest.search.method == "policy"


def test_layers_of_a_policy_have_the_precision_and_the_count_that_it_gives_each(tmp_path: Path) -> None:
    policy = Policy({"stem": INT8, "conv1": FP32, "down": INT8}, {"conv1": 6, "down": 10})
    outcome = export(tmp_path / "out", DigitNet(8), digits(), policy=write_policy(tmp_path / "mine.json", policy))
    assert {record.name: (record.kept, record.runs_as) for record in outcome.manifest.layers} == {
        "stem": (8, "int8"),
        "conv1": (6, "fp32"),
        "conv2": (8, "fp32"),
        "down": (10, "int8"),
        "head": (10, "fp32"),
    }
    assert policy_of(outcome).keep == {"conv1": 6, "conv2": 8, "down": 10}  # what was left to the program is said


def test_a_branch_that_keeps_nothing_is_gone_from_the_file(tmp_path: Path) -> None:
    policy = write_policy(tmp_path / "shallow.json", Policy({}, {"conv1": 0}))
    outcome = export(tmp_path / "out", DigitNet(8), digits(), policy=policy)
    assert outcome.status == ExitStatus.OK
    for name in ("conv1", "conv2"):
        record = layer(outcome, name)
        assert (record.kept, record.of, record.weight_bytes, record.tensor) == (0, 8, 0, None)
    names = {value.name for value in onnx.load(outcome.folder / "model.onnx").graph.initializer}
    assert len([name for name in names if name in {record.tensor for record in outcome.manifest.layers}]) == 3


class CountingSource(ArraySource):
    """Remembers how often each example was read."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.reads = np.zeros(len(self), int)

    def take(self, indices: np.ndarray) -> Batch:
        self.reads[indices] += 1
        return super().take(indices)


def by_arithmetic(kernels: Sequence[Kernel], anchor_us: float | None, machine: Machine) -> Any:
    """Instead of `profiling.measure`: the same times on a machine that is busy."""
    device = EstimatedPrices(load_target("raspberry-pi-5").estimate)
    return [profiling.Sample(each, device(each), device(each), 0.0, 1) for each in {*kernels, ANCHOR}], {}


def test_a_search_holds_every_limit_and_never_looks_at_the_test_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each test example is read once, for the file that was chosen, and not again when a finished run is resumed.

    A search ends early where no proposal is both smaller and faster than the original.  Of a network as small as this
    that depends on its weights and on the times of kernels: so both are the same every time.
    """
    monkeypatch.setattr(profiling, "measure", by_arithmetic)
    monkeypatch.setattr(Latencies, "times_ms", lambda self, policies: None)
    task = random_task(source=CountingSource, x=(1, 8, 8))
    short, limits = quick_target(tmp_path, channel_multiple=8), {"max_size_bytes": 10_000, "max_drop": 90.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DigitNet(8)
    outcome = export(tmp_path / "out", model, task, target=short, epochs=1, evaluations=4, **limits)
    manifest = outcome.manifest
    assert (outcome.status, manifest.verdict) == (ExitStatus.OK, "pass")
    assert manifest.measured.size_bytes <= 10_000 < manifest.baseline.size_bytes
    assert {check.name: check.ok for check in manifest.checks}.items() >= {"size_bytes": True, "drop": True}.items()
    assert (manifest.search.method, manifest.search.evaluations) == ("hierarchical", 4)
    assert task.train.source.reads.max() > 1
    assert set(task.test.source.reads) == {1}

    again = export(tmp_path / "out", model, task, target=short, epochs=1, evaluations=4, resume=True, **limits)
    assert set(task.test.source.reads) == {1}
    assert again.manifest.measured == manifest.measured
    assert again.manifest.artifact == manifest.artifact


def test_a_missed_limit_fails_and_the_file_is_written_all_the_same(tmp_path: Path) -> None:
    outcome = export(tmp_path / "out", DigitNet(8), digits(), recipe="keep=50%,compute=int8", max_drop=-200.0)
    assert (outcome.status, outcome.manifest.verdict) == (ExitStatus.BUDGET_MISSED, "fail")
    assert [check.name for check in outcome.manifest.checks if check.ok is False] == ["drop"]
    assert run_file(outcome.folder, digits().example)["output"].shape == (8, 10)


# What was believed is what was measured


def test_the_simulated_network_decides_as_the_file_does(
    artifact: verification.Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(monkeypatch)
    outcome = export(tmp_path / "out", trained_digit_net(), digits(), recipe="keep=75%,compute=int8", epochs=2)
    simulated, file = recorded.on_search(digits())
    assert digits().agreement(simulated, file) >= LABELS_ALIKE_PCT
    manifest = outcome.manifest
    assert manifest.error.accuracy_points is not None
    assert abs(manifest.error.accuracy_points) <= SCORE_TOLERANCE_POINTS
    assert manifest.measured.accuracy_search == pytest.approx(digits().score(file, digits().search.targets), rel=1e-5)
    assert manifest.predicted.size_bytes == manifest.measured.size_bytes


def test_weights_of_few_bits_take_few_bytes_and_compute_what_was_trained(
    artifact: verification.Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(monkeypatch)
    recipe = "storage=codebook3,compute=fp32"
    outcome = export(tmp_path / "out", trained_digit_net(), digits(), recipe=recipe, epochs=2)
    simulated, file = recorded.on_search(digits())
    assert relative_error(file, simulated) < FLOAT_TOLERANCE
    assert {(record.storage, record.runs_as) for record in outcome.manifest.layers} == {("codebook3/channel", "fp32")}
    for name, weights in (("conv1", 12 * 12 * 9), ("conv2", 12 * 12 * 9), ("down", 24 * 12 * 9)):
        record = layer(outcome, name)
        assert record.encoding is not None
        assert record.encoding.startswith("3-bit codes")
        assert record.weight_bytes == weights * 3 / 8 + 2**3 + 4 * record.of  # codes, levels, scales
    assert outcome.manifest.predicted.size_bytes == outcome.manifest.measured.size_bytes
    assert outcome.manifest.measured.compression > 4  # more than int8 could
    assert outcome.manifest.measured.drop_points is not None
    assert outcome.manifest.measured.drop_points < 5


def test_the_file_scores_what_the_manifest_says(artifact: verification.Outcome) -> None:
    measured = artifact.manifest.measured
    for split, said in ((digits().test, measured.accuracy), (digits().search, measured.accuracy_search)):
        outputs, targets = accuracy.outputs(lambda inputs: run_file(artifact.folder, inputs), split)
        assert said == pytest.approx(digits().score(outputs, targets), rel=1e-5)


# Networks of other kinds


def test_behind_a_channel_last_flatten_the_right_columns_stay(tmp_path: Path) -> None:
    """A cut that is consistent but wrong would run, and agree with its own simulation: the original judges it."""
    task = random_task(batch=80, x=(3, 8, 8))  # one batch: statistics of one data set are then the same however taken
    model = networks.build("channel_last").model.eval()
    reestimate(model, (graph.tensors(inputs) for inputs, _ in task.train))  # as the pass will do after its cut
    outcome = export(tmp_path / "out", model, task, recipe="keep=50%,compute=fp32")
    assert {name: layer(outcome, name).kept for name in ("conv1", "conv2", "head")} == {
        "conv1": 4,
        "conv2": 6,
        "head": 5,
    }
    assert any(note.startswith("conv2: ") for note in outcome.manifest.notes)

    traced = graph.trace(model, task.example)
    seen = moments(model, traced, [graph.tensors(inputs) for inputs, _ in task.train])
    norms = foldable(model, graph.tensors(task.example))
    scored = scores(model, traced, "l2") | staying(model, traced, seen, norms)
    kept = prune(model, traced, policy_of(outcome), scored).kept
    silenced = copy.deepcopy(model)
    compensate(silenced, traced, kept, seen, norms)
    with torch.no_grad():
        for channel in set(range(8)) - set(kept["conv1"]):
            silenced.norm1.weight[channel] = silenced.norm1.bias[channel] = 0.0
    inputs = task.test.take(np.arange(5))[0]
    wanted = {name: value.detach().numpy() for name, value in graph.forward(silenced, graph.tensors(inputs)).items()}
    assert relative_error(run_file(outcome.folder, inputs), wanted) < FLOAT_TOLERANCE


def test_a_channel_last_network_in_int8_computes_what_was_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, task = Recorded(monkeypatch), random_task(x=(3, 8, 8))
    export(tmp_path / "out", networks.build("channel_last").model, task, recipe="keep=50%,compute=int8", epochs=1)
    simulated, file = recorded.on_search(task)
    assert relative_error(file, simulated) < INT8_TOLERANCE


class WithoutGradients(nn.Module):
    """Made for inference: torch-pruning, which follows gradients, finds nothing to follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


def test_a_network_that_cannot_be_traced_is_quantised_and_the_user_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = export(tmp_path / "out", WithoutGradients(), random_task(x=(3, 8, 8)), recipe="keep=50%,compute=int8")
    assert [(record.kept, record.of, record.runs_as) for record in outcome.manifest.layers] == [
        (8, 8, "int8"),
        (8, 8, "int8"),
        (5, 5, "int8"),
    ]
    assert outcome.status == ExitStatus.OK
    (note,) = (note for note in outcome.manifest.notes if note.startswith("model: "))
    assert "no channels can be removed" in note
    assert note in capsys.readouterr().err


def test_what_is_in_memory_may_be_called_like_files_that_are_not_there(tmp_path: Path) -> None:
    named = {"model": "nowhere.py:net", "data": "nowhere.py:data"}
    outcome = export(
        tmp_path / "out", nn.Sequential(nn.Linear(4, 5)), random_task(x=(4,)), recipe="compute=fp32", **named
    )
    assert outcome.manifest.model.spec == "nowhere.py:net"


def test_several_inputs_and_nested_outputs_keep_their_names(tmp_path: Path) -> None:
    task = random_task(sound=(4,), x=(3, 8, 8))
    model = networks.build("two_inputs").model
    outcome = export(tmp_path / "out", model, task, recipe="keep=50%,compute=int8", epochs=1)
    assert outcome.status == ExitStatus.OK
    assert layer(outcome, "hear1").kept == 6
    outputs = run_file(outcome.folder, task.test.take(np.arange(3))[0])
    assert {name: array.shape for name, array in outputs.items()} == {"logits": (3, 5), "more.0": (3, 4)}


def test_a_task_with_another_score_is_judged_in_its_unit_and_direction(tmp_path: Path) -> None:
    """The mean error of the regression example, in degrees: more is worse, and a drop is a rise of the error."""
    example = exporting.ROOT / "examples" / "regression"
    outcome = export(
        tmp_path / "out",
        model=f"{example / 'network.py'}:network",
        data=f"{example / 'task.py'}:task",
        checkpoint=example / "checkpoint.safetensors",
        recipe="keep=75%,compute=int8",
        max_drop=0.05,
    )
    measured, baseline = outcome.manifest.measured, outcome.manifest.baseline
    assert outcome.manifest.task.unit == "degrees"
    assert measured.accuracy is not None
    assert baseline.accuracy is not None
    assert measured.accuracy > baseline.accuracy
    assert measured.drop_points == pytest.approx(measured.accuracy - baseline.accuracy, rel=1e-4)
    assert outcome.status == ExitStatus.BUDGET_MISSED
    assert main(["gate", str(outcome.folder), "--max-drop", "40"]) == ExitStatus.OK


def test_a_transformer_of_the_transformers_library(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTForImageClassification(
            ViTConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=8,
                patch_size=4,
                num_labels=5,
            )
        )
    model.save_pretrained(tmp_path / "vit")
    task = random_task(pixel_values=(3, 8, 8))
    outcome = export(tmp_path / "out", task=task, model=f"hf:{tmp_path / 'vit'}", recipe="keep=50%,compute=int8")
    assert outcome.status == ExitStatus.OK
    assert {record.runs_as for record in outcome.manifest.layers} == {"int8"}
    assert outcome.manifest.layers[0].name.endswith("patch_embeddings.projection")
    narrowed = {record.name for record in outcome.manifest.layers if record.kept == 16 and record.of == 32}
    assert len(narrowed) == 2  # the inner width of both MLPs
    heads = {(record.kept, record.of) for record in outcome.manifest.layers if record.name.endswith("k_proj")}
    assert heads == {(8, 16)}  # one of two; the size was told to the byte all the same
    assert outcome.manifest.predicted.size_bytes == outcome.manifest.measured.size_bytes
    assert run_file(outcome.folder, task.test.take(np.arange(3))[0])["logits"].shape == (3, 5)
