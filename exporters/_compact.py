"""A graph in as few bytes as it takes: short names, shared constants, nothing that is not read.

At a thirtieth of its size a network's file would otherwise be names for a third.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import count, product
from string import ascii_letters

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

SHARED_BYTES = 64
"""Constants up to this size are compared; weights are left alone."""


def share(model: ir.Model, *, parameters: Collection[str]) -> None:
    """One initializer for all small constants of equal type, shape and values.

    Parameters are left apart: whether two of them are equal is chance, and the size of a file must be known
    before their values are.
    """
    seen: dict[tuple[object, ...], ir.Value] = {}
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes > SHARED_BYTES or name in parameters:
            continue
        first = seen.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
        if first is not value and not value.is_graph_output():
            ir.convenience.replace_all_uses_with(value, first)
            del graph.initializers[name]


def shorten(model: ir.Model) -> dict[str, str]:
    """Give every value but the graph's inputs and outputs a short name, nodes none; returns old name -> new."""
    graph = model.graph
    fixed = {value.name for value in [*graph.inputs, *graph.outputs]}
    names = (name for name in _short_names() if name not in fixed)
    renamed: dict[str, str] = {}
    values: Iterable[ir.Value] = [
        *graph.initializers.values(),
        *(value for node in graph for value in node.outputs if value.name),
    ]
    # Values that are read most get the shortest names.
    for value in sorted(values, key=lambda value: -len(value.uses())):
        if value.name in fixed:
            continue
        old, new = value.name or "", next(names)
        renamed[old] = new
    _rename(graph, renamed)
    for node in graph:
        node.name = None
    return renamed


def _rename(graph: ir.Graph, renamed: Mapping[str, str]) -> None:
    """In two passes, as a new name may still be another value's old one."""
    values = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    chosen = [(value, renamed[value.name]) for value in values if value.name is not None and value.name in renamed]
    for index, (value, _) in enumerate(chosen):
        value.name = f"#{index}"
    for value, name in chosen:
        value.name = name


def _short_names() -> Iterator[str]:
    for length in count(1):
        for letters in product(ascii_letters, repeat=length):
            yield "".join(letters)


def drop_unused(model: ir.Model) -> None:
    passes.RemoveUnusedNodesPass()(model)


def to_bytes(model: ir.Model, *, ir_version: int, metadata: Mapping[str, str]) -> bytes:
    """The file, the same bytes for the same model."""
    model.ir_version = ir_version
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    proto = ir.serde.serialize_model(model)
    for node in proto.graph.node:
        node.ClearField("name")
    for tensor in proto.graph.initializer:
        _as_varints(tensor)
    proto.graph.name = "g"
    del proto.graph.value_info[:]
    return proto.SerializeToString(deterministic=True)


def _as_varints(tensor: onnx.TensorProto) -> None:
    """Shapes and sizes as the short integers that they are: a byte or two an entry, not eight."""
    if tensor.data_type == onnx.TensorProto.INT64 and tensor.HasField("raw_data"):
        short = onnx.TensorProto(int64_data=np.frombuffer(tensor.raw_data, "<i8").tolist())
        if short.ByteSize() < len(tensor.raw_data):
            tensor.ClearField("raw_data")
            tensor.int64_data.extend(short.int64_data)
