"""What the user names on the command line: files to read and Python to call.

User code runs here and nowhere else, and only the file or module that `--model` or `--data` names.
"""

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from hirelc_deploy.errors import UserError

PREFIX = "_hirelc_user_"
"""Of the names in `sys.modules` under which the user's files are imported."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the operating system says about `path` (missing, no permission, a bad disk) into a UserError."""
    try:
        yield
    except FileNotFoundError as error:
        missing = error.filename or path
        raise UserError(f"{missing} does not exist", fix="check the path; it is relative to where you are") from error
    except PermissionError as error:
        denied = error.filename or path
        raise UserError(f"no permission to read {denied}", fix=f"chmod u+r {denied}, or ask its owner") from error
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path} cannot be read: {why}", fix="check that it is a whole file on a sound disk") from error


def is_callable_spec(spec: str) -> bool:
    """Whether `spec` has the form FILE.py:callable or package.module:callable."""
    module, colon, name = spec.rpartition(":")
    return bool(colon) and name.isidentifier() and (module.endswith(".py") or _dotted(module))


def call(spec: str) -> Any:
    """What the callable of `FILE.py:callable` or `package.module:callable` returns; it is called without arguments.

    Raises UserError if there is no such file, module or callable, and with the place and the words of whatever the
    user's code raised.  A UserError of the user's code passes through.
    """
    module_name, _, name = spec.rpartition(":")
    if module_name.endswith(".py"):
        path = Path(module_name)
        folder, load = path.resolve().parent, lambda: _import_file(path)
    else:
        folder, load = Path.cwd(), lambda: importlib.import_module(module_name)

    with _importable(folder):
        module = _run(spec, load)
        return _run(spec, _callable(module, name, module_name))


def digest(*specs: str) -> str:
    """SHA-256 of the files among specs FILE.py:callable: another forward, or another score, is another run.

    Of what was handed over in memory a spec is only a name, of which there may be no file.
    """
    found = hashlib.sha256()
    for spec in specs:
        path = Path(spec.rpartition(":")[0])
        if path.suffix == ".py" and path.is_file():
            with reading(path):
                found.update(path.read_bytes())
    return found.hexdigest()


def _dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _callable(module: ModuleType, name: str, where: str) -> Callable[[], Any]:
    found = getattr(module, name, None)
    if callable(found):
        return found
    offered = sorted(
        key
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__
    )
    raise UserError(
        f"{where} has no callable {name!r}",
        fix=f"its own are: {', '.join(offered)}" if offered else f"define a function {name}() in it",
    )


def _import_file(path: Path) -> ModuleType:
    """Import a file under a name of its own, so that two files called `model.py` are two modules."""
    with reading(path):
        source = path.read_bytes()
    digest = hashlib.sha256(str(path.resolve()).encode() + b"\0" + source).hexdigest()[:12]
    name = f"{PREFIX}{digest}_{path.stem}"
    if name in sys.modules:  # --model and --data may name the same file: its classes must be the same ones
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None, "a .py file always has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _run(spec: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a script without a __main__ guard may call sys.exit
        raise UserError(
            f"{spec} raised {type(error).__name__}: {error}{_place(error, spec)}",
            fix="run that function on its own in Python until it returns, then try again",
        ) from error


def _place(error: BaseException, spec: str) -> str:
    """The line of the user's own code that the error came through last."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).name == Path(spec.rpartition(":")[0]).name]
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    if not own:
        own = [
            frame for frame in frames if Path(frame.filename) != Path(__file__) and "importlib" not in frame.filename
        ]
    return f" ({own[-1].filename}, line {own[-1].lineno}: {own[-1].line})" if own else ""


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """`folder` comes first on the import path, as for a script in it."""
    _forget_namesakes(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _forget_namesakes(folder: Path) -> None:
    """Two user files may each have a `data.py` beside them: the second must not be handed the first one's."""
    others = {Path(m.__file__).parent for name, m in sys.modules.items() if name.startswith(PREFIX) and m.__file__}
    for file in folder.glob("*.py"):
        loaded = getattr(sys.modules.get(file.stem), "__file__", None)
        if loaded and Path(loaded) != file and Path(loaded).parent in others:
            del sys.modules[file.stem]
