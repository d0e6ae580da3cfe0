"""TensorRT: a file in its flavour, which is built into an engine on the device that runs it.

The path of a model: PyTorch -> float graph (`_float`) -> plan (`_trt_plan`) -> Q/DQ (`_trt_qdq`) -> halves
(`_trt_half`) -> bytes (`_compact`) -> lint (`_trt_lint`).  One file serves TensorRT 10, 11 and TensorRT-RTX.

Away from the device a file is run by an independent reference: ONNX Runtime without optimisations, which computes what
the operators say, node by node, every half rounded (`_trt_reference`).  That is a simulation of the engine's numbers,
and says nothing of its speed.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn

from hirelc_deploy.cost.kernel import Kernel
from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters import _sessions, _trt_lower
from hirelc_deploy.exporters._base import (
    NO_FLOATS,
    Adviser,
    Arrays,
    Exported,
    Floats,
    Footprint,
    KernelFile,
    KernelMaker,
    KernelSteps,
    Request,
    RoundingErrors,
    Session,
    Stored,
)
from hirelc_deploy.exporters._calibrate import Histogram, Method, magnitude_of
from hirelc_deploy.exporters._compact import drop_unused, share, shorten, to_bytes
from hirelc_deploy.exporters._float import FloatGraph, float_graph
from hirelc_deploy.exporters._graph import name_of, weight_of
from hirelc_deploy.exporters._observe import histograms, rounding_errors
from hirelc_deploy.exporters._plan import Plan
from hirelc_deploy.exporters._qdq import rounded
from hirelc_deploy.exporters._resize import with_shapes
from hirelc_deploy.exporters._trt_build import build, library
from hirelc_deploy.exporters._trt_fp32 import float_names, needing_fp32, nodes_in_fp32
from hirelc_deploy.exporters._trt_half import to_halves
from hirelc_deploy.exporters._trt_lint import lint
from hirelc_deploy.exporters._trt_plan import plan
from hirelc_deploy.exporters._trt_qdq import Span, place, scale_of
from hirelc_deploy.exporters._trt_reference import in_fp32
from hirelc_deploy.kernels._base import INT8_MAX, Grid
from hirelc_deploy.policy import FP32, Compute, Precision
from hirelc_deploy.profiles import Target


class TensorRt:
    """The `Runtime` contract of `_base` for TensorRT, as far as it can be held without its device."""

    name = "tensorrt"
    suffix = ".onnx"
    range_methods = tuple(Method)
    memory_law = None
    load_law = None
    is_symmetric = True
    builds_on_device = True

    def version(self) -> str:
        """What files are run by here."""
        return f"simulated by onnxruntime {_sessions.version()}"

    def float_graph(
        self, model: nn.Module, example: Arrays, *, opset: int, unfolded: Collection[str] = ()
    ) -> FloatGraph:
        """The float ONNX graph of a model in eval mode: what both baseline and artifact are written from."""
        graph = float_graph(model, example, opset=opset, unfolded=unfolded)
        share(graph.model, parameters=dict(model.named_parameters()))
        return graph

    def write(
        self,
        graph: FloatGraph,
        precisions: Mapping[str, Precision],
        grids: Mapping[str, Grid] | None = None,
        *,
        seen: Mapping[str, Histogram] | None = None,
        ranges: str = Method.MIN_MAX,
        floats: Floats = NO_FLOATS,
        largest: int = INT8_MAX,
        ir_version: int = 10,
        metadata: Mapping[str, str] | None = None,
    ) -> Exported:
        """The file of a float graph under the given precisions.

        Where every layer computes in fp32 all of it does; otherwise what is not decided computes in fp16, but for the
        operators that are in fp32 by `floats`.  `seen` is
        what `observe` gave for the same layers and `floats`.  Raises UserError for a weight that TensorRT cannot hold
        as it was decided.
        """
        layout = plan(graph, precisions, floats=floats)
        if layout.calibrated and seen is None:
            raise ValueError(f"{len(layout.calibrated)} tensors have no range: observe first")
        histograms_of = {name: (seen or {})[name] for name in layout.calibrated}
        spans = {
            name: Span(magnitude_of(each, Method(ranges)), magnitude_of(each, Method.MIN_MAX))
            for name, each in histograms_of.items()
        }
        return _finish(
            graph,
            precisions,
            layout,
            spans,
            grids or {},
            floats=floats,
            largest=largest,
            ir_version=ir_version,
            metadata=metadata or {},
        )

    def observe(
        self,
        graph: FloatGraph,
        precisions: Mapping[str, Precision],
        calibration: Iterable[Arrays],
        *,
        floats: Floats = NO_FLOATS,
    ) -> dict[str, Histogram]:
        """The values of every tensor that is quantised, from one pass with one batch in memory."""
        return histograms(graph, plan(graph, precisions, floats=floats).calibrated, calibration)

    def rounding_errors(
        self, graph: FloatGraph, precisions: Mapping[str, Precision], examples: Sequence[Arrays]
    ) -> RoundingErrors:
        """What it would cost to round the int8 activations of a float graph, each alone."""
        layout = plan(graph, precisions)

        def on_its_grid(name: str, histogram: Histogram) -> FloatGraph:
            return rounded(graph, name, scale_of(magnitude_of(histogram, Method.MSE)), np.array(0, np.int8))

        return rounding_errors(graph, layout, examples, on_its_grid)

    def needing_fp32(
        self, graph: FloatGraph, examples: Sequence[Arrays], *, bearable: float, adviser: Adviser | None = None
    ) -> dict[str, str]:
        """The layers and operators that fp16 ruins, and why."""
        return needing_fp32(graph, examples, bearable=bearable, adviser=adviser)

    def foreseen(
        self,
        graph: FloatGraph,
        shapes: Mapping[str, tuple[int, ...]],
        precisions: Mapping[str, Precision],
        *,
        floats: Floats = NO_FLOATS,
        ir_version: int = 10,
        metadata: Mapping[str, str] | None = None,
    ) -> bytes:
        """A file as long as that which `write` will make once the model has parameters of these shapes."""
        small = with_shapes(graph, shapes)
        layout = plan(small, precisions, floats=floats)
        exported = _finish(
            small,
            precisions,
            layout,
            dict.fromkeys(layout.calibrated, Span(1.0, 1.0)),
            None,
            floats=floats,
            largest=INT8_MAX,
            ir_version=ir_version,
            metadata=metadata or {},
        )
        return exported.data

    def load(self, path: Path, *, threads: int) -> Session:
        """The file in the reference.  Raises UserError if that cannot load it, or no TensorRT could."""
        if path.suffix != self.suffix:
            raise UserError(
                f"{path.name} is an engine, which runs on the device that built it and nowhere else",
                fix="measure it there: hirelc-deploy verify DIR --host user@device",
            )
        model = onnx.load(path)
        lint(model)
        # node by node, as it is written
        options = _sessions.options(threads, _sessions.Level.ORT_DISABLE_ALL)
        return _sessions.Loaded(_sessions.in_memory(in_fp32(model), options))

    def inspect(self, path: Path, target: Target, tensors: Mapping[str, str]) -> tuple[str, ...]:
        """Lint a file for the target.  Raises UserError for what its TensorRT would refuse, by layer."""
        gpu = target.gpu
        pairs = gpu is not None and gpu.int4_in_pairs
        lint(onnx.load(path), opset=target.runtime.opset, int4_in_pairs=pairs, layers=tensors)
        notes = [
            f"the file was run by ONNX Runtime {_sessions.version()} without optimisations: its accuracy is a "
            f"simulation of {target.description if gpu is None else gpu.software}, and size_bytes is that of the file, "
            "not of the engine that the device builds from it",
        ]
        if gpu is not None and library() is not None:
            built = build(path.read_bytes(), gpu.compute_capability, batch=target.batch, layers=tensors)
            notes.append(
                f"{built.library} accepts the file and builds an engine of {len(built.data)} bytes for "
                f"{built.built_for}: an acceptance test of the file, and no evidence about compute capability "
                f"{gpu.compute_capability}"
            )
        return tuple(notes)

    def footprint(self, path: Path, inputs: Arrays, *, threads: int) -> Footprint | None:
        """Not known before there is an engine."""
        return None

    def runs_as(self, path: Path, tensors: Mapping[str, str], *, threads: int) -> dict[str, str | None]:
        """Layer -> None: only an engine says what a layer runs as."""
        return dict.fromkeys(tensors)

    network = staticmethod(_trt_lower.TensorRtLowering.network)

    def kernel_steps(self, kernel: Kernel) -> KernelSteps:
        raise _not_here()

    def answer(self, request: Request) -> Any:
        raise _not_here()

    def nothing(self) -> KernelMaker:
        raise _not_here()

    def kernel_session(self, file: KernelFile, *, threads: int) -> Session:
        raise _not_here()


def _not_here() -> UserError:
    return UserError(
        "kernels of TensorRT cannot be timed on this machine",
        fix="the target's latencies are told from its estimate; a finished artifact is timed on the device",
    )


def _finish(
    graph: FloatGraph,
    precisions: Mapping[str, Precision],
    layout: Plan,
    spans: Mapping[str, Span],
    grids: Mapping[str, Grid] | None,
    *,
    floats: Floats,
    largest: int,
    ir_version: int,
    metadata: Mapping[str, str],
) -> Exported:
    written = graph.copy()
    body = written.model.graph
    in_floats = {weight for layer, weight in graph.weights.items() if _compute(precisions, layer) is Compute.FP32}
    layers = [node for node in body if (weight := weight_of(node)) is not None and weight.name in in_floats]
    between = nodes_in_fp32(written, floats)
    stored = place(written, layout, spans, precisions, grids, largest=largest)
    if any(precision.compute is not Compute.FP32 for precision in precisions.values()):
        to_halves(body, in_floats={*layers, *between}, no_floats=_no_floats(graph) if between else ())
    stored |= {layer: _in_floats(written, name) for layer, name in graph.weights.items() if layer not in stored}
    drop_unused(written.model)
    renamed = shorten(written.model)
    data = to_bytes(written.model, ir_version=ir_version, metadata=metadata)
    return Exported(
        data,
        {
            layer: replace(stored[layer], tensor=renamed.get(stored[layer].tensor, stored[layer].tensor))
            for layer in graph.weights
        },
    )


def _no_floats(graph: FloatGraph) -> frozenset[str]:
    values = (*graph.model.graph.inputs, *(value for node in graph.model.graph for value in node.outputs))
    return frozenset(map(name_of, values)) - float_names(graph)


def _compute(precisions: Mapping[str, Precision], layer: str) -> Compute:
    return precisions.get(layer, FP32).compute


def _in_floats(graph: FloatGraph, weight: str) -> Stored:
    tensor = graph.model.graph.initializers[weight].const_value
    assert tensor is not None
    return Stored(weight, f"fp{8 * tensor.dtype.itemsize:.0f} values", tensor.nbytes)


RUNTIME = TensorRt()
