"""Which forms TensorRT-RTX takes for which compute capability, and how large its engines are: no GPU is needed.

    pip install hirelc-deploy[tensorrt-rtx]
    python benchmarks/tensorrt_forms.py forms sizes
    python benchmarks/tensorrt_forms.py page

Files are those that `exporters/tensorrt.py` writes, of networks with random weights; they are parsed and built, not
run.  The first command fills benchmarks/results/tensorrt_forms.json, forms in seconds and sizes in half an hour, the
second writes docs/tensorrt.md from it.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from _bench import RESULTS, ROOT, markdown, save
from _networks import TRAINED
from scipy.optimize import nnls
from torch import nn
from transformers import (
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hirelc_deploy.compress.distil import as_tensors
from hirelc_deploy.compress.fold import fold, foldable
from hirelc_deploy.compress.grids import fitted
from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters import load_runtime
from hirelc_deploy.exporters._base import Exported
from hirelc_deploy.exporters._trt_build import build, library
from hirelc_deploy.policy import FP8, FP16, INT8, Compute, PerChannel, PerGroup, Precision, Storage

RESULT, PAGE = RESULTS / "tensorrt_forms.json", ROOT / "docs" / "tensorrt.md"
MANIFESTS = RESULTS / "tensorrt"
"""Of exports for boards that are not here (tensorrt_networks.py)."""
BUILT = re.compile(r"builds an engine of (?P<bytes>\d+) bytes for (?P<capability>\w+)")
"""In a manifest's notes."""
OPSET, IR_VERSION = 21, 10
CAPABILITIES = ("7.5", "8.6", "8.9", "12.0")

INT4 = Precision(Storage("int", 4, PerChannel()), Compute.FP16)
INT4_BLOCKS = Precision(Storage("int", 4, PerGroup(64)), Compute.FP16)
INT4_LONG_BLOCKS = Precision(Storage("int", 4, PerGroup(128)), Compute.FP16)

KINDS = {"Conv2d": nn.Conv2d, "Linear": nn.Linear}

FORMS: Mapping[str, tuple[str, Precision | None]] = {
    "fp32, convolution": ("conv", None),
    "fp32, Linear": ("linear", None),
    "fp16": ("both", FP16),
    "int8, fp16 elsewhere": ("both", INT8),
    "fp8, convolution": ("conv", FP8),
    "fp8, Linear": ("linear", FP8),
    "int4 a channel, convolution": ("conv", INT4),
    "int4 a channel, Linear": ("linear", INT4),
    "int4 in blocks of 64, Linear": ("linear", INT4_BLOCKS),
    "int4 in blocks of 128, Linear": ("linear", INT4_LONG_BLOCKS),
}

SMALL: Mapping[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16 * 64, 64), nn.ReLU(), nn.Linear(64, 10)),
    "both": lambda: nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10)),
}


def _resnet(layer_type: str, sizes: Sequence[int], depths: Sequence[int]) -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(layer_type=layer_type, hidden_sizes=list(sizes), depths=list(depths), num_labels=1000)
    )


def _deit(*, width: int, blocks: int) -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            num_labels=1000,
        )
    )


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: _resnet("basic", (64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet18 half as wide": lambda: _resnet("basic", (32, 64, 128, 256), (2, 2, 2, 2)),
    "resnet34": lambda: _resnet("basic", (64, 128, 256, 512), (3, 4, 6, 3)),
    "resnet50": lambda: _resnet("bottleneck", (256, 512, 1024, 2048), (3, 4, 6, 3)),
    "mobilenetv2 half as wide": lambda: MobileNetV2ForImageClassification(
        MobileNetV2Config(num_labels=1000, depth_multiplier=0.5)
    ),
    "mobilenetv2": lambda: MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000)),
    "mobilenetv1 half as wide": lambda: MobileNetV1ForImageClassification(
        MobileNetV1Config(num_labels=1000, depth_multiplier=0.5)
    ),
    "mobilenetv1": lambda: MobileNetV1ForImageClassification(MobileNetV1Config(num_labels=1000)),
    "deit-tiny of 2 blocks": lambda: _deit(width=192, blocks=2),
    "deit-tiny of 4 blocks": lambda: _deit(width=192, blocks=4),
    "deit-tiny": lambda: _deit(width=192, blocks=12),
    "deit-small": lambda: _deit(width=384, blocks=12),
}

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "CNNs": ("resnet18", "resnet18 half as wide", "resnet34", "mobilenetv2 half as wide", "mobilenetv1 half as wide"),
    "transformers": ("deit-tiny of 2 blocks", "deit-tiny of 4 blocks"),
}
"""What an engine adds to its file is taken from these, and judged on the others."""

COUNTED: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("CNNs", "fp32"): (),
    ("CNNs", "fp16"): (),
    ("CNNs", "int8"): ("dense", "depthwise"),
    ("CNNs", "int4"): ("weight shapes",),
    **{("transformers", precision): ("dense",) for precision in ("fp32", "fp16", "int8", "int4")},
}
"""What engines have kernels of: every int8 layer of a CNN its own, int4 weights of one shape share theirs, whatever the
layer's stride and image; those of a transformer go by its blocks, and so by its layers."""

PRECISIONS: Mapping[str, Precision | None] = {"fp32": None, "fp16": FP16, "int8": INT8, "int4": INT4_BLOCKS}


def written(model: nn.Module, example: Mapping[str, np.ndarray], precision: Precision | None) -> Exported:
    """The file with one precision for all layers that can have it; int4 without whole blocks is a channel's."""
    runtime = load_runtime("tensorrt")
    model = fold(model.eval(), foldable(model.eval(), as_tensors(example))).eval()
    floats = runtime.float_graph(model, example, opset=OPSET)
    precisions = {name: chosen for name in floats.weights if (chosen := _fitting(model, name, precision)) is not None}
    seen = runtime.observe(floats, precisions, [example])
    grids = fitted(model, precisions, {}, largest=127)
    return runtime.write(floats, precisions, grids, seen=seen, ir_version=IR_VERSION)


def _fitting(model: nn.Module, name: str, precision: Precision | None) -> Precision | None:
    layer = model.get_submodule(name)
    if precision is None or not isinstance(layer, tuple(KINDS.values())):
        return None
    granularity = precision.storage.granularity
    columns = prod(layer.get_parameter("weight").shape[1:])
    if isinstance(granularity, PerGroup) and (isinstance(layer, nn.Conv2d) or columns % granularity.size):
        return INT4
    return precision


def forms(_: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By form, whether each capability takes it, or why not."""
    rows = []
    example = {"x": np.random.default_rng(0).normal(size=(2, 16, 8, 8)).astype(np.float32)}
    for form, (network, precision) in FORMS.items():
        torch.manual_seed(0)
        exported = written(SMALL[network](), example, precision)
        rows.append({"form": form, "taken": {each: _taken(exported, each) for each in CAPABILITIES}})
    return rows


def _taken(exported: Exported, capability: str) -> str:
    try:
        build(exported.data, capability, layers=exported.tensors)
    except UserError as error:
        return f"no: {error.what.partition(': ')[2]}"
    return "ok"


def sizes(before: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Bytes of files and of their engines; those that were built before are not again."""
    known = {(row["network"], row["precision"]): row for row in before}
    rows = []
    example = {"pixel_values": np.random.default_rng(0).normal(size=(2, 3, 224, 224)).astype(np.float32)}
    for name, make in NETWORKS.items():
        layers = layers_of(make())
        for precision, chosen in PRECISIONS.items():
            row = known.get((name, precision)) or _sizes(make, example, chosen)
            rows.append({**row, "network": name, "precision": precision, "layers": layers})
            print(rows[-1], flush=True)
    return rows


def _sizes(
    make: Callable[[], nn.Module], example: Mapping[str, np.ndarray], precision: Precision | None
) -> dict[str, Any]:
    torch.manual_seed(0)
    exported = written(make(), example, precision)
    built = {each: len(build(exported.data, each, layers=exported.tensors).data) for each in ("8.6", "8.9")}
    return {"file": len(exported.data), "engine": built}


def layers_of(model: nn.Module) -> dict[str, int]:
    """How many convolutions and Linear layers there are, depthwise ones apart, and of how many shapes their weights."""
    layers = [layer for layer in model.modules() if isinstance(layer, tuple(KINDS.values()))]
    depthwise = sum(getattr(layer, "groups", 1) > 1 for layer in layers)
    shapes = {(type(layer), layer.get_parameter("weight").shape) for layer in layers}
    return {"dense": len(layers) - depthwise, "depthwise": depthwise, "weight shapes": len(shapes)}


def measure(parts: Sequence[str]) -> None:
    if library() is None:
        raise SystemExit("install TensorRT-RTX first: pip install hirelc-deploy[tensorrt-rtx]")
    record = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    if record and (record["library"], record["opset"]) != (library(), OPSET):
        record, parts = {}, tuple(PARTS)  # of one library alone
    found = {part: PARTS[part](record.get(part, [])) for part in parts}
    save(record | {"library": library(), "opset": OPSET} | found, RESULT)


PARTS: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], list[dict[str, Any]]]] = {"forms": forms, "sizes": sizes}
"""What each makes of its rows of before."""


def family_of(network: str) -> str:
    return "transformers" if network.startswith("deit") else "CNNs"


def is_fitted(network: str) -> bool:
    return network in FAMILIES[family_of(network)]


def off_pct(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> float:
    """How far what is told of an engine's size is off."""
    return 100 * (told_bytes(rows, row) / float(row["engine"]["8.6"]) - 1)


def told_bytes(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> float:
    """An engine's size from its file's: what it adds is a fixed part and one for each kernel, none below nought."""
    family = family_of(row["network"])
    counted = COUNTED[family, row["precision"]]
    alike = [each for each in rows if each["network"] in FAMILIES[family] and each["precision"] == row["precision"]]
    parts = np.array([_parts(each, counted) for each in alike])
    law, _ = nnls(parts, np.array([each["engine"]["8.6"] - each["file"] for each in alike], float))
    return float(row["file"] + np.array(_parts(row, counted)) @ law)


def _parts(row: Mapping[str, Any], counted: Sequence[str]) -> list[float]:
    return [1.0, *(float(row["layers"][name]) for name in counted)]


def worst(rows: Sequence[Mapping[str, Any]], family: str) -> str:
    """Of the networks that were held out, in words."""
    held_out = [row for row in rows if family_of(row["network"]) == family and not is_fitted(row["network"])]
    errors = {f"{row['network']} in {row['precision']}": off_pct(rows, row) for row in held_out}
    name = max(errors, key=lambda each: abs(errors[each]))
    mean = sum(map(abs, errors.values())) / len(errors)
    return f"{family}: {mean:.1f} % off in the mean of {len(errors)}, {errors[name]:+.1f} % at worst ({name})"


def page() -> None:
    record = json.loads(RESULT.read_text(encoding="utf-8"))
    forms_table = markdown(
        ["form", *(f"SM{each.replace('.', '')}" for each in CAPABILITIES)],
        [[row["form"], *(row["taken"][each] for each in CAPABILITIES)] for row in record["forms"]],
    )
    sizes_table = markdown(
        ["network", "precision", "file, KB", "engine SM86, KB", "engine SM89, KB", "told for SM86, %"],
        [
            [
                row["network"],
                row["precision"],
                f"{row['file'] / 1e3:,.0f}",
                *(f"{row['engine'][each] / 1e3:,.0f}" for each in ("8.6", "8.9")),
                "fitted" if is_fitted(row["network"]) else f"{off_pct(record['sizes'], row):+.1f}",
            ]
            for row in record["sizes"]
        ],
    )
    text = TEXT.format(
        library=record["library"],
        opset=record["opset"],
        forms=forms_table,
        networks=networks_table(),
        sizes=sizes_table,
        worst="\n".join(f"- {worst(record['sizes'], family)}" for family in FAMILIES),
    )
    PAGE.write_text(text, encoding="utf-8")


def networks_table() -> str:
    """What exports for boards that are not here came to, from their manifests."""
    rows = []
    for path in sorted(MANIFESTS.glob("*.json")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        measured, baseline = manifest["measured"], manifest["baseline"]
        network, target = path.stem.split("_")
        (built,) = (
            found
            for note in (*manifest["notes"], *manifest.get("notes_on_measurement", ()))
            if (found := BUILT.search(note))
        )
        rows.append(
            [
                f"`{network}`",
                f"`{target}`",
                f"{baseline['size_bytes'] / 1e3:,.0f}",
                f"{measured['size_bytes'] / 1e3:,.0f}",
                f"{int(built['bytes']) / 1e3:,.0f}, {built['capability']}",
                f"{measured['latency_ms']['p50']:.3g}",
                f"{measured['drop_points']:.2f}" if network in TRAINED else "random weights",
                manifest["verdict"],
            ]
        )
    head = (
        "network",
        "target",
        "original, KB",
        "file, KB",
        "engine, KB, for",
        "estimated, ms",
        "simulated drop",
        "verdict",
    )
    return markdown(head, rows)


TEXT = """# What TensorRT takes, and how large its engines are

Written by `python benchmarks/tensorrt_forms.py page` from `benchmarks/results/tensorrt_forms.json`; the head of that
script says what makes that.

Files of `exporters/tensorrt.py` (opset {opset}), parsed and built by {library} on a machine without a GPU, not
run. That is an acceptance test of the files. It is no evidence about a Jetson Orin, whose compute capability is 8.7 and
whose TensorRT is 10.3: there the lint holds files to what the sources of its parser say.

{forms}
Refused by the lint and by that parser alike: quantised biases, packed weights, zero points that are not 0, several
scales for an activation, scales that are not positive, unknown operators (`tests/test_trt_lint.py` breaks a file each
way). Refused by the lint alone, since TensorRT 10 refuses it or no int8 kernel reads it: quantised constants other
than weights, uint8 activations, scales along another axis than a weight's outputs, computed scales, newer opsets.

Away from the device a file is scored by ONNX Runtime, which has no kernels for fp16 on x86 and would compute all of it
in fp32: every half of the file is rounded to one for that (`exporters/_trt_reference.py`).  What fp16 ruins stays in
fp32, with Casts around it; such files are built as well (`tests/test_trt_fp32.py`).

FP8 convolutions are built as well, but NVIDIA's documentation names matrix products alone, so targets offer FP8 to
Linear layers. TensorRT 10's parser also refuses INT4 weights whose last axis is odd, which is that of every convolution
of 1 x 1 or 3 x 3: targets say so with `int4_in_pairs`.

## Four networks for boards that are not here

`python benchmarks/tensorrt_networks.py`: three quarters of the channels of each, all layers in int8, nothing trained,
for what is tested is the file; `wide` and `vit` are those of Fashion-MNIST. Each file was linted for its target and
built by {library} for the nearest compute capability that it knows: SM86 stands in for an Orin's 8.7; that
it accepts the file says nothing of the board. Nothing ran on a GPU; the manifests are in
`benchmarks/results/tensorrt/`.

{networks}
## Sizes

At 224 pixels, random weights; int4 is weight-only, in blocks of 64 where a Linear layer has whole ones and a scale a
channel elsewhere. An engine holds kernels beside weights, some 0.1 MB for each that is different: that of a small
network is larger than its file many times over. The last column is what a file's size tells of its engine's. Added is a
fixed part, and one for each kernel, taken from the networks that say so. A CNN's int8 layers have one each, dense and
depthwise ones apart, and its int4 weights one a shape, whatever stride and image; what a transformer's blocks add is
told by its layers. Held out:

{worst}

{sizes}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("actions", nargs="+", choices=(*PARTS, "page"))
    actions = parser.parse_args().actions
    if parts := [each for each in actions if each in PARTS]:
        measure(parts)
    if "page" in actions:
        page()


if __name__ == "__main__":
    main()
