"""Four networks for boards with TensorRT that are not here, exported and built without a GPU.

    pip install hirelc-deploy[tensorrt-rtx]
    python benchmarks/tensorrt_networks.py              exports all for all targets, then writes the page
    python benchmarks/tensorrt_networks.py --networks wide --targets jetson-orin
    python benchmarks/tensorrt_forms.py page            the page alone

Each keeps three quarters of its channels, all layers in int8, and is not fine-tuned: what is tested is the file.
The two of 224 pixels have random weights, so that their scores say nothing.  The manifest of each goes to
benchmarks/results/tensorrt/NETWORK_TARGET.json; some 30 minutes in all.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import tensorrt_forms
import torch
from _bench import EXAMPLE, load_task
from _networks import NETWORKS, TRAINED, UNTRAINED, random_images
from torch import nn

from hirelc_deploy import checkpoint
from hirelc_deploy.config import ExportSettings
from hirelc_deploy.exporters._trt_build import library
from hirelc_deploy.pipeline import export
from hirelc_deploy.task import Task

TARGETS = ("jetson-orin", "rtx-ampere", "rtx-ada")
RECIPE = "keep=75%,compute=int8"


def model_and_task(network: str) -> tuple[nn.Module, Task]:
    """As it was trained, or with random weights and images."""
    if network in TRAINED:
        file = EXAMPLE / "checkpoints" / f"{network}.safetensors"
        return checkpoint.load(f"{EXAMPLE}/networks.py:{network}", file).model, load_task(network)
    torch.manual_seed(0)
    return UNTRAINED[network]().eval(), random_images()


def run(networks: Sequence[str], targets: Sequence[str], out: Path) -> None:
    """Export, and keep the manifests."""
    tensorrt_forms.MANIFESTS.mkdir(exist_ok=True)
    for network in networks:
        for target in targets:
            model, task = model_and_task(network)
            folder = out / f"{network}_{target}"
            settings = ExportSettings(
                model=network,
                data="given",
                target=target,
                out=folder,
                recipe=RECIPE,
                epochs=0,
                post_training=("statistics", "biases"),
                resume=True,
            )
            outcome = export(settings, model=model, task=task)
            manifest = (outcome.folder / "manifest.json").read_text(encoding="utf-8")
            (tensorrt_forms.MANIFESTS / f"{network}_{target}.json").write_text(manifest, encoding="utf-8")
            print(f"{network} for {target}: {outcome.manifest.verdict}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/tensorrt_networks"))
    options = parser.parse_args()
    if library() is None:
        raise SystemExit("install TensorRT-RTX first: pip install hirelc-deploy[tensorrt-rtx]")
    run(options.networks, options.targets, options.out)
    tensorrt_forms.page()


if __name__ == "__main__":
    main()
