"""Number formats: one format, one file.  Files that begin with `_` are shared helpers."""

from typing import TYPE_CHECKING

from hirelc_deploy._outer import give_way, load_module, module_names

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
