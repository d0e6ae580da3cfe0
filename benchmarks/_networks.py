"""The networks whose files are timed and weighed under random policies: two of Fashion-MNIST, two at 224 pixels."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from _bench import workbench
from torch import nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from hirelc_deploy import console, graph
from hirelc_deploy.compress.distil import FineTuning
from hirelc_deploy.compress.posttraining import PostTraining
from hirelc_deploy.policy import Policy
from hirelc_deploy.profiles import load_target
from hirelc_deploy.rundir import RunFolder
from hirelc_deploy.search.space import SearchSpace
from hirelc_deploy.task import ArraySource, Classification
from hirelc_deploy.workbench import Workbench

TRAINED = ("wide", "vit")
PIXELS = 224
SLOW_FORMATS = ("codebook", "vector", "shared_vector", "log", "float")
"""Whose values are searched for; how weights are stored changes no latency (benchmarks/number_formats.py)."""


def resnet18() -> nn.Module:
    """11.7 million parameters, 20 convolutions."""
    shape = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**shape, embedding_size=64, num_labels=1000))


def mobilenetv2() -> nn.Module:
    """3.5 million parameters, inverted residuals."""
    return MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000))


UNTRAINED: Mapping[str, Callable[[], nn.Module]] = {"resnet18": resnet18, "mobilenetv2": mobilenetv2}
NETWORKS = (*TRAINED, *UNTRAINED)


def random_images() -> Classification:
    """For networks whose weights are random, too: what a score says of them is nothing."""
    images = np.random.default_rng(0).standard_normal((8, 3, PIXELS, PIXELS)).astype(np.float32)
    source = ArraySource({"pixel_values": images}, np.arange(8) % 2)
    return Classification(source, source, source, batch=4)


@contextmanager
def bench_of(network: str, out: Path, *, threads: int = 1, batch: int = 1) -> Iterator[Workbench]:
    """A network that can be made real under any policy; weights are random where none are at hand."""
    if network in TRAINED:
        with workbench(network, out / network / "run", threads=threads, batch=batch) as bench:
            yield bench
        return
    torch.manual_seed(0)
    model, task = UNTRAINED[network]().eval(), random_images()
    with RunFolder.open(out / network / "run", {"model": network}, resume=True) as folder:
        yield Workbench(
            model,
            task,
            graph.trace(model, task.example),
            load_target("host"),
            folder,
            importance="obs",
            fine_tuning=FineTuning(epochs=0),
            post_training=PostTraining.of(()),
            threads=threads,
            batch=batch,
            progress=console.progress,
        )


def random_policies(space: SearchSpace, count: int) -> list[Policy]:
    random = np.random.default_rng(1)
    found = []
    for _ in range(count):
        precisions = {}
        for layer, choices in space.layers.items():
            compute = random.choice(list(space.computes[layer]))
            quick = [each for each in choices if each.compute == compute and each.storage.format not in SLOW_FORMATS]
            precisions[layer] = quick[random.integers(len(quick))]
        counts = {group: [n for n in each if n] for group, each in space.groups.items()}
        found.append(Policy(precisions, {group: int(random.choice(each)) for group, each in counts.items()}))
    return found
