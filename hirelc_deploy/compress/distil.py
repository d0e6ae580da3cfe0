"""Fine-tuning after compression: the small network learns the outputs of the original one.

The original's outputs on the train split are computed once and kept, so that an epoch costs what the small
network costs.  A run that is killed goes on at its last checkpoint and ends with the same weights.
"""

import io
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hirelc_deploy.compress.batchnorm import NORMS
from hirelc_deploy.compress.simulate import Simulation, StoredWeight
from hirelc_deploy.errors import UserError
from hirelc_deploy.graph import forward
from hirelc_deploy.layout import channels_last
from hirelc_deploy.task import LEAST_VARIANCE, Batches, Inputs, Task

LOSS_TAKES = "it is called with outputs by name and targets, both as tensors, and returns the mean over the batch"

CACHE_BYTES = 1 << 30
"""Outputs of the original up to this size, of all views together, are kept in memory; others are computed in every
step."""

CHECKPOINT_SECONDS = 30.0
"""What a killed run loses at most."""

WARM_UP = 0.1
"""Part of the steps in which the rate rises."""


@dataclass(frozen=True)
class FineTuning:
    """How to fine-tune.  The same settings, seed and threads give the same weights."""

    epochs: int
    seed: int = 0
    rate: float = 1.5e-3
    """Peak of Adam's rate, in batches of RATE_BATCH, for a network as wide as the original whose outputs are wrong
    altogether (`peak_rate`)."""
    weight_decay: float = 1e-4
    task_weight: float = 0.5
    """Weight of the task's own loss beside the distance to the original's outputs."""


SETTLED = 0.25
"""Part of the steps, the last ones, in which BatchNorm no longer follows the batches."""


LEAST_RATE, MOST_RATE = 2.5e-4, 8e-3
"""A peak is between these, in batches of RATE_BATCH."""

RATE_BATCH = 32
"""The batches that rates were found with; in others they grow with the root."""

LOOKED_AT = 512
"""Examples from which it is told how far a network is from the original."""


def peak_rate(rate: float, distance: float, kept: float, batch: int) -> float:
    """The peak of Adam's rate for a network this far from the original, with this part of its parameters.

    In proportion to the error that is to be mended, the root of the mean squared one, and to the width of what is left:
    a step of Adam moves every weight by as much, so that a sum over fewer of them moves less (as in muP, arXiv
    2203.03466).  And to the root of the batch, whose gradient is the surer the larger it is (arXiv 2205.10287).
    docs/fine-tuning.md has the measurements.
    """
    told = min(max(LEAST_RATE, rate * math.sqrt(distance / kept)), MOST_RATE)  # the least if the distance is NaN
    return told * math.sqrt(batch / RATE_BATCH)


class Checkpoints(Protocol):
    """Where an unfinished fine-tuning lies; `hirelc_deploy.rundir.RunFolder` is one."""

    def save_state(self, name: str, data: bytes) -> None: ...

    def load_state(self, name: str) -> bytes | None: ...

    def drop_state(self, name: str) -> None: ...


class Teacher:
    """Outputs of the original network on the train split, by view and position; computed once where they fit.

    Raises UserError if no output is made of floats.
    """

    def __init__(self, model: nn.Module, train: Batches, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._model = model.eval()
        self._train = train
        self._cache_bytes = cache_bytes
        self.parameters = parameters_of(model)
        self._kept: dict[int, dict[str, Tensor] | None] = {}
        self._variance: dict[str, float] = {}
        self._read()

    def outputs(self, positions: np.ndarray, inputs: Inputs, *, view: int = 0) -> dict[str, Tensor]:
        """What the original says of these examples, which are `inputs` in this view."""
        if view not in self._kept:
            self._kept[view] = self._all_of(view)
        kept = self._kept[view]
        if kept is not None:
            return {name: each[positions] for name, each in kept.items()}
        return self._run(inputs)

    def distance(self, outputs: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> Tensor:
        """Mean squared difference in units of the original's variance, averaged over the outputs.

        Matching logits in this way does as well as matching softened probabilities, and needs no temperature
        (Kim et al., 2021); and it means something for every task.  Outputs that are integers have no distance.
        """
        terms = [F.mse_loss(outputs[name], original[name]) / variance for name, variance in self._variance.items()]
        return torch.stack(terms).mean()

    def _read(self) -> None:
        """One pass over the split as it is: the variance of every output, and the outputs themselves where they fit."""
        moments: dict[str, _Moments] = {}
        kept: dict[str, Tensor] | None = None
        start = 0
        for inputs, target in self._train:
            outputs = self._run(inputs)
            if start == 0:
                moments = {name: _Moments() for name, output in outputs.items() if output.is_floating_point()}
                kept = self._room_for(outputs)
            for name, seen in moments.items():
                seen.add(outputs[name])
            _put(kept, start, outputs)
            start += len(target)
        if not moments:
            raise UserError(
                "the model's outputs are integers, which cannot be approached step by step",
                fix="let it return what they are made from (logits), or export without fine-tuning: --epochs 0",
            )
        self._variance = {name: max(seen.variance, LEAST_VARIANCE) for name, seen in moments.items()}
        self._kept[0] = kept

    def _all_of(self, view: int) -> dict[str, Tensor] | None:
        """The outputs of the split in another view; None if they do not fit beside those that are kept."""
        first = self._kept[0]
        kept = None if first is None else self._room_for(first)
        if kept is None:
            return None
        start = 0
        for inputs, target in self._train.viewed(view):
            _put(kept, start, self._run(inputs))
            start += len(target)
        return kept

    def _room_for(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Empty tensors for one view more of the whole split, told from some outputs; None if that is too much."""
        examples = self._train.examples
        room = {name: (examples, *output.shape[1:]) for name, output in outputs.items()}
        size_bytes = sum(math.prod(room[name]) * output.element_size() for name, output in outputs.items())
        if (len(self._kept) + 1) * size_bytes > self._cache_bytes:
            return None
        return {name: output.new_empty(room[name]) for name, output in outputs.items()}

    @torch.no_grad()
    def _run(self, inputs: Inputs) -> dict[str, Tensor]:
        return forward(self._model, as_tensors(inputs))


def _put(kept: dict[str, Tensor] | None, start: int, outputs: Mapping[str, Tensor]) -> None:
    """A batch's outputs to where they belong, if they are kept."""
    for name, each in (kept or {}).items():
        each[start : start + len(outputs[name])] = outputs[name]


class _Moments:
    """The variance of values that come in batches, in float64, where the squares of a long sum keep their digits."""

    def __init__(self) -> None:
        self._count = 0
        self._sum = 0.0
        self._squares = 0.0

    def add(self, values: Tensor) -> None:
        wide = values.double()
        self._count += wide.numel()
        self._sum += wide.sum().item()
        self._squares += wide.square().sum().item()

    @property
    def variance(self) -> float:
        return self._squares / self._count - (self._sum / self._count) ** 2


def loss_of(task: Task, outputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
    """What the task says of a batch.  Raises UserError, with the words of whatever the user's code raised."""
    try:
        loss = task.loss(outputs, target)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the task's loss fails: {type(error).__name__}: {error}", fix=LOSS_TAKES) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise UserError(f"the task's loss returns {shape}", fix=LOSS_TAKES)
    return loss


def distil(
    student: nn.Module,
    teacher: Teacher,
    task: Task,
    simulation: Simulation,
    settings: FineTuning,
    *,
    settle: Callable[[], None] = lambda: None,
    checkpoints: Checkpoints,
    name: str,
    advance: Callable[[str], None] = lambda detail: None,
) -> None:
    """Train `student` in place, under its simulated formats, towards the original and the task's targets.

    Of augmented examples every epoch shows another view, and the original is asked about that view.

    For the last SETTLED part of the steps BatchNorm uses its statistics, which `settle` estimates once before: what
    is trained then are the very numbers that are stored.  How fast it learns follows from how far it is from the
    original (`peak_rate`).  `name` tells this fine-tuning's checkpoint from others';
    `advance` is called after each epoch, those that a checkpoint holds included.  Raises UserError if the loss is not
    finite, or if no parameter may be trained.
    """
    of_grids = _of_grids(student)
    if not any(parameter.requires_grad and id(parameter) not in of_grids for parameter in student.parameters()):
        raise UserError(
            "no parameter of the model may be trained: requires_grad is False for all",
            fix="let the factory return a model that can be fine-tuned, or export without fine-tuning: --epochs 0",
        )
    steps_per_epoch = math.ceil(task.train.examples / task.train.batch)
    steps = settings.epochs * steps_per_epoch
    settled_from = round((1 - SETTLED) * steps)
    state = checkpoints.load_state(name)
    rate = settings.rate  # a checkpoint holds the one that it began with
    if state is None:
        kept = parameters_of(student) / teacher.parameters
        distance = distance_of(student, teacher, task.train, settings.seed)
        rate = peak_rate(rate, distance, kept, task.train.batch)
    optimizer = torch.optim.AdamW(_groups(student, settings.weight_decay), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    held = _Held(student, simulation, optimizer, schedule)
    with torch.random.fork_rng():  # dropout draws from torch's own generator
        channels_last(student, as_tensors(task.example))
        torch.manual_seed(settings.seed)
        done = held.restore(state)
        for _ in range(done // steps_per_epoch):
            advance("from the checkpoint")
        saved = time.monotonic()
        for step, view, (positions, inputs, target) in _steps(task.train, settings, done, steps_per_epoch):
            if step == settled_from:
                simulation.train(False)  # as it is after a checkpoint was read: a resumed run ends the same
                settle()
            student.train()
            if step >= settled_from:
                _hold_statistics(student)
            simulation.train(True)
            outputs = forward(student, as_tensors(inputs))
            original = teacher.outputs(positions, inputs, view=view)
            loss = teacher.distance(outputs, original) + settings.task_weight * loss_of(
                task, outputs, torch.from_numpy(target)
            )
            if loss.grad_fn is None:
                raise UserError(
                    "the loss does not depend on any weight in a way that can be followed",
                    fix="does forward run under torch.no_grad? take it out, or export without fine-tuning: --epochs 0",
                )
            if not torch.isfinite(loss):
                raise UserError(
                    f"the loss is {loss.item()} after {step} steps of fine-tuning",
                    fix="does the model give finite outputs on the train data? --epochs 0 exports without fine-tuning",
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                checkpoints.save_state(name, held.dump(step + 1))
                saved = time.monotonic()
            if (step + 1) % steps_per_epoch == 0:
                advance(f"loss {loss.item():.3f}")
    simulation.train(False)
    student.eval()


def parameters_of(model: nn.Module) -> int:
    """Entries of all parameters but those of number formats."""
    of_grids = _of_grids(model)
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in of_grids)


@torch.no_grad()
def distance_of(student: nn.Module, teacher: Teacher, train: Batches, seed: int) -> float:
    """How far a network is from the original on some train examples, in units of the outputs' variance."""
    student.eval()
    distances, seen = [], 0
    for positions, inputs, target in train.shuffled(seed, 0):
        outputs = forward(student, as_tensors(inputs))
        distances.append(teacher.distance(outputs, teacher.outputs(positions, inputs)).item())
        seen += len(target)
        if seen >= LOOKED_AT:
            break
    return sum(distances) / len(distances)


def as_tensors(inputs: Inputs) -> dict[str, Tensor]:
    """A batch's inputs as tensors that share memory with the arrays."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}


def _steps(
    train: Batches, settings: FineTuning, done: int, steps_per_epoch: int
) -> Iterator[tuple[int, int, tuple[np.ndarray, Inputs, np.ndarray]]]:
    """All steps from number `done` on, with the view that they see of their examples.

    The order of each epoch is drawn from the seed and its number alone.
    """
    first = done // steps_per_epoch  # epochs before it are not read again
    for epoch in range(first, settings.epochs):
        view = train.view_of(epoch)
        batches = train.shuffled(settings.seed, epoch, view=view)
        for step, batch in enumerate(batches, start=epoch * steps_per_epoch):
            if step >= done:
                yield step, view, batch


def _rate(step: int, steps: int) -> float:
    """Share of the peak rate: a linear rise, then half a cosine."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights decay; biases, the scales of norms and number grids do not."""
    of_grids = _of_grids(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    decaying = [p for p in trained if p.dim() > 1 and id(p) not in of_grids]
    others = [p for p in trained if p.dim() <= 1 or id(p) in of_grids]
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _of_grids(model: nn.Module) -> set[int]:
    """Identities of the parameters of number formats, which are trained but are no weights of the model."""
    return {id(p) for module in model.modules() if isinstance(module, StoredWeight) for p in module.parameters()}


def _hold_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, NORMS):
            module.eval()


class _Held:
    """Everything that the next step depends on."""

    def __init__(
        self,
        model: nn.Module,
        simulation: Simulation,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
    ) -> None:
        self._parts: dict[str, Any] = {
            "model": model,
            "ranges": simulation,
            "optimizer": optimizer,
            "schedule": schedule,
        }

    def dump(self, step: int) -> bytes:
        buffer = io.BytesIO()
        state = {name: part.state_dict() for name, part in self._parts.items()}
        torch.save({**state, "step": step, "random": torch.get_rng_state()}, buffer)
        return buffer.getvalue()

    def restore(self, data: bytes | None) -> int:
        """The number of steps that were already done."""
        if data is None:
            return 0
        state = torch.load(io.BytesIO(data), weights_only=True)
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        return int(state["step"])
