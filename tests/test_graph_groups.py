"""Prune groups: what is offered, in which units, and what is left out with which reason."""

from functools import cache

import networks
import pytest
import torch
from torch import Tensor, nn

from hirelc_deploy.graph import trace
from hirelc_deploy.graph.model_graph import Group, ModelGraph
from hirelc_deploy.graph.proof import prove
from hirelc_deploy.graph.trial import jitter

OFFERED = {
    "plain": {"conv1": 8, "conv2": 6},
    "channel_last": {"conv1": 8},
    "residual": {
        "blocks.0.conv1": 8,
        "blocks.0.conv2": 8,
        "blocks.1.conv1": 12,
        "blocks.1.conv2": 12,
        "blocks.2.conv1": 6,
        "blocks.2.conv2": 6,
    },
    "concat": {"left": 6, "right": 10, "reader": 8},
    "concat_then_add": {"a_wide": 6, "right": 10},
    "inverted": {"project": 6, "depthwise": 12},
    "gated": {"project": 6, "depthwise": 12, "squeeze": 4},
    "grouped": {"first": 3, "grouped": 2},
    "upsample": {"down": 8, "up": 6},
    "tied_twice": {"wide": 10},
    "called_twice": {"again": 8, "wide": 10},
    "text": {"positions": 8, "conv": 12},
    "tied_head": {"mlp.2": 8, "mlp.0": 12},
    "two_inputs": {"see": 8, "hear1": 10, "hear2": 6},
    "attention": {"key": 2, "fc1": 16},
}
"""Units of every group that is offered; the output layer never is."""

VANISHING = {
    "residual": {
        "blocks.0.conv1": ("blocks.0.conv1", "blocks.0.conv2"),
        "blocks.1.conv1": ("blocks.1.conv1", "blocks.1.conv2"),
        "blocks.2.conv2": ("blocks.2.conv1", "blocks.2.conv2", "blocks.2.conv3"),
    },
    "inverted": {"depthwise": ("expand", "depthwise", "project")},
    "gated": {"depthwise": ("expand", "depthwise", "squeeze", "excite", "project")},
    "tied_head": {"mlp.0": ("mlp.0", "mlp.2")},
    "attention": {"key": ("query", "key", "value", "out"), "fc1": ("fc1", "fc2")},
}
"""The layers that leave with the last unit; in all other networks no branch goes."""


@cache
def traced(name: str) -> ModelGraph:
    case = networks.build(name)
    return trace(case.model, case.example)


def reason(graph: ModelGraph, name: str) -> str:
    return next(left.reason for left in graph.left_out if left.name == name)


@pytest.mark.parametrize("name", networks.CASES)
def test_what_is_offered(name: str) -> None:
    graph = traced(name)

    assert {group.name: group.total for group in graph.groups} == OFFERED[name]
    gone = {group.name: group.gone_at_zero for group in graph.groups if group.vanishing}
    assert gone == VANISHING.get(name, {})
    for group in graph.groups:
        assert group.legal == tuple(range(0 if group.vanishing else 1, group.total + 1))


def test_a_channel_last_flatten_is_left_out_with_its_error() -> None:
    assert "is not the same as not reading them (relative error" in reason(traced("channel_last"), "conv2")


class InPascal(nn.Module):
    """What a network says in the units of its data: a large constant, and little about it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 100 * self.inner(x) + 101_325


def test_a_wrong_group_does_not_hide_behind_a_large_constant() -> None:
    case = networks.build("channel_last")
    plain, constant = (trace(model, case.example) for model in (case.model, InPascal(case.model)))
    assert "relative error" in reason(constant, "inner.conv2")
    assert {f"inner.{group.name}" for group in plain.groups} == {group.name for group in constant.groups}


def test_nothing_is_said_of_the_one_unit_of_a_regressor() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    graph = trace(model, {"input": torch.randn(4, 4)})
    assert [group.name for group in graph.groups] == ["0"]
    assert graph.left_out == ()


def test_a_group_that_works_on_half_its_channels_at_random_is_not_taken_for_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Groups of a network that flattens plainly, held against one that flattens channel-last."""
    case = networks.build("channel_last")
    graph = traced("plain")
    proved, left_out = prove(jitter(case.model.eval()), case.example, graph.groups)

    assert [group.name for group in proved] == ["conv1"]
    assert [left.name for left in left_out] == ["conv2"]


def test_units_of_grouped_convolutions_hold_one_channel_of_each_group() -> None:
    graph = traced("grouped")

    first = graph.group["first"]
    assert first.unit == 4
    weight, reader = (next(a for a in first.axes if a.tensor == t) for t in ("first.weight", "grouped.weight"))
    assert weight.entries == ((0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8, 11))
    assert (reader.axis, reader.role, reader.entries) == (1, "in", ((0,), (1,), (2,)))
    # groups of two channels and a norm over halves: both bind the offsets
    assert graph.group["grouped"].unit == 4


def test_channels_with_other_companions_are_groups_of_their_own() -> None:
    graph = traced("concat_then_add")

    assert [m.module for m in graph.group["a_wide"].members if m.role == "out"] == ["a_wide", "left"]
    assert [m.module for m in graph.group["right"].members if m.role == "out"] == ["a_wide", "right"]
    wide = next(axis for axis in graph.group["right"].axes if axis.tensor == "a_wide.weight")
    assert wide.entries == tuple((i,) for i in range(6, 16))


def test_a_flattened_channel_is_several_columns() -> None:
    columns = next(axis for axis in traced("plain").group["conv2"].axes if axis.tensor == "head.weight")
    assert (columns.axis, columns.per_unit) == (1, 16)


def test_shared_weights_are_refused_by_name() -> None:
    graph = traced("tied_twice")
    for name in ("first", "one", "other"):
        assert "one.weight" in reason(graph, name)


def test_the_width_of_an_attention_is_left_out_with_the_networks_own_words_but_for_its_heads() -> None:
    graph = traced("attention")
    assert {entry.name for entry in graph.left_out}.isdisjoint({"query", "key", "value"})
    assert "with half of its units removed the network fails: RuntimeError" in reason(graph, "fc2")


def test_a_silent_branch_is_not_proved_by_its_silence() -> None:
    """norm2 begins at zero, as in many residual networks: without noise nothing in the branch could fail."""

    class Silent(networks.ChannelLast):
        def __init__(self) -> None:
            super().__init__()
            nn.init.zeros_(self.head.weight)

    graph = trace(Silent(), networks.image())
    assert "conv2" not in graph.group
    assert "conv1" in graph.group


def test_where_a_group_is_decided() -> None:
    graph = traced("residual")
    blocks = {name: graph.group[name].blocks for name in ("blocks.0.conv1", "blocks.1.conv2")}
    assert blocks == {"blocks.0.conv1": ("blocks.0",), "blocks.1.conv2": ("blocks.1", "blocks.2", "head")}


class InPlace(nn.Module):
    """As most residual networks are written: `out += x`, then an activation in place, one Dropout for two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.dropout(self.stem(x)))
        out = self.act(self.norm1(self.conv1(x)))
        out = self.dropout(self.norm2(self.conv2(out)))
        out += x
        return self.head(self.act(out).mean((2, 3)))


def test_a_branch_that_is_added_in_place_can_go() -> None:
    graph = trace(InPlace(), networks.image())
    assert graph.group["conv1"].gone_at_zero == ("conv1", "conv2")


class Sequence(nn.Module):
    """A GRU, which torch-pruning fails at, between layers that it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.recurrent = nn.GRU(16, 16, batch_first=True)
        self.wide = nn.Linear(16, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.recurrent(torch.tanh(self.embed(x)))
        return self.head(torch.relu(self.wide(states[:, -1])))


def test_what_cannot_be_followed_does_not_hide_the_rest() -> None:
    graph = trace(Sequence(), {"x": torch.randn(2, 5, 6)})
    assert {group.name: group.total for group in graph.groups} == {"wide": 32}
    assert "torch-pruning cannot follow it: IndexError" in reason(graph, "embed")


class Sum(nn.Module):
    """Two branches that only have each other: either can go, not both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.a1, self.a2 = nn.Linear(6, 8), nn.Linear(8, 6)
        self.b1, self.b2 = nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = self.a2(torch.relu(self.a1(x))) + self.b2(torch.relu(self.b1(x)))
        return self.head(x)


def test_branches_that_carry_each_other_cannot_both_go() -> None:
    graph = trace(Sum(), networks.vector())
    able = [group for group in graph.groups if group.legal[0] == 0]
    assert [group.name for group in able] in (["a1"], ["b1"])


class Towers(nn.Module):
    """Two inputs, added: without one branch the network would not look at one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a1, self.a2 = nn.Linear(6, 8), nn.Linear(8, 6)
        self.b1, self.b2 = nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.head(self.a2(torch.relu(self.a1(a))) + self.b2(torch.relu(self.b1(b))))


def test_no_input_is_cut_off() -> None:
    graph = trace(Towers(), {"a": torch.randn(2, 6), "b": torch.randn(2, 6)})
    assert all(group.legal[0] == 1 for group in graph.groups)


def test_a_group_is_the_same_however_the_modules_are_numbered() -> None:
    group: Group = traced("residual").group["blocks.0.conv2"]
    assert {member.module for member in group.members if member.role == "out"} == {
        "stem",
        "blocks.0.conv2",
        "blocks.0.norm2",
    }
