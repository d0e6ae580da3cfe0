"""What a model or a file scores on the search split, beside what the original does there."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from hirelc_deploy.compress.distil import as_tensors
from hirelc_deploy.errors import UserError
from hirelc_deploy.graph import forward
from hirelc_deploy.verify import accuracy

if TYPE_CHECKING:
    from hirelc_deploy.exporters._base import Arrays, Session
    from hirelc_deploy.subject import Subject


RESAMPLES = 200
"""Of the search split, for the error of a score that is no share: told to some 5 %."""


class Scoring:
    """The search split as a judge: scores in the task's unit."""

    def __init__(self, subject: "Subject") -> None:
        self._subject = subject
        self._task = subject.task

    @cached_property
    def original(self) -> float:
        """Of the original."""
        return self._subject.run.step("original score", lambda: self.of(self.outputs(self._subject.model)))

    def drop(self, score: float) -> float:
        """Of a score, against the original's; a positive one is worse, whatever the direction of the score."""
        return self._task.drop(self.original, score)

    def error(self, examples: int, *, drop: float = 0.0) -> float:
        """Standard error, on so many examples, of a score that is worse than the original's by a `drop`.

        Of a share in percent it is known; of other scores it is seen of the original's, on examples that are drawn
        anew.  A network that is all but perfect scores with next to no error, and one that may lose two points more
        with a larger one.
        """
        share = (self.original - self._task.drop(drop, 0.0)) / 100
        if self._task.unit == "%" and 0 <= share <= 1:
            return 100 * math.sqrt(share * (1 - share) / examples)
        return self._spread / math.sqrt(examples)

    @cached_property
    def _spread(self) -> float:
        """The standard deviation of one example's part in the original's score; nought where few resamples have one."""
        found: float = self._subject.run.step("spread of the score", self._resampled)
        return found

    def _resampled(self) -> float:
        outputs, targets = self.outputs(self._subject.model), self._task.search.targets
        random = np.random.default_rng(0)
        scores = []
        for _ in range(RESAMPLES):
            picks = random.integers(len(targets), size=len(targets))
            drawn = {name: output[picks] for name, output in outputs.items()}
            try:
                scores.append(accuracy.task_score(self._task, drawn, targets[picks]))
            except UserError:  # a score may need examples of every kind
                continue
        finite = [score for score in scores if math.isfinite(score)]
        return float(np.std(finite)) * math.sqrt(len(targets)) if len(finite) > RESAMPLES / 2 else 0.0

    def outputs(self, model: nn.Module) -> accuracy.Outputs:
        """What a model says of the split."""
        return accuracy.outputs(torch_session(model), self._task.search)[0]

    def of(self, outputs: accuracy.Outputs) -> float:
        """The score of these outputs.  Raises UserError if it is no finite number."""
        score = accuracy.task_score(self._task, outputs, self._task.search.targets)
        if not math.isfinite(score):
            raise UserError(
                f"the score on the search split is {score}",
                fix="do the model's outputs hold NaN or infinity there? mend the model, the data or the task's score",
            )
        return score

    def of_file(self, session: "Session") -> float:
        """The score of a file that is loaded.  Raises UserError as `of`."""
        return self.of(accuracy.outputs(session, self._task.search)[0])


def torch_session(model: nn.Module) -> Callable[["Arrays"], dict[str, Any]]:
    """The model as a function of arrays, in eval mode."""

    @torch.inference_mode()
    def run(inputs: "Arrays") -> dict[str, Any]:
        return {name: output.numpy() for name, output in forward(model.eval(), as_tensors(inputs)).items()}

    return run
