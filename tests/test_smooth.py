"""Channels scaled between norms and what reads them: the function stays, what rounding leaves of it is more."""

import copy
from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hirelc_deploy.compress import smooth as smoothing
from hirelc_deploy.compress.grids import fitted, put_on
from hirelc_deploy.compress.inputs import energies
from hirelc_deploy.compress.smooth import pairs, smooth
from hirelc_deploy.policy import INT8, Compute, PerChannel, Precision, Storage

LARGEST = 127
WIDTH = 24
FLOAT_TOLERANCE = 1e-5  # of float32 sums in another order

INT3 = Precision(Storage("int", 3, PerChannel()), Compute.FP32)


class Reads(nn.Module):
    """A norm, and whatever a subclass does with what it writes: inputs (N, 5, WIDTH)."""

    def __init__(self, norm: Callable[[], nn.Module] = lambda: nn.LayerNorm(WIDTH)) -> None:
        super().__init__()
        self.norm = norm()
        self.one = nn.Linear(WIDTH, 40)
        self.other = nn.Linear(WIDTH, 40)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return self.one(normed) * torch.sigmoid(self.other(normed[:, :1]))


class WithAResidual(Reads):
    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return F.pad(normed, (0, 16)) + self.one(normed)


class ThroughACurve(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.one(F.gelu(self.norm(x), approximate="none").mul_(1.0))


class InPlace(Reads):
    """What Linear reads lies where the norm wrote, and is something else by then."""

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.norm(x).clamp_(max=0.5))


class Shared(Reads):
    def __init__(self) -> None:
        super().__init__()
        self.other.weight = self.one.weight


class SharedWithAnEmbedding(Reads):
    """As the head of a language model behind its last norm."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, WIDTH)
        self.one.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.norm(x + self.tokens.weight[0]))


class Attends(Reads):
    """An operator that is no layer reads the norm as well."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return self.one(normed) + F.pad(self.attention(normed, normed, normed)[0], (0, 16))


class OnePlus(nn.Module):
    """A scale that is counted from one, as Gemma's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (WIDTH,)) * (1 + self.weight)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def examples(count: int, seed: int) -> Tensor:
    return torch.randn(count, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def batches_of(x: Tensor) -> Callable[[], Iterable[Mapping[str, Tensor]]]:
    return lambda: ({"x": part} for part in x.split(64))


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(WIDTH, bias=False), lambda: nn.RMSNorm(WIDTH), None])
def test_all_that_reads_a_norm_is_found(norm: Callable[[], nn.Module] | None) -> None:
    model = seeded(Reads if norm is None else lambda: Reads(norm))
    (pair,) = pairs(model, {"x": examples(2, 1)})
    assert (pair.name, pair.readers) == ("norm", ("one", "other"))


@pytest.mark.parametrize(
    "make",
    [
        *(WithAResidual, ThroughACurve, InPlace, Shared, SharedWithAnEmbedding, Attends),
        lambda: Reads(OnePlus),
        lambda: Reads(lambda: nn.LayerNorm(WIDTH, elementwise_affine=False)),
        lambda: Reads(nn.Identity),
    ],
)
def test_what_something_else_reads_is_left_alone(make: Callable[[], nn.Module]) -> None:
    model = seeded(make)
    before = copy.deepcopy(model.state_dict())
    assert pairs(model, {"x": examples(2, 1)}) == []
    assert (
        smooth(model, {"one": INT8, "other": INT8}, batches_of(examples(64, 1)), largest=127, is_symmetric=False) == {}
    )
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_a_pair_that_is_wrong_does_not_spoil_the_others() -> None:
    model = seeded(lambda: nn.Sequential(Reads(), nn.Linear(40, WIDTH), WithAResidual(), nn.Linear(40, WIDTH), Reads()))
    found = pairs(model, {"input": examples(2, 1)})
    assert [pair.name for pair in found] == ["0.norm", "4.norm"]


def with_wide_channels() -> nn.Module:
    """What a norm of a large transformer writes: some channels are many times as wide as the others."""
    model = Reads()
    with torch.no_grad():
        model.norm.weight[::8] = 60.0
        model.one.weight[:, ::8] /= 30
    return model


@torch.no_grad()
def off(
    model: nn.Module, original: nn.Module, precisions: Mapping[str, Precision], seen: Tensor, unseen: Tensor
) -> float:
    """Mean squared error of unseen outputs, relative; weights are on their grids, inputs of int8 layers on theirs."""
    own = copy.deepcopy(model)
    grids = fitted(own, precisions, energies(own, precisions, batches_of(seen)()), largest=LARGEST)
    put_on(own, precisions, grids, largest=LARGEST)
    read = model.get_submodule("norm")(seen)
    low, high = min(float(read.min()), 0.0), float(read.max())
    step = (high - low) / 255

    def round_input(_layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.fake_quantize_per_tensor_affine(args[0], step, round(-low / step), 0, 255),)

    for name, precision in precisions.items():
        if precision.compute is Compute.INT8:
            own.get_submodule(name).register_forward_pre_hook(round_input)
    wanted = original(unseen)
    return float((own(unseen) - wanted).square().mean() / wanted.square().mean())


@pytest.mark.parametrize("is_symmetric", [False, True])
@pytest.mark.parametrize("precision", [INT8, INT3], ids=str)
def test_wide_channels_are_evened_out_and_the_function_stays(precision: Precision, is_symmetric: bool) -> None:
    original = seeded(with_wide_channels)
    precisions = {"one": precision, "other": precision}
    seen, unseen = examples(256, 1), examples(256, 2)
    model = copy.deepcopy(original)

    taken = smooth(model, precisions, batches_of(seen), largest=LARGEST, is_symmetric=is_symmetric)

    assert taken.keys() == {"norm"}
    with torch.no_grad():
        assert torch.allclose(model(unseen), original(unseen), rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE)
    before, after = (off(each, original, precisions, seen, unseen) for each in (original, model))
    assert after < before / 2


def test_where_nothing_helps_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    wider = torch.zeros(WIDTH)
    wider[::8] = 3.0
    monkeypatch.setattr(smoothing._Trial, "candidates", lambda trial: {"wide channels wider still": wider})
    model = seeded(with_wide_channels)
    before = copy.deepcopy(model.state_dict())
    assert smooth(model, {"one": INT8}, batches_of(examples(64, 1)), largest=LARGEST, is_symmetric=False) == {}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_what_is_proposed_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """For readers of one norm the mean of what is proposed for each: a factor and its inverse come to none."""
    monkeypatch.setattr(smoothing, "STRENGTHS", ())
    seen = examples(256, 1)
    narrow = torch.ones(WIDTH)
    narrow[::8] = 1 / 16
    for proposed, taken in (
        ({"right": {"one": narrow}, "wrong": {"one": 1 / narrow}, "of others": {"elsewhere": narrow}}, "right"),
        ({"for both": {"one": narrow, "other": narrow}}, "for both"),
        ({"opposite": {"one": narrow, "other": 1 / narrow}}, None),
    ):
        model = seeded(with_wide_channels)
        found = smooth(
            model,
            {"one": INT8, "other": INT8},
            batches_of(seen),
            largest=LARGEST,
            is_symmetric=False,
            propose=lambda _model, _batches, proposed=proposed: proposed,
        )
        assert found == ({} if taken is None else {"norm": taken})


def test_layers_that_stay_in_floats_are_scaled_with_the_others() -> None:
    original = seeded(with_wide_channels)
    model = copy.deepcopy(original)
    seen = examples(64, 1)
    assert smooth(model, {"one": INT8}, batches_of(seen), largest=LARGEST, is_symmetric=False)
    assert not torch.equal(model.get_parameter("other.weight"), original.get_parameter("other.weight"))
    with torch.no_grad():
        assert torch.allclose(model(seen), original(seen), rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE)


def test_channels_that_are_dead_do_no_harm() -> None:
    original = seeded(with_wide_channels)
    with torch.no_grad():
        original.get_parameter("norm.weight")[:2] = 0
        original.get_parameter("norm.bias")[:2] = 0
        original.get_parameter("one.weight")[:, 2] = 0
    model = copy.deepcopy(original)
    seen = examples(64, 1)
    assert smooth(model, {"one": INT8, "other": INT3}, batches_of(seen), largest=LARGEST, is_symmetric=False)
    with torch.no_grad():
        assert torch.allclose(model(seen), original(seen), rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE)
