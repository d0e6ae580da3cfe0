"""Files in TensorRT's flavour, of small networks: what the tests of that runtime have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import networks
import numpy as np
import onnx
import torch
import torch.nn.functional as F
from exporting import hasten
from torch import Tensor, nn

from hirelc_deploy.compress.fold import fold, foldable
from hirelc_deploy.compress.grids import fitted
from hirelc_deploy.exporters import load_runtime
from hirelc_deploy.exporters._base import Exported
from hirelc_deploy.exporters._float import FloatGraph
from hirelc_deploy.policy import Compute, PerChannel, PerGroup, Precision, Storage

hasten()

RUNTIME = load_runtime("tensorrt")
INT4 = Precision(Storage("int", 4, PerChannel()), Compute.FP16)
INT4_BLOCKS = Precision(Storage("int", 4, PerGroup(64)), Compute.FP16)
INT4_LONG_BLOCKS = Precision(Storage("int", 4, PerGroup(128)), Compute.FP16)
OPSET = 21
EXAMPLES = 16


class Residual(nn.Module):
    """Convolutions with a skip connection, a pool, a shortcut of its own, and a head on 128 inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.down, self.side = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Conv2d(16, 32, 1, stride=2)
        self.head = nn.Linear(32 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = F.relu(x + self.second(F.relu(self.first(x))))
        x = F.relu(self.down(x) + self.side(x))
        return self.head(x.flatten(1))


class Words(nn.Module):
    """Integers go in; an output is read within the network as well."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 64)
        self.inner = nn.Linear(64, 64)
        self.head = nn.Linear(64, 6)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        hidden = F.gelu(self.inner(self.words(tokens)))
        return {"logits": self.head(hidden.mean(1)), "hidden": hidden}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(EXAMPLES, *shape)).astype(np.float32)


NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], dict[str, np.ndarray]]] = {
    "residual": (Residual, {"x": noise(3, 8, 8)}),
    "words": (Words, {"tokens": np.random.default_rng(0).integers(0, 20, (EXAMPLES, 5))}),
    "attention": (lambda: networks.build("attention").model, {"x": noise(6, 8)}),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(), nn.Conv2d(8, 6, 1)),
        {"x": noise(8, 6, 6)},
    ),
}


@dataclass(frozen=True)
class Case:
    """A network, one batch for it, and its float graph with norms folded."""

    model: nn.Module
    inputs: dict[str, np.ndarray]
    graph: FloatGraph

    def precisions(self, precision: Precision | None, *kinds: type[nn.Module]) -> dict[str, Precision]:
        """That one for all layers of these kinds."""
        wanted = kinds or (nn.Conv2d, nn.Linear)
        names = [name for name, module in self.model.named_modules() if isinstance(module, wanted)]
        return {} if precision is None else dict.fromkeys(names, precision)

    def write(self, precisions: Mapping[str, Precision], **options: object) -> Exported:
        seen = RUNTIME.observe(self.graph, precisions, [self.inputs])
        grids = fitted(self.model, precisions, {}, largest=127)
        return RUNTIME.write(self.graph, precisions, grids, seen=seen, ir_version=10, **options)  # type: ignore[arg-type]

    def file(self, precisions: Mapping[str, Precision]) -> onnx.ModelProto:
        return onnx.load_from_string(self.write(precisions).data)


@cache
def case(name: str) -> Case:
    """Made once: PyTorch's exporter takes a second."""
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    pairs = foldable(model, {key: torch.from_numpy(array) for key, array in inputs.items()})
    model = fold(model, pairs).eval()
    return Case(model, inputs, RUNTIME.float_graph(model, inputs, opset=OPSET))
