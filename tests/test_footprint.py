"""Memory and load time of a file, taken in a process of its own."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from exporting import needs_linux
from onnx import TensorProto, helper, numpy_helper

from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters import _footprint
from hirelc_deploy.exporters._footprint import footprint

ROWS = 1024
INPUTS = {"x": np.ones((1, ROWS), np.float32)}


def product(path: Path, columns: int) -> Path:
    """A file whose one weight takes `columns` times 4 KiB."""
    weight = numpy_helper.from_array(np.ones((ROWS, columns), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, ROWS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, columns])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


@needs_linux
def test_the_weights_are_in_the_peak(tmp_path: Path) -> None:
    columns = 8192
    small, large = (footprint(product(tmp_path / f"{each}.onnx", each), INPUTS, threads=1) for each in (16, columns))
    assert small is not None
    assert large is not None
    weight_bytes = 4 * ROWS * columns
    assert large.memory_bytes - small.memory_bytes >= 0.95 * weight_bytes
    assert small.memory_bytes < weight_bytes, "what torch holds in this process is none of the session's"
    assert small.load_ms > 0


def test_a_file_that_cannot_be_loaded_says_so_in_the_runtimes_words(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"this is no protobuf")
    with pytest.raises(UserError, match=r"broken\.onnx: .*Protobuf parsing"):
        footprint(broken, INPUTS, threads=1)


def test_where_the_system_does_not_tell_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_footprint, "STATUS", tmp_path / "status")
    assert footprint(product(tmp_path / "a.onnx", 16), INPUTS, threads=1) is None
