"""Networks of all that files for ONNX Runtime are made of, a batch for each, and their files."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import networks
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hirelc_deploy import graph
from hirelc_deploy.compress.fold import fold, foldable
from hirelc_deploy.compress.grids import fitted, put_on
from hirelc_deploy.exporters import load_runtime
from hirelc_deploy.exporters._base import Exported
from hirelc_deploy.exporters._float import FloatGraph
from hirelc_deploy.kernels._base import Grid
from hirelc_deploy.policy import Precision

RUNTIME = load_runtime("onnxruntime")
EXAMPLES = 16
LARGEST = 63  # integers that saturate on no CPU, so that a file computes the same on all of them


class TextClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.inner = nn.Linear(8, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.relu(self.inner(self.words(tokens))).mean(1))


class TwoInputsTwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 6)
        self.right = nn.Linear(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        hidden = F.relu(self.left(a) + self.right(b))
        return {"logits": self.head(hidden), "hidden": hidden}


class Residual(nn.Module):
    """Stem, one basic block, pooling, head: everything between the first and the last layer has integer kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.conv1 = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.conv2 = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.conv2(F.relu(self.conv1(x))) + x)
        return self.head(x.mean((2, 3)))


class NormAndActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: a BatchNorm by type that does more than that."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Gated(nn.Module):
    """SiLU and squeeze-and-excitation, as EfficientNet has them, and a leaky ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.last = nn.Conv2d(8, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return F.leaky_relu(self.last(x * gate), 0.1)


class NormsThatStay(nn.Module):
    """One whose input is read elsewhere, one that is called as a function, and beside them one that is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm1 = NormAndActivation(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(16)
        self.third = nn.Conv2d(16, 8, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm1(self.first(x)))
        x = self.third(F.relu(self.norm2(x) + x))
        norm = self.norm3
        return F.relu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias))


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class TiedEmbedding(nn.Module):
    """As language models have it: the head reads the embedding's weight, transposed."""

    def __init__(self, tokens: int = 20) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, tokens, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.relu(self.inner(self.tokens(tokens))))


class NextToken(TiedEmbedding):
    """Its head reads the last token alone, on 2-D: the very values that the embedding reads."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens[:, -1])


class TiedOnTwoShapes(nn.Module):
    """One weight that reads tokens, and what they come to: the exporter transposes it for the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(128, 128), nn.Linear(128, 128)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)).mean(1))


class Clip(nn.Module):
    def __init__(self, least: float, most: float) -> None:
        super().__init__()
        self.least, self.most = least, most

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(self.least, self.most)


class LastState(nn.Module):
    """Of a recurrent layer nothing but what it ends with: its first output has no name in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[1][-1])


class NamesOfItsOwn(nn.Module):
    """Inputs and outputs that are called like values inside the graph, and one tensor as two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, linear: Tensor) -> dict[str, Tensor]:
        logits = self.second(F.relu(self.first(linear)))
        return {"linear_1": logits.softmax(-1), "softmax": logits, "relu": logits}


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(EXAMPLES, *shape)).astype(np.float32)


def single(layer: nn.Module, *behind: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(layer, *behind)


TOKENS = np.random.default_rng(0).integers(0, 1200, (EXAMPLES, 7))

LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, np.ndarray]]] = {
    "conv": (single(nn.Conv2d(3, 8, 3)), {"x": floats(3, 8, 8)}),
    "conv and relu": (single(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU()), {"x": floats(3, 8, 8)}),
    "conv without bias": (single(nn.Conv2d(3, 8, 3, bias=False)), {"x": floats(3, 8, 8)}),
    "conv and batchnorm": (single(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6()), {"x": floats(3, 8, 8)}),
    "dilated conv": (single(nn.Conv2d(3, 8, 3, dilation=2, padding=2)), {"x": floats(3, 8, 8)}),
    "grouped conv": (single(nn.Conv2d(4, 8, 3, groups=2)), {"x": floats(4, 8, 8)}),
    "depthwise conv": (single(nn.Conv2d(8, 8, 3, groups=8)), {"x": floats(8, 8, 8)}),
    "conv1d": (single(nn.Conv1d(3, 8, 3)), {"x": floats(3, 16)}),
    "linear": (single(nn.Linear(12, 8)), {"x": floats(12)}),
    "linear and relu": (single(nn.Linear(12, 8), nn.ReLU()), {"x": floats(12)}),
    "linear without bias": (single(nn.Linear(12, 8, bias=False)), {"x": floats(12)}),
    "linear on 3-D": (single(nn.Linear(12, 8)), {"x": floats(5, 12)}),
    "linear on 3-D without bias": (single(nn.Linear(12, 8, bias=False)), {"x": floats(5, 12)}),
}

NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, np.ndarray]]] = {
    "residual": (Residual, {"x": floats(3, 8, 8)}),
    "two inputs": (TwoInputsTwoOutputs, {"a": floats(4), "b": floats(5)}),
    "text": (TextClassifier, {"tokens": np.random.default_rng(0).integers(0, 20, (EXAMPLES, 7))}),
    "tied": (Tied, {"x": floats(6)}),
    "tied embedding": (TiedEmbedding, {"tokens": np.random.default_rng(0).integers(0, 20, (EXAMPLES, 7))}),
    # more than is folded by itself
    "large tied embedding": (lambda: TiedEmbedding(1200), {"tokens": TOKENS}),
    "large tied embedding, on 2-D": (lambda: NextToken(1200), {"tokens": TOKENS}),
    "tied, on 2-D and 3-D": (TiedOnTwoShapes, {"x": floats(5, 128)}),
    "clip above nought": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Clip(0.5, 1.0), nn.Conv2d(8, 8, 3), nn.Flatten()),
        {"x": floats(3, 8, 8)},
    ),
    "pool rounded up": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2, ceil_mode=True),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True),
            nn.Conv2d(8, 4, 1),
            nn.Flatten(),
        ),
        {"x": floats(3, 9, 9)},
    ),
    "linear, relu and norm": (
        lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 8)),
        {"x": floats(12)},
    ),
    "last state": (LastState, {"x": floats(5, 6)}),
    "names of its own": (NamesOfItsOwn, {"linear": floats(12)}),
    "pooled": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Flatten()),
        {"x": floats(3, 12, 12)},
    ),
    "transposed conv": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 2, stride=2), nn.ReLU()),
        {"x": floats(3, 4, 4)},
    ),
    "grouped transposed conv": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6), nn.ReLU()),
        {"x": floats(4, 4, 4)},
    ),
    "3-D conv": (lambda: nn.Sequential(nn.Conv3d(3, 8, 2), nn.BatchNorm3d(8), nn.ReLU()), {"x": floats(3, 4, 4, 4)}),
    "norms that stay": (NormsThatStay, {"x": floats(3, 8, 8)}),
    "gated": (Gated, {"x": floats(3, 8, 8)}),
    "attention": (lambda: networks.build("attention").model, {"x": floats(6, 8)}),
}


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # layers of LAYERS were made before there was a seed
        if isinstance(
            module, (nn.BatchNorm2d, nn.BatchNorm3d)
        ):  # statistics of 0 and 1 would hide a fold that went wrong
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def reference(model: nn.Module, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        outputs = graph.forward(model, {name: torch.from_numpy(array) for name, array in inputs.items()})
    return {name: output.numpy() for name, output in outputs.items()}


@dataclass(frozen=True)
class Case:
    """A network, one batch for it, and the float graph of it with its norms folded, which takes a second or two."""

    model: nn.Module
    inputs: dict[str, np.ndarray]
    folded: nn.Module
    graph: FloatGraph

    @classmethod
    def of(cls, model: nn.Module, inputs: dict[str, np.ndarray]) -> "Case":
        pairs = foldable(model, {name: torch.from_numpy(array) for name, array in inputs.items()})
        folded = fold(model, pairs).eval()
        return cls(model, inputs, folded, RUNTIME.float_graph(folded, inputs, opset=18))

    @property
    def able(self) -> list[str]:
        """The layers that have an integer kernel."""
        return [n for n, m in self.model.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))]

    def grids(self, precisions: Mapping[str, Precision]) -> dict[str, Grid]:
        return fitted(self.folded, precisions, {}, largest=LARGEST)

    def rounded(self, precisions: Mapping[str, Precision]) -> nn.Module:
        """The network with the weights that are stored."""
        model = copy.deepcopy(self.folded)
        put_on(model, precisions, self.grids(precisions), largest=LARGEST)
        return model


@cache
def case_of(name: str) -> Case:
    make, inputs = (LAYERS | NETWORKS)[name]
    return Case.of(build(make), inputs)


def write(
    case: Case, precision: Precision | None, folder: Path, only: tuple[str, ...] | None = None
) -> tuple[Exported, Path]:
    """The file with `precision` for all layers that can have it, or for `only` some."""
    precisions = {} if precision is None else dict.fromkeys(only or case.able, precision)
    seen = RUNTIME.observe(case.graph, precisions, [case.inputs])
    exported = RUNTIME.write(case.graph, precisions, case.grids(precisions), seen=seen, largest=LARGEST)
    path = folder / "model.onnx"
    path.write_bytes(exported.data)
    return exported, path
