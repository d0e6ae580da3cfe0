"""A folder of images as a task: train/CLASS/*.png, and val/ or test/ as the test split.

Images are read when a batch asks for them and never kept: a folder may be larger than the memory.  All headers are read
at once, so that a broken or odd file is named before the work begins; what images become follows from those of train
and search alone.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from hirelc_deploy.errors import UserError
from hirelc_deploy.task import BATCH, Batch, Classification
from hirelc_deploy.usercode import reading

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
GRAY, COLOUR = frozenset({"1", "L"}), frozenset({"CMYK", "P", "RGB", "YCbCr"})
"""Pillow's modes that become one and three channels of 8 bits without loss; 16 bits and transparency are not there."""
OWN_TASK = "for any other preparation (resizing, normalising) write FILE.py:callable returning a Task"


def image_folder(folder: Path, *, seed: int = 0, batch: int = BATCH) -> Classification:
    """Inputs (N, 1 or 3, H, W) float32 in [0, 1], one channel if all train images are gray; labels by class name.

    Splits: train/; test/ or, without it, val/ as the test split; search/ or, beside a test/, val/ as the search
    split.  Classes are the folders of train/ in sorted order.  Raises UserError, naming the file or folder.
    """
    train, search, test = _splits(folder)
    classes = _classes(train)
    files = {split: _files(split, classes) for split in (train, search, test) if split is not None}
    headers = [header for split in (train, search) if split is not None for header in _headers(files[split])]
    form = _form(headers)
    for header in _headers(files[test]):
        _check(header, form)
    sources = {split: ImageSource(split, files[split], form) for split in files}
    return Classification(
        sources[train], sources[test], sources[search] if search is not None else None, batch=batch, seed=seed
    )


@dataclass(frozen=True)
class Form:
    """What every image becomes."""

    width: int
    height: int
    channels: int


@dataclass(frozen=True)
class ImageFile:
    path: Path
    label: int


@dataclass(frozen=True)
class Header:
    path: Path
    mode: str
    size: tuple[int, int]


class ImageSource:
    """The images of one split."""

    def __init__(self, folder: Path, files: Sequence[ImageFile], form: Form) -> None:
        self._folder, self._files, self._form = folder, files, form

    def __len__(self) -> int:
        return len(self._files)

    @cached_property
    def targets(self) -> np.ndarray:
        return np.array([file.label for file in self._files], np.int64)

    def take(self, indices: np.ndarray) -> Batch:
        images = np.stack([read_image(self._files[i].path, self._form) for i in indices])
        return {"input": images}, self.targets[indices]

    def header(self) -> str:
        """Names and sizes of the files."""
        with reading(self._folder):
            return " ".join(f"{f.path.relative_to(self._folder)}:{f.path.stat().st_size}" for f in self._files)


def read_image(path: Path, form: Form) -> np.ndarray:
    """(C, H, W) float32 in [0, 1].  Raises UserError for a broken image or one of another size."""
    with _open(path) as image:
        _check(Header(path, image.mode, image.size), form)
        try:
            pixels = np.asarray(image.convert("L" if form.channels == 1 else "RGB"))
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken pixels
            raise _broken(path, error) from error
    return np.moveaxis(pixels.reshape(form.height, form.width, form.channels), 2, 0).astype(np.float32) / 255


def _open(path: Path) -> Image.Image:
    with reading(path):
        try:
            image = Image.open(path)
        except (UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise _broken(path, error) from error
    if image.mode not in GRAY | COLOUR:
        image.close()
        raise UserError(
            f"{path} has pixels of the kind {image.mode!r}", fix=f"convert it to 8-bit gray or RGB; {OWN_TASK}"
        )
    return image


def _broken(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read as an image: {error}", fix="remove it, or copy it again from its origin")


def _splits(folder: Path) -> tuple[Path, Path | None, Path]:
    """The folders of train, search and test."""
    with reading(folder):
        there = {path.name for path in folder.iterdir() if path.is_dir()}
    if "train" not in there or not there & {"test", "val"}:
        raise UserError(
            f"{folder} has no {'train/' if 'train' not in there else 'test/ or val/'}; "
            f"it has {', '.join(sorted(there)) or 'no folders'}",
            fix="lay it out as train/CLASS/*.png and test/CLASS/*.png (or val/), and optionally search/CLASS/*.png",
        )
    test = "test" if "test" in there else "val"
    unused_val = test == "test" and "val" in there
    search = "search" if "search" in there else "val" if unused_val else None
    return folder / "train", folder / search if search else None, folder / test


def _classes(train: Path) -> list[str]:
    names = _class_names(train)
    if not names:
        raise UserError(f"{train} has no class folders", fix="put the images of each class in a folder of its own")
    return names


def _class_names(split: Path) -> list[str]:
    with reading(split):
        return sorted(path.name for path in split.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(split: Path, classes: Sequence[str]) -> list[ImageFile]:
    """Every image of a split, class by class in sorted order."""
    names = _class_names(split)
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UserError(
            f"{split} has the classes {', '.join(unknown)}, which train/ lacks",
            fix=f"the model knows those of train/ only: {', '.join(classes)}",
        )
    return [ImageFile(path, classes.index(name)) for name in names for path in _images(split / name)]


def _images(folder: Path) -> list[Path]:
    with reading(folder):
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not found:
        raise UserError(
            f"the class folder {folder} holds no images",
            fix=f"put images in it ({', '.join(sorted(SUFFIXES))}) or remove it",
        )
    return found


def _headers(files: Sequence[ImageFile]) -> list[Header]:
    headers = []
    for file in files:
        with _open(file.path) as image:
            headers.append(Header(file.path, image.mode, image.size))
    return headers


def _form(headers: Sequence[Header]) -> Form:
    """The size of the first image and one channel if all are gray.  Raises UserError unless all have that size."""
    width, height = headers[0].size
    form = Form(width, height, 3 if any(header.mode in COLOUR for header in headers) else 1)
    if len({header.size for header in headers}) > 1:
        sizes = ", ".join(f"{n} of {w}x{h}" for (w, h), n in Counter(header.size for header in headers).most_common(4))
        odd = next(header for header in headers if header.size != headers[0].size)
        raise UserError(
            f"the images differ in size ({sizes}): {odd.path} is {odd.size[0]}x{odd.size[1]} "
            f"and {headers[0].path} is {width}x{height}",
            fix=f"resize them to what the model takes; {OWN_TASK}",
        )
    return form


def _check(header: Header, form: Form) -> None:
    """Raises UserError unless the image can become what every image becomes."""
    if header.size != (form.width, form.height):
        raise UserError(
            f"{header.path} is {header.size[0]}x{header.size[1]} and the train images are {form.width}x{form.height}",
            fix=f"resize it; {OWN_TASK}",
        )
    if form.channels == 1 and header.mode not in GRAY:
        raise UserError(f"{header.path} is in colour and the train images are gray", fix=f"convert it; {OWN_TASK}")
