"""BatchNorm folded: the same outputs, no pair too many, and number grids that are those of what the file stores."""

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hirelc_deploy.compress.fold import fold, foldable, present
from hirelc_deploy.compress.grids import fitted, put_on
from hirelc_deploy.compress.simulate import simulated
from hirelc_deploy.graph import forward
from hirelc_deploy.graph.trial import jitter, relative_error
from hirelc_deploy.graph.vanish import Gone
from hirelc_deploy.kernels import every_storage
from hirelc_deploy.policy import Compute, Precision, Storage

LARGEST = 127

# The same products of 32-bit floats, with the norm before the sum or behind it.
TOLERANCE = 1e-6


def pair(layer: nn.Module, norm: nn.Module, *behind: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(layer, norm, *behind)


PAIRS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (pair(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (3, 8, 8)),
    "conv without bias": (pair(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()), (3, 8, 8)),
    "grouped conv": (pair(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)), (4, 8, 8)),
    "depthwise conv": (pair(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)), (8, 8, 8)),
    "conv1d": (pair(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), (3, 16)),
    "conv3d": (pair(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8)), (3, 5, 5, 5)),
    "transposed conv": (pair(nn.ConvTranspose2d(6, 8, 3, stride=2), nn.BatchNorm2d(8)), (6, 5, 5)),
    "grouped transposed conv": (
        pair(nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(8)),
        (6, 5, 5),
    ),
    "transposed conv1d": (pair(nn.ConvTranspose1d(6, 8, 3, groups=2), nn.BatchNorm1d(8)), (6, 9)),
    "linear": (pair(nn.Linear(12, 8), nn.BatchNorm1d(8)), (12,)),
    "linear without bias": (pair(nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8)), (12,)),
    "norm without scale and shift": (pair(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)), (3, 8, 8)),
    "norm behind dropout": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(), nn.BatchNorm2d(8)), (3, 8, 8)),
    "synchronised norm": (pair(nn.Conv2d(3, 8, 3), nn.SyncBatchNorm(8)), (3, 8, 8)),
}
"""Networks whose first module and whose BatchNorm are a pair, and the shape of one example."""


def built(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, dict[str, Tensor]]:
    """In eval mode, with weights and statistics that would show a wrong fold, and a batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = jitter(make())
    return model.eval(), {"x": torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))}


@torch.no_grad()
def run(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return forward(model, inputs)


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)}


# -- folding gives the same outputs --------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PAIRS))
def test_a_folded_network_gives_the_same_outputs(name: str) -> None:
    model, inputs = built(*PAIRS[name])
    before = copy.deepcopy(model.state_dict())
    pairs = foldable(model, inputs)
    assert pairs == {"0": next(iter(norms_of(model)))}
    folded = fold(model, pairs)
    assert not norms_of(folded)
    assert folded.state_dict().keys() == {"0.weight", "0.bias"}
    assert relative_error(run(folded, inputs), run(model, inputs)) < TOLERANCE
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_a_channel_that_its_norm_multiplies_by_zero_says_the_norms_bias() -> None:
    """As residual branches begin, and as pruning by scale leaves them."""
    model, inputs = built(*PAIRS["conv"])
    norm = model.get_submodule("1")
    with torch.no_grad():
        norm.get_parameter("weight")[:3] = 0
    folded = fold(model, foldable(model, inputs))
    assert not folded.get_parameter("0.weight")[:3].any()
    assert torch.equal(folded.get_parameter("0.bias")[:3], norm.get_parameter("bias")[:3])
    assert relative_error(run(folded, inputs), run(model, inputs)) < TOLERANCE


def test_a_folded_layer_is_frozen_if_it_was() -> None:
    model, inputs = built(*PAIRS["conv without bias"])
    pairs = foldable(model, inputs)
    assert all(parameter.requires_grad for parameter in fold(model, pairs).parameters())
    model.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in fold(model, pairs).parameters())


# -- which pairs there are -----------------------------------------------------------------------------------


class Both(nn.Module):
    """A pair that can be folded, and one of `kinds` that cannot; the second is all that `forward` differs in."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Conv2d(3, 8, 3, padding=1)
        self.good_norm = nn.BatchNorm2d(8)
        self.layer: nn.Conv2d | nn.Linear = nn.Conv2d(8, 8, 3, padding=1)
        self.norm: nn.BatchNorm2d | nn.BatchNorm1d = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(F.relu(self.good_norm(self.good(x))))

    def rest(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class ReadElsewhere(Both):
    def rest(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return self.norm(x) + x


class LayerCalledTwice(Both):
    def rest(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(F.relu(self.layer(x))))


class NormCalledTwice(Both):
    def rest(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.norm(self.layer(x))))


class BothCalledTwice(Both):
    def rest(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(F.relu(self.norm(self.layer(x)))))


class NormBefore(Both):
    def rest(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))


class InPlaceBetween(Both):
    """The norm reads the very tensor that the layer wrote, but no longer the same values."""

    def rest(self, x: Tensor) -> Tensor:
        return self.norm(F.relu_(self.layer(x)))


class SharedWeight(Both):
    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Conv2d(8, 8, 3, padding=1)
        self.twin.weight = self.layer.weight

    def rest(self, x: Tensor) -> Tensor:
        return self.twin(F.relu(self.norm(self.layer(x))))


class WeightReadByHand(Both):
    """Outside of any module that could be watched."""

    def rest(self, x: Tensor) -> Tensor:
        return F.conv2d(F.relu(self.norm(self.layer(x))), self.layer.weight, padding=1)


class BatchStatistics(Both):
    """Without statistics of its own there is nothing to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)

    def rest(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


class LinearOnTokens(Both):
    """BatchNorm1d then takes the tokens for channels, and there are as many."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)

    def rest(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x[:, :, 0]))


NOT_TO_BE_FOLDED = [
    ReadElsewhere,
    LayerCalledTwice,
    NormCalledTwice,
    BothCalledTwice,
    NormBefore,
    InPlaceBetween,
    SharedWeight,
    WeightReadByHand,
    BatchStatistics,
    LinearOnTokens,
]


@pytest.mark.parametrize("kind", NOT_TO_BE_FOLDED)
def test_what_cannot_be_folded_is_left_out_and_the_others_are_not(kind: type[nn.Module]) -> None:
    model, inputs = built(kind, (3, 8, 8))
    pairs = foldable(model, inputs)
    assert pairs == {"good": "good_norm"}
    assert relative_error(run(fold(model, pairs), inputs), run(model, inputs)) < TOLERANCE


class TwoPaths(nn.Module):
    """Both layers run before the first of their norms does."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.left_norm = nn.BatchNorm2d(8)
        self.right = nn.Conv2d(3, 8, 1, bias=False)
        self.right_norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        return F.relu(self.left_norm(left) + self.right_norm(right))


class NormAndActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: a BatchNorm by type that does more than that."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class NormDoesMore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)
        self.norm = NormAndActivation(8)
        self.again = nn.Conv2d(8, 8, 3)
        self.unscaled = NormAndActivation(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.unscaled(self.again(self.norm(self.layer(x))))


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(input=self.layer(input=x))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (TwoPaths, {"left": "left_norm", "right": "right_norm"}),
        (NormDoesMore, {"layer": "norm", "again": "unscaled"}),
        (ByKeyword, {"layer": "norm"}),
    ],
)
def test_pairs_are_found_however_the_forward_pass_is_written(kind: type[nn.Module], expected: dict[str, str]) -> None:
    model, inputs = built(kind, (3, 8, 8))
    pairs = foldable(model, inputs)
    assert pairs == expected
    assert relative_error(run(fold(model, pairs), inputs), run(model, inputs)) < TOLERANCE


def test_looking_for_pairs_leaves_nothing_behind() -> None:
    model, inputs = built(LayerCalledTwice, (3, 8, 8))
    before = copy.deepcopy(model.state_dict())
    foldable(model, inputs)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(part._forward_hooks or part.training for part in model.modules())


def test_pairs_of_a_branch_that_is_gone_are_passed_over() -> None:
    model, inputs = built(TwoPaths, (3, 8, 8))
    pairs = foldable(model, inputs)
    model.add_module("right", Gone())
    model.add_module("right_norm", nn.Identity())
    assert present(pairs, model) == {"left": "left_norm"}


# -- the grid of what is stored, while the norm still stands -------------------------------------------------


def with_precision(name: str, storage: Storage) -> tuple[nn.Module, dict[str, Tensor], dict[str, Precision]]:
    model, inputs = built(*PAIRS[name])
    with torch.no_grad():
        model.get_submodule("1").get_parameter("weight")[1] *= -1  # turns a channel's signs round
    return model, inputs, {"0": Precision(storage, Compute.FP32)}


@pytest.mark.parametrize("storage", list(every_storage()), ids=str)
@pytest.mark.parametrize("name", ["conv", "depthwise conv", "grouped transposed conv", "linear"])
def test_a_stored_weight_under_its_norm_computes_what_the_folded_network_does(name: str, storage: Storage) -> None:
    model, inputs, precisions = with_precision(name, storage)
    pairs = {"0": "1"}
    folded = fold(model, pairs)
    grids = fitted(model, precisions, {}, largest=LARGEST, norms=pairs)
    of_folded = fitted(folded, precisions, {}, largest=LARGEST)
    assert grids["0"].keys() == of_folded["0"].keys()
    assert all(torch.equal(values, of_folded["0"][role]) for role, values in grids["0"].items())

    before = run(folded, inputs)
    put_on(folded, precisions, grids, largest=LARGEST)
    with simulated(model, precisions, grids, largest=LARGEST, norms=pairs):
        found = run(model, inputs)
    assert relative_error(found, run(folded, inputs)) < TOLERANCE
    assert relative_error(found, before) > 10 * TOLERANCE  # it is rounded


@pytest.mark.parametrize("storage", list(every_storage()), ids=str)
def test_where_the_norm_multiplies_by_zero_nothing_is_divided_by_it(storage: Storage) -> None:
    model, inputs, precisions = with_precision("conv", storage)
    silent = [0, 1, 2]
    with torch.no_grad():
        model.get_submodule("1").get_parameter("weight")[silent] = 0
    pairs = {"0": "1"}
    grids = fitted(model, precisions, {}, largest=LARGEST, norms=pairs)
    folded = fold(model, pairs)
    put_on(folded, precisions, grids, largest=LARGEST)
    expected = run(folded, inputs)["output"]
    with simulated(model, precisions, grids, largest=LARGEST, norms=pairs):
        found = forward(model, inputs)["output"]
        found.square().sum().backward()
    assert relative_error({"heard": found[:, 3:]}, {"heard": expected[:, 3:]}) < TOLERANCE
    if not folded.get_parameter("0.weight")[
        silent
    ].any():  # of the others the least weight is stored, as there is no zero
        assert torch.equal(found[:, silent], expected[:, silent])
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
