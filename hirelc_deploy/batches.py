"""Examples as they are read: in splits, batches and views, and checked."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hirelc_deploy.errors import UserError
from hirelc_deploy.sources import Batch, Inputs, Source

Augment = Callable[[Inputs, np.random.Generator], Inputs]
"""One train example, its inputs without the axis of the batch, changed at random: names, shapes and types stay."""

VIEWS = 8
"""Of an augmented example: as it is, and the others changed.  Few enough for what the original says of all of them to
be kept, so that not every epoch costs a pass through it."""


NUMBERS = "biuf"
"""Kinds of arrays, as numpy has them, that a batch is made of."""


@dataclass(frozen=True, eq=False)
class Batches:
    """One split: batches in a fixed order, as often as they are asked for.  Reading them is what opens the data.

    Every batch is checked as it is read.  Raises UserError, naming the example, for NaN or infinity, for a label
    outside `labels`, for what is no array of numbers, and for an augmentation that changes more than values.
    """

    split: str
    """train, search or test."""
    source: Source
    batch: int
    indices: np.ndarray
    """The examples of the source that belong to the split, in order."""
    labels: frozenset[int] | None = None
    """The labels that may occur; None where targets are not labels."""
    augment: Augment | None = None
    """What makes views of an example; without it all views are the example."""

    @property
    def examples(self) -> int:
        return len(self.indices)

    @property
    def targets(self) -> np.ndarray:
        """The targets of the whole split, (examples, ...)."""
        return self.source.targets[self.indices]

    def __iter__(self) -> Iterator[Batch]:
        return self.viewed(0)

    def shuffled(self, seed: int, epoch: int, *, view: int = 0) -> Iterator[tuple[np.ndarray, Inputs, np.ndarray]]:
        """Positions in the split (n,), inputs and targets: every example once, in an order of (seed, epoch) alone.

        Batches differ by one example at most, so that no BatchNorm meets a last batch of one.
        """
        order = np.random.default_rng([seed, epoch]).permutation(self.examples)
        for positions in np.array_split(order, math.ceil(self.examples / self.batch)):
            inputs, target = self.take(positions, view=view)
            yield positions, inputs, target

    def view_of(self, epoch: int) -> int:
        """The view that an epoch of training sees, below VIEWS; view 0 is the examples as they are."""
        return 0 if self.augment is None else epoch % VIEWS

    def viewed(self, view: int) -> Iterator[Batch]:
        """The split in its order, every example in this view."""
        for start in range(0, self.examples, self.batch):
            yield self.take(np.arange(start, min(start + self.batch, self.examples)), view=view)

    def take(self, positions: np.ndarray, *, view: int = 0) -> Batch:
        """The examples at these positions of the split; of a view they are the same each time."""
        indices = self.indices[positions]
        try:
            inputs, target = self.source.take(indices)
        except UserError:
            raise
        except Exception as error:  # a source can be the user's, and so is whatever it raises
            raise UserError(
                f"the {self.split} data cannot be read, examples {indices.min()} to {indices.max()}: "
                f"{type(error).__name__}: {error}",
                fix="take(indices) returns inputs by name and targets, both as arrays with a row an index",
            ) from error
        for name, array in (*inputs.items(), ("target", target)):
            self._check_array(name, array)
        if view and self.augment is not None:
            inputs = self._changed(inputs, indices, view)
        for name, array in (*inputs.items(), ("target", target)):
            self._check_finite(name, array, indices)
        if self.labels is not None:
            self._check_labels(target, indices)
        return inputs, target

    def _changed(self, inputs: Inputs, indices: np.ndarray, view: int) -> Inputs:
        assert self.augment is not None
        changed = {name: np.empty_like(array) for name, array in inputs.items()}
        wanted = {name: (array.shape[1:], array.dtype) for name, array in inputs.items()}
        for row, index in enumerate(indices):
            draws = np.random.default_rng([view, index])  # the same for this view of it, whoever asks
            example = self.augment({name: array[row] for name, array in inputs.items()}, draws)
            found = {name: (np.shape(array), np.asarray(array).dtype) for name, array in example.items()}
            if found != wanted:
                raise UserError(
                    f"the augmentation makes {_forms(found)} of {_forms(wanted)} (example {index})",
                    fix="let it return inputs of the same names, shapes and types",
                )
            for name, array in example.items():
                changed[name][row] = array
        return changed

    def _check_array(self, name: str, array: object) -> None:
        if not isinstance(array, np.ndarray) or array.dtype.kind not in NUMBERS:
            what = f"an array of {array.dtype}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
            raise UserError(
                f"the {self.split} data's {name} is {what}",
                fix="give numpy arrays of numbers (of a torch tensor: tensor.numpy())",
            )

    def _check_finite(self, name: str, array: np.ndarray, indices: np.ndarray) -> None:
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
            raise UserError(
                f"the {self.split} data holds NaN or infinity: {name} of example {indices[bad][0]}",
                fix="remove such examples, or find what made them (a division by zero while normalising?)",
            )

    def _check_labels(self, target: np.ndarray, indices: np.ndarray) -> None:
        assert self.labels is not None
        unknown = ~np.isin(target, list(self.labels))
        if unknown.any():
            example = int(np.flatnonzero(unknown.reshape(len(target), -1).any(axis=1))[0])
            raise UserError(
                f"the {self.split} data has the label {target[unknown][0]} (example {indices[example]}), "
                "which the train data lacks",
                fix="number the classes alike in every split, and leave out those that train does not have",
            )


def _forms(inputs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (shape, dtype) in sorted(inputs.items()))
