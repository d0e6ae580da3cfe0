"""Train images changed at random for fine-tuning.

A small network then learns what the original says of more than the images that the original has learned by heart.
That takes epochs: a few of them can mend less (docs/findings.md).
`Classification(..., augment=images("flip", "shift"))`, or any function of one's own (`hirelc_deploy.task.Augment`).
"""

import copy
from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

from hirelc_deploy.config import AUGMENTATIONS, require_known
from hirelc_deploy.errors import UserError
from hirelc_deploy.task import Augment, Inputs, Task

SHIFT = 1 / 12
"""Of the height and the width, at most."""

IMAGE_AXES = 3


def flip(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """An image (C, H, W) with left and right changed over, every second time."""
    return image[..., ::-1] if random.random() < 0.5 else image


def shift(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """An image (C, H, W) moved by whole pixels both ways; the border is repeated where nothing moves in."""
    height, width = image.shape[1:]
    down, right = (max(1, round(SHIFT * size)) for size in (height, width))
    wide = np.pad(image, ((0, 0), (down, down), (right, right)), mode="edge")
    top, left = random.integers(0, [2 * down + 1, 2 * right + 1])
    return wide[:, top : top + height, left : left + width]


CHANGES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = dict(
    zip(AUGMENTATIONS, (flip, shift), strict=True)
)


def images(*names: str) -> Augment:
    """The changes of these names, one after the other, of every input that is an image.

    Raises UserError for an unknown name, and where an example has no image.
    """
    require_known(names, AUGMENTATIONS, "augmentation")

    def changed(inputs: Inputs, random: np.random.Generator) -> Inputs:
        found = {name: array for name, array in inputs.items() if array.ndim == IMAGE_AXES}
        if not found:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
            raise UserError(
                f"{' and '.join(names)} can change images, and an example has {shapes}",
                fix="leave the augmentation out, or write FILE.py:callable returning a Task with one of its own",
            )
        for change in names:
            found = {name: CHANGES[change](image, random) for name, image in found.items()}
        return {**inputs, **found}

    return changed


def augmented(task: Task, names: Collection[str]) -> Task:
    """The task with these changes of its train images; it itself where there are none.

    Raises UserError if it has an augmentation of its own, or no images.
    """
    if not names:
        return task
    if task.train.augment is not None:
        raise UserError(
            f"augment is {','.join(names)}, and the task has an augmentation of its own", fix="leave one of them out"
        )
    other = copy.copy(task)
    vars(other).pop("_fingerprint", None)
    other.train = replace(task.train, augment=images(*names))
    other.train.take(np.arange(1), view=1)
    return other
