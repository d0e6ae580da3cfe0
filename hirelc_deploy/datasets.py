"""Ready-made data: what `--data` may name.

`digits` is embedded in scikit-learn; `FILE.npz` holds arrays; a folder holds images (imagefolder.py); and
`FILE.py:callable` returns a Task of the user's own.
"""

import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hirelc_deploy.errors import UserError
from hirelc_deploy.imagefolder import image_folder
from hirelc_deploy.task import BATCH, ArraySource, Batch, Classification, Task, stratified_holdout
from hirelc_deploy.usercode import call, is_callable_spec, reading

DIGITS_TEST, DIGITS_SEARCH, DIGITS_SEED = 0.2, 0.2, 0
NEEDED, OPTIONAL = ("x_train", "y_train", "x_test", "y_test"), ("x_search", "y_search")


def load_task(spec: str, *, seed: int = 0, batch: int = BATCH) -> Task:
    """The task that `--data` names.

    `seed` cuts the search split of data that brings none, and `batch` is its batch size; a Task that the user's
    callable returns has made both choices itself.  Raises UserError for anything that cannot be used; train and
    search data are looked through, the test data is not.
    """
    task = _load(spec, seed, batch)
    task.spec = spec
    return task


def _load(spec: str, seed: int, batch: int) -> Task:
    path = Path(spec)
    if spec == "digits":
        return digits(batch=batch)
    if is_callable_spec(spec):
        return _from_callable(spec)
    if path.suffix == ".npz":
        return npz(path, seed=seed, batch=batch)
    with reading(path):
        is_folder = path.is_dir()
        path.stat()
    if is_folder:
        return image_folder(path, seed=seed, batch=batch)
    raise UserError(
        f"--data {spec} is nothing that can be read",
        fix="name `digits`, a FILE.npz, a folder of images or FILE.py:callable returning a Task",
    )


def _from_callable(spec: str) -> Task:
    task = call(spec)
    if not isinstance(task, Task):
        raise UserError(
            f"{spec} returned a {type(task).__name__}, not a Task",
            fix="return a hirelc_deploy.task.Classification, or a subclass of hirelc_deploy.task.Task",
        )
    return task


def digits(*, batch: int = BATCH) -> Classification:
    """Scikit-learn's 1,797 handwritten digits: inputs (N, 1, 8, 8) float32 in [0, 1], labels 0 to 9.

    The cut in three never changes: the demo network was trained on the train part only.
    """
    parts = {name: ArraySource(images[:, None], labels) for name, (images, labels) in digit_images().items()}
    return Classification(parts["train"], parts["test"], parts["search"], batch=batch)


def digit_images() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (N, 8, 8) float32 in [0, 1] and labels (N,) int64 of train, search and test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = (data.images / 16).astype(np.float32), data.target.astype(np.int64)
    rest, test = stratified_holdout(labels, DIGITS_TEST, DIGITS_SEED)
    train, search = stratified_holdout(labels[rest], DIGITS_SEARCH, DIGITS_SEED)
    parts = {"train": rest[train], "search": rest[search], "test": test}
    return {name: (images[indices], labels[indices]) for name, indices in parts.items()}


def npz(path: Path, *, seed: int = 0, batch: int = BATCH) -> Classification:
    """Arrays x_train, y_train, x_test, y_test and, where the network has not seen them, x_search, y_search.

    x is as the model takes it, first axis the example (images NCHW), floats or int32/int64 indices; y holds class
    numbers (N,).  Raises UserError for a missing array, one of another kind, unequal lengths, NaN or infinity.
    """
    members = npz_members(path)
    wanted = NEEDED if not set(OPTIONAL) & set(members) else NEEDED + OPTIONAL
    missing = [name for name in wanted if name not in members]
    if missing:
        raise UserError(
            f"{path} has no array {', '.join(missing)}; it has {', '.join(sorted(members)) or 'none'}",
            fix="np.savez(FILE, x_train=…, y_train=…, x_test=…, y_test=…), and optionally x_search and y_search",
        )
    for name in wanted:
        like = members["x_train"] if name.startswith("x_") else members["y_train"]
        array = members[name]
        # floats of any width are taken as floats
        if array.shape[1:] != like.shape[1:] or (name.startswith("x_") and array.dtype.kind != like.dtype.kind):
            raise UserError(
                f"{path.name}: {name} holds {array.dtype} of the shape {array.shape[1:]} an example, and {like.name} "
                f"{like.dtype} of the shape {like.shape[1:]}",
                fix="store all splits as the model takes them",
            )
    sources = {
        name: NpzSource(members[f"x_{name}"], members[f"y_{name}"])
        for name in ("train", "test", "search")
        if f"x_{name}" in wanted
    }
    task = Classification(sources["train"], sources["test"], sources.get("search"), batch=batch, seed=seed)
    for split in (task.train, task.search):
        for _ in split:  # reading is checking: better now than after an hour of search
            pass
    return task


DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, ValueError, EOFError, NotImplementedError, RuntimeError)
"""What reading an archive raises that is none, or no whole one: the last two of compressions and locks it pretends."""


@dataclass(frozen=True)
class NpzMember:
    """One array of an .npz file by its header; nothing of the array has been read."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    crc32: int
    """Of the array's bytes, as the archive states it."""
    offset: int | None
    """Where the array's bytes begin in the file; None where they are compressed."""

    def array(self) -> np.ndarray:
        """Memory-mapped where the archive is not compressed, read whole where it is."""
        with reading(self.path):
            if self.offset is not None and self.shape and 0 not in self.shape:
                order: Any = "F" if self.fortran_order else "C"
                return np.memmap(self.path, self.dtype, "r", self.offset, self.shape, order)
            try:
                with np.load(self.path, allow_pickle=False) as archive:
                    return archive[self.name]
            except DAMAGE as error:
                raise UserError(
                    f"{self.name} of {self.path} is damaged: {error}", fix="write the file again"
                ) from error


def npz_members(path: Path) -> Mapping[str, NpzMember]:
    """The arrays of an .npz file by name, from their headers alone.  Raises UserError if it is none."""
    with reading(path), path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return {info.filename.removesuffix(".npy"): _member(path, archive, info) for info in archive.infolist()}
        except DAMAGE as error:
            raise UserError(
                f"{path} is no .npz file: {error}", fix="write it with np.savez(FILE, x_train=…)"
            ) from error


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NpzMember:
    with archive.open(info) as entry:
        version = np.lib.format.read_magic(entry)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(entry)
        header_bytes = entry.tell()
    name = info.filename.removesuffix(".npy")
    if dtype.hasobject:
        raise UserError(
            f"{name} in {path} holds Python objects, which could run code when they are read",
            fix="save arrays of numbers; examples of unequal shape have to be padded or cropped first",
        )
    stored = info.compress_type == zipfile.ZIP_STORED
    offset = _data_offset(archive, info) + header_bytes if stored else None
    return NpzMember(path, name, shape, dtype, fortran_order, info.CRC, offset)


def _data_offset(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its local header, whose extra field may differ from the directory's."""
    assert archive.fp is not None
    archive.fp.seek(info.header_offset + 26)  # PKWARE's APPNOTE 4.3.7: lengths of the name and of the extra field
    name_bytes, extra_bytes = struct.unpack("<HH", archive.fp.read(4))
    return info.header_offset + 30 + name_bytes + extra_bytes


class NpzSource:
    """Inputs and labels of one split, read when they are asked for."""

    def __init__(self, x: NpzMember, y: NpzMember) -> None:
        self._x, self._y = x, y
        self._dtype = _model_dtype(x)
        if y.shape != (x.shape or (0,))[:1]:
            raise UserError(
                f"{y.name} in {y.path} has the shape {list(y.shape)} and {x.name} has {list(x.shape)}",
                fix=f"{y.name} is one class number for each example of {x.name}: (N,)",
            )
        if not np.issubdtype(y.dtype, np.integer):
            raise UserError(
                f"{y.name} in {y.path} is {y.dtype}, not integers",
                fix="store class numbers, y.astype('int64'); for another kind of target write a Task: FILE.py:callable",
            )

    def __len__(self) -> int:
        return self._y.shape[0]

    @cached_property
    def targets(self) -> np.ndarray:
        return np.asarray(self._y.array(), dtype=np.int64)

    @cached_property
    def _inputs(self) -> np.ndarray:
        return self._x.array()

    def take(self, indices: np.ndarray) -> Batch:
        return {"input": self._inputs[indices].astype(self._dtype, copy=False)}, self.targets[indices]

    def header(self) -> str:
        return " ".join(f"{m.dtype}{list(m.shape)}:{m.crc32:08x}" for m in (self._x, self._y))


def _model_dtype(x: NpzMember) -> np.dtype:
    """float32 for floats, int64 for indices; anything else is not what a model takes."""
    if np.issubdtype(x.dtype, np.floating):
        return np.dtype(np.float32)
    if x.dtype in (np.dtype(np.int32), np.dtype(np.int64)):
        return np.dtype(np.int64)
    raise UserError(
        f"{x.name} in {x.path} is {x.dtype}",
        fix="store it as the model takes it: float32, scaled and normalised as in training (or int64 indices)",
    )
