"""Data that cannot be used: one message that names the place, says why and what to do."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hirelc_deploy.batches import Batches
from hirelc_deploy.datasets import load_task
from hirelc_deploy.errors import UserError
from hirelc_deploy.task import ArraySource, Classification, check_labels

FINE: dict[str, np.ndarray] = {
    "x_train": np.zeros((40, 1, 2, 2), np.float32),
    "y_train": np.arange(40) % 4,
    "x_test": np.zeros((8, 1, 2, 2), np.float32),
    "y_test": np.arange(8) % 4,
}


def refusal(act: Callable[[], object]) -> str:
    """What the user is told: what happened, and the fix in a line of its own."""
    with pytest.raises(UserError) as raised:
        act()
    message = str(raised.value)
    what, fix = message.split("\n  fix: ")
    assert len(what) > 10
    assert len(fix) > 10
    return message


def load_npz(folder: Path, **changed: np.ndarray | None) -> Classification:
    arrays = {name: array for name, array in {**FINE, **changed}.items() if array is not None}
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]
    task = load_task(str(folder / "data.npz"))
    assert isinstance(task, Classification)
    return task


def with_value(array: np.ndarray, position: int, value: float) -> np.ndarray:
    changed = array.copy()
    changed[position] = value
    return changed


# Files


@pytest.mark.parametrize("spec", ["nowhere.npz", "nowhere", "nowhere.py:task"])
def test_missing_file(tmp_path: Path, spec: str) -> None:
    assert f"{spec.partition(':')[0]} does not exist" in refusal(lambda: load_task(str(tmp_path / spec)))


def test_a_file_of_no_known_kind(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("1,2")
    assert "FILE.npz" in refusal(lambda: load_task(str(tmp_path / "data.csv")))


def deny(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No permission to read `name`: injected, since the superuser may read everything."""

    def denying(method: Callable[..., object]) -> Callable[..., object]:
        def act(path: Path, *arguments: object, **options: object) -> object:
            if path.name == name:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return method(path, *arguments, **options)

        return act

    for method in ("open", "iterdir", "read_bytes"):
        monkeypatch.setattr(Path, method, denying(getattr(Path, method)))


def test_no_permission_to_read_an_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "data.npz", **FINE)  # type: ignore[arg-type]
    deny(monkeypatch, "data.npz")
    assert "no permission to read" in refusal(lambda: load_task(str(tmp_path / "data.npz")))


def test_no_permission_to_read_a_class_folder(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deny(monkeypatch, "dog")
    message = refusal(lambda: load_task(str(images)))
    assert "no permission to read" in message
    assert "train/dog" in message


def test_a_disk_that_fails_while_a_batch_is_read(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(str(images))

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Image, "open", fail)
    assert "Input/output error" in refusal(lambda: list(task.train))


# Arrays


def test_a_missing_array_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    message = refusal(lambda: load_npz(tmp_path, y_test=None))
    assert "has no array y_test" in message
    assert "it has x_test, x_train, y_train" in message


def test_half_a_search_split(tmp_path: Path) -> None:
    assert "has no array y_search" in refusal(lambda: load_npz(tmp_path, x_search=FINE["x_test"]))


def test_a_file_that_is_no_npz(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(b"not a zip archive")
    assert "is no .npz file" in refusal(lambda: load_task(str(tmp_path / "data.npz")))


def test_an_array_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    objects = np.array([Payload()] * 40, dtype=object)
    assert "could run code" in refusal(lambda: load_npz(tmp_path, x_train=objects))
    assert not (tmp_path / "executed").exists()


def test_examples_and_labels_of_unequal_number(tmp_path: Path) -> None:
    message = refusal(lambda: load_npz(tmp_path, y_train=np.zeros(39, np.int64)))
    assert "[39]" in message
    assert "[40, 1, 2, 2]" in message


def test_unequal_numbers_in_arrays_of_ones_own() -> None:
    assert "40 examples" in refusal(lambda: ArraySource(FINE["x_train"], np.zeros(39, np.int64)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_found_before_the_work_begins(tmp_path: Path, value: float) -> None:
    message = refusal(lambda: load_npz(tmp_path, x_train=with_value(FINE["x_train"], 33, value)))
    assert "train data holds NaN or infinity" in message or "search data holds NaN or infinity" in message
    assert "example 33" in message


def test_pixels_in_bytes_are_not_scaled_by_guessing(tmp_path: Path) -> None:
    assert "x_train" in refusal(lambda: load_npz(tmp_path, x_train=np.zeros((40, 1, 2, 2), np.uint8)))


# Labels


def test_a_negative_label(tmp_path: Path) -> None:
    message = refusal(lambda: load_npz(tmp_path, y_train=with_value(FINE["y_train"], 7, -1)))
    assert "label -1 (example 7)" in message


@pytest.mark.parametrize("labels", [np.arange(40) % 4 / 2, np.eye(4)[np.arange(40) % 4]], ids=["floats", "one-hot"])
def test_labels_that_are_no_class_numbers(tmp_path: Path, labels: np.ndarray) -> None:
    assert "y_train" in refusal(lambda: load_npz(tmp_path, y_train=labels))


def test_a_label_that_the_model_has_no_output_for(tmp_path: Path) -> None:
    task = load_npz(tmp_path, y_train=with_value(FINE["y_train"], 7, 12))
    check_labels(task, classes=13)
    message = refusal(lambda: check_labels(task, classes=10))
    assert "label 12" in message
    assert "10 outputs" in message
    assert "example 7" in message


def test_a_test_label_that_train_lacks(tmp_path: Path) -> None:
    task = load_npz(tmp_path, y_test=with_value(FINE["y_test"], 5, 9))
    message = refusal(lambda: list(task.test))
    assert "test data has the label 9 (example 5)" in message


def test_an_empty_split(tmp_path: Path) -> None:
    empty: dict[str, np.ndarray | None] = {
        "x_test": np.zeros((0, 1, 2, 2), np.float32),
        "y_test": np.zeros(0, np.int64),
    }
    assert "test split is empty" in refusal(lambda: load_npz(tmp_path, **empty))


def test_too_few_examples_to_cut_a_search_split() -> None:
    few = ArraySource(FINE["x_test"], FINE["y_test"])
    assert "too few" in refusal(lambda: Classification(few, few))


# Folders of images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of twelve gray 6x4 images in train and test."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(12):
                Image.new("L", (6, 4), i).save(folder / f"{i:02}.png")
    return tmp_path / "images"


def test_an_empty_class_folder(images: Path) -> None:
    (images / "train" / "bird").mkdir()
    (images / "train" / "bird" / "notes.txt").touch()
    assert "train/bird holds no images" in refusal(lambda: load_task(str(images)))


def test_no_classes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    assert "train has no class folders" in refusal(lambda: load_task(str(tmp_path)))


def test_no_test_split(images: Path) -> None:
    (images / "test").rename(images / "tests")
    message = refusal(lambda: load_task(str(images)))
    assert "no test/ or val/" in message
    assert "it has tests, train" in message


def test_test_classes_that_train_lacks(images: Path) -> None:
    (images / "test" / "cow").mkdir()
    message = refusal(lambda: load_task(str(images)))
    assert "cow" in message
    assert "cat, dog" in message


def test_an_image_of_another_size(images: Path) -> None:
    Image.new("L", (5, 4)).save(images / "train" / "dog" / "03.png")
    message = refusal(lambda: load_task(str(images)))
    assert "23 of 6x4, 1 of 5x4" in message
    assert "train/dog/03.png is 5x4" in message


@pytest.mark.parametrize(("mode", "size", "said"), [("L", (5, 4), "is 5x4"), ("RGB", (6, 4), "is in colour")])
def test_a_test_image_of_another_form_is_named_before_the_work_begins(
    images: Path, mode: str, size: tuple[int, int], said: str
) -> None:
    """Its header alone is read."""
    Image.new(mode, size).save(images / "test" / "dog" / "03.png")
    assert f"test/dog/03.png {said}" in refusal(lambda: load_task(str(images)))


@pytest.mark.parametrize(
    ("target", "said"), [(torch.zeros(40), "is a Tensor"), (np.array([[0]] * 40, object), "is an array of object")]
)
def test_what_is_no_array_of_numbers_is_named(target: Any, said: str) -> None:
    source = ArraySource(np.zeros((40, 3), np.float32), target)
    with pytest.raises(UserError, match=f"target {said}"):
        Batches("train", source, 8, np.arange(40)).take(np.arange(4))


def test_a_file_that_is_no_image(images: Path) -> None:
    (images / "train" / "cat" / "00.png").write_text("an error page")
    assert "train/cat/00.png cannot be read as an image" in refusal(lambda: load_task(str(images)))


def test_an_image_that_breaks_off(images: Path) -> None:
    path = images / "train" / "cat" / "00.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-30])
    task = load_task(str(images))
    assert "train/cat/00.png cannot be read as an image" in refusal(lambda: [list(task.train), list(task.search)])


@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_pixels_that_would_lose_something_are_not_converted(images: Path, mode: str) -> None:
    Image.new(mode, (6, 4)).save(images / "train" / "cat" / "00.png")
    message = refusal(lambda: load_task(str(images)))
    assert f"train/cat/00.png has pixels of the kind {mode!r}" in message
    assert "FILE.py:callable" in message


# A task of the user's own


def write_task(folder: Path, body: str) -> str:
    (folder / "mine.py").write_text(body)
    return f"{folder / 'mine.py'}:task"


def test_a_factory_that_raises_is_quoted_with_its_line(tmp_path: Path) -> None:
    spec = write_task(tmp_path, "def task():\n    rows = []\n    return rows[3]\n")
    message = refusal(lambda: load_task(spec))
    assert "IndexError: list index out of range" in message
    assert "mine.py, line 3: return rows[3]" in message


def test_a_factory_that_raises_while_a_helper_runs(tmp_path: Path) -> None:
    (tmp_path / "deep_helper.py").write_text("def read():\n    raise ValueError('no such table')\n")
    spec = write_task(tmp_path, "from deep_helper import read\ndef task():\n    return read()\n")
    message = refusal(lambda: load_task(spec))
    assert "ValueError: no such table" in message
    assert "line 3: return read()" in message or "deep_helper.py, line 2" in message


def test_a_users_own_refusal_passes_through(tmp_path: Path) -> None:
    spec = write_task(
        tmp_path,
        "from hirelc_deploy.errors import UserError\n"
        "def task():\n    raise UserError('the data is not here', fix='apt-get install it')\n",
    )
    assert refusal(lambda: load_task(spec)) == "the data is not here\n  fix: apt-get install it"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def task(:\n", "SyntaxError"),
        ("import nothing_of_that_name\n", "nothing_of_that_name"),
        ("def tusk():\n    pass\n", "its own are: tusk"),
        ("def task():\n    return 3\n", "returned a int, not a Task"),
        ("raise SystemExit('usage')\n", "SystemExit: usage"),
    ],
)
def test_files_without_a_usable_factory(tmp_path: Path, body: str, said: str) -> None:
    spec = write_task(tmp_path, body)
    assert said in refusal(lambda: load_task(spec))


def test_helpers_of_one_name_are_not_mixed_up(tmp_path: Path) -> None:
    """Each task file gets the `helper.py` beside it, whichever was imported first."""
    body = (
        "import numpy as np\nfrom helper import N\nfrom hirelc_deploy.task import ArraySource, Classification\n"
        "def task():\n    s = ArraySource(np.zeros((N, 1)), np.zeros(N, np.int64))\n    return Classification(s, s)\n"
    )
    for examples in (20, 30):
        folder = tmp_path / str(examples)
        folder.mkdir()
        (folder / "helper.py").write_text(f"N = {examples}\n")
        assert load_task(write_task(folder, body)).test.examples == examples
