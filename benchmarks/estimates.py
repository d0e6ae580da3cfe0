"""Fits the estimates of devices that were not measured to figures that others published: python benchmarks/estimates.py

A target's roofline has few numbers: the multiply-accumulates a second that its layers reach, by compute, and a floor a
kernel.  They are fitted to some of the published latencies and judged on the others.  Prints what belongs into
profiles/*.toml and writes benchmarks/results/estimates.json.  Memory bandwidth is the specification's.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    ResNetConfig,
    ResNetForImageClassification,
)

from hirelc_deploy import tables
from hirelc_deploy.cost.estimate import EstimatedPrices
from hirelc_deploy.cost.network import Network
from hirelc_deploy.cost.predictor import Predictor
from hirelc_deploy.policy import INT8, Compute, Policy
from hirelc_deploy.profiles import Estimate, load_target

RESULT = RESULTS / "estimates.json"
ARM, COURSE = "Arm model cards (ExecuTorch, XNNPACK)", "Arm course (ExecuTorch, XNNPACK)"
ZOO = "OpenCV Zoo (OpenCV DNN)"
CARD = "Arm model card (ONNX Runtime)"


@dataclass(frozen=True)
class Published:
    """A latency at batch 1 and 224 pixels that somebody else measured."""

    network: str
    compute: Compute
    ms: float
    source: str
    held_out: bool = False


@dataclass(frozen=True)
class Device:
    """What is known of a device."""

    gb_per_s: float
    """By its specification."""
    channel_tile: int
    figures: tuple[Published, ...]


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
}


def _resnet(layer_type: str, sizes: Sequence[int], depths: Sequence[int]) -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(layer_type=layer_type, hidden_sizes=list(sizes), depths=list(depths), num_labels=1000)
    )


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: _resnet("basic", (64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet50": lambda: _resnet("bottleneck", (256, 512, 1024, 2048), (3, 4, 6, 3)),
    "mobilenetv2": lambda: MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000)),
}


BY_SIZE = {"inception_v3": (5.71e9, 140)}
"""Multiply-accumulates and kernels of networks that cannot be built here, by their publications."""


@cache
def network_of(name: str) -> Network:
    """The kernels of a network with all its channels."""
    torch.manual_seed(0)
    example = {"pixel_values": np.zeros((2, 3, 224, 224), np.float32)}
    return tables.network_of(MODELS[name]().eval(), example, load_target("host"), batch=1).with_counts({})


def told_ms(estimate: Estimate, figure: Published) -> float:
    """What the estimate makes of a published figure's network."""
    if figure.network in BY_SIZE:
        macs, kernels = BY_SIZE[figure.network]
        return (kernels * estimate.floor_us + macs / (estimate.gmacs_per_s[figure.compute] * 1e3)) / 1e3
    network = network_of(figure.network)
    able = [layer for layer, computes in network.computes.items() if figure.compute in computes]
    policy = Policy({} if figure.compute is Compute.FP32 else dict.fromkeys(able, INT8), {})
    return float(Predictor(network, EstimatedPrices(estimate)).foretell([policy]).ms[0])


def estimate_of(device: Device, numbers: Sequence[float], error_pct: float = 1.0) -> Estimate:
    """From logarithms of fp32 and int8 rates and of the floor."""
    fp32, int8, floor_us = np.exp(numbers).tolist()
    return Estimate(
        gmacs_per_s={Compute.FP32: fp32, Compute.INT8: int8},
        gb_per_s=device.gb_per_s,
        floor_us=floor_us,
        channel_tile=device.channel_tile,
        error_pct=error_pct,
        sources=tuple(dict.fromkeys(figure.source for figure in device.figures)),
    )


def fitted(device: Device) -> tuple[Estimate, dict[str, float]]:
    """The estimate with the smallest squared relative errors, and its errors on every figure in percent."""
    seen = [figure for figure in device.figures if not figure.held_out]

    def loss(numbers: np.ndarray) -> float:
        estimate = estimate_of(device, numbers)
        return sum(np.log(told_ms(estimate, figure) / figure.ms) ** 2 for figure in seen)

    found = minimize(loss, np.log([20.0, 40.0, 5.0]), method="Nelder-Mead", options={"maxfev": 300})
    estimate = estimate_of(device, found.x)
    errors = {
        f"{figure.network} {figure.compute}{', held out' if figure.held_out else ''}": 100
        * (told_ms(estimate, figure) / figure.ms - 1)
        for figure in device.figures
    }
    return estimate, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("devices", nargs="*", default=list(DEVICES))
    options = parser.parse_args()
    record: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in options.devices:
        estimate, errors = fitted(DEVICES[name])
        held_out = [abs(error) for figure, error in errors.items() if figure.endswith("held out")]
        estimate = estimate.model_copy(update={"error_pct": float(np.mean(held_out))})
        record[name] = {"estimate": estimate.model_dump(mode="json"), "error_pct": errors}
        print(name, estimate, errors, sep="\n")
    save(record, RESULT)


if __name__ == "__main__":
    main()
