"""Number formats: one format, one file.  Files that begin with `_` are shared helpers."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hirelc_deploy._outer import give_way, load_module, module_names
from hirelc_deploy.errors import UserError
from hirelc_deploy.policy import PerGroup, Storage

if TYPE_CHECKING:
    from hirelc_deploy.kernels._base import Format

if __name__ != "hirelc_deploy.kernels":
    give_way(__name__)


def format_names() -> tuple[str, ...]:
    """The formats of this folder, sorted."""
    return module_names(__path__)


def load_format(name: str) -> "Format":
    """The `FORMAT` of the file `name`.  Raises UserError, with the nearest name, where there is no such file."""
    return load_module(__name__, name, kind="number format").FORMAT


GROUP_SIZES = (16, 32, 64)
"""Sizes of groups that are offered where a format has groups."""


def every_storage() -> Iterator[Storage]:
    """All formats in all bits and granularities, the default granularity of each first."""
    for name in format_names():
        numbers = load_format(name)
        for bits in numbers.bits:
            for kind in numbers.granularities:
                granularities = [kind(size) for size in GROUP_SIZES] if issubclass(kind, PerGroup) else [kind()]
                for granularity in granularities:
                    yield Storage(name, bits, granularity)


def add_folder(folder: Path) -> None:
    """Find a user's own formats as well, one a file, as here.

    Raises UserError if there is no such folder, if it holds no format, or one that has the name of another's.
    """
    folder = folder.expanduser().resolve()
    if str(folder) in __path__:
        return
    own = module_names([str(folder)]) if folder.is_dir() else ()
    if not own:
        raise UserError(
            f"{folder} is no folder with number formats",
            fix="it holds one file a format, NAME.py with a FORMAT; CONTRIBUTING.md says what that is",
        )
    taken = sorted(set(own) & set(format_names()))
    if taken:
        raise UserError(f"{folder} has a format {taken[0]!r}, and so has this program", fix="rename its file")
    __path__.append(str(folder))
    try:
        for name in own:
            _check_format(folder, name)
    except BaseException:
        __path__.remove(str(folder))
        raise


def _check_format(folder: Path, name: str) -> None:
    """Raises UserError, in the file's own words, if it cannot be loaded or is not the format that it is called."""
    try:
        module = load_module(__name__, name, kind="number format")
    except Exception as error:  # the file is the user's, and so is whatever it raises
        raise UserError(
            f"{folder / name}.py cannot be loaded: {type(error).__name__}: {error}", fix="mend that file"
        ) from error
    if not hasattr(module, "FORMAT"):
        raise UserError(f"{folder / name}.py has no FORMAT", fix="end it with FORMAT = YourFormat()")
    if module.FORMAT.name != name:
        raise UserError(
            f"{folder / name}.py holds a format that is called {module.FORMAT.name!r}", fix=f"call it {name!r}"
        )
