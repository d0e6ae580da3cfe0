"""What the tensors of a float graph hold when it runs on a CPU: ranges, and what rounding one of them would cost."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from hirelc_deploy.exporters import _sessions
from hirelc_deploy.exporters._base import Arrays, RoundingErrors
from hirelc_deploy.exporters._calibrate import Histogram
from hirelc_deploy.exporters._float import FloatGraph
from hirelc_deploy.exporters._plan import Plan


def histograms(graph: FloatGraph, names: Sequence[str], calibration: Iterable[Arrays]) -> dict[str, Histogram]:
    """The values of these tensors, where there are any.  Raises ValueError without data."""
    if not names:
        return {}
    seen = {name: Histogram() for name in names}
    empty = True
    for batch in values(graph, names, calibration):
        empty = False
        for name, histogram in seen.items():
            histogram.add(batch[name])
    if empty:
        raise ValueError(f"no calibration data for {len(names)} tensors, {names[0]} among them")
    return seen


def values(graph: FloatGraph, names: Sequence[str], batches: Iterable[Arrays]) -> Iterator[dict[str, np.ndarray]]:
    """Inputs of the graph and tensors of floats that its nodes write, by name, batch by batch."""
    probe = graph.copy()
    outputs = probe.model.graph.outputs
    inputs = {value.name for value in probe.model.graph.inputs}
    written = {v.name: v for node in probe.model.graph for v in node.outputs}
    watched = [name for name in names if name not in inputs]
    present = {value.name for value in outputs}
    for name in watched:
        if name not in present:
            written[name].type = ir.TensorType(ir.DataType.FLOAT)
            outputs.append(written[name])
    session = _in_memory(probe, _sessions.options(threads=1))
    for batch in batches:
        read = dict(zip(watched, session.run(watched, dict(batch)), strict=True)) if watched else {}
        yield {name: np.asarray(batch[name] if name in inputs else read[name]) for name in names}


def rounding_errors(
    graph: FloatGraph,
    layout: Plan,
    examples: Sequence[Arrays],
    rounded: Callable[[str, Histogram], FloatGraph],
) -> RoundingErrors:
    """What it costs that `rounded` puts a tensor of the plan alone on a grid: a part of the outputs' variance.

    Tensors that are outputs of the graph themselves are left out.
    """
    seen = histograms(graph, layout.calibrated, examples)
    error_of = errors_of(graph, examples)
    of_the_graph = {value.name for value in graph.model.graph.outputs}
    between: dict[str, float] = {}
    inputs: dict[str, float] = {}
    for name in layout.calibrated:
        if name in of_the_graph:
            continue
        error = error_of(rounded(name, seen[name]))
        held = layout.tensors[name]
        if held.computed_by is not None:
            between[held.computed_by] = max(error, between.get(held.computed_by, 0.0))
        inputs |= dict.fromkeys(layout.readers(name), error)
    return RoundingErrors(between, inputs)


def errors_of(graph: FloatGraph, examples: Sequence[Arrays]) -> Callable[[FloatGraph], float]:
    """By how much the outputs of another graph differ from this one's: of the one that differs most, mean squared and
    as a part of the variance; infinite where they are no numbers."""
    original = _outputs(graph, examples)

    def error(other: FloatGraph) -> float:
        found = _outputs(other, examples)
        most = max(_relative_error(found[output], original[output]) for output in original)
        return most if math.isfinite(most) else math.inf

    return error


def _outputs(graph: FloatGraph, examples: Sequence[Arrays]) -> dict[str, np.ndarray]:
    """Of a float graph, or one with single tensors rounded: nothing is fused into kernels of integers."""
    session = _in_memory(graph, _sessions.options(1, _sessions.Level.ORT_ENABLE_BASIC))
    names = [output.name for output in session.get_outputs()]
    batches = [session.run(names, dict(batch)) for batch in examples]
    return {name: np.concatenate(arrays) for name, arrays in zip(names, zip(*batches, strict=True), strict=True)}


def _relative_error(found: np.ndarray, original: np.ndarray) -> float:
    """Mean squared, as a part of the variance; of integers the share that is another."""
    if not np.issubdtype(original.dtype, np.floating):
        return float(np.mean(found != original))
    squared = float(np.mean(np.square(found.astype(np.float64) - original)))
    return squared / (float(np.var(original.astype(np.float64))) or 1.0)


def _in_memory(graph: FloatGraph, options: Any) -> _sessions.Session:
    return _sessions.in_memory(ir.serde.serialize_model(graph.model).SerializeToString(), options)
