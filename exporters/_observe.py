"""What the tensors of a float graph hold when it runs on a CPU: ranges, and what rounding one of them would cost."""

from collections.abc import Callable, Iterable, Sequence
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
    probe = graph.copy()
    outputs = probe.model.graph.outputs
    inputs = {value.name for value in probe.model.graph.inputs}
    values = {v.name: v for node in probe.model.graph for v in node.outputs}
    watched = [name for name in names if name not in inputs]
    present = {value.name for value in outputs}
    for name in watched:
        if name not in present:
            values[name].type = ir.TensorType(ir.DataType.FLOAT)
            outputs.append(values[name])
    session = _in_memory(probe, _sessions.options(threads=1))
    seen = {name: Histogram() for name in names}
    empty = True
    for batch in calibration:
        empty = False
        read = dict(zip(watched, session.run(watched, dict(batch)), strict=True)) if watched else {}
        for name, histogram in seen.items():
            histogram.add(np.asarray(batch[name] if name in inputs else read[name]))
    if empty:
        raise ValueError(f"no calibration data for {len(names)} tensors, {names[0]} among them")
    return seen


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
    original = _outputs(graph, examples)
    of_the_graph = {value.name for value in graph.model.graph.outputs}
    between: dict[str, float] = {}
    inputs: dict[str, float] = {}
    for name in layout.calibrated:
        if name in of_the_graph:
            continue
        found = _outputs(rounded(name, seen[name]), examples)
        error = max(_relative_error(found[output], original[output]) for output in original)
        held = layout.tensors[name]
        if held.computed_by is not None:
            between[held.computed_by] = max(error, between.get(held.computed_by, 0.0))
        inputs |= dict.fromkeys(layout.readers(name), error)
    return RoundingErrors(between, inputs)


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
