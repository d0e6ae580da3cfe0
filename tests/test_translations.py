"""What PyTorch's exporter knows of operators is read once a process, which no user of PyTorch may notice."""

from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry
from written_networks import RUNTIME, floats

from hirelc_deploy.exporters import _translations


def test_the_exporter_reads_its_translations_once_and_is_left_as_it_was(monkeypatch):
    """1,500 of them, which takes longer than writing a small network."""
    read, calls = _translations._from_torchlib, []
    monkeypatch.setattr(_translations, "_from_torchlib", lambda **version: calls.append(version) or read(**version))
    _translations._read.cache_clear()
    before = ONNXRegistry.__dict__["from_torchlib"]
    for outputs in (3, 5):
        RUNTIME.float_graph(nn.Linear(4, outputs).eval(), {"input": floats(4)}, opset=18)
    assert len(calls) == 1
    assert ONNXRegistry.__dict__["from_torchlib"] is before


def test_a_pytorch_that_keeps_its_translations_elsewhere_writes_files_all_the_same(monkeypatch):
    monkeypatch.setattr(_translations, "ONNXRegistry", None)
    graph = RUNTIME.float_graph(nn.Linear(4, 3).eval(), {"input": floats(4)}, opset=18)
    assert len(graph.weights) == 1
