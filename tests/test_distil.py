"""Fine-tuning: nearer to the original, the same weights however often it was killed, and no number that is not one."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hirelc_deploy.augment import images
from hirelc_deploy.compress import distil as module
from hirelc_deploy.compress.batchnorm import reestimate
from hirelc_deploy.compress.distil import (
    LEAST_RATE,
    MOST_RATE,
    RATE_BATCH,
    FineTuning,
    Teacher,
    as_tensors,
    distance_of,
    distil,
    parameters_of,
    peak_rate,
)
from hirelc_deploy.compress.fold import fold
from hirelc_deploy.compress.grids import fitted, put_on
from hirelc_deploy.compress.simulate import Simulation, StoredWeight, simulated
from hirelc_deploy.errors import UserError
from hirelc_deploy.graph import forward
from hirelc_deploy.graph.trial import relative_error
from hirelc_deploy.policy import INT8, Compute, PerChannel, Precision, Storage
from hirelc_deploy.task import ArraySource, Classification, Task

EXAMPLES = 44
BATCH = 16
STEPS_PER_EPOCH = 3  # of 15, 15 and 14 examples
SETTINGS = FineTuning(epochs=2, seed=5, rate=5e-3)
STEPS = SETTINGS.epochs * STEPS_PER_EPOCH
PRECISIONS = {"conv": INT8, "head": INT8}
NORMS = {"conv": "norm"}
LARGEST = 63

# The same products, summed in another order where an example lies elsewhere in its batch, over a few steps of Adam.
BATCH_TOLERANCE = 1e-4

# The same products of 32-bit floats, with the norm before the sum or behind it.
EXACT = 1e-6

# An activation that lies between two steps of its grid, and is rounded the other way.
ONE_STEP_APART = 1e-3


class KilledError(Exception):
    """In the place of a SIGKILL."""


class Memory:
    """Checkpoints as they would lie on disk; from `saves` on, saving kills."""

    def __init__(self, saves: float = float("inf")) -> None:
        self.states: dict[str, bytes] = {}
        self.left = saves

    def save_state(self, name: str, data: bytes) -> None:
        self.states[name] = data
        self.left -= 1
        if self.left <= 0:
            raise KilledError

    def load_state(self, name: str) -> bytes | None:
        return self.states.get(name)

    def drop_state(self, name: str) -> None:
        self.states.pop(name, None)


class Small(nn.Module):
    """Everything that a checkpoint has to hold: BatchNorm's statistics, dropout's draws, ranges, Adam's moments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(input))).flatten(1)))


class Several(Small):
    """Two outputs of floats, one a hundred times the other, and one of integers."""

    def forward(self, input: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(input)
        return {"logits": logits, "large": 100 * logits, "label": logits.argmax(1)}


class Series(Small):
    """The same of a line of sixteen values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4)  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(2))


class Volumes(Small):
    """The same of a volume of one slice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4)  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.unsqueeze(2))


class LabelsOnly(Small):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).argmax(1)


def task() -> Task:
    random = np.random.default_rng(0)
    source = ArraySource(random.normal(size=(EXAMPLES, 1, 4, 4)).astype(np.float32), np.arange(EXAMPLES) % 3)
    return Classification(source, source, source, augment=images("flip", "shift"), batch=BATCH)


def build(kind: type[Small] = Small, seed: int = 0) -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind()
    return model.eval()


def student_of(teacher: nn.Module) -> nn.Module:
    """The original after a blow: what pruning leaves behind."""
    student = copy.deepcopy(teacher)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.2)
    return student


def batches(data: Task) -> Iterator[dict[str, Tensor]]:
    return (as_tensors(inputs) for inputs, _ in data.train)


@contextmanager
def trained(
    teacher: nn.Module,
    student: nn.Module,
    *,
    settings: FineTuning = SETTINGS,
    precisions: Mapping[str, Precision] = PRECISIONS,
    checkpoints: Memory | None = None,
    advance: Callable[[str], None] = lambda detail: None,
    cache_bytes: int = module.CACHE_BYTES,
    settling: Callable[[], None] = lambda: None,
) -> Iterator[Simulation]:
    """The student fine-tuned, still under its number formats; `settling` is called where statistics settle."""
    data = task()
    grids = fitted(student, precisions, {}, largest=LARGEST, norms=NORMS)

    def settle() -> None:
        settling()
        reestimate(student, batches(data))

    with simulated(student, precisions, grids, largest=LARGEST, norms=NORMS) as simulation:
        simulation.calibrate(batches(data))
        distil(
            student,
            Teacher(teacher, data.train, cache_bytes=cache_bytes),
            data,
            simulation,
            settings,
            settle=settle,
            checkpoints=checkpoints or Memory(),
            name="a",
            advance=advance,
        )
        yield simulation


def train(teacher: nn.Module, *, student: nn.Module | None = None, **settings: Any) -> dict[str, Tensor]:
    """Weights, ranges and number grids of a student that was fine-tuned under INT8."""
    student = student or student_of(teacher)
    with trained(teacher, student, **settings) as simulation:
        ranges = {f"range {key}": value for key, value in simulation.state_dict().items()}
        grids = {
            f"grid {layer} {role}": values
            for layer, grid in simulation.weight_grids().items()
            for role, values in grid.items()
        }
    return {**student.state_dict(), **ranges, **grids}


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step."""
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", -1.0)


def distance(student: nn.Module, teacher: nn.Module) -> float:
    inputs = {"input": torch.from_numpy(task().train.source.take(np.arange(EXAMPLES))[0]["input"])}
    with torch.no_grad():
        return float((student.eval()(**inputs) - teacher(**inputs)).square().mean())


def test_the_student_comes_nearer_to_the_original() -> None:
    """On its number grids, since that is what is stored."""
    teacher = build()
    student = student_of(teacher)
    before = distance(student, teacher)
    with trained(teacher, student, settings=FineTuning(epochs=30, task_weight=0.0)) as simulation:
        grids = simulation.weight_grids()
    assert not student.training
    folded = fold(student, NORMS)
    put_on(folded, PRECISIONS, grids, largest=LARGEST)
    assert distance(folded, teacher) < before / 4


def test_the_original_stays_as_it_was() -> None:
    teacher = build()
    before = copy.deepcopy(teacher.state_dict())
    train(teacher)
    assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())
    assert not any(part.training for part in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())


# -- killed and gone on with ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("saves", range(1, STEPS + 1))
def test_killed_after_any_step_it_ends_with_the_same_weights(saves: int) -> None:
    undisturbed = train(build())
    checkpoints = Memory(saves)
    with pytest.raises(KilledError):
        train(build(), checkpoints=checkpoints)
    checkpoints.left = float("inf")
    resumed = train(build(), checkpoints=checkpoints)
    assert resumed.keys() == undisturbed.keys()
    for key, tensor in undisturbed.items():
        assert torch.equal(resumed[key], tensor), key


@pytest.mark.usefixtures("often")
def test_what_was_done_behind_the_last_checkpoint_is_done_again() -> None:
    """And not on top of it, twice in a row."""
    undisturbed = train(build())
    checkpoints = OneMore()
    for _ in range(2):
        checkpoints.left = 1
        with pytest.raises(KilledError):
            train(build(), checkpoints=checkpoints, advance=killing_after_an_epoch())
    resumed = train(build(), checkpoints=checkpoints)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in undisturbed.items())


class OneMore(Memory):
    """The disk takes one more checkpoint; those behind it never get there."""

    def save_state(self, name: str, data: bytes) -> None:
        if self.left > 0:
            self.states[name] = data
        self.left -= 1


def killing_after_an_epoch() -> Callable[[str], None]:
    def advance(detail: str) -> None:
        raise KilledError

    return advance


@pytest.mark.usefixtures("often")
def test_a_run_that_goes_on_does_only_what_is_left_and_shows_all_epochs() -> None:
    checkpoints = Memory(4)
    with pytest.raises(KilledError):
        train(build(), checkpoints=checkpoints)
    checkpoints.left = float("inf")
    student, steps, told = student_of(build()), [], list[str]()
    student.register_forward_pre_hook(lambda model, _: steps.append(1) if model.training else None)
    train(build(), checkpoints=checkpoints, student=student, advance=told.append)
    assert len(steps) == STEPS - 4
    assert len(told) == SETTINGS.epochs


@pytest.mark.usefixtures("often")
def test_epochs_that_are_done_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading is what an epoch costs where images lie in a folder."""
    checkpoints = Memory(STEPS_PER_EPOCH + 1)
    with pytest.raises(KilledError):
        train(build(), checkpoints=checkpoints)
    checkpoints.left = float("inf")
    epochs: list[int] = []
    shuffled = module.Batches.shuffled

    def noted(self: module.Batches, seed: int, epoch: int, *, view: int = 0) -> Any:
        epochs.append(epoch)
        return shuffled(self, seed, epoch, view=view)

    monkeypatch.setattr(module.Batches, "shuffled", noted)
    train(build(), checkpoints=checkpoints)
    assert epochs == [1]


def test_the_rate_grows_with_the_error_that_is_to_be_mended_and_with_narrowness_and_with_the_batch() -> None:
    def rate(distance: float, kept: float, batch: int = RATE_BATCH) -> float:
        return peak_rate(1.5e-3, distance, kept, batch)

    assert rate(1.0, 1.0) == pytest.approx(1.5e-3)
    assert rate(0.25, 1.0) == pytest.approx(0.75e-3)
    assert rate(1.0, 0.25) == pytest.approx(3e-3)
    assert rate(0.0, 1.0) == rate(float("nan"), 1.0) == LEAST_RATE
    assert rate(float("inf"), 0.5) == rate(1.0, 1e-6) == MOST_RATE
    for distance in (0.0, 1.0, float("inf")):
        assert rate(distance, 1.0, 4 * RATE_BATCH) == pytest.approx(2 * rate(distance, 1.0))


def test_how_far_a_network_is_from_the_original() -> None:
    teacher = build()
    known = Teacher(teacher, task().train)
    assert distance_of(build(), known, task().train, seed=0) == pytest.approx(0.0, abs=1e-12)
    student = student_of(teacher)
    with torch.no_grad():
        variance = torch.cat([teacher(**inputs) for inputs in batches(task())]).var(correction=0)
    # batches of 15, 15 and 14 count alike
    wanted = distance(student, teacher) / float(variance)
    assert distance_of(student, known, task().train, seed=0) == pytest.approx(wanted, rel=0.05)
    assert parameters_of(student) == sum(p.numel() for p in teacher.parameters()) == known.parameters


def test_the_seed_alone_decides_and_the_random_state_stays() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = train(build())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = train(build())
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())
    other = train(build(), settings=FineTuning(epochs=2, seed=6, rate=5e-3))
    assert not torch.equal(other["head.weight"], first["head.weight"])


# -- steps and rate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 3])
def test_an_epoch_is_every_example_once(epochs: int) -> None:
    student, sizes, told = student_of(build()), [], list[str]()
    student.register_forward_pre_hook(
        lambda model, args, kwargs: sizes.append(len(kwargs["input"])) if model.training else None, with_kwargs=True
    )
    train(build(), student=student, settings=FineTuning(epochs=epochs), advance=told.append)
    assert sizes == [15, 15, 14] * epochs
    assert len(told) == epochs
    assert all(detail.startswith("loss ") for detail in told)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_the_rate_rises_to_its_peak_and_falls_towards_zero(steps: int) -> None:
    rates = [module._rate(step, steps) for step in range(steps)]
    peak = rates.index(max(rates))
    assert max(rates) == 1
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert peak + 1 <= max(1, module.WARM_UP * steps)
    assert all(0 < rate <= 1 for rate in rates)
    if steps == 100:
        assert rates[0] == pytest.approx(0.1)
        assert rates[-1] < 1e-3


def test_weights_decay_and_biases_norms_and_number_grids_do_not() -> None:
    student = build()
    grids = fitted(student, PRECISIONS, {}, largest=LARGEST, norms=NORMS)
    with simulated(student, PRECISIONS, grids, largest=LARGEST, norms=NORMS):
        decaying, others = module._groups(student, 0.1)
        of_grids = [p for part in student.modules() if isinstance(part, StoredWeight) for p in part.parameters()]
    assert decaying["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert {id(p) for p in decaying["params"]} == {id(student.conv.weight), id(student.head.weight)}
    assert {p.dim() for p in of_grids} == {2}  # so that their shape does not tell them from weights
    assert {id(p) for p in others["params"]} == {
        *map(id, of_grids),
        *(id(p) for p in student.parameters() if p.dim() == 1),
    }


# -- the settled part ----------------------------------------------------------------------------------------


def test_in_the_last_quarter_statistics_are_those_estimated_once_before() -> None:
    """What is folded at the end is then what the weights were trained under, not a mean of what was since left."""
    steps = 4 * STEPS_PER_EPOCH
    settled_from = 9
    student = student_of(build())
    norm = student.get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm2d)
    means: list[Tensor] = []  # of each step's forward pass, before it
    by_batch: list[bool] = []
    settled: list[int] = []

    def note(model: nn.Module, _: Any) -> None:
        if model.training:
            assert norm.running_mean is not None
            means.append(norm.running_mean.clone())
            by_batch.append(norm.training)

    student.register_forward_pre_hook(note)
    after = train(build(), student=student, settings=FineTuning(epochs=4), settling=lambda: settled.append(len(means)))
    assert len(means) == steps
    assert settled == [settled_from]
    assert by_batch == [True] * settled_from + [False] * (steps - settled_from)
    assert all(not torch.equal(one, other) for one, other in pairwise(means[: settled_from + 1]))
    assert all(torch.equal(mean, after["norm.running_mean"]) for mean in means[settled_from:])


SETTLED_CASES = [
    *(
        (Precision(Storage(name, bits, PerChannel()), Compute.FP32), EXACT)
        for name, bits in (("int", 2), ("int", 4), ("float", 4), ("log", 3), ("codebook", 3), ("vector", 2))
    ),
    (INT8, ONE_STEP_APART),
]


@pytest.mark.parametrize(("precision", "tolerance"), SETTLED_CASES, ids=str)
def test_what_was_trained_is_what_is_stored(precision: Precision, tolerance: float) -> None:
    """Weights folded and put on their grids, as the file has them, against the network that was trained."""
    student = student_of(build())
    precisions = dict.fromkeys(PRECISIONS, precision)
    inputs = {"input": torch.from_numpy(task().train.source.take(np.arange(EXAMPLES))[0]["input"])}
    with torch.no_grad():
        started_from = forward(student, inputs)
    with trained(build(), student, precisions=precisions) as simulation, torch.no_grad():
        expected = forward(student, inputs)
        grids, ranges = simulation.weight_grids(), simulation.state_dict()
    folded = fold(student, NORMS)
    put_on(folded, precisions, grids, largest=LARGEST)
    with torch.no_grad(), simulated(folded, precisions, {}, largest=LARGEST) as simulation:
        simulation.load_state_dict(ranges)
        assert relative_error(forward(folded, inputs), expected) < tolerance
    assert relative_error(started_from, expected) > 0.1


@pytest.mark.parametrize("role", ["scale", "book"])
def test_number_grids_are_trained_with_the_weights(role: str) -> None:
    student = student_of(build())
    precisions = dict.fromkeys(PRECISIONS, Precision(Storage("vector", 2, PerChannel()), Compute.FP32))
    before = fitted(student, precisions, {}, largest=LARGEST, norms=NORMS)
    with trained(build(), student, precisions=precisions) as simulation:
        after = simulation.weight_grids()
    for layer in precisions:
        assert not torch.equal(after[layer][role], before[layer][role])
        assert after[layer][role].isfinite().all()


# -- the original's outputs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [0, 2])
def test_kept_outputs_are_those_computed_on_the_fly(view: int) -> None:
    teacher, data = build(Several), task()
    kept, fresh = Teacher(teacher, data.train), Teacher(teacher, data.train, cache_bytes=0)
    for positions, inputs, _ in data.train.shuffled(3, 0, view=view):
        expected = forward(teacher, as_tensors(inputs))
        for outputs in (kept.outputs(positions, inputs, view=view), fresh.outputs(positions, inputs, view=view)):
            assert outputs.keys() == expected.keys()
            for name, output in outputs.items():
                torch.testing.assert_close(output, expected[name].detach())
        outputs = {name: output.detach() + 1 for name, output in expected.items()}
        assert kept.distance(outputs, expected) == fresh.distance(outputs, expected)


def runs_of(teacher: Small, kept: Teacher, data: Task, view: int) -> int:
    """Of the original, while an epoch of this view is read."""
    calls: list[int] = []
    with teacher.register_forward_pre_hook(lambda *_: calls.append(1)):
        for positions, inputs, _ in data.train.shuffled(3, 0, view=view):
            kept.outputs(positions, inputs, view=view)
    return len(calls)


def test_kept_outputs_are_not_computed_again() -> None:
    teacher, data = build(), task()
    kept = Teacher(teacher, data.train)
    assert [runs_of(teacher, kept, data, view) for view in (0, 0, 1, 2, 1, 2)] == [0, 0, *2 * (STEPS_PER_EPOCH,), 0, 0]


def test_what_all_views_take_is_bounded() -> None:
    """Room for two of them: of the third one every batch is asked about when it comes."""
    teacher, data = build(), task()
    kept = Teacher(teacher, data.train, cache_bytes=2 * EXAMPLES * 3 * 4)
    steps = STEPS_PER_EPOCH
    assert [runs_of(teacher, kept, data, view) for view in (1, 2, 1, 2, 0)] == [steps, steps, 0, steps, 0]


def test_every_epoch_shows_another_view() -> None:
    student, shown = student_of(build()), []
    with student.register_forward_pre_hook(
        lambda module, args, kwargs: shown.append((module.training, kwargs["input"].clone())), with_kwargs=True
    ):
        train(build(), student=student)
    trained_on = [inputs for is_training, inputs in shown if is_training]
    for epoch in range(SETTINGS.epochs):
        found = trained_on[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH]
        wanted = task().train.shuffled(SETTINGS.seed, epoch, view=epoch)
        for inputs, (_, expected, _) in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(inputs.numpy(), expected["input"])


def test_training_does_not_depend_on_whether_outputs_fit_in_memory() -> None:
    """The weight between distance and task loss would shift with the variance, if that came from one batch."""
    kept, fresh = train(build()), train(build(), cache_bytes=0)
    for key, tensor in kept.items():
        torch.testing.assert_close(fresh[key], tensor, rtol=BATCH_TOLERANCE, atol=BATCH_TOLERANCE)


def test_each_output_counts_in_units_of_its_own_variance_and_integers_do_not_count() -> None:
    teacher, data = build(Several), task()
    (inputs, _) = data.train.take(np.arange(EXAMPLES))
    with torch.no_grad():
        original = forward(teacher, as_tensors(inputs))
    logits = original["logits"]
    worse = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    expected = (worse - logits).square().mean() / logits.var(correction=0)
    found = Teacher(teacher, data.train)
    for label in (original["label"], 1 - original["label"]):
        outputs = {"logits": worse, "large": 100 * worse, "label": label}
        torch.testing.assert_close(found.distance(outputs, original), expected)
    half = {"logits": worse, "large": original["large"], "label": original["label"]}
    torch.testing.assert_close(found.distance(half, original), expected / 2)


@pytest.mark.parametrize("kind", [Several, Series, Volumes])
def test_models_with_several_outputs_or_other_dimensions_are_trained(kind: type[Small]) -> None:
    before = student_of(build(kind)).state_dict()
    after = train(build(kind))
    assert not torch.equal(after["conv.weight"], before["conv.weight"])
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_an_output_that_never_changes_does_not_divide_by_zero() -> None:
    teacher, data = build(), task()
    nn.init.zeros_(teacher.head.weight)
    found = Teacher(teacher, data.train)
    positions, inputs, _ = next(data.train.shuffled(0, 0))
    original = found.outputs(positions, inputs)
    assert found.distance(original, original) == 0


# -- what cannot be trained ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_at_once(value: float) -> None:
    student = student_of(build())
    with torch.no_grad():
        student.get_parameter("head.bias").fill_(value)
    with pytest.raises(UserError, match="after 0 steps of fine-tuning") as raised:
        train(build(), student=student)
    assert "--epochs 0" in raised.value.fix


def test_outputs_that_are_all_integers_are_refused() -> None:
    with pytest.raises(UserError, match="integers") as raised:
        train(build(LabelsOnly))
    assert "--epochs 0" in raised.value.fix


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(UserError, match="requires_grad") as raised:
        train(build(), student=student_of(build()).requires_grad_(False))
    assert "--epochs 0" in raised.value.fix


def test_frozen_layers_stay_and_the_others_are_trained() -> None:
    student = student_of(build())
    student.get_parameter("conv.weight").requires_grad_(False)
    before = copy.deepcopy(student.state_dict())
    after = train(build(), student=student)
    assert torch.equal(after["conv.weight"], before["conv.weight"])
    assert not torch.equal(after["head.weight"], before["head.weight"])


class WithoutGradients(Small):
    """As models that were only meant for inference have it."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_forward_without_gradients_is_refused() -> None:
    with pytest.raises(UserError, match="in a way that can be followed") as raised:
        train(build(), student=student_of(build(WithoutGradients)))
    assert "--epochs 0" in raised.value.fix
