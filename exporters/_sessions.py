"""Sessions of ONNX Runtime's CPU provider: the one file that imports it."""

from pathlib import Path

from onnxruntime import (
    GraphOptimizationLevel as Level,
    InferenceSession as Session,
    SessionOptions,
    __version__ as VERSION,
)

from hirelc_deploy.errors import UserError

__all__ = ["Level", "Session", "in_memory", "of_file", "options", "version"]


def version() -> str:
    return str(VERSION)


def options(threads: int, level: Level = Level.ORT_ENABLE_ALL) -> SessionOptions:
    found = SessionOptions()
    found.intra_op_num_threads = threads
    found.inter_op_num_threads = 1
    found.graph_optimization_level = level
    found.log_severity_level = 3  # the optimiser's warnings are about names that we shortened
    return found


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
