"""Asks nvidia-modelopt for bits, for factors of activations, or for nodes: python _modelopt_worker.py FOLDER

It runs in an environment that has modelopt, as a copy in FOLDER, and so imports nothing of ours.  FOLDER holds
job.json, and model.pt and batches.pt, or model.onnx and examples.npz.  What job.json wants is written beside them:
formats.json has auto_quantize's bits by layer, one mapping for each number of effective bits; factors.pt has what each
algorithm multiplies a layer's input by; nodes.json has the names of the nodes that AutoCast keeps in fp32.
"""

import copy
import importlib.abc
import importlib.util
import json
import site
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.algorithms import get_auto_quantize_config
from torch import nn
from torch.nn import functional as F

OF_WEIGHT = ".weight_quantizer"
ACTIVATION_BITS = 8

OF_INPUT = ".input_quantizer"

Batch = Mapping[str, Any]
Run = Callable[[nn.Module, Batch], Any]


class UserModules(importlib.abc.MetaPathFinder):
    """The files that the model's classes are from, under the names that they were pickled with."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self._files = files

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        file = self._files.get(fullname)
        return None if file is None else importlib.util.spec_from_file_location(fullname, file)


def weights_in(bits: int) -> dict[str, Any]:
    """A format of modelopt's: integers, one scale an output channel, activations in 8 bits."""
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}},
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": ACTIVATION_BITS, "axis": None}},
        ],
        "algorithm": "max",
    }


def logits(result: Any, name: str) -> torch.Tensor:
    """The output of this name; items of a tuple are called output_0, output_1 …"""
    if isinstance(result, torch.Tensor):
        return result
    if isinstance(result, Mapping):
        found: torch.Tensor = result[name]
        return found
    if hasattr(result, "_asdict"):
        return logits(result._asdict(), name)
    return logits(result[int(name.rpartition("_")[2])], name)


def chosen_bits(config: Mapping[str, Any]) -> dict[str, int]:
    """Bits of each layer's weight; layers that stay as they are have none."""
    return {
        entry["quantizer_name"].removesuffix(OF_WEIGHT): entry["cfg"]["num_bits"]
        for entry in config["quant_cfg"]
        if entry["quantizer_name"].endswith(OF_WEIGHT) and entry.get("cfg") and entry.get("enable", True)
    }


def bits(model: nn.Module, batches: list[Batch], run: Run, job: Mapping[str, Any]) -> list[dict[str, int]]:
    """By layer, for each number of effective bits."""
    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": min(job["effective_bits"])},
        quantization_formats=[weights_in(width) for width in job["bits"]],
        data_loader=batches,
        forward_step=lambda network, batch: logits(run(network, batch), job["output"]),
        loss_func=lambda output, batch: F.cross_entropy(output, batch["targets"]),
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
    )
    return [chosen_bits(get_auto_quantize_config(state, {"effective_bits": each})) for each in job["effective_bits"]]


def factors(model: nn.Module, batches: list[Batch], run: Run) -> dict[str, dict[str, torch.Tensor]]:
    """By algorithm and layer, (channels,)."""

    def calibrate(network: nn.Module) -> None:
        for batch in batches:
            run(network, batch)

    found = {}
    for algorithm, config in {"SmoothQuant": mtq.INT8_SMOOTHQUANT_CFG, "AWQ": mtq.INT4_AWQ_CFG}.items():
        quantised = mtq.quantize(copy.deepcopy(model), config, calibrate)
        scales = {
            name.removesuffix(OF_INPUT): getattr(module, "pre_quant_scale", None)
            for name, module in quantised.named_modules()
            if name.endswith(OF_INPUT)
        }
        found[algorithm] = {
            name: scale.detach().float().flatten() for name, scale in scales.items() if scale is not None
        }
    return found


def fp32_nodes(model: Path, examples: Path) -> list[str]:
    """By the types that its file of halves gives to what nodes write."""
    import onnx
    from modelopt.onnx.autocast import convert_to_mixed_precision  # loads what the other jobs can do without

    mixed = convert_to_mixed_precision(str(model), keep_io_types=True, calibration_data=str(examples))
    graph = onnx.shape_inference.infer_shapes(mixed).graph
    kinds = {each.name: each.type.tensor_type.elem_type for each in (*graph.value_info, *graph.output)}
    named = {node.name for node in onnx.load(model).graph.node}
    return [
        node.name
        for node in graph.node
        if node.name in named and any(kinds.get(output) == onnx.TensorProto.FLOAT for output in node.output)
    ]


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    for path in job["path"]:
        site.addsitedir(path)  # behind the others: torch and all that modelopt needs are this environment's own
    if job["want"] == "fp32 nodes":
        found = fp32_nodes(folder / "model.onnx", folder / "examples.npz")
        (folder / "nodes.json").write_text(json.dumps(found), encoding="utf-8")
        return
    sys.meta_path.append(UserModules(job["modules"]))
    model: nn.Module = torch.load(folder / "model.pt", weights_only=False)
    batches: list[Batch] = torch.load(folder / "batches.pt")

    def run(network: nn.Module, batch: Batch) -> Any:
        inputs = batch["inputs"]
        return network(**inputs) if job["by_name"] else network(*inputs.values())

    if job["want"] == "bits":
        (folder / "formats.json").write_text(json.dumps(bits(model, batches, run, job)), encoding="utf-8")
    else:
        torch.save(factors(model, batches, run), folder / "factors.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
