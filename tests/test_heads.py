"""Whole heads of attention: found however a module lays them out, and gone from the file as from the network."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from exporting import export, random_task, write_policy
from torch import Tensor, nn

from hirelc_deploy.compress.importance import scores
from hirelc_deploy.compress.prune import prune
from hirelc_deploy.graph import ModelGraph, trace
from hirelc_deploy.graph.model_graph import Group
from hirelc_deploy.policy import Policy

WIDTH, HEADS, DIM, TOKENS = 12, 3, 4, 5


class Attention(nn.Module):
    """Separate projections, a number of heads, and a width of all of them together."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.attn_dim = WIDTH
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], TOKENS, self.num_heads, DIM).transpose(1, 2)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(q.shape[0], TOKENS, self.attn_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mixed(*(self.split(project(x)) for project in (self.query, self.key, self.value))))


class Fused(Attention):
    """All queries, then all keys, then all values (timm)."""

    def __init__(self) -> None:
        super().__init__()
        del self.query, self.key, self.value
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).reshape(x.shape[0], TOKENS, 3, self.num_heads, DIM).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mixed(*self.parts(x)))


class FusedByHead(Fused):
    """Queries, keys and values of one head, then those of the next (GPT-NeoX)."""

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).reshape(x.shape[0], TOKENS, self.num_heads, 3, DIM).permute(3, 0, 2, 1, 4).unbind(0)


class Grouped(nn.Module):
    """Four heads of queries, two of keys and values (Llama), known by the configuration and a head's size alone."""

    class Config:
        def __init__(self) -> None:
            vars(self).update(num_attention_heads=4, num_key_value_heads=2)

    def __init__(self) -> None:
        super().__init__()
        self.config = self.Config()
        self.head_dim = DIM
        self.q_proj = nn.Linear(WIDTH, 4 * DIM, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, 2 * DIM, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(4 * DIM, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (each.repeat_interleave(2, 1) for each in (k, v))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Positioned(Attention):
    """With a bias for every head and pair of places, and a temperature a head."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(TOKENS * TOKENS, HEADS))
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 1)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.bias.T.reshape(1, -1, TOKENS, TOKENS)
        weights = (q @ k.mT * self.temperature + bias).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(q.shape[0], TOKENS, self.attn_dim)


class Apart(nn.Module):
    """What reads the heads lies beside them (BERT)."""

    class Heads(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.all_head_size = self.attn_dim
            del self.out, self.attn_dim

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self.split(project(x)) for project in (self.query, self.key, self.value))
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return mixed.reshape(x.shape[0], TOKENS, self.all_head_size)

    def __init__(self) -> None:
        super().__init__()
        self.heads = self.Heads()
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.heads(x))


class Fixed(Attention):
    """As wide as what it reads, whatever it may know of heads."""

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], TOKENS, HEADS, DIM).transpose(1, 2)


class Net(nn.Module):
    """One residual block of attention on tokens."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = attention
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.attention(self.norm(x))).mean(1))


def net(attention: Callable[[], nn.Module]) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(attention()).eval()


def example(count: int = 2) -> dict[str, Tensor]:
    return {"x": torch.randn(count, TOKENS, 6, generator=torch.Generator().manual_seed(1))}


def heads_of(graph: ModelGraph) -> Group:
    (group,) = (group for group in graph.groups if group.kind == "heads")
    return group


FOUND = {
    Attention: (3, 4),
    Fused: (3, 4),
    FusedByHead: (3, 4),
    Grouped: (2, 8),
    Positioned: (3, 4),
    Apart: (3, 4),
}
"""Units, and channels that are read of each."""


@pytest.mark.parametrize("kind", FOUND)
def test_heads_are_offered_and_go_as_if_nobody_read_them(kind: Callable[[], nn.Module]) -> None:
    model = net(kind)
    graph = trace(model, example())
    group = heads_of(graph)
    assert (group.total, group.unit) == FOUND[kind]
    assert group.legal == tuple(range(group.total + 1))  # with the last head the branch goes
    made = {member.module for member in group.members if member.role == "out"}
    assert made.isdisjoint(left.name for left in graph.left_out)

    pruned = prune(model, graph, Policy({}, {group.name: 1}), scores(model, graph, "l2"))
    (stays,) = pruned.kept[group.name]
    (read,) = (axis for axis in group.axes if axis.role == "in")
    gone = [entry for unit, entries in enumerate(read.entries) if unit != stays for entry in entries]
    with torch.no_grad():
        model.get_parameter(read.tensor)[:, gone] = 0.0
        expected = model(**example())
        torch.testing.assert_close(pruned.model(**example()), expected)
    assert sum(p.numel() for p in pruned.model.parameters()) < sum(p.numel() for p in model.parameters())


def test_without_heads_the_block_is_its_shortcut() -> None:
    model = net(Fused)
    graph = trace(model, example())
    pruned = prune(model, graph, Policy({}, {heads_of(graph).name: 0}), scores(model, graph, "l2")).model
    with torch.no_grad():
        expected = model.head(model.embed(example()["x"]).mean(1))
        torch.testing.assert_close(pruned(**example()), expected)
    assert not any("attention" in name for name, _ in pruned.named_parameters())


def test_a_fused_projection_is_cut_as_it_is_laid_out() -> None:
    for kind, entries in ((Fused, (0, 1, 2, 3, 12, 13, 14, 15, 24, 25, 26, 27)), (FusedByHead, tuple(range(12)))):
        group = heads_of(trace(net(kind), example()))
        (made,) = (axis for axis in group.axes if axis.tensor == "attention.qkv.weight")
        assert made.entries[0] == entries


def test_heads_that_cannot_go_are_left_out_by_their_channels() -> None:
    graph = trace(net(Fixed), example())
    assert all(group.kind == "channels" for group in graph.groups)
    assert any("attention.key" in left.name for left in graph.left_out)


def test_the_module_knows_how_many_are_left_and_the_original_still_has_all() -> None:
    model = net(Attention)
    graph = trace(model, example())
    pruned = prune(model, graph, Policy({}, {heads_of(graph).name: 2}), scores(model, graph, "l2")).model
    attention = pruned.get_submodule("attention")
    assert (attention.num_heads, attention.attn_dim) == (2, 8)
    assert (model.attention.num_heads, model.attention.attn_dim) == (HEADS, WIDTH)


@pytest.mark.parametrize("kind", [Fused, Grouped, Positioned])
def test_the_file_has_the_heads_that_are_left_and_the_size_that_was_told(
    tmp_path: Path, kind: Callable[[], nn.Module]
) -> None:
    model = net(kind)
    group = heads_of(trace(model, example()))
    for stay, channels in ({Fused: (1, 12), Grouped: (1, 4), Positioned: (2, 8)}[kind], (0, 0)):
        policy = write_policy(tmp_path / "policy.json", Policy({}, {group.name: stay}))
        manifest = export(tmp_path / str(stay), model, random_task(x=(TOKENS, 6)), policy=policy).manifest
        assert manifest.predicted.size_bytes == manifest.measured.size_bytes < manifest.baseline.size_bytes
        assert manifest.error.agreement == 100.0
        assert {layer.name: layer.kept for layer in manifest.layers}[group.name] == channels
