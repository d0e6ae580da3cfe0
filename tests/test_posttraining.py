"""Weights on their grids without training: what the files compute comes nearer to the original, and stays storable."""

import copy
from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
import torch.nn.functional as F
from networks import build, image
from torch import Tensor, nn

from hirelc_deploy.compress.equalise import equalise
from hirelc_deploy.compress.fold import fold, foldable
from hirelc_deploy.compress.grids import fitted, put_on
from hirelc_deploy.compress.inputs import can_unfold, columns_at, energies
from hirelc_deploy.compress.posttraining import PostTraining, correct_biases, feed_back_errors, post_train
from hirelc_deploy.compress.prune import prune
from hirelc_deploy.graph import forward, trace
from hirelc_deploy.graph.trial import jitter, relative_error
from hirelc_deploy.kernels import load_format
from hirelc_deploy.kernels._base import Grid
from hirelc_deploy.policy import Compute, PerChannel, PerGroup, Policy, Precision, Storage

LARGEST = 127

# Of float32 sums in another order.
FLOAT_TOLERANCE = 1e-5

STORAGES = [
    Storage("int", 3, PerChannel()),
    Storage("int", 4, PerGroup(16)),
    Storage("codebook", 2, PerChannel()),
    Storage("float", 4, PerChannel()),
    Storage("log", 3, PerChannel()),
    Storage("vector", 2, PerChannel()),
]

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(64, 24, bias=False),
    "conv": lambda: nn.Conv2d(8, 16, 3, padding=1, bias=False),
    "strided conv1d": lambda: nn.Conv1d(8, 16, 5, stride=2, dilation=2, bias=False),
    "grouped conv": lambda: nn.Conv2d(8, 16, 4, groups=2, bias=False),
    "depthwise conv": lambda: nn.Conv2d(8, 8, 4, padding=2, groups=8, bias=False),
}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def correlated(shape: tuple[int, ...], examples: int, seed: int) -> Tensor:
    """Smooth along the places, channels that share a few causes: as what layers of trained networks read."""
    mixing = torch.randn(shape[0], 3, generator=torch.Generator().manual_seed(7))
    random = torch.Generator().manual_seed(seed)
    causes = torch.randn(examples, 3, *shape[1:], generator=random)
    noise = torch.randn(examples, *shape, generator=random)
    x = torch.einsum("ck,nk...->nc...", mixing, causes) + 0.3 * noise
    pools = {2: F.avg_pool1d, 3: F.avg_pool2d}
    return pools[len(shape)](x, 3, 1, 1) if len(shape) > 1 else x


def inputs_for(layer: nn.Module) -> tuple[int, ...]:
    shapes = {nn.Linear: (64,), nn.Conv1d: (8, 24), nn.Conv2d: (8, 10, 10)}
    return shapes[type(layer)]


def stored(storage: Storage, *layers: str) -> dict[str, Precision]:
    return dict.fromkeys(layers, Precision(storage, Compute.FP32))


def batches_of(x: Tensor, size: int = 64) -> Callable[[], Iterable[Mapping[str, Tensor]]]:
    return lambda: ({"input": part} for part in x.split(size))


def fit(model: nn.Module, precisions: Mapping[str, Precision], x: Tensor) -> dict[str, Grid]:
    return fitted(model, precisions, energies(model, precisions, batches_of(x)()), largest=LARGEST)


@torch.no_grad()
def error(model: nn.Module, original: nn.Module, x: Tensor) -> float:
    """Mean squared, relative to the original's outputs."""
    wanted = original(x)
    return float((model(x) - wanted).square().mean() / wanted.square().mean())


def assert_on_grid(model: nn.Module, precisions: Mapping[str, Precision], grids: Mapping[str, Grid]) -> None:
    for name, grid in grids.items():
        weight = model.get_parameter(f"{name}.weight").detach()
        storage = precisions[name].storage
        again = load_format(storage.format).quantise(weight.flatten(1), grid, storage, largest=LARGEST)
        assert torch.equal(again.view_as(weight), weight), name


# -- error feedback ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_fed_back_errors_show_less_in_the_outputs_and_the_weights_can_be_stored(storage: Storage, name: str) -> None:
    original = nn.Sequential(seeded(LAYERS[name]))
    precisions = stored(storage, "0")
    seen, unseen = (correlated(inputs_for(original[0]), 256, seed) for seed in (1, 2))
    grids = fit(original, precisions, seen)
    nearest, fed = copy.deepcopy(original), copy.deepcopy(original)
    put_on(nearest, precisions, grids, largest=LARGEST)
    feed_back_errors(fed, precisions, grids, batches_of(seen), largest=LARGEST)

    assert_on_grid(fed, precisions, grids)
    assert error(fed, original, unseen) < 0.9 * error(nearest, original, unseen)


def test_a_code_word_that_runs_on_into_the_next_channel_stays_whole() -> None:
    original = nn.Sequential(
        seeded(lambda: nn.Conv2d(8, 8, 3, groups=8)), nn.ReLU(), seeded(lambda: nn.Conv2d(8, 5, 3))
    )
    precisions = stored(Storage("vector", 2, PerChannel()), "0", "2")
    x = correlated((8, 10, 10), 128, 1)
    grids = fit(original, precisions, x)
    nearest, fed = copy.deepcopy(original), copy.deepcopy(original)
    put_on(nearest, precisions, grids, largest=LARGEST)
    feed_back_errors(fed, precisions, grids, batches_of(x), largest=LARGEST)

    assert_on_grid(fed, precisions, grids)
    assert error(fed, original, x) < error(nearest, original, x)


def test_a_layer_makes_up_for_those_before_it() -> None:
    original = nn.Sequential(
        seeded(lambda: nn.Linear(64, 32)), nn.ReLU(), seeded(lambda: nn.Linear(32, 8)), nn.Identity()
    )
    precisions = stored(Storage("int", 2, PerChannel()), "0") | stored(Storage("int", 8, PerChannel()), "2")
    seen, unseen = (correlated((64,), 512, seed) for seed in (1, 2))
    grids = fit(original, precisions, seen)
    fed = copy.deepcopy(original)
    feed_back_errors(fed, precisions, grids, batches_of(seen), largest=LARGEST)

    second_as_it_was = copy.deepcopy(fed)
    second_as_it_was[2] = original[2]
    assert error(fed, original, unseen) < 0.8 * error(second_as_it_was, original, unseen)


class Odd(nn.Module):
    """Layers whose inputs cannot be laid out as columns, two that share a weight, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.named_padding = nn.Conv2d(8, 8, 3, padding="same")
        self.transposed = nn.ConvTranspose2d(8, 8, 2, groups=2)
        self.one = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.other.weight = self.one.weight
        self.never = nn.Linear(8, 8)

    def forward(self, input: Tensor) -> Tensor:
        x = F.relu(self.transposed(F.relu(self.named_padding(input))))
        return self.other(F.relu(self.one(x.mean((2, 3)))))


def test_what_cannot_be_fed_back_is_rounded_to_nearest() -> None:
    original = seeded(Odd)
    precisions = stored(STORAGES[0], "named_padding", "transposed", "one", "other", "never")
    x = correlated((8, 10, 10), 16, 1)
    grids = fit(original, precisions, x)
    nearest, fed = copy.deepcopy(original), copy.deepcopy(original)
    put_on(nearest, precisions, grids, largest=LARGEST)
    feed_back_errors(fed, precisions, grids, batches_of(x), largest=LARGEST)
    for name, tensor in nearest.state_dict().items():
        assert torch.equal(fed.state_dict()[name], tensor), name


def test_a_layer_that_works_on_its_own_result_is_fed_back() -> None:
    original = jitter(build("called_twice").model).eval()
    precisions = stored(STORAGES[0], "first", "again", "wide", "head")
    x = correlated((6,), 256, 1)
    grids = fit(original, precisions, x)
    nearest, fed = copy.deepcopy(original), copy.deepcopy(original)
    put_on(nearest, precisions, grids, largest=LARGEST)
    feed_back_errors(fed, precisions, grids, batches_of(x), largest=LARGEST)
    assert_on_grid(fed, precisions, grids)
    assert error(fed, original, x) < error(nearest, original, x)


def test_dead_inputs_do_no_harm() -> None:
    """Channels that are 0 on all examples leave the moments singular."""
    original = nn.Sequential(seeded(lambda: nn.Linear(64, 8)))
    precisions = stored(STORAGES[0], "0")
    x = correlated((64,), 64, 1)
    x[:, ::2] = 0
    for seen in (x, torch.zeros_like(x)):
        fed = copy.deepcopy(original)
        grids = fit(original, precisions, seen)
        feed_back_errors(fed, precisions, grids, batches_of(seen), largest=LARGEST)
        assert_on_grid(fed, precisions, grids)
        assert all(tensor.isfinite().all() for tensor in fed.state_dict().values())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(2, 1), groups=2),
        nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2),
        nn.Linear(9, 2),
    ],
    ids=str,
)
def test_some_columns_are_columns_of_the_same_places_each_time(layer: nn.Module) -> None:
    x = torch.randn(3, 4, 11, 13) if isinstance(layer, nn.Conv2d) else torch.randn(3, 4, 9)
    assert can_unfold(layer)
    every = columns_at(layer, x, 10**6, torch.Generator())
    weight = layer.weight.detach().flatten(1).unflatten(0, (len(every), -1))  # (groups, channels a group, columns)
    layer.bias = None
    channels_first = layer(x).detach().movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
    assert torch.allclose((every @ weight.mT).mT.flatten(0, 1), channels_first, atol=FLOAT_TOLERANCE)

    first, second = (columns_at(layer, x * sign, 5, torch.Generator().manual_seed(3)) for sign in (1, -1))
    assert torch.equal(first, -second)
    assert first.shape == (len(every), 5, every.shape[2])
    found = (first[:, :, None] == every[:, None]).all(3).all(0).any(1)  # of every column, at one place for all groups
    assert found.all()


# -- biases --------------------------------------------------------------------------------------------------


def test_corrected_layers_write_the_means_of_the_original() -> None:
    torch.manual_seed(0)
    original = jitter(nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 6, 3, bias=False), nn.Flatten(2)))
    original.append(nn.Linear(36, 5)).eval()
    x = correlated((8, 10, 10), 96, 1)
    precisions = stored(Storage("int", 2, PerChannel()), "0", "2", "4")
    model = copy.deepcopy(original)
    put_on(model, precisions, fit(original, precisions, x), largest=LARGEST)
    weights = {name: weight.clone() for name, weight in model.named_parameters() if name.endswith("weight")}
    before = error(model, original, x)
    correct_biases(model, original, precisions, batches_of(x, 40))  # the last batch is shorter

    with torch.no_grad():
        for end, axes in ((1, (0, 2, 3)), (5, (0, 1))):
            found, wanted = (net[:end](x).mean(axes) for net in (model, original))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert error(model, original, x) < before
    assert model[2].bias is None
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in weights.items())


def test_a_layer_called_twice_keeps_its_bias() -> None:
    """Its two calls have two means, and it has one bias."""
    original = jitter(build("called_twice").model).eval()
    x = correlated((6,), 64, 1)
    precisions = stored(Storage("int", 2, PerChannel()), "first", "again", "wide")
    model = copy.deepcopy(original)
    put_on(model, precisions, fit(original, precisions, x), largest=LARGEST)
    correct_biases(model, original, precisions, batches_of(x))
    assert torch.equal(model.again.bias, original.again.bias)
    assert not torch.equal(model.wide.bias, original.wide.bias)


# -- equal ranges --------------------------------------------------------------------------------------------


class Separable(nn.Module):
    """A convolution, depthwise and pointwise ones with norms between, a Linear behind a flatten."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12 * 16, 5)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.stem(x)))
        x = self.act(self.norm2(self.depthwise(x)))
        return self.head(F.max_pool2d(self.act(self.pointwise(x)), 2).flatten(1))


def scaled_badly(model: nn.Module, groups: Mapping[str, tuple[str, ...]]) -> None:
    """Channels of a norm, or a layer, up or down by up to 16 times: what training leaves behind in small networks."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensors in groups.items():
            factor = (8 * torch.rand(len(model.get_parameter(tensors[0])), generator=random) - 4).exp2()
            for key in tensors:
                tensor = model.get_parameter(key)
                tensor.mul_(factor.reshape(-1, *[1] * (tensor.dim() - 1)))
            assert name


def separable(act: Callable[[Tensor], Tensor] = F.relu) -> nn.Module:
    model = jitter(seeded(lambda: Separable(act))).eval()
    scaled_badly(
        model,
        {
            "stem": ("norm1.weight", "norm1.bias"),
            "depthwise": ("norm2.weight", "norm2.bias"),
            "pointwise": ("pointwise.weight", "pointwise.bias"),
        },
    )
    return model


def unevenness(model: nn.Module) -> float:
    """The largest ratio between the ranges that a channel has in the layers that it goes through, over all channels."""
    weight = {name: tensor.detach().abs() for name, tensor in model.named_parameters()}
    of_units = [
        [
            weight["stem.weight"].amax((1, 2, 3)),
            weight["depthwise.weight"].amax((1, 2, 3)),
            weight["pointwise.weight"].amax((0, 2, 3)),
        ],
        [weight["pointwise.weight"].amax((1, 2, 3)), weight["head.weight"].unflatten(1, (-1, 16)).amax((0, 2))],
    ]
    ratios = [torch.stack(ranges).amax(0) / torch.stack(ranges).amin(0) for ranges in of_units]
    return float(torch.cat(ratios).max())


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_ranges_are_evened_out_and_the_function_stays(pruned: bool) -> None:
    model, example = separable(), image()
    graph = trace(model, example)
    kept = None
    if pruned:
        units = {group.name: group.total - 2 for group in graph.groups}
        scores = {group.name: torch.rand(group.total) for group in graph.groups}
        result = prune(model, graph, Policy({}, units), scores)
        model, kept = result.model, result.kept
    folded = fold(model, foldable(model, example)).eval()
    even = copy.deepcopy(folded)
    assert sorted(equalise(even, graph, example, kept=kept)) == sorted(group.name for group in graph.groups)

    assert unevenness(folded) > 8
    assert unevenness(even) < 1.05
    x = {"x": torch.randn(16, 3, 8, 8)}
    with torch.no_grad():
        assert relative_error(forward(even, x), forward(folded, x)) < FLOAT_TOLERANCE


@pytest.mark.parametrize("act", [F.gelu, F.silu, F.relu6, F.hardswish, torch.tanh], ids=lambda act: act.__name__)
def test_what_is_no_relu_between_layers_is_left_alone(act: Callable[[Tensor], Tensor]) -> None:
    model, example = separable(act), image()
    folded = fold(model, foldable(model, example)).eval()
    even = copy.deepcopy(folded)
    assert equalise(even, trace(model, example), example) == []
    assert all(torch.equal(tensor, even.state_dict()[name]) for name, tensor in folded.state_dict().items())


@pytest.mark.parametrize("name", ["residual", "concat", "gated", "tied_twice", "called_twice", "two_inputs", "grouped"])
def test_whatever_is_equalised_the_function_stays(name: str) -> None:
    case = build(name)
    model = jitter(case.model).eval()
    folded = fold(model, foldable(model, case.example)).eval()
    even = copy.deepcopy(folded)
    equalise(even, trace(model, case.example), case.example)
    with torch.no_grad():
        assert relative_error(forward(even, case.example), forward(folded, case.example)) < FLOAT_TOLERANCE


# -- all of it -----------------------------------------------------------------------------------------------


def test_every_step_can_be_left_out_and_together_they_help() -> None:
    model = separable()
    x = correlated((3, 8, 8), 256, 1)
    graph = trace(model, {"x": x[:2]})
    folded = fold(model, foldable(model, {"x": x[:2]})).eval()
    precisions = stored(STORAGES[0], "stem", "depthwise", "pointwise", "head")

    def result(**steps: bool) -> nn.Module:
        own = copy.deepcopy(folded)
        everything = {"equalise": False, "smooth": False, "feed_back": False, "correct_biases": False} | steps
        grids = post_train(
            own,
            precisions,
            PostTraining(**everything),
            lambda: ({"x": part} for part in x.split(64)),
            largest=LARGEST,
            graph=graph,
        ).grids
        assert_on_grid(own, precisions, grids)
        return own

    nearest = copy.deepcopy(folded)
    put_on(nearest, precisions, fit(folded, precisions, x), largest=LARGEST)
    plain = result()
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in nearest.state_dict().items())

    unseen = correlated((3, 8, 8), 256, 2)
    errors = [error(net, folded, unseen) for net in (plain, result(correct_biases=True), result(feed_back=True))]
    assert errors[1] < errors[0]
    assert errors[2] < errors[0]
    assert error(result(equalise=True, feed_back=True, correct_biases=True), folded, unseen) < errors[0] / 2
