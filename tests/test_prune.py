"""What is cut is what was counted, it computes what it should, and the right units stay."""

import copy
import random
from collections.abc import Mapping
from functools import cache
from math import prod

import networks
import pytest
import torch
from torch import Tensor, nn

from hirelc_deploy.compress.importance import scores
from hirelc_deploy.compress.prune import Pruned, best, prune
from hirelc_deploy.errors import UserError
from hirelc_deploy.graph import forward, shapes_after, trace
from hirelc_deploy.graph.layers import observe
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.graph.shapes import parameters_after
from hirelc_deploy.graph.trial import jitter, shapes
from hirelc_deploy.graph.vanish import Gone
from hirelc_deploy.policy import FP32, Policy


def cut(model: nn.Module, graph: ModelGraph, keep: dict[str, int]) -> Pruned:
    return prune(model, graph, Policy({}, keep), scores(model, graph, "l2"))


@cache
def built(name: str) -> tuple[networks.Case, ModelGraph]:
    """A case that no test changes, and its graph."""
    case = networks.build(name)
    return case, trace(case.model, case.example)


def multiply_accumulates(model: nn.Module, example: dict[str, Tensor]) -> int:
    layers, _ = observe(copy.deepcopy(model).eval(), {name: tensor[:1] for name, tensor in example.items()})
    return sum(layer.macs for layer in layers)


def foretold_macs(graph: ModelGraph, keep: Mapping[str, int]) -> int:
    """A weight is used as often as before, wherever it stands, so a layer's count shrinks as its weight does."""
    after = shapes_after(graph, keep)
    stay = [layer for layer in graph.layers if layer.weight in after]
    return sum(layer.macs // prod(layer.weight_shape) * prod(after[layer.weight]) for layer in stay)


@pytest.mark.parametrize("name", networks.CASES)
@pytest.mark.parametrize("seed", range(3))
def test_random_counts_give_exactly_the_shapes_that_were_foretold(name: str, seed: int) -> None:
    case, graph = built(name)
    draw = random.Random(f"{name} {seed}")
    keep = {group.name: draw.choice(group.legal) for group in graph.groups}
    pruned = cut(case.model, graph, keep).model

    assert shapes(pruned.state_dict()) == shapes_after(graph, keep)
    assert sum(p.numel() for p in pruned.parameters()) == parameters_after(graph, keep)
    assert multiply_accumulates(pruned, case.example) == foretold_macs(graph, keep)
    outputs = forward(pruned, case.example)
    assert {n: t.shape for n, t in outputs.items()} == {
        n: t.shape for n, t in forward(case.model, case.example).items()
    }


@pytest.mark.parametrize("name", ["plain", "residual", "concat_then_add", "gated", "grouped", "text", "upsample"])
def test_cutting_units_that_nobody_reads_changes_nothing(name: str) -> None:
    """The strongest promise of physical pruning: what was zero is gone, and the outputs stay."""
    case = networks.build(name)
    model = jitter(case.model).eval()
    graph = trace(model, case.example)
    with torch.no_grad():
        for group in graph.groups:
            for axis in (axis for axis in group.axes if axis.role == "in"):
                weight = model.get_parameter(axis.tensor)
                weight.index_fill_(axis.axis, torch.tensor([p for unit in axis.entries[::2] for p in unit]), 0.0)
    keep = {group.name: group.total // 2 for group in graph.groups if not _has_group_norm(model, group.name)}
    halves = {
        group.name: torch.tensor([float(unit % 2) for unit in range(group.total)], dtype=torch.float64)
        for group in graph.groups
    }
    pruned = prune(model, graph, Policy({}, keep), halves)

    assert all(set(pruned.kept[g]) <= set(range(1, graph.group[g].total, 2)) for g in keep)
    torch.testing.assert_close(forward(pruned.model, case.example), forward(model, case.example), rtol=1e-4, atol=1e-4)


def _has_group_norm(model: nn.Module, group: str) -> bool:
    """A GroupNorm takes its statistics over the channels that are left: there cutting does change the rest."""
    return group == "grouped" and isinstance(model, networks.Grouped)


def test_a_block_without_its_branch_is_its_shortcut() -> None:
    case = networks.build("residual")
    model = jitter(case.model).eval()
    graph = trace(model, case.example)
    pruned = cut(model, graph, {"blocks.0.conv1": 0, "blocks.1.conv1": 0, "blocks.2.conv2": 0}).model
    x = torch.relu(model.get_submodule("stem")(case.example["x"]))
    shortcut, head = model.get_submodule("blocks.1.shortcut"), model.get_submodule("head")
    expected = head(torch.relu(shortcut(x)).mean((2, 3)))

    torch.testing.assert_close(forward(pruned, case.example)["output"], expected)
    assert isinstance(pruned.get_submodule("blocks.0.conv2"), Gone)
    assert not any(name.startswith(("blocks.0", "blocks.2")) for name in pruned.state_dict())


def test_a_network_without_a_branch_can_be_trained() -> None:
    case = networks.build("residual")
    graph = trace(case.model, case.example)
    pruned = cut(case.model, graph, {"blocks.0.conv1": 0, "blocks.1.conv2": 5}).model.train()
    forward(pruned, case.example)["output"].sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


def test_identifiers_may_begin_with_one() -> None:
    class FromOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.inner, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(torch.relu(self.inner(self.words(words - 1).mean(1))))

    model = FromOne().eval()
    graph = trace(model, {"words": torch.randint(1, 10, (2, 5))})
    pruned = cut(model, graph, {"inner": 4})
    assert pruned.model.get_submodule("inner").out_features == 4


def test_the_network_that_was_given_stays_whole_and_modes_are_kept() -> None:
    case = networks.build("residual")
    case.model.train()
    case.model.get_submodule("blocks.0.norm1").eval()
    graph = trace(case.model, case.example)
    before = copy.deepcopy(case.model.state_dict())
    pruned = cut(case.model, graph, {"blocks.0.conv2": 3}).model

    assert all(torch.equal(tensor, before[name]) for name, tensor in case.model.state_dict().items())
    assert pruned.training
    assert not pruned.get_submodule("blocks.0.norm1").training
    torch.testing.assert_close(
        pruned.state_dict()["blocks.0.norm2.running_mean"], before["blocks.0.norm2.running_mean"][:3]
    )


def test_a_tied_weight_stays_one_weight() -> None:
    case = networks.build("tied_head")
    graph = trace(case.model, case.example)
    pruned = cut(case.model, graph, {"mlp.2": 5}).model

    assert pruned.get_parameter("tokens.weight") is pruned.get_parameter("head.weight")
    assert pruned.get_parameter("head.weight").shape == (20, 5)


def test_the_best_units_stay_and_equal_ones_go_by_position() -> None:
    group = trace(networks.Plain(), networks.image()).group["conv2"]
    assert best(group, 3, {"conv2": torch.tensor([1.0, 5, 1, 1, 9, 1])}) == (0, 1, 4)
    assert best(group, 6, {}) == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("policy", "what", "fix"),
    [
        (Policy({}, {"conv3": 2}), "'conv3', which is no prune group", "did you mean 'conv"),
        (Policy({}, {"conv2": 0}), "cannot keep 0 of its 6 units", "nearest legal count is 1"),
        (Policy({}, {"conv2": 7}), "cannot keep 7 of its 6 units", "nearest legal count is 6"),
        (Policy({"haed": FP32}, {}), "'haed', which is no layer", "did you mean 'head'"),
    ],
)
def test_a_policy_for_another_network_is_refused(policy: Policy, what: str, fix: str) -> None:
    case = networks.build("plain")
    graph = trace(case.model, case.example)
    with pytest.raises(UserError) as refused:
        prune(case.model, graph, policy, scores(case.model, graph, "l2"))
    assert what in refused.value.what
    assert fix in refused.value.fix


def test_l2_weighs_every_tensor_alike() -> None:
    """A reader with weights a thousand times larger must not decide alone."""
    model = networks.Plain()
    with torch.no_grad():
        for weight in (model.conv2.weight, model.head.weight):
            weight.fill_(1.0)
        model.conv2.weight[2] = 2.0
        model.head.weight.mul_(1000.0)
    score = scores(model, trace(model, networks.image()), "l2")["conv2"]

    assert score.shape == (6,)
    assert score.argmax() == 2
    torch.testing.assert_close(score[2] - score[0], torch.tensor(3 / 1.5, dtype=torch.float64))


def test_taylor_is_the_change_of_the_loss() -> None:
    """On a loss that is linear in what is read, the first order is exact: remove a unit and compare."""
    case = networks.build("grouped")
    model = jitter(case.model).eval()
    graph = trace(model, case.example)

    def loss(outputs: dict[str, Tensor], target: Tensor) -> Tensor:
        return (outputs["output"] * target).sum()

    target = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))
    found = scores(model, graph, "taylor", [(case.example, target)], loss)["grouped"]
    whole = loss(forward(model, case.example), target)
    for unit, score in enumerate(found):
        less = copy.deepcopy(model)
        entries = next(axis for axis in graph.group["grouped"].axes if axis.tensor == "head.weight").entries[unit]
        with torch.no_grad():
            less.get_parameter("head.weight").index_fill_(1, torch.tensor(entries), 0.0)
        change = (whole - loss(forward(less, case.example), target)).abs()
        torch.testing.assert_close(score.float(), change, rtol=1e-3, atol=1e-4)


def test_taylor_leaves_the_model_alone_and_names_a_loss_that_is_not_finite() -> None:
    case = networks.build("plain")
    graph = trace(case.model, case.example)
    scores(case.model, graph, "taylor", [(case.example, torch.zeros(2))], lambda outputs, _: outputs["output"].sum())
    assert all(parameter.grad is None for parameter in case.model.parameters())

    with pytest.raises(UserError, match="loss is nan on batch 0"):
        scores(case.model, graph, "taylor", [(case.example, torch.zeros(2))], lambda o, _: o["output"].sum() / 0 * 0)
    with pytest.raises(UserError, match="no batch"):
        scores(case.model, graph, "taylor", [], lambda o, _: o["output"].sum())
