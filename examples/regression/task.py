"""A task with a score of its own: --data examples/regression/task.py:task

Outputs and targets are angles in degrees, and a lower score is better: `--max-drop 0.5` allows half a degree more.
"""

from collections.abc import Mapping

import numpy as np
import torch.nn.functional as F
from data import splits
from torch import Tensor

from hirelc_deploy.task import ArraySource, Task


class Angle(Task):
    """Regression of one number; outputs (N, 1), targets (N,), both in degrees."""

    unit = "degrees"
    higher_is_better = False

    def loss(self, outputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Huber's, which becomes linear beyond one degree: digits that look the same either way do not rule it."""
        return F.smooth_l1_loss(outputs["output"][:, 0], target)

    def score(self, outputs: Mapping[str, np.ndarray], targets: np.ndarray) -> float:
        """The mean absolute error."""
        return float(np.abs(outputs["output"][:, 0] - targets).mean())


def task() -> Angle:
    """The search digits are unseen in training."""
    parts = {name: ArraySource(x, degrees) for name, (x, degrees) in splits().items()}
    return Angle(parts["train"], parts["test"], parts["search"], batch=64)
