"""Sessions of ONNX Runtime's CPU provider: the one file that imports it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from onnxruntime import (
    GraphOptimizationLevel as Level,
    InferenceSession as Session,
    SessionOptions,
    __version__ as VERSION,
)

from hirelc_deploy.errors import UserError

__all__ = ["Level", "Loaded", "Session", "in_memory", "of_file", "options", "version"]


def version() -> str:
    return str(VERSION)


SPIN_US = 300
"""How long a worker of several waits for work before it sleeps: longer than most kernels that leave it idle, and over
before the next session's turn.  Left alone it spins for tens of milliseconds to a second, and so do those of every
other session that is open: timed in turns, each would share its cores with all of them (benchmarks/spinning.py)."""

SPIN_DURATION_SINCE = (1, 26)
"""Versions before have only a switch, that ends the spinning with each inference."""


def options(threads: int, level: Level = Level.ORT_ENABLE_ALL) -> SessionOptions:
    found = SessionOptions()
    if threads > 1:
        found.add_session_config_entry(*_spinning(version()))
    found.intra_op_num_threads = threads
    found.inter_op_num_threads = 1
    found.graph_optimization_level = level
    found.log_severity_level = 3  # the optimiser's warnings are about names that we shortened
    return found


def _spinning(of_version: str) -> tuple[str, str]:
    """The setting that keeps workers from spinning into another session's turn."""
    if tuple(map(int, of_version.split(".")[:2])) < SPIN_DURATION_SINCE:
        return "session.force_spinning_stop", "1"
    return "session.intra_op.spin_duration_us", str(SPIN_US)


def in_memory(data: bytes, chosen: SessionOptions) -> Session:
    return Session(data, chosen, ["CPUExecutionProvider"])


def of_file(path: Path, chosen: SessionOptions) -> Session:
    """Raises UserError if the file cannot be loaded."""
    try:
        return Session(str(path), chosen, ["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(
            f"ONNX Runtime {version()} cannot load {path.name}: {str(error).splitlines()[0]}",
            fix="is the file whole, and the runtime at least the version that the target names?",
        ) from error


class Loaded:
    """A file, ready to run; in the calling thread where it has one."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of one batch by name.  Raises UserError where the file does not run on it."""
        try:
            values = self._session.run(self._outputs, dict(inputs))
        except Exception as error:
            raise UserError(
                f"ONNX Runtime {version()} does not run the file on some examples: {str(error).splitlines()[0]}",
                fix="does the model run on them? token ids have to lie below its vocabulary",
            ) from error
        return dict(zip(self._outputs, values, strict=True))
