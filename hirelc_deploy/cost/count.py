"""Exact counts of a network after a policy's counts: parameters and multiply-accumulates."""

from math import prod

from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.graph.shapes import Keep, parameters_after, shapes_after


def parameters(graph: ModelGraph, keep: Keep) -> int:
    """Parameters that stay, a shared one counted once; buffers (norm statistics) are none."""
    return parameters_after(graph, keep)


def macs(graph: ModelGraph, keep: Keep) -> int:
    """Multiply-accumulates of the layers that stay, for one example.

    A weight is used as often as before, wherever it stands, so a layer's count shrinks as its weight does.
    """
    shapes = shapes_after(graph, keep)
    stay = [layer for layer in graph.layers if layer.weight in shapes]
    return sum(layer.macs // prod(layer.weight_shape) * prod(shapes[layer.weight]) for layer in stay)
