"""The manifest's table of layers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hirelc_deploy.graph.shapes import shapes_after
from hirelc_deploy.policy import FP32, Policy
from hirelc_deploy.verify.manifest import LayerRecord

if TYPE_CHECKING:
    from hirelc_deploy.exporters._base import Exported, Stored
    from hirelc_deploy.graph.model_graph import Layer, ModelGraph


def layer_records(
    network: "ModelGraph", policy: Policy, exported: "Exported", runs_as: Mapping[str, str | None]
) -> tuple[LayerRecord, ...]:
    """What each layer of the network was decided to be, how it lies in the file, and what it runs as.

    `runs_as` is by layer, as the runtime says.
    """
    shapes = shapes_after(network, policy.keep)
    return tuple(
        _layer_record(layer, shapes.get(layer.weight), policy, exported.layers.get(layer.name), runs_as)
        for layer in network.layers
    )


def _layer_record(
    layer: "Layer",
    shape: tuple[int, ...] | None,
    policy: Policy,
    stored: "Stored | None",
    runs_as: Mapping[str, str | None],
) -> LayerRecord:
    precision = policy.precisions.get(layer.name, FP32)
    transposed = layer.op.startswith("ConvTranspose")
    kept = 0 if shape is None else shape[1] * layer.conv_groups if transposed else shape[0]
    return LayerRecord(
        name=layer.name,
        op=layer.op,
        kept=kept,
        of=layer.out_channels,
        storage=str(precision.storage),
        encoding=None if stored is None else stored.encoding,
        compute=str(precision.compute),
        weight_bytes=0 if stored is None else stored.bytes,
        runs_as=runs_as.get(layer.name),
        tensor=None if stored is None else stored.tensor,
    )
