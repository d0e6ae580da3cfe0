"""Runtimes: one runtime, one file.  Files that begin with `_` are shared helpers."""

from typing import TYPE_CHECKING

from hirelc_deploy._outer import give_way, load_module, module_names

if TYPE_CHECKING:
    from hirelc_deploy.exporters._base import Runtime

if __name__ != "hirelc_deploy.exporters":
    give_way(__name__)


def runtime_names() -> tuple[str, ...]:
    """The runtimes of this folder, sorted."""
    return module_names(__path__)


def load_runtime(name: str) -> "Runtime":
    """The `RUNTIME` of the file `name`.  Raises UserError, with the nearest name, where there is no such file."""
    return load_module(__name__, name, kind="runtime").RUNTIME
