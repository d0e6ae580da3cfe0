"""Stands in for trtexec on a device that is not there: reads its options and writes what it would write.

What it prints and the layouts of its files follow NVIDIA's documentation of TensorRT 10; nothing of it was recorded on
a device.  Its "engine" is the ONNX file behind a first line, its outputs are ONNX Runtime's, its times are made up.
Faults are asked for by the file `fault` beside it.
"""

import json
import sys
from pathlib import Path

MAGIC = b"stand-in engine\n"
VERSION = "v100300"
LATENCY_MS = {"model": 0.5, "baseline_fp16": 0.8, "baseline": 1.5}


def main() -> int:
    options = dict(argument.lstrip("-").partition("=")[::2] for argument in sys.argv[1:])
    home = Path(__file__).parent
    fault = (home / "fault").read_text() if (home / "fault").exists() else ""
    version = "v8502" if fault == "old" else VERSION
    print(f"&&&& RUNNING TensorRT.trtexec [TensorRT {version}] [b26] # trtexec {' '.join(sys.argv[1:])}")
    if fault == "refuses":
        print("[11/27/2026-14:00:00] [E] Error[3]: node_of_k: unsupported int8 convolution with 3 groups")
        print("[11/27/2026-14:00:00] [E] Engine could not be created from network")
        return 1
    if "onnx" in options:
        if fault == "full":
            print("[11/27/2026-14:00:00] [E] Saving engine to file failed: No space left on device")
            return 1
        kind = Path(options["onnx"]).stem
        Path(options["saveEngine"]).write_bytes(MAGIC + kind.encode() + b"\n" + Path(options["onnx"]).read_bytes())
        return 0
    _, kind, file = Path(options["loadEngine"]).read_bytes().split(b"\n", 2)
    if "exportTimes" in options:
        Path(options["exportTimes"]).write_text(json.dumps(times(LATENCY_MS[kind.decode()])))
        print(f"[11/27/2026-14:00:00] [I] Throughput: {1000 / LATENCY_MS[kind.decode()]} qps")
    if "exportLayerInfo" in options:
        Path(options["exportLayerInfo"]).write_text(json.dumps(layers(file)))
    if "exportOutput" in options:
        Path(options["exportOutput"]).write_text(json.dumps(outputs(file, options)))
    return 0


def times(latency_ms: float) -> list[dict[str, float]]:
    each = [latency_ms * (1 + 0.01 * (i % 10)) for i in range(100)]
    return [{"inMs": 0.1 * ms, "computeMs": 0.8 * ms, "outMs": 0.1 * ms, "latencyMs": ms} for ms in each]


def layers(file: bytes) -> dict[str, object]:
    """A layer an operator, named as TensorRT names nodes without names, with what it computes in."""
    import onnx

    model = onnx.load_from_string(file)
    producer = {name: node.op_type for node in model.graph.node for name in node.output}
    halves = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    found: list[dict[str, object]] = [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to node_of_x",
            "LayerType": "Reformat",
            "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP32"}],
        }
    ]
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            in_integers = producer.get(node.input[0]) == "DequantizeLinear"
            kind = "Int8 NC/32HW32" if in_integers else "Half NHWC8" if halves else "Float row major linear"
            found.append(
                {
                    "Name": f"node_of_{node.output[0]} + relu_{node.output[0]}",
                    "LayerType": "CaskConvolution" if node.op_type == "Conv" else "gemm",
                    "Inputs": [{"Name": node.input[0], "Format/Datatype": kind}],
                    "Metadata": f"[ONNX Layer: node_of_{node.output[0]}]",
                }
            )
    return {"Layers": found, "Bindings": [value.name for value in model.graph.input]}


def outputs(file: bytes, options: dict[str, str]) -> list[dict[str, object]]:
    import numpy as np
    import onnxruntime

    shapes = dict(each.split(":") for each in options["shapes"].split(","))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    read = {}
    for value in session.get_inputs():
        path = dict(each.split(":") for each in options["loadInputs"].split(","))[value.name]
        kind = np.int64 if "int64" in value.type else np.float32
        read[value.name] = np.fromfile(path, kind).reshape([int(size) for size in shapes[value.name].split("x")])
    names = [value.name for value in session.get_outputs()]
    return [
        {"name": name, "dimensions": "x".join(map(str, array.shape)), "values": array.ravel().tolist()}
        for name, array in zip(names, session.run(names, read), strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
