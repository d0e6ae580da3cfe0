"""What a session has made of a file, compared."""

from hashlib import sha256

import onnx


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
