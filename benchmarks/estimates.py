"""Fits the estimates of devices that were not measured to figures that others published: python benchmarks/estimates.py

A target's roofline has few numbers: the multiply-accumulates a second that its layers reach, by compute, and a floor a
kernel.  They are fitted to some of the published latencies and judged on the others.  Prints what belongs into
profiles/*.toml and writes benchmarks/results/estimates.json.  Memory bandwidth is the specification's.

Some figures hold more than the network: Ultralytics times a call of its own Python.  What that adds is one number for
all of its figures on a device; it is fitted with the others and is no part of the estimate.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from _bench import RESULTS, save
from scipy.optimize import minimize
from torch import nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileViTConfig,
    MobileViTForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from hirelc_deploy import tables
from hirelc_deploy.cost.estimate import EstimatedPrices
from hirelc_deploy.cost.network import Network
from hirelc_deploy.cost.predictor import Predictor
from hirelc_deploy.policy import FP16, INT8, Compute, Policy
from hirelc_deploy.profiles import Estimate, load_target

RESULT = RESULTS / "estimates.json"
ARM, COURSE = "Arm model cards (ExecuTorch, XNNPACK)", "Arm course (ExecuTorch, XNNPACK)"
ZOO = "OpenCV Zoo (OpenCV DNN)"
CARD = "Arm model card (ONNX Runtime)"
MLPERF = "MLPerf Inference v3.1 (TensorRT 8.5)"
EMBEDL = "embedl Edge-Inference-Benchmarks (TensorRT)"
GUIDE = "Ultralytics Jetson guide (TensorRT 10)"
EXPORT = "Ultralytics TensorRT page (TensorRT 10)"


@dataclass(frozen=True)
class Published:
    """A latency that somebody else measured, of what PIXELS says of the network's images."""

    network: str
    compute: Compute
    ms: float
    source: str
    held_out: bool = False
    batch: int = 1
    harness: bool = False
    """Whether it holds what a call costs around the network."""

    def __str__(self) -> str:
        batch = "" if self.batch == 1 else f" batch {self.batch}"
        return f"{self.network}{batch} {self.compute}{', held out' if self.held_out else ''}"


@dataclass(frozen=True)
class Device:
    """What is known of a device."""

    gb_per_s: float
    """By its specification."""
    channel_tile: int
    figures: tuple[Published, ...]
    image_tile: int | None = None
    runtime: str = "host"
    """A target whose runtime makes kernels of networks as this device's does."""
    start: Mapping[Compute, float] = field(default_factory=lambda: {Compute.FP32: 20.0, Compute.INT8: 40.0})
    """Where the fit begins, by compute: the rates that figures tell."""
    least_error_pct: float = 0.0
    """Where what is held out says too little: one figure, with which in view the fusing of operators was settled."""
    follows: Mapping[Compute, tuple[Compute, float]] = field(default_factory=dict)
    """Rates that no figure tells: so many times another's."""
    like: tuple[str, float] | None = None
    """A device that is made alike, and how many times its multiprocessors and clock this one has: its rates are scaled,
    and without figures its floor and error are taken as well."""


FP16_OF_INT8, FP32_OF_INT8 = 0.556, 0.231
"""Rates on jetson-orin-nano, as this script fits them."""


def _yolo11(compute: Compute, source: str, **ms: float) -> list[Published]:
    """Its sizes n, m and x are fitted to, s and l held out."""
    return [
        Published(f"yolo11{size}", compute, each, source, held_out=size in "sl", harness=True)
        for size, each in ms.items()
    ]


DEVICES = {
    "raspberry-pi-5": Device(
        17.1,  # LPDDR4X-4267, 32 bits
        8,
        (
            Published("resnet50", Compute.INT8, 20.6, ARM),
            Published("resnet18", Compute.INT8, 8.75, ARM, held_out=True),
            Published("mobilenetv2", Compute.FP32, 10.9, COURSE),
            Published("mobilenetv2", Compute.INT8, 4.0, COURSE),
            Published("inception_v3", Compute.INT8, 113, CARD, held_out=True),
        ),
    ),
    "raspberry-pi-4": Device(
        12.8,  # LPDDR4-3200, 32 bits
        8,
        (
            Published("mobilenetv2", Compute.FP32, 58, ZOO),
            Published("resnet50", Compute.FP32, 421, ZOO),
            Published("resnet50", Compute.INT8, 411, ZOO),
            Published("mobilenetv2", Compute.INT8, 61, ZOO, held_out=True),
        ),
    ),
    "jetson-orin": Device(
        204.8,  # LPDDR5, 256 bits
        32,
        (
            Published("resnet50", Compute.INT8, 0.636, MLPERF),
            Published("resnet50", Compute.INT8, 2.163, MLPERF, batch=8),
            Published("mobilevit-s", Compute.FP16, 1.28, EMBEDL, held_out=True),
        ),
        image_tile=4,
        runtime="jetson-orin",
        start={Compute.INT8: 18_000.0},
        least_error_pct=11.4,  # jetson-orin-nx's
        # as fitted on jetson-orin-nano, where all three were measured
        follows={Compute.FP16: (Compute.INT8, FP16_OF_INT8), Compute.FP32: (Compute.INT8, FP32_OF_INT8)},
    ),
    "jetson-orin-nx": Device(
        102.4,  # LPDDR5, 128 bits
        32,
        (
            Published("resnet50", Compute.INT8, 1.078, MLPERF),
            Published("resnet50", Compute.INT8, 5.078, MLPERF, batch=8, held_out=True),
            *_yolo11(Compute.FP16, GUIDE, n=4.85, s=7.55, m=14.45, l=18.53),
            *_yolo11(Compute.INT8, GUIDE, n=4.37, s=5.63, m=10.19, l=13.36),
        ),
        image_tile=4,
        runtime="jetson-orin",
        start={Compute.FP16: 3000.0, Compute.INT8: 6000.0},
        follows={Compute.FP32: (Compute.INT8, FP32_OF_INT8)},
    ),
    "jetson-orin-nano": Device(
        102.4,  # LPDDR5, 128 bits, Super
        32,
        (
            *_yolo11(Compute.FP32, GUIDE, n=7.60, s=13.29, m=28.21, l=35.59, x=67.32),
            *_yolo11(Compute.FP16, GUIDE, n=4.91, s=7.30, m=13.99, l=17.57, x=32.94),
            *_yolo11(Compute.INT8, GUIDE, n=3.91, s=5.25, m=9.58, l=12.37, x=20.72),
        ),
        image_tile=4,
        runtime="jetson-orin",
        start={Compute.FP32: 1300.0, Compute.FP16: 3000.0, Compute.INT8: 6000.0},
    ),
    "rtx-ampere": Device(
        360.0,  # GDDR6, 192 bits
        32,
        (
            Published("yolov8n", Compute.FP16, 0.86, EXPORT),
            Published("yolov8n", Compute.INT8, 0.80, EXPORT),
            Published("yolov8n", Compute.FP32, 1.76, EXPORT, held_out=True),
        ),
        image_tile=4,
        runtime="jetson-orin",
        start={},
        like=("jetson-orin-nano", (28 * 1.777) / (8 * 1.02)),
    ),
    "rtx-ada": Device(
        272.0, 32, (), image_tile=4, runtime="jetson-orin", start={}, like=("rtx-ampere", (24 * 2.46) / (28 * 1.777))
    ),
    "rtx-blackwell": Device(
        448.0, 32, (), image_tile=4, runtime="jetson-orin", start={}, like=("rtx-ampere", (30 * 2.497) / (28 * 1.777))
    ),
}


def _resnet(layer_type: str, sizes: Sequence[int], depths: Sequence[int]) -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(layer_type=layer_type, hidden_sizes=list(sizes), depths=list(depths), num_labels=1000)
    )


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: _resnet("basic", (64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet50": lambda: _resnet("bottleneck", (256, 512, 1024, 2048), (3, 4, 6, 3)),
    "mobilenetv2": lambda: MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000)),
    "mobilevit-s": lambda: MobileViTForImageClassification(MobileViTConfig(image_size=256)),
}


PIXELS = {"mobilevit-s": 256}
"""Of networks that do not read 224; those in BY_SIZE are published at their own."""

BY_SIZE = {
    "inception_v3": (5.71e9, 140),
    # at 640 pixels: half the FLOPs and the layers of the fused network, as Ultralytics prints them
    "yolo11n": (3.25e9, 100),
    "yolo11s": (10.75e9, 100),
    "yolo11m": (34.0e9, 125),
    "yolo11l": (43.45e9, 190),
    "yolo11x": (97.45e9, 190),
    "yolov8n": (4.35e9, 72),
}
"""Multiply-accumulates and kernels of networks that cannot be built here, by their publications."""


@cache
def network_of(name: str, runtime: str, batch: int) -> Network:
    """The kernels of a network with all its channels, as the runtime of a target makes them."""
    torch.manual_seed(0)
    size = PIXELS.get(name, 224)
    example = {"pixel_values": np.zeros((2, 3, size, size), np.float32)}
    return tables.network_of(MODELS[name]().eval(), example, load_target(runtime), batch=batch).with_counts({})


def told_ms(device: Device, estimate: Estimate, figure: Published, harness_us: float = 0.0) -> float:
    """What the estimate makes of a published figure's network."""
    if figure.network in BY_SIZE:
        macs, kernels = BY_SIZE[figure.network]
        around_us = harness_us if figure.harness else 0.0
        return (around_us + kernels * estimate.floor_us + macs / (estimate.gmacs_per_s[figure.compute] * 1e3)) / 1e3
    network = network_of(figure.network, device.runtime, figure.batch)
    able = [layer for layer, computes in network.computes.items() if figure.compute in computes]
    chosen = {Compute.INT8: INT8, Compute.FP16: FP16}.get(figure.compute)
    policy = Policy({} if chosen is None else dict.fromkeys(able, chosen), {})
    return float(Predictor(network, EstimatedPrices(estimate)).foretell([policy]).ms[0])


def estimate_of(device: Device, numbers: Sequence[float], given: Mapping[Compute, float]) -> tuple[Estimate, float]:
    """From logarithms of the rates that are fitted, of the floor and of what a harness adds; and that.

    `given` holds rates that are not fitted.
    """
    *fitted_rates, floor_us, harness_us = np.exp(numbers).tolist()
    rates = {**given, **dict(zip(device.start, fitted_rates, strict=True))}
    rates |= {compute: times * rates[other] for compute, (other, times) in device.follows.items()}
    estimate = Estimate(
        gmacs_per_s=rates,
        gb_per_s=device.gb_per_s,
        floor_us=floor_us,
        channel_tile=device.channel_tile,
        image_tile=device.image_tile,
        error_pct=1.0,
        sources=tuple(dict.fromkeys(figure.source for figure in device.figures)) or ("its specification",),
    )
    return estimate, harness_us


def fitted(device: Device, given: Mapping[Compute, float]) -> tuple[Estimate, float, dict[str, float]]:
    """The estimate with the smallest squared relative errors, what a harness adds, and the errors in percent."""
    seen = [figure for figure in device.figures if not figure.held_out]

    def loss(numbers: np.ndarray) -> float:
        found, harness_us = estimate_of(device, numbers, given)
        return sum(np.log(told_ms(device, found, figure, harness_us) / figure.ms) ** 2 for figure in seen)

    start = np.log([*device.start.values(), 5.0, 1000.0])
    found = minimize(loss, start, method="Nelder-Mead", options={"maxfev": 300 * (1 + len(device.start))})
    estimate, harness_us = estimate_of(device, found.x, given)
    errors = {
        str(figure): 100 * (told_ms(device, estimate, figure, harness_us) / figure.ms - 1) for figure in device.figures
    }
    return estimate, harness_us if any(figure.harness for figure in device.figures) else 0.0, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("devices", nargs="*", default=list(DEVICES))
    options = parser.parse_args()
    record: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in options.devices:
        device = DEVICES[name]
        given: dict[Compute, float] = {}
        if device.like is not None:
            alike, times = device.like
            model = Estimate.model_validate(record[alike]["estimate"])
            given = {compute: times * rate for compute, rate in model.gmacs_per_s.items()}
            if not device.figures:
                estimate = model.model_copy(update={"gmacs_per_s": given, "gb_per_s": device.gb_per_s})
                record[name] = {"estimate": estimate.model_dump(mode="json"), "error_pct": {}}
                continue
        estimate, harness_us, errors = fitted(device, given)
        held_out = [abs(error) for figure, error in errors.items() if figure.endswith("held out")]
        error_pct = max(float(np.mean(held_out)), device.least_error_pct)
        estimate = estimate.model_copy(update={"error_pct": error_pct})
        record[name] = {"estimate": estimate.model_dump(mode="json"), "error_pct": errors}
        if harness_us:
            record[name]["harness_us"] = harness_us
        print(name, estimate, errors, f"harness: {harness_us:.0f} us", sep="\n")
    save(record, RESULT)


if __name__ == "__main__":
    main()
