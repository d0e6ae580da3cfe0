"""Engines built without a GPU: an acceptance test of the files, and no evidence about a device."""

import platform
import sys

import onnx
import pytest
from torch import nn
from trt_files import INT4, INT4_BLOCKS, INT4_LONG_BLOCKS, NETWORKS, case

from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters import _trt_build
from hirelc_deploy.exporters._trt_build import build, library, nearest_capability
from hirelc_deploy.exporters._trt_exec import operators_by_layer
from hirelc_deploy.policy import FP8, FP16, INT8, Precision

IS_BROUGHT = sys.platform == "linux" and platform.machine() == "x86_64"
"""Whether the development environment has the library: there its tests fail without it."""

needs_library = pytest.mark.skipif(
    library() is None and not IS_BROUGHT,
    reason="neither tensorrt_rtx nor tensorrt is installed: pip install hirelc-deploy[tensorrt-rtx]",
)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_trt_build, "_trt", lambda: None)
    return


def test_without_the_library_nothing_is_built(no_library: None) -> None:
    assert library() is None
    with pytest.raises(ValueError, match="neither tensorrt_rtx nor tensorrt is installed"):
        build(b"", "8.6")


@pytest.mark.parametrize(
    ("wanted", "known", "found"),
    [
        ("8.7", ("7.5", "8.0", "8.6", "8.9"), "8.6"),
        ("8.9", ("8.6", "8.9", "12.0"), "8.9"),
        ("12.1", ("8.9", "12.0"), "12.0"),
        ("11.0", ("8.9", "12.0"), None),
    ],
)
def test_the_nearest_older_capability_of_a_generation_stands_in(
    wanted: str, known: tuple[str, ...], found: str | None
) -> None:
    assert nearest_capability(wanted, known) == found


@needs_library
@pytest.mark.parametrize("precision", [None, FP16, INT8, INT4], ids=str)
@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_form_is_built(name: str, precision: Precision | None) -> None:
    network = case(name)
    exported = network.write(network.precisions(precision))
    for capability in ("8.6", "8.9", "8.7"):
        built = build(exported.data, capability, layers=exported.tensors)
        assert len(built.data) > 10_000
        assert built.built_for == ("SM89" if capability == "8.9" else "SM86")


@needs_library
@pytest.mark.parametrize(
    ("name", "precisions"),
    [("words", {"inner": INT4_BLOCKS, "head": FP16}), ("residual", {"head": INT4_LONG_BLOCKS})],
)
def test_int4_in_blocks_is_built(name: str, precisions: dict[str, Precision]) -> None:
    assert build(case(name).write(precisions).data, "8.6").data


@needs_library
@pytest.mark.parametrize("name", ["attention", "words"])
def test_fp8_is_built_from_ada_on(name: str) -> None:
    network = case(name)
    exported = network.write(network.precisions(FP8, nn.Linear))
    for capability in ("8.9", "12.0"):
        assert len(build(exported.data, capability, layers=exported.tensors).data) > 10_000
    with pytest.raises(UserError, match="no engine for SM86: SM86 has no FP8"):
        build(exported.data, "8.6", layers=exported.tensors)


@needs_library
def test_what_a_capability_lacks_is_said_in_our_words() -> None:
    network = case("words")
    with pytest.raises(UserError, match="no engine for SM75: SM75 has no INT4") as refused:
        build(network.write({"inner": INT4, "head": FP16}).data, "7.5")
    assert "take int4 out" in refused.value.fix


@needs_library
def test_what_the_parser_refuses_is_named_by_layer() -> None:
    network = case("residual")
    exported = network.write(network.precisions(INT8))
    model = onnx.load_from_string(exported.data)
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "BitCount"
    with pytest.raises(UserError, match="TensorRT's parser refuses") as refused:
        build(model.SerializeToString(), "8.6", layers=exported.tensors)
    assert "BitCount" in refused.value.what
    assert refused.value.fix


@needs_library
def test_nodes_are_called_as_reading_an_engine_back_expects() -> None:
    trt = _trt_build._trt()
    network = case("residual")
    exported = network.write(network.precisions(INT8))
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    parsed = builder.create_network(0)
    assert trt.OnnxParser(parsed, log).parse(exported.data)
    kinds = (trt.LayerType.CONVOLUTION, trt.LayerType.MATRIX_MULTIPLY)
    names = {layer.name for layer in map(parsed.get_layer, range(parsed.num_layers)) if layer.type in kinds}
    expected = operators_by_layer(onnx.load_from_string(exported.data), exported.tensors)
    assert names == {name for each in expected.values() for name in each}


@needs_library
def test_a_capability_that_nobody_knows_is_refused() -> None:
    network = case("residual")
    with pytest.raises(UserError, match=r"builds nothing for compute capability 5\.3"):
        build(network.write({}).data, "5.3")
