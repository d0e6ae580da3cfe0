"""trtexec, the program that comes with TensorRT: what it is asked, and what it answers.

It builds an engine from a file on the device, times it, tells what each layer became, and runs it on raw inputs.  Read
from NVIDIA's documentation and sources of TensorRT 10.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters._trt_build import LARGEST_BATCH

TRTEXEC = "trtexec"
JETPACK = "/usr/src/tensorrt/bin/trtexec"
"""Where JetPack puts it, beside the path."""

WARM_UP_MS, SECONDS = 500, 3

Shapes = Mapping[str, tuple[int, ...]]
"""Of one example, by input."""

OPERATORS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather"}

COMPUTES = {"int8": "int8", "fp8": "fp8", "half": "fp16", "float": "fp32"}
"""By what `Format/Datatype` of a layer's input begins with."""

SAID = (
    ("not compatible with this version of TensorRT", "its engine is of another TensorRT", "build it again there"),
    ("No space left on device", "it has no room left", "free some in its temporary folder"),
    ("out of memory", "it has not enough memory for the engine", "close what else runs there, or add swap"),
    ("Unknown option: --stronglyTyped", "its TensorRT is older than 10", "install JetPack 6.1 or later"),
)
"""What trtexec says, what that means, and what to do."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of one inference, (runs,)."""

    end_to_end_ms: np.ndarray
    """With inputs on the way to the GPU and outputs on the way back."""
    gpu_ms: np.ndarray


def build_command(trtexec: str, file: str, engine: str, shapes: Shapes, *, batch: int) -> str:
    """Build an engine from a file, whose types it keeps."""
    return _command(
        trtexec,
        f"--onnx={file}",
        "--stronglyTyped",
        f"--saveEngine={engine}",
        "--skipInference",
        "--profilingVerbosity=detailed",
        f"--minShapes={sized(shapes, 1)}",
        f"--optShapes={sized(shapes, batch)}",
        f"--maxShapes={sized(shapes, max(batch, LARGEST_BATCH))}",
    )


def time_command(trtexec: str, engine: str, shapes: Shapes, *, batch: int, times: str, layers: str) -> str:
    """Time an engine in a CUDA graph, and write what its layers became."""
    return _command(
        trtexec,
        f"--loadEngine={engine}",
        f"--shapes={sized(shapes, batch)}",
        *("--useCudaGraph", "--useSpinWait"),
        *(f"--warmUp={WARM_UP_MS}", f"--duration={SECONDS}"),
        f"--exportTimes={times}",
        f"--exportLayerInfo={layers}",
    )


def run_command(trtexec: str, engine: str, shapes: Shapes, *, batch: int, inputs: Mapping[str, str], out: str) -> str:
    """Run an engine once on files with raw values, by input."""
    return _command(
        trtexec,
        f"--loadEngine={engine}",
        f"--shapes={sized(shapes, batch)}",
        f"--loadInputs={','.join(f'{name}:{file}' for name, file in inputs.items())}",
        *("--iterations=1", "--warmUp=0", "--duration=0"),
        f"--exportOutput={out}",
    )


def version_of(log: str) -> str:
    """The version in what trtexec prints first: [TensorRT v100300] is 10.3.0, and v8502 of earlier ones 8.5.2.

    Raises UserError without one.
    """
    found = re.search(r"\[TensorRT v(\d+)\]", log)
    if found is None:
        raise UserError("trtexec does not say which TensorRT it is of", fix="is it TensorRT's own trtexec?")
    digits = int(found[1])
    if digits < 10_000:
        return f"{digits // 1000}.{digits // 100 % 10}.{digits % 100}"
    return f"{digits // 10_000}.{digits // 100 % 100}.{digits % 100}"


def inferences_per_s(log: str) -> float | None:
    """What trtexec says of its throughput, a batch counting as one; None where it does not."""
    found = re.search(r"Throughput: ([0-9.]+) qps", log)
    return float(found[1]) if found and float(found[1]) else None


def failure_of(log: str) -> tuple[str, str]:
    """What went wrong on the device and what to do, from what trtexec printed."""
    for words, what, fix in SAID:
        if words in log:
            return what, fix
    errors = [line.partition("[E] ")[2] for line in log.splitlines() if "[E] " in line]
    last = log.strip().splitlines()[-1] if log.strip() else "nothing was printed"
    return errors[0].removeprefix("Error[1]: ") if errors else last, "is the target's TensorRT the device's?"


def times_of(text: str) -> Times:
    """From --exportTimes.  Raises UserError for anything else."""
    try:
        runs = json.loads(text)
        return Times(np.array([run["latencyMs"] for run in runs]), np.array([run["computeMs"] for run in runs]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the times that trtexec wrote cannot be read: {error!r}", fix="is it that of TensorRT 10 or later?"
        ) from error


def outputs_of(text: str) -> dict[str, np.ndarray]:
    """From --exportOutput, by name.  Raises UserError for anything else."""
    try:
        return {
            each["name"]: np.array(each["values"], np.float32).reshape(
                [int(size) for size in str(each["dimensions"]).split("x")]
            )
            for each in json.loads(text)
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the outputs that trtexec wrote cannot be read: {error!r}", fix="is it that of TensorRT 10 or later?"
        ) from error


def runs_as(text: str, model: onnx.ModelProto, tensors: Mapping[str, str]) -> dict[str, str | None]:
    """Layer -> what it computes in, from --exportLayerInfo; None where no layer of the engine is its own.

    TensorRT calls a node without a name after what it writes, and keeps that in the names of what it fuses.
    """
    layers = json.loads(text)["Layers"]
    names = operators_by_layer(model, tensors)
    found: dict[str, str | None] = {}
    for layer in tensors:
        kinds = {_computes_in(each) for each in layers if _is_of(each, names.get(layer, ()))}
        kinds.discard(None)
        found[layer] = kinds.pop() if len(kinds) == 1 else None
    return found


def operators_by_layer(model: onnx.ModelProto, tensors: Mapping[str, str]) -> dict[str, list[str]]:
    """By layer what TensorRT calls its operators."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: dict[str, list[str]] = {}
    for layer, tensor in tensors.items():
        pending = [tensor]
        while pending:
            for node in readers.get(pending.pop(), []):
                if node.op_type in OPERATORS:
                    found.setdefault(layer, []).append(node.name or f"node_of_{node.output[0]}")
                else:
                    pending += node.output
    return found


def _is_of(layer: Mapping[str, object], names: Sequence[str]) -> bool:
    said = f"{layer.get('Name', '')} {layer.get('Metadata', '')}"
    return any(re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", said) for name in names)


def _computes_in(layer: Mapping[str, object]) -> str | None:
    """The type of the first input; what only brings a tensor to another type computes nothing."""
    inputs = layer.get("Inputs")
    if layer.get("LayerType") == "Reformat" or not isinstance(inputs, list) or not inputs:
        return None
    kind = str(inputs[0].get("Format/Datatype", "")).lower()
    return next((compute for begins, compute in COMPUTES.items() if begins in kind.split()), None)


def sized(shapes: Shapes, batch: int) -> str:
    """The shapes of a batch, as TensorRT's options have them."""
    return ",".join(f"{name}:{'x'.join(map(str, (batch, *shape)))}" for name, shape in shapes.items())


def _command(*words: str) -> str:
    return " ".join(map(shlex.quote, words))
