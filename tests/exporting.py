"""Exports of tiny networks that take seconds: what the end-to-end tests have in common."""

import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hirelc_deploy import datasets, latencies, pipeline, verification
from hirelc_deploy.compress.batchnorm import reestimate
from hirelc_deploy.config import ExportSettings
from hirelc_deploy.policy import Policy
from hirelc_deploy.search import hierarchical
from hirelc_deploy.task import ArraySource, Classification
from hirelc_deploy.verify import manifest as manifests

ROOT = Path(__file__).parents[1]
SIZE_TOLERANCE_PCT = 0.5  # what the product promises; the prediction is exact today

QUICK_TARGET = (
    (ROOT / "profiles" / "host.toml")
    .read_text(encoding="utf-8")
    .replace('name = "host"', 'name = "quick"')
    .replace("warmup_rounds = 20", "warmup_rounds = 1")
    .replace("min_seconds = 2.5", "min_seconds = 0.05")
)
"""This machine, timed for a moment: the figures are noise, and no test here reads them."""

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process the peak of its memory")
"""There the tests run whatever its files look like: that nothing is told is a test of its own."""

ESTIMATE = """
[estimate]
gmacs_per_s = { fp32 = 10.0, int8 = 40.0 }
gb_per_s = 10.0
floor_us = 5.0
channel_tile = 16
error_pct = 20.0
sources = ["a data sheet"]
"""
"""What makes the TOML of a target that of a device which nobody has measured."""


def hasten() -> None:
    """Spend no time on what these tests do not look at."""
    latencies.PREDICTION_SECONDS = 0.05
    hierarchical.HIGH_STEPS, hierarchical.LOW_STEPS, hierarchical.PROPOSALS = 512, 1024, 32


class DigitNet(nn.Module):
    """A stem, one residual block that can vanish, a strided layer, a head: inputs (N, 1, 8, 8)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return self.head(F.relu(self.down(x)).mean((2, 3)))


@functools.cache
def digits() -> Classification:
    task = datasets.load_task("digits")
    assert isinstance(task, Classification)
    return task


@functools.cache
def trained_digit_net() -> nn.Module:
    """Some 90 % of the digits right after a few seconds; no test may change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DigitNet(12).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    task = digits()
    for epoch in range(8):
        for _, inputs, target in task.train.shuffled(0, epoch):
            loss = task.loss({"output": model(torch.from_numpy(inputs["input"]))}, torch.from_numpy(target))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    # the running averages of so few steps lag behind: with them the network gets 59 % right
    reestimate(model, ({"input": torch.from_numpy(inputs["input"])} for inputs, _ in task.train))
    return model.eval()


def relative_error(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float:
    """The largest over all outputs of |found - wanted| / |wanted| (Frobenius norms)."""
    assert found.keys() == wanted.keys()
    # behind a ReLU one example may be all zeros, in both or not at all
    return max(float(np.linalg.norm(found[n] - wanted[n]) / (np.linalg.norm(wanted[n]) or 1.0)) for n in wanted)


def random_task(*, source: type[ArraySource] = ArraySource, batch: int = 32, **shapes: tuple[int, ...]) -> Any:
    """Noise with 5 labels: inputs by name in these shapes, 80 examples to train on and 40 to test."""
    random = np.random.default_rng(0)

    def split(examples: int) -> ArraySource:
        inputs = {name: random.normal(size=(examples, *shape)).astype(np.float32) for name, shape in shapes.items()}
        return source(inputs, np.arange(examples) % 5)

    return Classification(split(80), split(40), batch=batch)


def quick_target(folder: Path, *, channel_multiple: int = 2) -> str:
    """A file for --target.  With a multiple of 8 a network of 8 and 16 channels has a short ladder."""
    path = folder / "quick.toml"
    changed = QUICK_TARGET.replace("channel_multiple = 8", f"channel_multiple = {channel_multiple}")
    path.write_text(changed, encoding="utf-8")
    return str(path)


def export(out: Path, network: nn.Module | None = None, task: Any = None, **settings: Any) -> verification.Outcome:
    """An export to `out`, checked for what holds of every one.  Without fine-tuning unless `epochs` is given."""
    out.parent.mkdir(parents=True, exist_ok=True)
    defaults = {"model": "in memory", "data": "in memory", "epochs": 0, "out": out}
    target = settings.pop("target", None) or quick_target(out.parent)
    outcome = pipeline.export(ExportSettings(**{**defaults, "target": target, **settings}), model=network, task=task)
    check(outcome)
    return outcome


def check(outcome: verification.Outcome) -> None:
    """What a user relies on, whatever was exported: the folder is whole, and the manifest speaks of its file."""
    folder, manifest = outcome.folder, outcome.manifest
    assert manifests.read(folder) == manifest
    assert manifest.artifact == manifests.Artifact.of(folder / manifest.artifact.path)
    assert (folder / "baseline.onnx").stat().st_size == manifest.baseline.size_bytes
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")
    assert manifest.error.size_pct is not None
    assert abs(manifest.error.size_pct) <= SIZE_TOLERANCE_PCT
    for layer in manifest.layers:
        assert layer.runs_as == (layer.compute if layer.kept else None), layer.name
    policy = policy_of(outcome)
    assert policy.precisions.keys() == {layer.name for layer in manifest.layers}


def policy_of(outcome: verification.Outcome) -> Policy:
    return Policy.from_dict(json.loads((outcome.folder / "policy.json").read_bytes()))


def write_policy(path: Path, policy: Policy) -> Path:
    path.write_text(json.dumps(policy.to_dict()), encoding="utf-8")
    return path


hasten()
