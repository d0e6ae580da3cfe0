"""The contract of a task, and the ready-made data behind it."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hirelc_deploy.checkpoint import load
from hirelc_deploy.datasets import load_task, npz_members
from hirelc_deploy.demo import CHECKPOINT, DATA, MODEL, train
from hirelc_deploy.errors import UserError
from hirelc_deploy.task import (
    EXAMPLE,
    ArraySource,
    Batch,
    Classification,
    DatasetSource,
    Task,
    check_labels,
    stratified_holdout,
)

ROOT = Path(__file__).parents[1]
REGRESSION = f"{ROOT}/examples/regression"


def source(examples: int = 40, classes: int = 4, seed: int = 0) -> ArraySource:
    x = np.random.default_rng(seed).standard_normal((examples, 1, 2, 2), dtype=np.float32)
    return ArraySource(x, np.arange(examples) % classes)


def write_npz(path: Path, *, compressed: bool = False, **changed: np.ndarray) -> Path:
    train, test = source(), source(12, seed=1)
    (x, y), (x_test, y_test) = (s.take(np.arange(len(s))) for s in (train, test))
    arrays = {"x_train": x["input"], "y_train": y, "x_test": x_test["input"], "y_test": y_test, **changed}
    (np.savez_compressed if compressed else np.savez)(path, **arrays)  # type: ignore[arg-type]
    return path


def write_image(path: Path, *, mode: str = "L", size: tuple[int, int] = (6, 4), value: int = 51) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 255)).save(path)


class Counting:
    """A source that counts how often it is read."""

    def __init__(self, inner: ArraySource) -> None:
        self.inner, self.reads = inner, 0

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def targets(self) -> np.ndarray:
        self.reads += 1
        return self.inner.targets

    def take(self, indices: np.ndarray) -> Batch:
        self.reads += 1
        return self.inner.take(indices)

    def header(self) -> str:
        return self.inner.header()


# Splits


def test_holdout_is_the_one_that_the_committed_checkpoints_were_trained_with() -> None:
    """Another cut would put images that a network was trained on into the search split."""
    kept, held = stratified_holdout(np.array([0, 1] * 10), 0.3, seed=0)
    assert held.tolist() == [4, 5, 7, 8, 12, 19]
    assert sorted([*kept, *held]) == list(range(20))


def test_a_task_without_search_data_cuts_a_tenth_of_every_class_and_says_so() -> None:
    task = Classification(source(400), source(8))
    assert task.search_seen_in_training
    assert np.bincount(task.search.targets).tolist() == [10, 10, 10, 10]
    assert task.train.examples == 360
    assert not set(task.train.indices) & set(task.search.indices)


def test_search_data_of_ones_own_is_used_whole() -> None:
    task = Classification(source(40), source(8), source(20, seed=2))
    assert not task.search_seen_in_training
    assert (task.train.examples, task.search.examples) == (40, 20)


def test_nobody_reads_the_test_split_before_it_is_iterated() -> None:
    test = Counting(source(4))
    task = Classification(source(), test)
    task.fingerprint()
    check_labels(task, classes=4)
    assert task.example["input"].shape == (EXAMPLE, 1, 2, 2)
    assert task.test.examples == 4
    assert test.reads == 0
    assert len(list(task.test)) == 1
    assert test.reads == 1


def test_the_npz_test_arrays_stay_on_disk_until_they_are_iterated(tmp_path: Path) -> None:
    """Only the header of x_test is looked at: NaN in it goes unseen until somebody opens the split."""
    path = write_npz(tmp_path / "data.npz", x_test=np.full((12, 1, 2, 2), np.nan, np.float32))
    task = load_task(str(path))
    task.fingerprint()
    with pytest.raises(Exception, match="test data holds NaN"):
        list(task.test)


def test_batches_can_be_read_again_in_the_same_order() -> None:
    task = Classification(source(), source(), batch=16)
    first, second = ([target for _, target in task.train] for _ in range(2))
    assert [len(target) for target in first] == [16, 16, 4]
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(second))
    np.testing.assert_array_equal(np.concatenate(first), task.train.targets)


def test_a_shuffled_epoch_names_every_example_by_its_position() -> None:
    """Cached teacher outputs are looked up by these positions."""
    task = Classification(source(101), source(), batch=20)
    inputs_in_order = np.concatenate([inputs["input"] for inputs, _ in task.train])
    seen = []
    for positions, inputs, target in task.train.shuffled(seed=3, epoch=1):
        np.testing.assert_array_equal(inputs["input"], inputs_in_order[positions])
        np.testing.assert_array_equal(target, task.train.targets[positions])
        seen.append(positions)
    assert sorted(np.concatenate(seen)) == list(range(task.train.examples))
    assert max(map(len, seen)) - min(map(len, seen)) <= 1, "a last batch of one would break BatchNorm"


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        train = Classification(source(), source()).train
        return [int(p) for positions, _, _ in train.shuffled(seed, epoch) for p in positions]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 0)


# Fingerprint


def test_equal_data_has_one_fingerprint_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    here, there = write_npz(tmp_path / "a.npz"), write_npz(tmp_path / "elsewhere" / "b.npz")
    assert load_task(str(here)).fingerprint() == load_task(str(there)).fingerprint()


@pytest.mark.parametrize("array", ["x_train", "y_train", "x_test", "y_test"])
def test_one_changed_value_changes_the_fingerprint(tmp_path: Path, array: str) -> None:
    whole = write_npz(tmp_path / "a.npz")
    changed = np.load(whole)[array].copy()
    changed.flat[1] += 1
    other = write_npz(tmp_path / "b.npz", **{array: changed})
    assert load_task(str(whole)).fingerprint() != load_task(str(other)).fingerprint()


def test_a_setting_changes_the_fingerprint() -> None:
    digests = [
        Classification(source(), source()).fingerprint(),
        Classification(source(), source(), seed=1).fingerprint(),
        Classification(source(), source(), batch=7).fingerprint(),
        Classification(source(), source(), output="logits").fingerprint(),
    ]
    assert len(set(digests)) == len(digests)


# Scores


def test_classification_scores_percent() -> None:
    task = Classification(source(), source())
    logits = np.eye(4)[[0, 1, 2, 3]]
    assert task.score({"output": logits}, np.array([0, 1, 2, 0])) == 75
    assert task.agreement({"output": logits}, {"output": np.roll(logits, 1, axis=0)}) == 0
    assert task.drop(before=90, after=89.5) == 0.5


def test_the_logits_of_a_model_with_several_outputs() -> None:
    features, logits = np.ones((4, 9)), np.eye(4)
    labels = np.arange(4)
    assert Classification(source(), source()).score({"features": features, "logits": logits}, labels) == 100
    assert (
        Classification(source(), source(), output="head").score({"features": features, "head": logits}, labels) == 100
    )
    with pytest.raises(Exception, match=r"no output 'head'.*\n.*features, logits"):
        Classification(source(), source(), output="head").score({"features": features, "logits": logits}, labels)


def test_the_loss_is_cross_entropy_and_has_a_gradient() -> None:
    logits = torch.zeros(2, 4, requires_grad=True)
    loss = Classification(source(), source()).loss({"output": logits}, torch.tensor([0, 3], dtype=torch.int32))
    assert loss.item() == pytest.approx(np.log(4))
    loss.backward()
    assert logits.grad is not None


def test_a_pytorch_dataset_is_a_source() -> None:
    dataset = [({"a": torch.full((2,), float(i)), "b": np.float32(i)}, i % 2) for i in range(20)]
    task = Classification(DatasetSource(dataset), DatasetSource(dataset), batch=4)  # type: ignore[arg-type]
    inputs, target = next(iter(task.train))
    assert inputs["a"].shape == (4, 2)
    assert inputs["b"].shape == (4,)
    np.testing.assert_array_equal(target, inputs["b"] % 2)


class Distance(Task):
    """A user's own: lower is better."""

    higher_is_better = False

    def loss(self, outputs: Mapping[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        return (outputs["output"] - target).square().mean()

    def score(self, outputs: Mapping[str, np.ndarray], targets: np.ndarray) -> float:
        return float(np.abs(outputs["output"] - targets).mean())


def test_a_drop_is_positive_when_a_lower_score_was_better() -> None:
    data = ArraySource(np.zeros((20, 1)), np.linspace(0, 1, 20))
    task = Distance(data, data)
    assert task.drop(before=1.0, after=1.5) == 0.5
    assert task.agreement({}, {}) is None
    assert task.search.examples == 2, "continuous targets are cut without classes"


# Ready-made data


@pytest.mark.parametrize("compressed", [False, True])
def test_npz(tmp_path: Path, compressed: bool) -> None:
    x = np.asfortranarray(np.random.default_rng(0).standard_normal((40, 3, 5, 5)))
    path = write_npz(
        tmp_path / "data.npz", compressed=compressed, x_train=x, x_test=np.zeros((12, 3, 5, 5), np.float32)
    )
    task = load_task(str(path), batch=32)
    assert task.spec == str(path)
    inputs, target = task.train.take(np.arange(task.train.examples))
    assert inputs["input"].dtype == np.float32
    np.testing.assert_array_equal(inputs["input"], x[task.train.indices].astype(np.float32))
    np.testing.assert_array_equal(target, np.arange(40)[task.train.indices] % 4)


def test_a_damaged_archive_is_told_wherever_the_damage_is(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "data.npz", compressed=True)
    sound = path.read_bytes()
    for position in range(40, len(sound), len(sound) // 50):
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 0xFF]) + sound[position + 1 :])
        with suppress(UserError):  # or nothing that matters was hit
            load_task(str(path))


def test_uncompressed_arrays_are_mapped_and_not_read_into_memory(tmp_path: Path) -> None:
    members = npz_members(write_npz(tmp_path / "data.npz"))
    assert isinstance(members["x_train"].array(), np.memmap)


def test_npz_with_search_arrays(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "d.npz", x_search=np.ones((8, 1, 2, 2), np.float32), y_search=np.arange(8) % 4)
    task = load_task(str(path))
    assert not task.search_seen_in_training
    assert (task.train.examples, task.search.examples) == (40, 8)


def image_tree(folder: Path, *splits: str, images: int = 12) -> Path:
    for split in splits:
        for value, name in ((51, "cat"), (102, "dog")):
            for i in range(images):
                write_image(folder / split / name / f"{i}.png", value=value)
    return folder


def test_image_folder(tmp_path: Path) -> None:
    task = load_task(str(image_tree(tmp_path, "train", "val")))
    inputs, target = next(iter(task.train))
    assert inputs["input"].shape == (22, 1, 4, 6)
    assert inputs["input"].dtype == np.float32
    np.testing.assert_allclose(inputs["input"][:, 0, 0, 0], np.where(target == 0, 0.2, 0.4))
    assert (task.search.examples, task.test.examples, task.search_seen_in_training) == (2, 24, True)


def test_val_beside_test_is_the_search_split(tmp_path: Path) -> None:
    image_tree(image_tree(tmp_path, "train", "test"), "val", images=5)
    task = load_task(str(tmp_path))
    assert not task.search_seen_in_training
    assert (task.train.examples, task.search.examples, task.test.examples) == (24, 10, 24)


def test_one_coloured_image_makes_three_channels(tmp_path: Path) -> None:
    folder = image_tree(tmp_path, "train", "test")
    write_image(folder / "train" / "dog" / "99.png", mode="RGB")
    inputs, _ = next(iter(load_task(str(folder)).train))
    assert inputs["input"].shape[1] == 3


def test_images_are_read_when_a_batch_asks_and_not_kept(tmp_path: Path) -> None:
    folder = image_tree(tmp_path, "train", "test")
    task = load_task(str(folder), batch=4)
    batches = iter(task.train)
    next(batches)
    write_image(folder / "train" / "dog" / "9.png", value=255)
    assert max(inputs["input"].max() for inputs, _ in batches) == 1.0


def test_digits_keep_the_cut_that_the_demo_was_trained_on() -> None:
    task = load_task("digits")
    assert not task.search_seen_in_training
    assert [split.examples for split in (task.train, task.search, task.test)] == [1151, 287, 359]
    assert task.example["input"].shape == (EXAMPLE, 1, 8, 8)
    assert task.fingerprint() == load_task("digits").fingerprint()


# Networks that are committed


def predict(model: torch.nn.Module, task: Task) -> tuple[dict[str, np.ndarray], np.ndarray]:
    with torch.inference_mode():
        outputs = [model(torch.from_numpy(inputs["input"])).numpy() for inputs, _ in task.test]
    return {"output": np.concatenate(outputs)}, task.test.targets


def test_the_demo_network_knows_its_digits() -> None:
    task = load_task(DATA)
    assert task.score(*predict(load(MODEL, CHECKPOINT).model, task)) >= 98.0
    assert CHECKPOINT.stat().st_size < 500_000


def test_the_regression_example_carries_another_score() -> None:
    task = load_task(f"{REGRESSION}/task.py:task")
    checkpoint = Path(REGRESSION) / "checkpoint.safetensors"
    outputs, targets = predict(load(f"{REGRESSION}/network.py:network", checkpoint).model, task)
    error = task.score(outputs, targets)
    assert task.unit == "degrees"
    assert error < 3.0
    assert task.drop(before=error, after=error + 1) > 0
    assert checkpoint.stat().st_size < 300_000


def test_training_the_demo_again_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One epoch: the committed checkpoint can be made again from the package alone."""
    out = tmp_path / "digits.safetensors"
    monkeypatch.setattr(sys, "argv", ["train", "--epochs", "1", "--out", str(out)])
    train.main()
    assert "of 359" in capsys.readouterr().out
    assert out.stat().st_size == CHECKPOINT.stat().st_size
