"""The folders beside this package, kernels/, exporters/ and profiles/, and their bare names.

They are installed as `hirelc_deploy.kernels` and so on.  Where the repository root is on Python's path, as in a
clone, `import kernels` finds the folder as well: transformers asks for a package of that name, another project's.
"""

import pkgutil
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

from hirelc_deploy.config import nearest
from hirelc_deploy.errors import UserError


def module_names(path: Iterable[str]) -> tuple[str, ...]:
    """The modules of a package with this `__path__`, sorted, without the helpers, whose names begin with `_`."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_")))


def load_module(package: str, name: str, *, kind: str) -> ModuleType:
    """The module `name` of a package that is one file a `kind`.  Raises UserError, with the nearest name."""
    loaded = sys.modules.get(f"{package}.{name}")
    if loaded is not None and not name.startswith("_"):  # formats are asked for all the time: the folder is not listed
        return loaded
    names = module_names(sys.modules[package].__path__)
    if name not in names:
        raise UserError(
            f"there is no {kind} {name!r}",
            fix=f"did you mean {nearest(name, names)}? There is {', '.join(names)}",
        )
    return import_module(f"{package}.{name}")


def give_way(name: str) -> None:
    """Put in the place of the module `name`, while it is imported, what Python would have found without our folder.

    That is another project's package of this name, or, where none is installed, an empty module: nothing of ours is
    ever loaded a second time under a second name.  To raise ImportError instead would break whoever merely asked.
    """
    ours = sys.modules[name]
    assert ours.__spec__ is not None
    root = Path(str(ours.__spec__.origin)).resolve().parents[1]
    theirs = PathFinder.find_spec(name, [entry for entry in sys.path if Path(entry).resolve() != root])
    if theirs is None or theirs.loader is None:
        sys.modules[name] = ModuleType(name, f"Nothing: the folder {name}/ is the package hirelc_deploy.{name}.")
        sys.modules[name].__spec__ = ours.__spec__  # importlib.util.find_spec refuses a module without one
        return
    sys.modules[name] = module_from_spec(theirs)
    theirs.loader.exec_module(sys.modules[name])
