"""Channels that go are told by those that stay: nothing is lost where they can be, and least squares otherwise."""

import copy
from collections.abc import Callable, Mapping

import networks
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hirelc_deploy.compress.compensate import MOST_CHANNELS, compensate, moments, staying
from hirelc_deploy.compress.fold import foldable
from hirelc_deploy.compress.importance import scores
from hirelc_deploy.compress.prune import prune
from hirelc_deploy.graph import ModelGraph, forward, trace
from hirelc_deploy.policy import Policy

EXAMPLES = 512


class Convolutions(nn.Module):
    """A convolution whose channels can go, and one that reads them, with a bias or with a norm that has a mean."""

    def __init__(self, *, bias: bool, norm: bool = False, transposed: bool = False) -> None:
        super().__init__()
        self.made = nn.Conv2d(3, 8, 3)
        self.act = nn.ReLU()
        self.read = (nn.ConvTranspose2d if transposed else nn.Conv2d)(8, 6, 3, bias=bias)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.read(self.act(self.made(x)))).relu().mean((2, 3)))


class Flattened(nn.Module):
    """A Linear layer that reads several entries of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.made(x).relu().flatten(1))


class OneByOne(Convolutions):
    """What reads the channels is called with one example at a time, without its axis."""

    def forward(self, x: Tensor) -> Tensor:
        made = self.act(self.made(x))
        read = torch.stack([self.read(made[i]) for i in range(2)])
        return self.head(self.norm(read).relu().mean((2, 3)))


class Shared(Convolutions):
    """What reads the channels shares its weight with a layer that reads something else."""

    def __init__(self) -> None:
        super().__init__(bias=True)
        self.again = nn.Conv2d(8, 6, 3)
        self.again.weight = self.read.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.again(x[:, :1].expand(-1, 8, -1, -1)).mean()


READERS: dict[str, Callable[[], nn.Module]] = {
    "with a bias": lambda: Convolutions(bias=True),
    "before a norm": lambda: Convolutions(bias=False, norm=True),
    "with a bias before a norm": lambda: Convolutions(bias=True, norm=True),
    "transposed": lambda: Convolutions(bias=True, transposed=True),
    "flattened": Flattened,
}


def images(seed: int = 0) -> dict[str, Tensor]:
    return {"x": torch.randn(EXAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}


def more_like(example: Tensor) -> Tensor:
    random = torch.Generator().manual_seed(2)
    shape = (EXAMPLES, *example.shape[1:])
    if example.is_floating_point():
        return torch.randn(shape, generator=random)
    return torch.randint(int(example.max()) + 1, shape, generator=random)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def cut(model: nn.Module, graph: ModelGraph, keep: Mapping[str, int], seen_on: Mapping[str, Tensor]) -> nn.Module:
    seen = moments(model, graph, [seen_on])
    norms = foldable(model, {name: tensor[:2] for name, tensor in seen_on.items()})
    return prune(
        model,
        graph,
        Policy({}, keep),
        scores(model, graph, "l2"),
        before=lambda copy, kept: compensate(copy, graph, kept, seen, norms),
    ).model


def plain(model: nn.Module, graph: ModelGraph, keep: Mapping[str, int]) -> nn.Module:
    return prune(model, graph, Policy({}, keep), scores(model, graph, "l2")).model


@torch.no_grad()
def off(model: nn.Module, original: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Mean squared difference of the outputs, in units of the original's variance."""
    (found,), (wanted,) = (forward(each, inputs).values() for each in (model, original))
    return float((found - wanted).square().mean() / wanted.var())


@pytest.mark.parametrize("name", READERS)
def test_channels_that_others_tell_are_not_missed(name: str) -> None:
    """They are half of one that stays, or the same everywhere."""
    model = seeded(READERS[name])
    made = model.get_submodule("made")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter[4:] = parameter[:4] / 2  # the smaller ones go
        if name != "transposed":  # at the edge of what it writes less of a constant arrives
            made.get_parameter("weight")[7], made.get_parameter("bias")[7] = 0.0, 0.25
    graph = trace(model, {"x": torch.zeros(2, 3, 8, 8)})
    held_out = images(1)
    assert off(cut(model, graph, {"made": 4}, images()), model, held_out) < 1e-4
    assert off(plain(model, graph, {"made": 4}), model, held_out) > 1e-3


@pytest.mark.parametrize("name", ["residual", "concat", "gated", "attention", "inverted", "tied_head"])
def test_what_is_lost_is_less(name: str) -> None:
    """On networks of other shapes: sums, concatenations, gates, layers of tokens, depthwise ones in between."""
    case = networks.build(name)
    graph = trace(case.model.eval(), case.example)
    inputs = {name: more_like(tensor) for name, tensor in case.example.items()}
    keep = {group.name: next(n for n in group.legal if 2 * n >= group.total) for group in graph.groups}
    assert off(cut(case.model, graph, keep, inputs), case.model, inputs) < off(
        plain(case.model, graph, keep), case.model, inputs
    )


def test_a_map_through_the_origin_where_nothing_can_hold_a_constant() -> None:
    """Neither bias nor norm: a layer that reads noughts writes noughts, as before."""
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    seeded(lambda: model)
    graph = trace(model, {"x": torch.zeros(2, 3)})
    inputs = {"x": torch.randn(EXAMPLES, 3, generator=torch.Generator().manual_seed(3))}
    found = cut(model, graph, {"0": 4}, inputs)
    assert found.get_submodule("2").bias is None
    assert off(found, model, inputs) < off(plain(model, graph, {"0": 4}), model, inputs)


def test_where_all_channels_stay_nothing_changes() -> None:
    model = seeded(READERS["with a bias"])
    graph = trace(model, {"x": torch.zeros(2, 3, 8, 8)})
    found = cut(model, graph, {}, images())
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_original_stays() -> None:
    model = seeded(READERS["before a norm"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cut(model, trace(model, {"x": torch.zeros(2, 3, 8, 8)}), {"made": 4}, images())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_channels_that_are_dead_do_no_harm() -> None:
    """All that stay are nought on every example: there is nothing to tell by."""
    model = seeded(READERS["with a bias"])
    with torch.no_grad():
        model.get_submodule("made").get_parameter("bias").fill_(-100.0)
    graph = trace(model, {"x": torch.zeros(2, 3, 8, 8)})
    found = cut(model, graph, {"made": 4}, images())
    assert off(found, model, {"x": images(1)["x"] + 1e-3}) < 1e-6


def test_large_means_hide_nothing() -> None:
    """Squares of what lies at a thousand have no digits left for what varies by a tenth."""
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 4))
    seeded(lambda: model)
    with torch.no_grad():
        model[0].bias.add_(1000.0)
        model[0].weight.mul_(0.1)
    graph = trace(model, {"x": torch.zeros(2, 3)})
    inputs = {"x": torch.randn(EXAMPLES, 3, generator=torch.Generator().manual_seed(3))}
    (found,) = moments(model, graph, [inputs]).values()
    seen = forward(model[0].double(), {"x": inputs["x"].double()})["output"].detach()
    torch.testing.assert_close(found.covariance.double(), torch.cov(seen.T, correction=0), rtol=1e-3, atol=1e-6)


def test_layers_that_cannot_be_told_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that a layer which reads something else has as well, inputs that are not finite, and too many."""
    shared = seeded(Shared)
    graph = trace(shared, {"x": torch.zeros(2, 3, 8, 8)})
    assert not {"read", "again"} & moments(shared, graph, [images()]).keys()

    one_by_one = seeded(lambda: OneByOne(bias=True))
    assert "read" not in moments(one_by_one, trace(Convolutions(bias=True), {"x": torch.zeros(2, 3, 8, 8)}), [images()])

    flattened = seeded(Flattened)
    graph = trace(flattened, {"x": torch.zeros(2, 3, 8, 8)})
    assert moments(flattened, graph, [images()]).keys() == {"head"}
    assert moments(flattened, graph, [images(), {"x": torch.full((1, 3, 8, 8), torch.nan)}]) == {}
    monkeypatch.setattr("hirelc_deploy.compress.compensate.MOST_CHANNELS", 8 * 36 - 1)
    assert moments(flattened, graph, [images()]) == {}
    assert MOST_CHANNELS > 8 * 36


# -- which channels go -----------------------------------------------------------------------------------------


def order_of(model: nn.Module, graph: ModelGraph, seen_on: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The units of each group, the first to go first."""
    norms = foldable(model, {key: each[:2] for key, each in seen_on.items()})
    found = staying(model, graph, moments(model, graph, [seen_on]), norms)
    return {name: steps.argsort().tolist() for name, steps in found.items()}


def test_of_channels_that_tell_each_other_one_stays() -> None:
    """By weights alone all small ones would go, and with them what only they tell."""
    model = seeded(READERS["with a bias"])
    made = model.get_submodule("made")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter[4:] = parameter[:4]
            parameter[2:4] *= 0.1
            parameter[6:] *= 0.1
    graph = trace(model, {"x": torch.zeros(2, 3, 8, 8)})
    gone = order_of(model, graph, images())["made"][:4]
    assert {unit % 4 for unit in gone} == {0, 1, 2, 3}


@pytest.mark.parametrize("name", sorted(READERS.keys() - {"transposed"}))  # places count alike, at the edge as well
def test_the_first_to_go_is_the_one_that_costs_least(name: str) -> None:
    """Each tried for itself: what the reader then writes, by least squares on the very examples."""
    model = seeded(READERS[name])
    graph = trace(model, {"x": torch.zeros(2, 3, 8, 8)})
    reader = "head" if name == "flattened" else "read"
    whole = {group.name: tuple(range(group.total)) for group in graph.groups}
    with torch.no_grad():
        wanted = written(model, reader)
        costs = []
        for unit in range(8):
            stay = tuple(each for each in range(8) if each != unit)
            trial = copy.deepcopy(model)
            seen = moments(model, graph, [images()])
            compensate(trial, graph, whole | {"made": stay}, seen, foldable(model, images()))
            made = trial.get_submodule("made")
            made.get_parameter("weight")[unit], made.get_parameter("bias")[unit] = 0.0, 0.0
            costs.append(float((written(trial, reader) - wanted).square().mean()))
    first, second = np.argsort(costs)[:2]
    assert costs[first] < 0.99 * costs[second], "too close to tell"
    assert order_of(model, graph, images())["made"][0] == first


def written(model: nn.Module, layer: str) -> Tensor:
    """What a layer and the norm behind it give."""
    found: list[Tensor] = []
    behind = model.get_submodule("norm" if layer == "read" else layer)
    handle = behind.register_forward_hook(lambda _module, _args, output: found.append(output))
    forward(model, images())
    handle.remove()
    return found[0]


def test_many_units_go_several_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once."""
    model = seeded(READERS["with a bias"])
    graph = trace(model, {"x": torch.zeros(2, 3, 8, 8)})
    monkeypatch.setattr("hirelc_deploy.compress.compensate.STEPS", 3)
    assert sorted(order_of(model, graph, images())["made"]) == list(range(8))


def test_a_group_of_whose_readers_nothing_is_known_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(Flattened)
    graph = trace(model, {"x": torch.zeros(2, 3, 8, 8)})
    assert order_of(model, graph, images()).keys() == {"made"}
    monkeypatch.setattr("hirelc_deploy.compress.compensate.MOST_CHANNELS", 8)
    assert order_of(model, graph, images()) == {}
