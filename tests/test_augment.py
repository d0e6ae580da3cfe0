"""Train images changed at random: the changes themselves, and what a task makes of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from exporting import digits, export, hasten, quick_target, trained_digit_net

from hirelc_deploy.augment import augmented, flip, images, shift
from hirelc_deploy.errors import UserError
from hirelc_deploy.task import VIEWS, ArraySource, Augment, Classification, Inputs

hasten()

RANDOM = np.random.default_rng


def task(augment: Augment | None = None, shape: tuple[int, ...] = (1, 12, 24)) -> Classification:
    x = RANDOM(0).standard_normal((40, *shape)).astype(np.float32)
    y = np.arange(40) % 4
    return Classification(ArraySource(x, y), ArraySource(x[:8], y[:8]), batch=16, augment=augment)


def seen(task: Classification, view: int) -> np.ndarray:
    return np.concatenate([inputs["input"] for inputs, _ in task.train.viewed(view)])


def test_every_second_image_is_mirrored() -> None:
    image = np.arange(6.0).reshape(1, 2, 3)
    found = [flip(image, RANDOM(seed)) for seed in range(200)]
    mirrored = [np.array_equal(each, [[[2, 1, 0], [5, 4, 3]]]) for each in found]
    assert all(
        np.array_equal(each, image) for each, is_mirrored in zip(found, mirrored, strict=True) if not is_mirrored
    )
    assert 70 < sum(mirrored) < 130


def test_an_image_moves_by_a_twelfth_at_most_and_its_border_is_repeated() -> None:
    """By one row of twelve, by two columns of twenty-four: fifteen places, each of them met."""
    rows, columns = np.indices((12, 24))
    met = set()
    for seed in range(300):
        moved_rows, moved_columns = shift(np.stack([rows, columns]), RANDOM(seed))
        down, right = 6 - moved_rows[6, 12], 12 - moved_columns[6, 12]
        np.testing.assert_array_equal(moved_rows, np.clip(rows - down, 0, 11))
        np.testing.assert_array_equal(moved_columns, np.clip(columns - right, 0, 23))
        met.add((down, right))
    assert met == {(down, right) for down in (-1, 0, 1) for right in (-2, -1, 0, 1, 2)}


def test_inputs_that_are_no_images_stay_as_they_are() -> None:
    inputs = {"image": np.arange(6.0).reshape(1, 2, 3), "age": np.ones(1)}
    found = [images("flip")(inputs, RANDOM(seed)) for seed in range(10)]
    assert any(not np.array_equal(each["image"], inputs["image"]) for each in found)
    assert all(each["age"] is inputs["age"] for each in found)


def test_a_view_is_the_same_each_time_and_unlike_the_others() -> None:
    data = task(images("flip", "shift"))
    as_it_is, *views = (seen(data, view) for view in range(VIEWS))
    np.testing.assert_array_equal(as_it_is, seen(task(), 0))
    for number, view in enumerate(views, start=1):
        np.testing.assert_array_equal(seen(data, number), view)
    assert all(not np.array_equal(one, other) for one in views for other in (as_it_is, *views) if one is not other)
    for positions, inputs, target in data.train.shuffled(5, 3, view=2):
        np.testing.assert_array_equal(inputs["input"], views[1][positions])
        np.testing.assert_array_equal(target, data.train.targets[positions])


def test_epochs_take_turns_with_the_views() -> None:
    assert [task(images("flip")).train.view_of(epoch) for epoch in range(VIEWS + 2)] == [*range(VIEWS), 0, 1]
    assert {task().train.view_of(epoch) for epoch in range(VIEWS + 2)} == {0}


def test_search_and_test_examples_are_never_changed() -> None:
    data = task(images("flip", "shift"))
    assert data.search.augment is None
    assert data.test.augment is None


def test_an_augmentation_is_part_of_the_fingerprint() -> None:
    prints = {task(each).fingerprint() for each in (None, images("flip"), images("shift"), images("flip", "shift"))}
    assert len(prints) == 4
    assert augmented(task(), ("flip",)).fingerprint() == task(images("flip")).fingerprint()


def test_a_task_is_augmented_and_stays_what_it_is() -> None:
    before = task()
    fingerprint = before.fingerprint()
    after = augmented(before, ("flip", "shift"))
    np.testing.assert_array_equal(seen(after, 1), seen(task(images("flip", "shift")), 1))
    assert (before.train.augment, before.fingerprint()) == (None, fingerprint)
    assert augmented(before, ()) is before


def longer(inputs: Inputs, _: np.random.Generator) -> Inputs:
    return {name: np.pad(array, ((0, 0), (0, 1), (0, 0))) for name, array in inputs.items()}


def doubles(inputs: Inputs, _: np.random.Generator) -> Inputs:
    return {name: array.astype(np.float64) for name, array in inputs.items()}


def renamed(inputs: Inputs, _: np.random.Generator) -> Inputs:
    return {"image": inputs["input"]}


def broken(inputs: Inputs, _: np.random.Generator) -> Inputs:
    return {name: np.full_like(array, np.nan) for name, array in inputs.items()}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: images("flip", "shfit"), r"'shfit' is no augmentation"),
        (lambda: augmented(task(images("flip")), ("shift",)), "an augmentation of its own"),
        (lambda: augmented(task(shape=(24,)), ("shift", "flip")), r"shift and flip can change images.* input \[24\]"),
        (
            lambda: seen(task(longer), 1),
            r"makes input float32\[1, 13, 24\] of input float32\[1, 12, 24\] \(example 0\)",
        ),
        (lambda: seen(task(doubles), 1), "input float64"),
        (lambda: seen(task(renamed), 1), "makes image float32"),
        (lambda: seen(task(broken), 1), "train data holds NaN"),
    ],
)
def test_what_cannot_be_an_augmentation_is_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


def test_an_export_trains_on_what_was_changed_from_its_second_epoch_on(tmp_path: Path) -> None:
    target = quick_target(tmp_path)

    def weights(epochs: int, *augment: str) -> bytes:
        out = tmp_path / f"{epochs}{augment}"
        settings = {"recipe": "keep=50%", "target": target, "epochs": epochs, "augment": augment}
        return (export(out, trained_digit_net(), digits(), **settings).folder / "model.onnx").read_bytes()

    assert weights(1) == weights(1, "shift")
    assert weights(2) != weights(2, "shift")
