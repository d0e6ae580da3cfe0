"""Where examples come from: arrays in memory, datasets of PyTorch, or what a user writes to the same contract."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from hirelc_deploy.errors import UserError

Inputs = Mapping[str, np.ndarray]
Batch = tuple[Inputs, np.ndarray]
"""Inputs by name and the target; the first axis of each is the example."""


class Source(Protocol):
    """Examples that can be read by index.  Nothing is read before `take` or `targets` asks for it."""

    def __len__(self) -> int: ...

    @property
    def targets(self) -> np.ndarray:
        """The targets of all examples, (N, ...), without reading the inputs where that is possible."""
        ...

    def take(self, indices: np.ndarray) -> Batch:
        """The examples at `indices`, in that order."""
        ...

    def header(self) -> str:
        """What tells this data from other data without reading the examples: shapes, names, checksums kept beside."""
        ...


class ArraySource:
    """Arrays in memory: one input (N, ...) or several by name, and the targets (N, ...)."""

    def __init__(self, inputs: np.ndarray | Inputs, targets: np.ndarray) -> None:
        self._inputs: Inputs = {"input": inputs} if isinstance(inputs, np.ndarray) else dict(inputs)
        self.targets = targets
        for name, array in self._inputs.items():
            if len(array) != len(targets):
                raise UserError(
                    f"{name} has {len(array)} examples and its targets have {len(targets)}",
                    fix="give one target for each example, in the same order",
                )

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: np.ndarray) -> Batch:
        return {name: array[indices] for name, array in self._inputs.items()}, self.targets[indices]

    def header(self) -> str:
        arrays = {**self._inputs, "target": self.targets}
        return " ".join(f"{name}:{array.dtype}{list(array.shape)}" for name, array in sorted(arrays.items()))


class MapDataset(Protocol):
    """PyTorch's map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Any]: ...


class DatasetSource:
    """A map-style PyTorch dataset, `dataset[i] -> (input, target)`, read example by example.

    An input is an array or tensor, or a mapping of name to those; all examples have one shape.  `dataset[i]` must be
    the same each time, or outputs that are cached by index would belong to other inputs; what is to change at random
    is the task's `augment`.
    """

    def __init__(self, dataset: MapDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def targets(self) -> np.ndarray:
        known = getattr(self.dataset, "targets", None)  # a convention: most datasets hold their labels in memory
        return np.asarray([self.dataset[i][1] for i in range(len(self))] if known is None else known)

    def take(self, indices: np.ndarray) -> Batch:
        examples = [self.dataset[int(i)] for i in indices]
        inputs = [x if isinstance(x, Mapping) else {"input": x} for x, _ in examples]
        stacked = {name: np.stack([np.asarray(x[name]) for x in inputs]) for name in inputs[0]}
        return stacked, np.asarray([target for _, target in examples])

    def header(self) -> str:
        return f"{type(self.dataset).__qualname__}[{len(self)}]"
