"""What a session makes of a file before it runs."""

import tempfile
from hashlib import sha256
from pathlib import Path

import onnx
import onnxruntime as ort


def optimised(path: Path) -> onnx.GraphProto:
    """The graph that is run."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath).graph


def shape_of(graph: onnx.GraphProto) -> list[str]:
    """A digest a node, sorted: equal for graphs that differ in names, order and values of initializers alone.

    A node's digest holds its operator and attributes and, for each input, the digest of the node that it comes from
    or the type and shape of the initializer.
    """
    known = {"": "none"}
    known |= {value.name: f"input {value.name}" for value in graph.input}
    known |= {tensor.name: f"{tensor.data_type} {list(tensor.dims)}" for tensor in graph.initializer}
    digests = []
    for node in graph.node:
        attributes = sorted(attribute.SerializeToString(deterministic=True).hex() for attribute in node.attribute)
        parts = [node.domain, node.op_type, *attributes, *(known[name] for name in node.input)]
        digests.append(sha256("\n".join(parts).encode()).hexdigest())
        known |= {name: f"{digests[-1]} {i}" for i, name in enumerate(node.output) if name}
    return sorted(digests)
