"""An engine, built without a GPU where TensorRT's library is installed: an acceptance test of the file.

TensorRT-RTX builds for a compute capability that it is told; TensorRT needs a GPU and builds for that.  Neither is a
dependency: `pip install hirelc-deploy[tensorrt-rtx]` brings the first.  What an engine runs as, and how fast, only its
device says.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx

from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters._trt_lint import where_in

LARGEST_BATCH = 64
"""Examples that an engine takes at once."""

WORDS = (
    ("HW-specific datatypes: int4", "{sm} has no INT4", "take int4 out of the target's precisions"),
    ("HW-specific datatypes: fp8", "{sm} has no FP8", "take fp8 out of the target's precisions"),
    ("FP32 GEMM is not supported", "{sm} multiplies no matrices in fp32", "compute Linear layers in fp16 or int8"),
    ("FP32 3D convolution is not supported", "{sm} has no 3-D convolution in fp32", "compute it in fp16"),
    ("out of memory", "there is not enough memory to build", "free some, or build on the device"),
)
"""What a builder says, what that means, and what to do."""


@dataclass(frozen=True)
class Built:
    """An engine, and what made it."""

    data: bytes
    library: str
    """Its name and version."""
    built_for: str
    """The compute capability, as SM86."""


def library() -> str | None:
    """The name and version of the library that is installed here, None without one."""
    trt = _trt()
    return None if trt is None else f"{trt.__name__} {trt.__version__}"


def build(data: bytes, compute_capability: str, *, batch: int = 1, layers: Mapping[str, str] | None = None) -> Built:
    """The engine of a file, for this compute capability (8.6) or the nearest older one of its generation.

    `layers` says in which tensor each layer's weight lies.  Raises UserError, in our words where the reason is known,
    if the file is refused or there is no engine for it; and ValueError if no library is installed.
    """
    trt = _trt()
    if trt is None:
        raise ValueError("neither tensorrt_rtx nor tensorrt is installed")
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(data):
        raise _refused(parser, data, layers or {})
    config = builder.create_builder_config()
    sm = _set_capability(trt, config, compute_capability)
    config.add_optimization_profile(_shapes(builder, network, batch))
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _not_built(log.errors, sm)
    return Built(bytes(engine), f"{trt.__name__} {trt.__version__}", sm)


def nearest_capability(wanted: str, known: tuple[str, ...]) -> str | None:
    """The newest of `known` (8.6) that is of the same generation and no newer; None if there is none."""

    def parts(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    able = [each for each in known if parts(each)[0] == parts(wanted)[0] and parts(each) <= parts(wanted)]
    return max(able, key=parts, default=None)


@cache
def _trt() -> Any:
    try:
        import tensorrt_rtx as trt
    except ImportError:
        try:
            import tensorrt as trt
        except ImportError:
            return None
    return trt


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps errors; what else is said is for those who develop the library."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

    return Log()


def _set_capability(trt: Any, config: Any, wanted: str) -> str:
    """Tell the builder what to build for, where it can be told; its name, as SM86."""
    if not hasattr(config, "set_compute_capability"):
        return "the GPU of this machine"
    members = {f"{name[2:-1]}.{name[-1]}": name for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    nearest = nearest_capability(wanted, tuple(members))
    if nearest is None:
        raise UserError(
            f"{trt.__name__} {trt.__version__} builds nothing for compute capability {wanted}",
            fix=f"it knows {', '.join(sorted(members, key=float))}; build on the device",
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, members[nearest]), 0)
    return members[nearest]


def _shapes(builder: Any, network: Any, batch: int) -> Any:
    """One example to many, at its best with `batch`."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        value = network.get_input(index)
        rest = tuple(value.shape)[1:]
        if any(size < 0 for size in rest):
            raise UserError(
                f"input {value.name} has sizes that are not fixed: {tuple(value.shape)}",
                fix="an engine needs all but the batch: give examples of one size",
            )
        profile.set_shape(value.name, (1, *rest), (batch, *rest), (max(batch, LARGEST_BATCH), *rest))
    return profile


def _refused(parser: Any, data: bytes, layers: Mapping[str, str]) -> UserError:
    """The parser's first error, with the layer that it is about."""
    error = parser.get_error(0)
    model = onnx.load_from_string(data)
    node = error.node()
    place = where_in(model, layers, node) if 0 <= node < len(model.graph.node) else "the file"
    said = error.desc().strip().splitlines()
    return UserError(
        f"TensorRT's parser refuses {place}: {said[0] if said else error.code()}",
        fix="compute that layer in fp16 or fp32, or write that part of the model with other operations",
    )


def _not_built(errors: list[str], sm: str) -> UserError:
    said = next((line for line in errors if line.strip()), "no reason given")
    for words, what, fix in WORDS:
        if words in said:
            return UserError(f"no engine for {sm}: {what.format(sm=sm)}", fix=fix)
    return UserError(
        f"no engine for {sm}: {said.splitlines()[0]}",
        fix="compute the layer that is named in fp16, or report it to NVIDIA",
    )
