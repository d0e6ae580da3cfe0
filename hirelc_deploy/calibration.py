"""Train examples that are only looked at: what activations span, what layers read, what statistics are."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from hirelc_deploy.compress.distil import as_tensors

if TYPE_CHECKING:
    from hirelc_deploy.task import Inputs, Task

EXAMPLES = 1024
"""Train examples that ranges and BatchNorm statistics are taken from."""

EPOCH = 1_000_000
"""Their order is drawn like an epoch's, of a number that no fine-tuning reaches."""

FEW_EXAMPLES, FEW_BATCH = 256, 32
"""Of them, those that what layers read is looked at on, in order to choose weights."""

FEW_ENTRIES = 1 << 25
"""What their inputs may have together, 128 MB: large images are fewer."""


class Calibration:
    """The same examples of the train split each time, a batch in memory at a time."""

    def __init__(self, task: "Task", seed: int) -> None:
        self._task = task
        self._seed = seed

    def arrays(self) -> Iterator["Inputs"]:
        """EXAMPLES or a few more, in batches of the task's."""
        return self._arrays(EXAMPLES)

    def tensors(self) -> Iterator[dict[str, Tensor]]:
        """The same as tensors."""
        return map(as_tensors, self._arrays(EXAMPLES))

    def few(self) -> Iterator[dict[str, Tensor]]:
        """The first of them, in small batches."""
        entries = sum(math.prod(array.shape[1:]) for array in self._task.example.values())
        yield from self.first(max(FEW_BATCH, min(FEW_EXAMPLES, FEW_ENTRIES // entries)), FEW_BATCH)

    def first(self, examples: int, batch: int) -> Iterator[dict[str, Tensor]]:
        """So many of them or a few more, in batches of at most `batch`."""
        for whole in map(as_tensors, self._arrays(examples)):
            for start in range(0, len(next(iter(whole.values()))), batch):
                yield {name: tensor[start : start + batch] for name, tensor in whole.items()}

    def _arrays(self, examples: int) -> Iterator["Inputs"]:
        seen = 0
        for positions, inputs, _ in self._task.train.shuffled(self._seed, EPOCH):
            yield inputs
            seen += len(positions)
            if seen >= examples:
                return
