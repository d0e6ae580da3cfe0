"""What ONNX Runtime's own tools make of the Fashion-MNIST networks, and what this project does, side by side.

    python benchmarks/against_onnxruntime.py

Nothing is pruned and nothing trained.  Every tool starts from the same stripped fp32 file, and its own file is
stripped in the same way (no metadata, value_info or docs, short names); its bytes as the tool wrote it are kept
beside.  Speed is the ratio to the fp32 file in CPU time of one thread, all files of a network in turns in one process;
accuracy is that of each file on the test images.  Files go to out/benchmarks/against, the record to
benchmarks/results/against_onnxruntime.json.
"""

import argparse
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from _bench import RESULTS, machine, markdown, save, workbench
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from hirelc_deploy.cpu import cpu_flags, has_dot_product
from hirelc_deploy.exporters import load_runtime
from hirelc_deploy.exporters._compact import shorten, to_bytes
from hirelc_deploy.exporters.onnxruntime import optimised
from hirelc_deploy.search.recipe import Recipe
from hirelc_deploy.task import Task
from hirelc_deploy.verify import accuracy, timing
from hirelc_deploy.verify.measure import example
from hirelc_deploy.workbench import Workbench

RESULT = RESULTS / "against_onnxruntime.json"
NETWORKS = ("wide", "depthwise", "vit")
TRANSFORMERS = {"vit"}
"""Of these only Conv, MatMul and Gemm are quantised: every operator in int8 ruins them (and is slower)."""

BASELINE = "fp32"
RECIPES = {
    "int8, computed in int8": "compute=int8",
    "int4, computed in int8": "storage=int4,compute=int8",
    "int4, computed in fp32": "storage=int4,compute=fp32",
    "int4, computed in what is fastest": "storage=int4,compute=fastest",
    "int3, computed in fp32": "storage=int3,compute=fp32",
}

CALIBRATION_EXAMPLES, CALIBRATION_BATCH = 512, 64
SECONDS = 30.0
"""Spent on timing all files of one network."""
SEED = 0

Make = Callable[[onnx.ModelProto], onnx.ModelProto]
"""What a tool makes of a model."""

WEIGHT_INPUT = {
    **dict.fromkeys(["Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits"], 1),
    **dict.fromkeys(["MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger"], 1),
    **dict.fromkeys(["QLinearConv", "QLinearMatMul", "QGemm"], 3),
}
"""At which input the kernels of layers read their weights."""


@dataclass(frozen=True)
class Candidate:
    """One file."""

    tool: str
    what: str
    path: Path
    as_written_bytes: int
    """By the tool, before the file was stripped as all are."""


@dataclass(frozen=True)
class Row:
    """What a file came to."""

    tool: str
    what: str
    size_bytes: int
    size_bytes_as_written: int
    compression: float
    latency_cpu_ms: float
    speedup: float
    speedup_ci95: tuple[float, float]
    accuracy: float
    drop_points: float
    drop_ci95: tuple[float, float]
    runs_as: Mapping[str, int]
    """Layers by the kernel that a session has chosen for them."""


# -- other tools ---------------------------------------------------------------------------------------------


class Reader(CalibrationDataReader):
    """Train images as the tools of ONNX Runtime read them."""

    def __init__(self, task: Task) -> None:
        inputs = task.train.take(np.arange(CALIBRATION_EXAMPLES))[0]
        self._batches: Iterator[dict[str, np.ndarray]] = (
            {name: array[start : start + CALIBRATION_BATCH] for name, array in inputs.items()}
            for start in range(0, CALIBRATION_EXAMPLES, CALIBRATION_BATCH)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def static(model: onnx.ModelProto, task: Task, operators: list[str] | None) -> onnx.ModelProto:
    """`quantize_static` as its documentation has it for x86: Q/DQ, U8 activations, S8 weights by channel."""
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, written = (Path(folder) / f"{name}.onnx" for name in ("source", "prepared", "written"))
        onnx.save(model, source)
        quant_pre_process(source, prepared)
        quantize_static(
            prepared,
            written,
            Reader(task),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=operators,
            per_channel=True,
            reduce_range=not has_dot_product(cpu_flags()),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(written)


def dynamic(model: onnx.ModelProto) -> onnx.ModelProto:
    """`quantize_dynamic` of Linear layers; convolutions would become slower (ConvInteger)."""
    with tempfile.TemporaryDirectory() as folder:
        source, written = (Path(folder) / f"{name}.onnx" for name in ("source", "written"))
        onnx.save(model, source)
        quantize_dynamic(
            source,
            written,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=not has_dot_product(cpu_flags()),
            weight_type=QuantType.QInt8,
        )
        return onnx.load(written)


def n_bits(block: int, accuracy_level: int | None) -> Make:
    """`MatMulNBitsQuantizer`: INT4 weights in blocks, for MatMul alone; what else there is stays fp32.

    At level 4 activations are rounded to int8 at every run, otherwise the products are float.
    """

    def make(model: onnx.ModelProto) -> onnx.ModelProto:
        quantizer = MatMulNBitsQuantizer(
            model, bits=4, block_size=block, is_symmetric=True, accuracy_level=accuracy_level
        )
        quantizer.process()
        return quantizer.model.model

    return make


def int4_dequantised(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weight-only INT4 as opset 21 spells it: INT4 initializer -> DequantizeLinear -> Conv, Gemm or MatMul.

    One scale an output channel, rounded to nearest.
    """
    graph = model.graph
    model.opset_import[0].version = 21  # the operators of these networks mean the same as in 18
    model.ir_version = 10
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in weights:
            tensor = weights[node.input[1]]
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            axis = 0 if node.op_type == "Conv" or transposed else 1
            values = numpy_helper.to_array(tensor)
            scale = np.abs(values).max(tuple(a for a in range(values.ndim) if a != axis), keepdims=True) / 7
            codes = np.round(values / np.where(scale == 0, 1, scale)).astype(np.int8)
            graph.initializer.append(_int4(f"{tensor.name}_codes", codes))
            graph.initializer.append(numpy_helper.from_array(scale.flatten(), f"{tensor.name}_scale"))
            inputs = [f"{tensor.name}_codes", f"{tensor.name}_scale"]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{tensor.name}_values"], axis=axis))
            node.input[1] = f"{tensor.name}_values"
            graph.initializer.remove(tensor)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _int4(name: str, codes: np.ndarray) -> TensorProto:
    """Two a byte, the first one in the lower half."""
    flat = codes.flatten().astype(np.uint8) & 15
    low, high = np.append(flat, np.zeros(len(flat) % 2, np.uint8)).reshape(-1, 2).T
    return helper.make_tensor(name, TensorProto.INT4, codes.shape, (low | high << 4).tobytes(), raw=True)


def stripped(model: onnx.ModelProto) -> bytes:
    """In the bytes that this project would need for the same graph."""
    for part in (model, model.graph, *model.graph.node):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    converted = ir.serde.deserialize_model(model)
    shorten(converted)
    return to_bytes(converted, ir_version=model.ir_version, metadata={})


# -- files ---------------------------------------------------------------------------------------------------


def candidates(network: str, bench: Workbench, folder: Path) -> dict[str, Candidate]:
    """Every file of a network by a name of its own, the baseline first."""
    found = {}

    def add(tool: str, what: str, data: bytes, as_written_bytes: int | None = None) -> None:
        path = folder / f"file{len(found)}.onnx"
        path.write_bytes(data)
        found[path.stem] = Candidate(tool, what, path, as_written_bytes or len(data))
        print(f"  {tool}: {what}: {len(data)} bytes", flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    baseline = bench.files.baseline().data
    add("none", BASELINE, baseline)
    for what, make in others(network, bench.task).items():
        model = make(named(baseline))
        add("onnxruntime", what, stripped(model), model.ByteSize())
    for what, text in RECIPES.items():
        recipe = Recipe.parse(text)
        computes = None if recipe.compute else bench.latencies.fastest_computes(recipe.counts(bench.space))
        policy = recipe.policy(bench.space, computes)
        compressed = bench.compressed(policy)
        add("hirelc-deploy", what, bench.files.write(compressed.model, policy, compressed.grids).file.data)
    return found


def others(network: str, task: Task) -> dict[str, Make]:
    """What other tools make of a network, by name."""
    operators = ["Conv", "MatMul", "Gemm"] if network in TRANSFORMERS else None
    made: dict[str, Make] = {
        "quantize_static, QDQ, U8/S8 by channel": lambda model: static(model, task, operators),
    }
    if network in TRANSFORMERS:
        made |= {
            "quantize_dynamic, S8 by channel": dynamic,
            "MatMulNBits, 4 bits, blocks of 32": n_bits(32, None),
            "MatMulNBits, 4 bits, blocks of 128": n_bits(128, None),
            "MatMulNBits, 4 bits, blocks of 32, accuracy level 4": n_bits(32, 4),
            "MatMulNBits, 4 bits, blocks of 128, accuracy level 4": n_bits(128, 4),
        }
    return {**made, "INT4 by channel -> DequantizeLinear": int4_dequantised}


def named(data: bytes) -> onnx.ModelProto:
    """The model of a stripped file with names for its nodes, by which the tools tell them apart."""
    model = onnx.load_from_string(data)
    for i, node in enumerate(model.graph.node):
        node.name = f"node{i}"
    return model


# -- figures -------------------------------------------------------------------------------------------------


def measure(bench: Workbench, files: Mapping[str, Candidate], seconds: float) -> list[Row]:
    """All files of a network side by side."""
    runtime = load_runtime("onnxruntime")
    sessions = {name: runtime.load(file.path, threads=1) for name, file in files.items()}
    times = timing.interleave(sessions, example(bench.task, 1), seconds=seconds)
    # threads of one's own wait for each other by spinning: on a busy machine more of them take longer
    scored = {name: runtime.load(file.path, threads=1) for name, file in files.items()}
    outputs, targets = accuracy.side_by_side(scored, bench.task.test)
    first = next(iter(files))
    rows = []
    for name, file in files.items():
        faster = timing.ratio(times[first], times[name], clock="cpu", seed=SEED)
        compared = accuracy.compare(bench.task, outputs[first], outputs[name], targets, SEED)
        rows.append(
            Row(
                tool=file.tool,
                what=file.what,
                size_bytes=file.path.stat().st_size,
                size_bytes_as_written=file.as_written_bytes,
                compression=files[first].path.stat().st_size / file.path.stat().st_size,
                latency_cpu_ms=times[name].cpu_p50_ms,
                speedup=faster.value,
                speedup_ci95=(faster.lo, faster.hi),
                accuracy=compared.after,
                drop_points=compared.drop,
                drop_ci95=compared.drop_ci95,
                runs_as=kernels(optimised(file.path, threads=1)),
            )
        )
    return rows


def kernels(graph: onnx.GraphProto) -> dict[str, int]:
    """Layers by kernel; those whose weight is decoded at every run apart."""
    stored = {tensor.name for tensor in graph.initializer}
    decoded: set[str] = set()
    found: Counter[str] = Counter()
    for node in graph.node:
        if all(name in stored | decoded for name in node.input):
            decoded |= set(node.output)
            continue
        weight = node.input[WEIGHT_INPUT[node.op_type]] if node.op_type in WEIGHT_INPUT else None
        if weight in stored | decoded:
            found[node.op_type if weight in stored else f"{node.op_type}, its weight decoded at every run"] += 1
    return dict(sorted(found.items()))


def table(network: str, rows: Sequence[Row]) -> str:
    """In Markdown."""
    head = (network, "file", "smaller", "faster [95 %]", "accuracy", "drop, points [95 %]", "layers run as")
    cells = (
        (
            row.what if row.tool == "none" else f"{row.tool}: {row.what}",
            f"{row.size_bytes / 1000:.1f} KB",
            f"{row.compression:.1f} ×",
            f"{row.speedup:.2f} × [{row.speedup_ci95[0]:.2f}, {row.speedup_ci95[1]:.2f}]",
            f"{row.accuracy:.2f} %",
            f"{row.drop_points:.2f} [{row.drop_ci95[0]:.2f}, {row.drop_ci95[1]:.2f}]",
            "; ".join(f"{count} {kernel}" for kernel, count in row.runs_as.items()),
        )
        for row in rows
    )
    return markdown(head, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/against"), help="where files and journals go")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing, a network")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # the tools' hints, which `quant_pre_process` has answered
    record: dict[str, Any] = {
        "machine": machine(),
        "test_images": None,
        "calibration_images_of_other_tools": CALIBRATION_EXAMPLES,
        "stripping": "every file has short names and no metadata, value_info or docs; size_bytes_as_written is before",
        "networks": {},
    }
    for network in options.networks:
        print(network, flush=True)
        with workbench(network, options.out / network / "run") as bench:
            rows = measure(bench, candidates(network, bench, options.out / network), options.seconds)
            record["test_images"] = bench.task.test.examples
        print(table(network, rows), flush=True)
        record["networks"][network] = [asdict(row) for row in rows]
    save(record, options.result)


if __name__ == "__main__":
    main()
