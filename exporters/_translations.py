"""What PyTorch's exporter knows of operators, read once a process.

It reads its 1,500 translations anew for every file, which is two thirds of what the file of a small network takes, and
a search writes many.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

try:
    from torch.onnx._internal.exporter._registration import ONNXRegistry
except ImportError:  # no public name has it: where another version keeps it elsewhere, files take longer
    ONNXRegistry = None  # type: ignore[assignment,misc]

READ = "from_torchlib"


@contextmanager
def read_once() -> Iterator[None]:
    """While a file is written; not for threads that write side by side."""
    original = getattr(ONNXRegistry, "__dict__", {}).get(READ)
    if original is None:
        yield
        return
    setattr(ONNXRegistry, READ, staticmethod(_read))
    try:
        yield
    finally:
        setattr(ONNXRegistry, READ, original)


_from_torchlib = getattr(ONNXRegistry, READ, None)


@cache
def _read(*version: int, **named: int) -> Any:
    assert _from_torchlib is not None
    return _from_torchlib(*version, **named)
