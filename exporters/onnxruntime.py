"""ONNX Runtime on CPU: files that run on every version from 1.16 on, in its own Q/DQ flavour.

The path of a model: PyTorch -> float graph (`_float`) -> plan and Q/DQ (`_qdq`) -> bytes (`_compact`).
"""

import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
from torch import nn

from hirelc_deploy.exporters import _kernels, _lower, _memory, _sessions
from hirelc_deploy.exporters._base import (
    NO_FLOATS,
    Adviser,
    Arrays,
    Exported,
    Floats,
    KernelFile,
    RoundingErrors,
    Session,
)
from hirelc_deploy.exporters._calibrate import Histogram, Method, Range, range_of
from hirelc_deploy.exporters._compact import drop_unused, share, shorten, to_bytes
from hirelc_deploy.exporters._float import FloatGraph, apart, float_graph
from hirelc_deploy.exporters._footprint import footprint
from hirelc_deploy.exporters._observe import histograms, rounding_errors
from hirelc_deploy.exporters._plan import Plan, plan
from hirelc_deploy.exporters._qdq import place, rounded
from hirelc_deploy.exporters._reach import computable
from hirelc_deploy.exporters._resize import with_shapes
from hirelc_deploy.kernels._base import INT8_MAX, Grid
from hirelc_deploy.policy import Precision
from hirelc_deploy.profiles import Target

COMPUTE_OF = {
    **dict.fromkeys(["QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"], "int8"),
    **dict.fromkeys(["DynamicQuantizeMatMul", "ConvInteger"], "int8_dynamic"),
    **dict.fromkeys(["Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"], "fp32"),
    **dict.fromkeys(["Gather"], "fp32"),
}
"""What a layer computes in, by the operator that it is after a session has optimised the graph."""

LAYER_OPERATORS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger", "Gather"}
"""What a layer is in the file."""

DYNAMIC = "DynamicQuantizeLinear"
"""What quantises a tensor at every run: the integer kernels behind it are dynamic ones."""

BLOCKED_SUFFIX = "_nchwc"
"""ONNX Runtime renames the weights that it reorders into blocks of channels, and calls the node by its output."""


class OnnxRuntime:
    """The `Runtime` contract of `_base` for ONNX Runtime's CPU provider."""

    name = "onnxruntime"
    suffix = ".onnx"
    range_methods = tuple(Method)
    memory_law = _memory.LAW
    load_law = _memory.LOAD_LAW
    is_symmetric = False
    builds_on_device = False

    def version(self) -> str:
        return _sessions.version()

    def float_graph(
        self, model: nn.Module, example: Arrays, *, opset: int, unfolded: Collection[str] = ()
    ) -> FloatGraph:
        """The float ONNX graph of a model in eval mode: what both baseline and artifact are written from."""
        graph = float_graph(model, example, opset=opset, unfolded=unfolded)
        share(graph.model, parameters=dict(model.named_parameters()))
        return apart(graph, model)

    def write(
        self,
        graph: FloatGraph,
        precisions: Mapping[str, Precision],
        grids: Mapping[str, Grid] | None = None,
        *,
        seen: Mapping[str, Histogram] | None = None,
        ranges: str = Method.MIN_MAX,
        floats: Floats = NO_FLOATS,
        largest: int = 127,
        ir_version: int = 8,
        metadata: Mapping[str, str] | None = None,
    ) -> Exported:
        """The file of a float graph under the given precisions; layers without one stay fp32.

        `seen` is what `observe` gave for the same layers and `floats`, for the ranges of int8 activations.
        """
        layout = plan(graph, precisions, floats=floats)
        if layout.calibrated and seen is None:
            raise ValueError(f"{len(layout.calibrated)} tensors have no range: observe first")
        found = {
            name: range_of((seen or {})[name], Method(ranges), nonnegative=layout.tensors[name].nonnegative)
            for name in layout.calibrated
        }
        return _finish(
            graph,
            precisions,
            layout,
            computable(graph, layout, found, grids or {}),
            grids or {},
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
        """The values of every tensor that int8 layers have in integers, from one pass with one batch in memory."""
        return histograms(graph, plan(graph, precisions, floats=floats).calibrated, calibration)

    def rounding_errors(
        self, graph: FloatGraph, precisions: Mapping[str, Precision], examples: Sequence[Arrays]
    ) -> RoundingErrors:
        """What it would cost to round the int8 activations of a float graph, each alone."""
        layout = plan(graph, precisions)

        def on_its_grid(name: str, histogram: Histogram) -> FloatGraph:
            nonnegative = layout.tensors[name].nonnegative
            found = range_of(histogram, Method.MSE, nonnegative=nonnegative)
            return rounded(graph, name, *found.grid(nonnegative=nonnegative))

        return rounding_errors(graph, layout, examples, on_its_grid)

    def needing_fp32(
        self, graph: FloatGraph, examples: Sequence[Arrays], *, bearable: float, adviser: Adviser | None = None
    ) -> dict[str, str]:
        """Nothing: no target of this runtime computes in fp16."""
        return {}

    def foreseen(
        self,
        graph: FloatGraph,
        shapes: Mapping[str, tuple[int, ...]],
        precisions: Mapping[str, Precision],
        *,
        floats: Floats = NO_FLOATS,
        ir_version: int = 8,
        metadata: Mapping[str, str] | None = None,
    ) -> bytes:
        """A file as long as that which `write` will make once the model has parameters of these shapes.

        `graph` is the float graph before anything was removed; `shapes` gives each parameter's shape after.
        Nothing is pruned, trained or calibrated for it: the plan depends on the graph alone, and the size of a
        tensor on its shape alone.
        """
        small = with_shapes(graph, shapes)
        layout = plan(small, precisions, floats=floats)
        # Any range will do, but a zero point is one byte whatever it is.
        ranges = dict.fromkeys(layout.calibrated, Range(-1.0, 1.0))
        exported = _finish(
            small, precisions, layout, ranges, None, largest=INT8_MAX, ir_version=ir_version, metadata=metadata or {}
        )
        return exported.data

    def load(self, path: Path, *, threads: int) -> Session:
        return _sessions.Loaded(_sessions.of_file(path, _sessions.options(threads)))

    def inspect(self, path: Path, target: Target, tensors: Mapping[str, str]) -> tuple[str, ...]:
        """Nothing: this runtime is on the machine that writes the file, and loads it."""
        return ()

    def runs_as(self, path: Path, tensors: Mapping[str, str], *, threads: int) -> dict[str, str | None]:
        """Layer -> `int8`, `int8_dynamic`, `fp32` or None, read from the graph that the session has optimised."""
        return computes(onnx.load(path).graph, optimised(path, threads=threads), tensors)

    footprint = staticmethod(footprint)
    network = staticmethod(_lower.Lowering.network)
    kernel_steps = staticmethod(_kernels.kernel_steps)
    answer = staticmethod(_kernels.answer)

    def nothing(self) -> _kernels.Cut:
        return _kernels.NOTHING

    def kernel_session(self, file: KernelFile, *, threads: int) -> _kernels.KernelSession:
        return _kernels.KernelSession(file, threads=threads)


def _finish(
    graph: FloatGraph,
    precisions: Mapping[str, Precision],
    layout: Plan,
    ranges: Mapping[str, Range],
    grids: Mapping[str, Grid] | None,
    *,
    largest: int,
    ir_version: int,
    metadata: Mapping[str, str],
) -> Exported:
    written = graph.copy()
    stored = place(written, layout, ranges, precisions, grids, largest=largest)
    drop_unused(written.model)
    renamed = shorten(written.model)
    data = to_bytes(written.model, ir_version=ir_version, metadata=metadata)
    return Exported(
        data, {layer: replace(each, tensor=renamed.get(each.tensor, each.tensor)) for layer, each in stored.items()}
    )


def optimised(path: Path, *, threads: int) -> onnx.GraphProto:
    """What a session makes of a file before it runs.  Raises UserError if it cannot be loaded."""
    with tempfile.TemporaryDirectory() as folder:
        options = _sessions.options(threads)
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        _sessions.of_file(path, options)
        return onnx.load(options.optimized_model_filepath).graph


def computes(file: onnx.GraphProto, session: onnx.GraphProto, tensors: Mapping[str, str]) -> dict[str, str | None]:
    """Layer -> what it computes in after optimisation (`session`); None where its node is not found again.

    A node is found by the name of its weight, which optimising keeps, or of what the weight is decoded into,
    and otherwise by its output.
    """
    by_input: dict[str, str] = {}
    by_name: dict[str, str] = {}
    quantised_at_run = {name for node in session.node if node.op_type == DYNAMIC for name in node.output}
    for node in session.node:
        if node.op_type in COMPUTE_OF:
            compute = COMPUTE_OF[node.op_type]
            if compute == "int8" and node.input[0] in quantised_at_run:
                compute = "int8_dynamic"
            by_name[node.name] = compute
            for name in node.input:
                by_input[name] = compute

    def runs(names: list[str], outputs: list[str]) -> str | None:
        by_weight = (by_input[name] for name in names if name in by_input)
        by_output = (by_name[name + BLOCKED_SUFFIX] for name in outputs if name + BLOCKED_SUFFIX in by_name)
        return next(by_weight, None) or next(by_output, None)

    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in file.node:
        for name in filter(None, node.input):  # an input that is left out is called "", as is an output
            readers.setdefault(name, []).append(node)
    found: dict[str, str | None] = {}
    others = frozenset(tensors.values())
    for layer, tensor in tensors.items():
        kinds = {runs(*place) for place in _places(tensor, readers, others - {tensor})}
        found[layer] = kinds.pop() if len(kinds) == 1 else None
    return found


def _places(
    tensor: str, readers: Mapping[str, list[onnx.NodeProto]], others: frozenset[str]
) -> list[tuple[list[str], list[str]]]:
    """Each node that computes with a weight: the names that the weight has on the way there, and the node's outputs.

    What becomes one of the `others` is another layer's: its weight transposed.

    The outputs of elementwise operators behind the node count as its own, since they are fused into it.
    """
    places = []
    names, pending = [tensor], [tensor]
    while pending:
        for node in readers.get(pending.pop(), []):
            if node.op_type not in LAYER_OPERATORS:
                own = [name for name in node.output if name not in others]
                names += own
                pending += own
                continue
            outputs = [node.output[0]]
            while len(behind := readers.get(outputs[-1], [])) == 1 and behind[0].op_type not in LAYER_OPERATORS:
                outputs.append(behind[0].output[0])
            places.append((names, outputs))
    return places


RUNTIME = OnnxRuntime()
