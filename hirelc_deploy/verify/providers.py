"""ONNX Runtime's execution providers beside its own for CPUs: what brings each of them, and what it is told.

CUDA and TensorRT come with onnxruntime-gpu, OpenVINO with onnxruntime-openvino or, for Intel's own processors, as a
plug-in; TensorRT-RTX is a plug-in.  The first two take the place of onnxruntime, so each belongs in an environment of
its own, whose Python is named.  An engine keeps the types of its file: no option lets a provider choose others.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hirelc_deploy.exporters._trt_build import LARGEST_BATCH
from hirelc_deploy.exporters._trt_exec import Shapes, sized

CACHE = "../{file}"
"""Where the engines of a file are kept between jobs: beside the folder of the job, by the file's own name, and removed
at the end.  Engines are looked up by names of nodes and shapes of inputs, which files of one network share."""


@dataclass(frozen=True)
class Provider:
    """One of them."""

    name: str
    """As a user writes it."""
    called: str
    """By ONNX Runtime."""
    kind: Literal["cpu", "gpu"]
    """Of the targets that it can run files for."""
    package: str | None
    """The Python module of its plug-in; None where it is built into a runtime."""
    install: str
    """What to do where it is not there."""
    options: Callable[[Shapes, int, int], dict[str, str]]
    """What it is told, by the shapes of one example, the batch that is timed, and the threads of a CPU."""

    def job(self, options: Mapping[str, str]) -> dict[str, Any]:
        """For the runner."""
        return {"called": self.called, "kind": self.kind, "package": self.package, "options": dict(options)}

    def fix_for(self, refused: str) -> str:
        """What to do about what ONNX Runtime says."""
        if "assigned to the default CPU EP" in refused:
            return "it does not run the whole file: choose other computes for the layers, or another provider"
        if re.search(r"\S+: cannot open shared object file|LoadLibrary failed", refused):
            return f"its libraries are not found: {self.install}"
        if f"has no {self.called}" in refused or "finds no device" in refused:
            return self.install
        return "is the file whole, and its runtime there as new as the target says?"


def _of_cuda(shapes: Shapes, batch: int, threads: int) -> dict[str, str]:
    return {}


def _of_openvino(shapes: Shapes, batch: int, threads: int) -> dict[str, str]:
    return {"num_of_threads": str(threads)}


def _of_tensorrt(shapes: Shapes, batch: int, threads: int) -> dict[str, str]:
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": CACHE,
        **_profile("trt", shapes, batch),
    }


def _of_tensorrt_rtx(shapes: Shapes, batch: int, threads: int) -> dict[str, str]:
    return {"nv_runtime_cache_path": CACHE, **_profile("nv", shapes, batch)}


def _profile(prefix: str, shapes: Shapes, batch: int) -> dict[str, str]:
    """The batches that an engine is built for: without, each larger one would have it built anew."""
    sizes = {"min": 1, "opt": batch, "max": max(batch, LARGEST_BATCH)}
    return {f"{prefix}_profile_{which}_shapes": sized(shapes, size) for which, size in sizes.items()}


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(
            "cuda",
            "CUDAExecutionProvider",
            "gpu",
            None,
            "pip install onnxruntime-gpu there, in an environment of its own, with CUDA and cuDNN of its version",
            _of_cuda,
        ),
        Provider(
            "tensorrt",
            "TensorrtExecutionProvider",
            "gpu",
            None,
            "pip install onnxruntime-gpu there, in an environment of its own, with CUDA and TensorRT of its version",
            _of_tensorrt,
        ),
        Provider(
            "tensorrt-rtx",
            "NvTensorRTRTXExecutionProvider",
            "gpu",
            "onnxruntime_ep_nv_tensorrt_rtx",
            "pip install 'onnxruntime>=1.24' onnxruntime-ep-nv-tensorrt-rtx there; it needs an RTX GPU, its driver and "
            "the CUDA runtime",
            _of_tensorrt_rtx,
        ),
        Provider(
            "openvino",
            "OpenVINOExecutionProvider",
            "cpu",
            "onnxruntime_ep_openvino",
            "pip install onnxruntime-openvino there, in an environment of its own",
            _of_openvino,
        ),
    )
}
