"""What a model or a file scores on the search split, beside what the original does there."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hirelc_deploy.compress.distil import as_tensors
from hirelc_deploy.errors import UserError
from hirelc_deploy.graph import forward
from hirelc_deploy.verify import accuracy

if TYPE_CHECKING:
    from hirelc_deploy.exporters._base import Arrays, Session
    from hirelc_deploy.subject import Subject


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

        Of a share in percent it is known; of other scores it is taken as nothing.  A network that is all but perfect
        scores with next to no error, and one that may lose two points more with a larger one.
        """
        share = (self.original - self._task.drop(drop, 0.0)) / 100
        return 100 * math.sqrt(share * (1 - share) / examples) if self._task.unit == "%" and 0 <= share <= 1 else 0.0

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
