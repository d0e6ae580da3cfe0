"""torch's own attention: the same function by layers, and those are stored, cut and computed as others are."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import export, random_task
from torch import Tensor, nn

from hirelc_deploy.checkpoint import of
from hirelc_deploy.graph import trace
from hirelc_deploy.graph.attention import PlainAttention, with_plain_attention

WIDTH, HEADS, PLACES, KEYS = 12, 3, 5, 4


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Holder(nn.Module):
    """What calls an attention; on itself, or on what else is given."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **settings)

    def forward(self, x: Tensor, other: Tensor | None = None, **how: Any) -> tuple[Tensor, Tensor | None]:
        other = x if other is None else other
        found: tuple[Tensor, Tensor | None] = self.attention(x, other, other, **how)
        return found


class Asking(nn.Module):
    """Looks at one tensor, and gives what comes of it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attention(x, x, x)[0]
        return found


MASKS = {
    "none": {},
    "causal": {"attn_mask": torch.ones(PLACES, PLACES, dtype=torch.bool).triu(1), "is_causal": True},
    "added": {"attn_mask": drawn(PLACES, PLACES)},
    "by head": {"attn_mask": drawn(2 * HEADS, PLACES, PLACES)},
    "padded": {"key_padding_mask": torch.tensor([[False] * PLACES, [False, False, False, True, True]])},
}


@pytest.mark.parametrize("mask", MASKS)
def test_it_computes_the_same_in_every_setting(mask: str) -> None:
    for bias, batch_first, need_weights, average in product((True, False), repeat=4):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Holder(bias=bias, batch_first=batch_first).eval()
        x = drawn(2, PLACES, WIDTH) if batch_first else drawn(PLACES, 2, WIDTH)
        how = {**MASKS[mask], "need_weights": need_weights, "average_attn_weights": average}
        with torch.no_grad():
            wanted, wanted_weights = model(x, **how)
            plain = with_plain_attention(model, {"x": x})
            found, weights = plain(x, **how)
        assert isinstance(plain.attention, PlainAttention)
        torch.testing.assert_close(found, wanted)
        assert (weights is None) == (wanted_weights is None)
        if weights is not None:
            torch.testing.assert_close(weights, wanted_weights)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 6}])
def test_it_looks_at_another_tensor_as_well(sizes: dict[str, int]) -> None:
    model = Holder(batch_first=True, **sizes).eval()
    inputs = {"x": drawn(2, PLACES, WIDTH), "other": drawn(2, KEYS, sizes.get("kdim", WIDTH), seed=2)}
    with torch.no_grad():
        wanted, _ = model(**inputs)
        plain = with_plain_attention(model, inputs)
        torch.testing.assert_close(plain(**inputs)[0], wanted)
    assert hasattr(plain.attention, "q_proj")


def test_a_transformer_of_torchs_own_is_all_layers_and_heads(tmp_path: Path) -> None:
    """Its encoder would read weights past them where nothing is trained."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, batch_first=True)
            self.embed = nn.Linear(6, WIDTH)
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.head = nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(self.embed(x)).mean(1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().eval()
    inputs = {"x": drawn(2, PLACES, 6)}
    plain = with_plain_attention(of(model, "in memory").model, inputs)
    assert isinstance(model.encoder.layers[0].self_attn, nn.MultiheadAttention), "the user's own stays as it is"
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs), model(**inputs))
    graph = trace(plain, inputs)
    assert sum(group.kind == "heads" for group in graph.groups) == 2
    assert {"encoder.layers.0.self_attn.in_proj", "encoder.layers.1.self_attn.out_proj"} <= graph.layer.keys()

    outcome = export(tmp_path / "out", model, random_task(x=(PLACES, 6)), recipe="keep=50%,compute=int8")
    kept = {layer.name: (layer.kept, layer.of, layer.runs_as) for layer in outcome.manifest.layers}
    assert kept["encoder.layers.0.self_attn.in_proj"] == (18, 36, "int8")
    assert {runs_as for _, _, runs_as in kept.values()} == {"int8"}
    assert outcome.manifest.predicted.size_bytes == outcome.manifest.measured.size_bytes


class Own(nn.MultiheadAttention):
    """Somebody's own, which may do anything."""


def test_what_cannot_be_told_by_layers_stays_as_it_is() -> None:
    x = {"x": drawn(2, PLACES, WIDTH)}
    for attention in (
        nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True),
        nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True),
        Own(WIDTH, HEADS),
    ):
        assert with_plain_attention(Asking(attention), x).attention is attention
    single = Asking(nn.MultiheadAttention(WIDTH, HEADS))
    assert isinstance(with_plain_attention(single, {"x": drawn(2, WIDTH)}).attention, nn.MultiheadAttention)

    class Uncalled(Asking):
        def forward(self, x: Tensor) -> Tensor:
            return x

    uncalled = Uncalled(nn.MultiheadAttention(WIDTH, HEADS))
    assert isinstance(with_plain_attention(uncalled, x).attention, nn.MultiheadAttention)

    class Shared(Asking):
        def __init__(self, attention: nn.MultiheadAttention) -> None:
            super().__init__(attention)
            self.projection = nn.Linear(WIDTH, 3 * WIDTH)
            self.projection.weight = attention.in_proj_weight

    shared = Shared(nn.MultiheadAttention(WIDTH, HEADS))
    assert isinstance(with_plain_attention(shared, x).attention, nn.MultiheadAttention)
