"""What a runtime is: one file in this folder, with a `RUNTIME` that exports, loads, runs and says what ran.

Timing, scoring and judging are the same for every runtime and live in `hirelc_deploy.verify`.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hirelc_deploy.cost.kernel import Kernel
from hirelc_deploy.cost.load import LoadLaw
from hirelc_deploy.cost.memory import MemoryLaw
from hirelc_deploy.cost.network import Network
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.kernels._base import Grid
from hirelc_deploy.policy import Compute, Precision
from hirelc_deploy.profiles import Target

if TYPE_CHECKING:
    from torch import nn

Arrays = Mapping[str, np.ndarray]
"""Inputs or outputs of one batch by name; the first axis is the example."""

Floats = Mapping[str, Compute]
"""By an operator between layers, what it computes in though the layers around it could do with less: floats among
integers, or fp32 among halves.  It is named by what it gets its values from, `Add of conv1, conv2`."""

NO_FLOATS: Floats = MappingProxyType({})


class Session(Protocol):
    """A file that a runtime has loaded, ready to run."""

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """The outputs of one batch, by the names that the PyTorch model's outputs have."""
        ...


@dataclass(frozen=True)
class Stored:
    """How one layer's weights lie in a file."""

    tensor: str
    """The value of the file that holds them, whole and decoded but for the scale."""
    encoding: str
    """In words."""
    bytes: int
    """Of all that the weights need: codes, tables, scales."""


@dataclass(frozen=True)
class Exported:
    """A model file as bytes, and where each layer's weights lie in it."""

    data: bytes
    layers: Mapping[str, Stored]
    """Layers that are gone are not in it."""

    @property
    def tensors(self) -> dict[str, str]:
        """Layer name -> the value that holds its weights."""
        return {layer: stored.tensor for layer, stored in self.layers.items()}


Adviser = Callable[[bytes, Sequence[Arrays]], Mapping[str, str]]
"""Of an ONNX model in floats, and examples: the nodes that had better compute in fp32, by name, and why."""


@dataclass(frozen=True)
class RoundingErrors:
    """What 8 bits cost, tensor by tensor: the mean squared change of the model's outputs, as a part of their variance.

    Of every tensor that int8 layers would have in integers, rounded alone on the grid with the least error.
    """

    between: Mapping[str, float]
    """Of those that no layer needs in integers, by what computes them; they can be left in float."""
    inputs: Mapping[str, float]
    """Of what a layer reads, by layer."""


class NoKernelError(Exception):
    """The runtime makes no kernel of its own of an operator; the message says what it made."""


@dataclass(frozen=True)
class Optimise:
    """Asks the device what a session makes of a file; the answer is the file."""

    data: bytes


@dataclass(frozen=True)
class Shapes:
    """Asks the device what values of a file are like; the answer is, by name, shape and type as numpy calls it."""

    data: bytes
    names: tuple[str, ...]
    inputs: Arrays


Request = Optimise | Shapes
KernelSteps = Generator[Request, Any, "KernelMaker"]
"""What has to be asked of a device to make a kernel's file for it.  Raises NoKernelError if there is no such kernel."""


@dataclass(frozen=True)
class KernelFile:
    """A file that runs one kernel some times over, and what it reads."""

    data: bytes
    inputs: Arrays
    copies: int
    """How often one run executes the kernel: the time of a short one is mostly the session's own otherwise."""


class KernelMaker(Protocol):
    """A kernel, cut out of what surrounds it."""

    def file(self, copies: int) -> KernelFile: ...


@dataclass(frozen=True)
class Footprint:
    """What a fresh process needs for one file."""

    memory_bytes: int
    """Peak of loading and running, over what the process held before it loaded."""
    load_ms: float
    """By the wall, the first time."""


class Runtime(Protocol):
    """One runtime, on the machine that it is called on."""

    name: str
    suffix: str
    """Of its files: .onnx, .engine"""
    range_methods: tuple[str, ...]
    """How the range of an activation can be chosen; empty where the runtime quantises none."""
    is_symmetric: bool
    """Whether the grids of activations are int8 about zero, and not uint8 with a zero point."""
    memory_law: MemoryLaw | None
    """What loading and running a file takes of memory; None where that is not known."""
    load_law: LoadLaw | None
    """How long loading a file takes; likewise."""
    builds_on_device: bool
    """Whether what the device runs is only built there: a file's bytes are then not those that it loads."""

    def version(self) -> str: ...

    def float_graph(self, model: "nn.Module", example: Arrays, *, opset: int, unfolded: Collection[str] = ()) -> Any:
        """A model in eval mode as this runtime's float graph: what baseline and artifact are both written from.

        Parameters that `unfolded` names are not computed with until a session loads.
        """
        ...

    def write(
        self,
        graph: Any,
        precisions: Mapping[str, Precision],
        grids: Mapping[str, Grid] | None = None,
        *,
        seen: Any = None,
        ranges: str = "min-max",
        floats: Floats = NO_FLOATS,
        largest: int = 127,
        ir_version: int = 8,
        metadata: Mapping[str, str] | None = None,
    ) -> Exported:
        """The file of a float graph under the given precisions; layers without one stay fp32.

        `grids` holds the grid of every layer that is not stored in floats, whose weights are on it; `seen` is what
        `observe` gave, for the ranges of int8 activations, which are chosen by `ranges`, one of `range_methods`;
        `floats` names operators that stay in floats; `largest` bounds the integers of int8 layers.
        """
        ...

    def observe(
        self,
        graph: Any,
        precisions: Mapping[str, Precision],
        calibration: Iterable[Arrays],
        *,
        floats: Floats = NO_FLOATS,
    ) -> Any:
        """What the int8 activations of a float graph span on these inputs, read once."""
        ...

    def rounding_errors(
        self, graph: Any, precisions: Mapping[str, Precision], examples: Sequence[Arrays]
    ) -> RoundingErrors:
        """What it would cost to round the int8 activations of a float graph, each alone."""
        ...

    def needing_fp32(
        self, graph: Any, examples: Sequence[Arrays], *, bearable: float, adviser: Adviser | None = None
    ) -> dict[str, str]:
        """The layers, and the operators between them, that fp16 ruins, and why, in words.

        They hold values that are too large on these examples, or round so coarsely that the outputs change by more
        than the `bearable` part of their variance.  An adviser's word is taken instead, if there is one.
        """
        ...

    def foreseen(
        self,
        graph: Any,
        shapes: Mapping[str, tuple[int, ...]],
        precisions: Mapping[str, Precision],
        *,
        floats: Floats = NO_FLOATS,
        ir_version: int = 8,
        metadata: Mapping[str, str] | None = None,
    ) -> bytes:
        """A file like that which `write` would make if the graph's parameters had these shapes, in nodes and length.

        Its values mean nothing.
        """
        ...

    def load(self, path: Path, *, threads: int) -> Session:
        """Load a file at the optimisation level that is deployed.  Raises UserError if it cannot be loaded."""
        ...

    def inspect(self, path: Path, target: Target, tensors: Mapping[str, str]) -> tuple[str, ...]:
        """Hold a file against what the target's runtime takes; what people should know of it.

        `tensors` says where each layer's weights lie.  Raises UserError for what would be refused there.
        """
        ...

    def footprint(self, path: Path, inputs: Arrays, *, threads: int) -> Footprint | None:
        """Memory and load time of a file in a process of its own; None where the system does not tell them."""
        ...

    def runs_as(self, path: Path, tensors: Mapping[str, str], *, threads: int) -> dict[str, str | None]:
        """Layer name -> the compute that the runtime chose for it (`int8`, `fp32` …), None where unreadable.

        Read from the runtime after it has optimised the graph, not from the file.
        """
        ...

    def network(
        self,
        graph: Any,
        model: ModelGraph,
        computes: Mapping[str, tuple[Compute, ...]],
        counts: Mapping[str, tuple[int, ...]],
        *,
        batch: int,
        floats: Floats = NO_FLOATS,
    ) -> Network:
        """The kernels that this runtime makes of the whole float graph, as a function of the policy."""
        ...

    def kernel_steps(self, kernel: Kernel) -> KernelSteps:
        """Make a kernel's file, asking the device for what it depends on."""
        ...

    def answer(self, request: Request) -> Any:
        """What this machine says.  Raises NoKernelError for a file that it cannot load."""
        ...

    def nothing(self) -> KernelMaker:
        """A file that does next to nothing: what a run costs by itself."""
        ...

    def kernel_session(self, file: KernelFile, *, threads: int) -> Session:
        """A file of kernels, ready to run on its own inputs, whatever `run` is given."""
        ...
