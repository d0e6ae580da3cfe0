"""What a file's outputs are worth, scored on the host by the same function as the PyTorch model's."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hirelc_deploy.errors import UserError

if TYPE_CHECKING:
    from hirelc_deploy.exporters._base import Arrays, Session
    from hirelc_deploy.task import Batch, Task

Outputs = Mapping[str, np.ndarray]
"""Outputs of a whole split by name, each (examples, ...)."""

RESAMPLES = 1000
INTERVAL_PCT = (2.5, 97.5)


@dataclass(frozen=True)
class Comparison:
    """One split, before and after; scores and drop in the task's unit, a positive drop is worse."""

    before: float
    after: float
    drop: float
    drop_ci95: tuple[float, float] | None
    """None where most resamples have no score, since it needs examples of every kind."""
    agreement: float | None
    """Percent of equal decisions; None where outputs are no decisions."""


def outputs(
    run: "Session | Callable[[Arrays], Mapping[str, np.ndarray]]", batches: "Iterable[Batch]"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Outputs by name and targets of a whole split, each (examples, ...).

    Raises UserError if there is no batch, and ValueError if an output does not have one row an example.
    """
    call = run if callable(run) else run.run
    collected: dict[str, list[np.ndarray]] = {}
    targets = []
    for inputs, target in batches:
        for name, output in call(inputs).items():
            if len(output) != len(target):
                raise ValueError(f"output {name} has {len(output)} rows for {len(target)} examples")
            collected.setdefault(name, []).append(output)
        targets.append(target)
    if not targets:
        raise UserError("the split has no examples", fix="give it at least one, or leave the split out")
    return {name: np.concatenate(arrays) for name, arrays in collected.items()}, np.concatenate(targets)


def side_by_side(
    sessions: "Mapping[str, Session]", batches: "Iterable[Batch]"
) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
    """Outputs of a split by session and name, and its targets; the split is read once.  Raises as `outputs`."""

    def run_all(inputs: "Arrays") -> dict[str, np.ndarray]:
        return {
            f"{number}/{name}": array
            for number, session in enumerate(sessions.values())
            for name, array in session.run(inputs).items()
        }

    names = list(sessions)
    together, targets = outputs(run_all, batches)
    apart: dict[str, dict[str, np.ndarray]] = {which: {} for which in sessions}
    for key, array in together.items():
        number, _, name = key.partition("/")
        apart[names[int(number)]][name] = array
    return apart, targets


def compare(task: "Task", before: Outputs, after: Outputs, targets: np.ndarray, seed: int) -> Comparison:
    """Score two models' outputs on the same examples.  Raises UserError if a score is not a finite number."""
    was, now = (score_of(task, name, o, targets) for name, o in (("original", before), ("compressed", after)))
    interval = paired_interval(task, before, after, targets, seed)
    return Comparison(was, now, task.drop(was, now), interval, task.agreement(before, after))


def paired_interval(
    task: "Task", before: Outputs, after: Outputs, targets: np.ndarray, seed: int
) -> tuple[float, float] | None:
    """The 95 % interval of the drop, by a paired bootstrap: a resample draws the same examples for both.

    What two models have in common (hard examples, above all) cancels, so it is far narrower than two intervals.  None
    unless most of the resamples have a score.
    """
    random = np.random.default_rng(seed)
    drops = []
    for _ in range(RESAMPLES):
        picks = random.integers(len(targets), size=len(targets))
        try:
            was, now = (task_score(task, _rows(each, picks), targets[picks]) for each in (before, after))
        except UserError:  # a score may need examples of every kind
            continue
        drops.append(task.drop(was, now))
    finite = [drop for drop in drops if math.isfinite(drop)]
    if len(finite) <= RESAMPLES / 2:
        return None
    lo, hi = np.percentile(finite, INTERVAL_PCT).tolist()
    return lo, hi


def _rows(arrays: Outputs, picks: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array[picks] for name, array in arrays.items()}


def task_score(task: "Task", of: Outputs, targets: np.ndarray) -> float:
    """What the task says of outputs.  Raises UserError, with the words of whatever the user's code raised."""
    try:
        return float(task.score(of, targets))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the task's score fails: {type(error).__name__}: {error}",
            fix="it is called with outputs by name and targets, both as arrays, and returns one number",
        ) from error


def score_of(task: "Task", name: str, of: Outputs, targets: np.ndarray) -> float:
    """What the task says of the outputs of the `name` model.  Raises UserError unless it is a finite number."""
    score = task_score(task, of, targets)
    if not math.isfinite(score):
        raise UserError(
            f"the {name} model's score is {score}",
            fix="do its outputs hold NaN or infinity? keep the layers that overflow in fp32, or mend the task's score",
        )
    return score
