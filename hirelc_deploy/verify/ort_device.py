"""An artifact measured by ONNX Runtime in a process that is not this one: on another device, or by another provider.

The device needs Python with numpy and onnxruntime, and nothing of this project (`_runner`).  Files are those that are
deployed: what a provider such as TensorRT builds of them, it builds when it loads them.
"""

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper

from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters import _footprint
from hirelc_deploy.exporters._base import Arrays, Footprint, NoKernelError, Optimise, Session
from hirelc_deploy.exporters._footprint import packed
from hirelc_deploy.exporters._trt_build import LARGEST_BATCH
from hirelc_deploy.exporters.onnxruntime import computes
from hirelc_deploy.profiles import Target
from hirelc_deploy.verify import timing
from hirelc_deploy.verify.environment import model_name
from hirelc_deploy.verify.machines import check_flags, check_version
from hirelc_deploy.verify.manifest import Environment
from hirelc_deploy.verify.measure import example, together
from hirelc_deploy.verify.providers import Provider
from hirelc_deploy.verify.remote import Runner, name_of, reached

if TYPE_CHECKING:
    from hirelc_deploy.task import Batch, Task

SCRIPT = "footprint.py"


@dataclass(frozen=True)
class _File:
    """A file that the device loads whenever it is asked to run it."""

    place: "OrtDevice"
    data: bytes

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        return self.place.outputs(self.data, inputs)


class OrtDevice:
    """A `Place`: ONNX Runtime on a device, by its CPU's provider or another one."""

    def __init__(self, runner: Runner, task: "Task", *, threads: int, batch: int) -> None:
        self.runner = runner
        self._threads = threads
        provider = runner.provider
        shapes = {name: array.shape[1:] for name, array in example(task, batch).items()}
        self._options = None if provider is None else provider.options(shapes, batch, threads)
        # what a provider does is not done by the thread that waits for it
        self.clock: timing.Clock = "wall" if provider is not None else timing.clock_for(threads)

    # -- as a place ------------------------------------------------------------------------------------------

    def load(self, path: Path) -> Session:
        return _File(self, path.read_bytes())

    def timed(self, sessions: Mapping[str, Session], inputs: Arrays) -> dict[str, timing.Timing]:
        files = [(session.data, inputs) for session in sessions.values() if isinstance(session, _File)]
        seen = self.runner.timed(
            files,
            threads=self._threads,
            warmup=timing.WARMUP_RUNS,
            rounds=(timing.MIN_ROUNDS, timing.MAX_ROUNDS),
            seconds=timing.SECONDS,
            optimise=True,
            options=self._options,
        )
        return dict(zip(sessions, seen, strict=True))

    def batches(self, split: "Iterable[Batch]") -> "Iterable[Batch]":
        return together(split)

    def footprint(self, path: Path, inputs: Arrays) -> Footprint | None:
        """None for a provider: what it holds lies on its device."""
        if self.runner.provider is not None:
            return None
        job = {
            "action": "footprint",
            "script": SCRIPT,
            "file": name_of(data := path.read_bytes()),
            "inputs": "0.npz",
            "threads": self._threads,
        }
        files = {SCRIPT: _footprint.SCRIPT.encode(), name_of(data): data, "0.npz": packed(inputs)}
        found = self.runner.job(job, files)[0]["footprint"]
        return None if found is None else Footprint(**found)

    def runs_as(self, path: Path, tensors: Mapping[str, str]) -> dict[str, str | None]:
        """None for a provider, which makes one node of many and does not say what they compute in."""
        if self.runner.provider is not None:
            return dict.fromkeys(tensors)
        data = path.read_bytes()
        optimised = self.runner.answers([Optimise(data)])[0]
        if isinstance(optimised, NoKernelError):
            return dict.fromkeys(tensors)
        return computes(onnx.load_from_string(data).graph, onnx.load_from_string(optimised).graph, tensors)

    # -- beside that ------------------------------------------------------------------------------------------

    def outputs(self, file: bytes, inputs: Arrays) -> dict[str, np.ndarray]:
        """Of any number of examples, by name."""
        job = {
            "action": "outputs",
            "file": name_of(file),
            "inputs": "0.npz",
            "threads": self._threads,
            "batch": LARGEST_BATCH,
        }
        result, back = self.runner.job(job, {name_of(file): file, "0.npz": packed(inputs)}, self._options)
        with np.load(io.BytesIO(back["outputs"])) as arrays:
            return {name: arrays[f"arr_{i}"] for i, name in enumerate(result["names"])}

    def environment(self, *, batch: int) -> Environment:
        """Names no host, user or folder."""
        about = self.runner.about
        packages = {"onnxruntime": self.runner.version}
        if self.runner.provider is not None:
            packages[self.runner.provider.called] = about["plugin"] or self.runner.version
        if about["gpu"]:
            packages["driver"] = about["gpu"]["driver"]
        return Environment(
            cpu=(about["gpu"] or {}).get("name") or model_name(about["cpuinfo"]) or about["board"] or about["machine"],
            flags=self.runner.flags,
            cores=about["cores"],
            threads=self._threads,
            batch=batch,
            clock=self.clock,
            power_mode=about["power_mode"] or None,
            packages=packages,
        )

    def notes(self) -> tuple[str, ...]:
        """For people."""
        provider = self.runner.provider
        if provider is None:
            return ()
        return (
            f"run by {provider.called} of ONNX Runtime {self.runner.version}, which took every operator of the file; "
            "times are those of a call, with inputs on their way there and outputs on their way back, and what single "
            "layers compute in is not told",
        )


def check(runner: Runner, target: Target) -> None:
    """Whether a device is the target, and whether its runtime runs anything, before hours are spent.

    Raises UserError where it does not: of a provider that is built in, only a file says whether it can be loaded.
    """
    provider = runner.provider
    if provider is not None and provider.kind != target.kind:
        raise UserError(
            f"{target.name} is a {target.kind.upper()}, and the provider {provider.name} is for another device",
            fix="export for a target that it runs on: `hirelc-deploy targets` lists them",
        )
    if target.kind == "cpu":
        check_version(target, runner.version, runner.host)
        check_flags(target, runner.flags, runner.host, "name the device, or a target of your own for this one")
    if provider is None:
        return
    has = (runner.about["gpu"] or {}).get("compute_capability", "")
    wanted = "" if target.gpu is None else target.gpu.compute_capability
    if has.replace(".", "").isdigit() and wanted and has != wanted:
        raise UserError(
            f"{runner.host} has a GPU of compute capability {has}, and {target.name} is one of {wanted}",
            fix="export for the target that it is, or write one of your own",
        )
    runner.timed(
        [(_smallest(), {"x": np.zeros((1, 8), np.float32)})],
        threads=1,
        warmup=1,
        rounds=(1, 1),
        optimise=True,
    )


def _smallest() -> bytes:
    """A network that every provider runs."""
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 8]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "smallest", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    return bytes(model.SerializeToString())


@contextmanager
def connected(
    host: str | None, python: str, provider: Provider | None, task: "Task", *, threads: int, batch: int
) -> Iterator[OrtDevice]:
    """ONNX Runtime of this Python on a host, or here without one.

    Raises UserError if the device cannot be reached, or lacks Python, the runtime or the provider.
    """
    with reached(host) as link:
        yield OrtDevice(Runner(link, python, provider), task, threads=threads, batch=batch)
