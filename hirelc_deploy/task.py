"""What a network is for: data in three splits, a loss and a score.

The user's side of the contract.  `Classification` is ready made; any other task is a subclass of `Task` with a
`loss` and a `score` of its own.  A model's inputs and outputs are mappings of name to array everywhere; a model
that returns one tensor has one output, called `output`.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hirelc_deploy.batches import VIEWS, Augment, Batches
from hirelc_deploy.errors import UserError
from hirelc_deploy.sources import ArraySource, Batch, DatasetSource, Inputs, MapDataset, Source

__all__ = [
    "BATCH",
    "LEAST_VARIANCE",
    "VIEWS",
    "ArraySource",
    "Augment",
    "Batch",
    "Batches",
    "Classification",
    "DatasetSource",
    "Inputs",
    "MapDataset",
    "Source",
    "Task",
    "check_labels",
    "stratified_holdout",
]

T = TypeVar("T")

BATCH = 128
EXAMPLE = 8  # examples in `Task.example`: more than one shows that the batch axis is free, many make a trace slow
SEARCH_FRACTION = 0.1

LEAST_VARIANCE = 1e-12
"""Of an output that is constant."""


def stratified_holdout(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut off `fraction` of every class of `labels` (N,): the indices kept and those held out, each ascending."""
    random = np.random.default_rng(seed)
    held = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        held.append(random.permutation(members)[: round(fraction * len(members))])
    held_out = np.sort(np.concatenate(held))
    kept = np.setdiff1d(np.arange(len(labels)), held_out)
    return kept, held_out


class Task(ABC):
    """Data, a loss and a score.  Subclasses give `loss` and `score`, and `unit` and `higher_is_better` if need be.

    Without a search split of its own a task cuts SEARCH_FRACTION of the train data, with `seed`, and says so in
    `search_seen_in_training`: the network was trained on those examples.  The test split is read by nobody but the
    one who iterates `test`.

    `augment` changes train examples for fine-tuning, as the network's own training did (`hirelc_deploy.augment` has
    some for images): the original is asked about the very examples that the small network is shown.
    """

    spec: str = ""
    """What the user wrote behind --data."""
    unit: str = "%"
    higher_is_better: bool = True

    def __init__(
        self,
        train: Source,
        test: Source,
        search: Source | None = None,
        *,
        augment: Augment | None = None,
        batch: int = BATCH,
        seed: int = 0,
    ) -> None:
        for name, source in (("train", train), ("test", test), ("search", search)):
            if source is not None and len(source) == 0:
                raise UserError(f"the {name} split is empty", fix="give it at least one example")
        labels = self.labels(train)
        self.search_seen_in_training = search is None
        kept, held_out = (
            self.holdout(train, seed) if search is None else (np.arange(len(train)), np.arange(len(search)))
        )
        if not len(held_out):
            raise UserError(
                f"{len(train)} train examples are too few to cut a search split of {SEARCH_FRACTION:.0%} from",
                fix="bring a search split (x_search and y_search, or a folder search/) or more data",
            )
        self.train = Batches("train", train, batch, kept, labels, augment)
        self.search = Batches("search", train if search is None else search, batch, held_out, labels)
        self.test = Batches("test", test, batch, np.arange(len(test)), labels)

    @abstractmethod
    def loss(self, outputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """What fine-tuning lowers, a scalar: the mean over the batch."""

    @abstractmethod
    def score(self, outputs: Mapping[str, np.ndarray], targets: np.ndarray) -> float:
        """How good the outputs of a whole split are, in `unit`."""

    def agreement(self, a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float | None:
        """How often two models decide alike, in percent; None where outputs are no decisions."""
        return None

    def divergence(self, outputs: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> float:
        """How far a model's outputs are from the original's, 0 where they are the same, on the same examples.

        The mean square of the difference in units of the original's variance, averaged over outputs of floats.
        """
        floats = [name for name, each in original.items() if each.is_floating_point()]
        if not floats:
            raise UserError(
                "the model's outputs are integers, which are near one another or not",
                fix="let it return what they are made from (logits)",
            )
        terms = [
            F.mse_loss(outputs[n], original[n]) / original[n].var(correction=0).clamp(min=LEAST_VARIANCE)
            for n in floats
        ]
        return float(torch.stack(terms).mean())

    def holdout(self, train: Source, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The train examples that stay and those that become the search split: a plain random cut."""
        return stratified_holdout(np.zeros(len(train)), SEARCH_FRACTION, seed)

    def labels(self, train: Source) -> frozenset[int] | None:
        """The labels that may occur in any split; None where targets are not labels."""
        return None

    def drop(self, before: float, after: float) -> float:
        """What a score lost from `before` to `after`, in `unit`; positive is worse, whatever the direction."""
        return before - after if self.higher_is_better else after - before

    @cached_property
    def example(self) -> Inputs:
        """The inputs of the first EXAMPLE train examples."""
        return self.train.take(np.arange(min(EXAMPLE, self.train.examples)))[0]

    def fingerprint(self) -> str:
        """SHA-256 of the settings, the train and search data, and the header of the test data, which stays unread."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode())
        for part, (inputs, target) in self._told_apart_by():
            for name, array in (*sorted(inputs.items()), ("target", target)):
                digest.update(f"{part}.{name}:{array.dtype}{list(array.shape)}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _told_apart_by(self) -> Iterator[tuple[str, Batch]]:
        """The train and search data, and what an augmentation makes of some examples."""
        for batches in (self.train, self.search):
            for batch in batches:
                yield batches.split, batch
        if self.train.augment is not None:
            few = np.arange(min(EXAMPLE, self.train.examples))
            for view in range(1, VIEWS):
                yield f"view {view}", self.train.take(few, view=view)

    def _settings(self) -> dict[str, Any]:
        return {
            "task": type(self).__qualname__,
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
            "search_seen_in_training": self.search_seen_in_training,
            "batch": self.train.batch,
            "test": self.test.source.header(),
        }


class Classification(Task):
    """One label an example, 0 to classes - 1; scored by accuracy in percent.

    Logits are (N, classes) or (N, classes, ...), targets (N,) or (N, ...) of integers.  `output` names the logits of
    a model with several outputs; by default `logits` if there is one, otherwise the first.
    """

    def __init__(
        self,
        train: Source,
        test: Source,
        search: Source | None = None,
        *,
        output: str | None = None,
        augment: Augment | None = None,
        batch: int = BATCH,
        seed: int = 0,
    ) -> None:
        super().__init__(train, test, search, augment=augment, batch=batch, seed=seed)
        self.output = output

    def loss(self, outputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self._logits(outputs), target.long())

    def score(self, outputs: Mapping[str, np.ndarray], targets: np.ndarray) -> float:
        """Percent of targets that have the highest logit."""
        return float(100 * np.mean(self._logits(outputs).argmax(1) == targets))

    def agreement(self, a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
        """Percent of equal decisions."""
        return float(100 * np.mean(self._logits(a).argmax(1) == self._logits(b).argmax(1)))

    def divergence(self, outputs: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> float:
        """Kullback-Leibler divergence of the classes' probabilities, in nats an example."""
        now, before = (F.log_softmax(self._logits(each), 1) for each in (outputs, original))
        return float(F.kl_div(now, before, reduction="none", log_target=True).sum(1).mean())

    def holdout(self, train: Source, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """A cut with the same share of every class, where an example has one label."""
        if train.targets.ndim > 1:
            return super().holdout(train, seed)
        return stratified_holdout(train.targets, SEARCH_FRACTION, seed)

    def labels(self, train: Source) -> frozenset[int]:
        """Those of the train data.  Raises UserError unless they are integers from 0."""
        return _labels(train.targets)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "output": self.output}

    def _logits(self, outputs: Mapping[str, T]) -> T:
        return outputs[self.output_name(outputs)]

    def output_name(self, outputs: Mapping[str, Any]) -> str:
        """Which of a model's outputs holds the logits.  Raises UserError if none has the name that was given."""
        name = self.output or ("logits" if "logits" in outputs else next(iter(outputs)))
        if name not in outputs:
            raise UserError(
                f"the model has no output {name!r}", fix=f"name one of its outputs: {', '.join(sorted(outputs))}"
            )
        return name


def _labels(targets: np.ndarray) -> frozenset[int]:
    if not np.issubdtype(targets.dtype, np.integer):
        raise UserError(
            f"the train labels are {targets.dtype}, not integers",
            fix="store class numbers, y.astype('int64'); for another kind of target write a Task: FILE.py:callable",
        )
    if targets.min() < 0:
        example = int(np.flatnonzero(targets.reshape(len(targets), -1).min(axis=1) < 0)[0])
        raise UserError(
            f"the train data has the label {targets.min()} (example {example})",
            fix="number the classes from 0, and leave out examples without a class",
        )
    return frozenset(np.unique(targets).tolist())


def check_labels(task: Classification, classes: int) -> None:
    """Raises UserError if a train or search label has no place among the model's `classes` outputs.

    The test labels are held against those of train when they are read.
    """
    for batches in (task.train, task.search):
        outside = batches.targets >= classes
        if outside.any():
            example = int(np.flatnonzero(outside.reshape(len(outside), -1).any(axis=1))[0])
            raise UserError(
                f"the {batches.split} data has the label {batches.targets.max()}, and the model has {classes} outputs, "
                f"0 to {classes - 1} (first in example {batches.indices[example]})",
                fix="is it the model of this data? classes are numbered from 0",
            )
