"""Small networks with random weights, one for every way in which channels hang together."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network and one batch of two examples that it runs on."""

    model: nn.Module
    example: dict[str, Tensor]


def image(channels: int = 3, size: int = 8) -> dict[str, Tensor]:
    return {"x": torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))}


class Plain(nn.Module):
    """conv, conv, flatten, linear: nothing shared, a channel is several columns behind the flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.head(F.relu(self.conv2(x)).flatten(1))


class ChannelLast(Plain):
    """As MTCNN's RNet: the places come before the channels, so a cut that takes runs of columns is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.head(F.relu(self.conv2(x)).permute(0, 3, 2, 1).flatten(1))


class Residual(nn.Module):
    """A stem, two basic blocks (identity and projection shortcut), a bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Basic(8, 8), Basic(8, 12), Bottleneck(12, 6))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        nn.init.zeros_(self.norm2.weight)  # as residual networks often begin: a proof must not be blind here
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


class Bottleneck(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 1)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1)
        self.conv3 = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))


class Concat(nn.Module):
    """Two branches side by side, a norm over both, a reader of both."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 1)
        self.right = nn.Conv2d(3, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.reader = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
        return self.head(F.relu(self.reader(x)).mean((2, 3)))


class ConcatThenAdd(nn.Module):
    """A wide layer added to two narrow ones side by side: its channels have different companions."""

    def __init__(self) -> None:
        super().__init__()
        self.a_wide = nn.Conv2d(3, 16, 1)
        self.left = nn.Conv2d(3, 6, 1)
        self.right = nn.Conv2d(3, 10, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.a_wide(x) + torch.cat([self.left(x), self.right(x)], 1)).mean((2, 3)))


class Inverted(nn.Module):
    """MobileNetV2's block with a shortcut, with squeeze-and-excitation on its wide part."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.expand = nn.Conv2d(6, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm = nn.BatchNorm2d(12)
        self.squeeze = nn.Conv2d(12, 4, 1) if gated else None
        self.excite = nn.Conv2d(4, 12, 1) if gated else None
        self.project = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        wide = F.relu6(self.norm(self.depthwise(F.relu6(self.expand(x)))))
        if self.squeeze is not None and self.excite is not None:
            gate = torch.sigmoid(self.excite(F.relu(self.squeeze(wide.mean((2, 3), keepdim=True)))))
            wide = wide * gate
        return self.head((x + self.project(wide)).mean((2, 3)))


class Grouped(nn.Module):
    """A grouped convolution (not depthwise) and a GroupNorm between full ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 1)
        self.grouped = nn.Conv2d(12, 8, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.grouped(F.relu(self.first(x))))).mean((2, 3)))


class Upsample(nn.Module):
    """A transposed convolution, and an image as the output."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.out = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.up(F.relu(self.down(x)))))


class TiedTwice(nn.Module):
    """Two layers that hold one weight, between layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.one = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.other.weight = self.one.weight
        self.wide = nn.Linear(8, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(F.relu(self.first(x))))
        return self.head(F.relu(self.wide(torch.tanh(self.other(x)))))


class CalledTwice(nn.Module):
    """One layer that works on its own result."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.again = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = torch.tanh(self.again(torch.tanh(self.again(x))))
        return self.head(F.relu(self.wide(x)))


class Text(nn.Module):
    """Token and position embeddings, a 1-D convolution, a head tied to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.positions = nn.Embedding(7, 8)
        self.conv = nn.Conv1d(8, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.head(F.relu(self.conv(x.transpose(1, 2))).mean(2))


class TiedHead(nn.Module):
    """A language model's embedding, whose matrix is the head's as well."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        return self.head(x + self.mlp(self.norm(x)))


class TwoInputs(nn.Module):
    """Two towers that are added, and three outputs in a nested dict."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Conv2d(3, 8, 3, padding=1)
        self.look = nn.Linear(8, 6)
        self.hear1 = nn.Linear(4, 10)
        self.hear2 = nn.Linear(10, 6)
        self.classes = nn.Linear(6, 5)
        self.box = nn.Linear(6, 4)

    def forward(self, sound: Tensor, x: Tensor) -> dict[str, object]:
        seen = self.look(F.relu(self.see(x)).mean((2, 3)))
        both = F.relu(seen + self.hear2(F.relu(self.hear1(sound))))
        return {"logits": self.classes(both), "more": (self.box(both), None)}


class Untraceable(nn.Module):
    """Runs, and cannot be differentiated: torch-pruning has nothing to follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3))).argmax(1)


class Attention(nn.Module):
    """One pre-norm transformer block on tokens, with separate projections whose heads must not be mixed."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 16)
        self.fc2 = nn.Linear(16, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = (f(normed).unflatten(2, (-1, 4)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return self.head((x + self.fc2(F.gelu(self.fc1(self.norm2(x))))).mean(1))


def ids(length: int = 7) -> dict[str, Tensor]:
    return {"ids": torch.randint(20, (2, length), generator=torch.Generator().manual_seed(1))}


def vector(size: int = 6) -> dict[str, Tensor]:
    return {"x": torch.randn(2, size, generator=torch.Generator().manual_seed(1))}


CASES: dict[str, Callable[[], Case]] = {
    "plain": lambda: Case(Plain(), image()),
    "channel_last": lambda: Case(ChannelLast(), image()),
    "residual": lambda: Case(Residual(), image()),
    "concat": lambda: Case(Concat(), image()),
    "concat_then_add": lambda: Case(ConcatThenAdd(), image()),
    "inverted": lambda: Case(Inverted(), image()),
    "gated": lambda: Case(Inverted(gated=True), image()),
    "grouped": lambda: Case(Grouped(), image()),
    "upsample": lambda: Case(Upsample(), image()),
    "tied_twice": lambda: Case(TiedTwice(), vector()),
    "called_twice": lambda: Case(CalledTwice(), vector()),
    "text": lambda: Case(Text(), ids()),
    "tied_head": lambda: Case(TiedHead(), ids()),
    "two_inputs": lambda: Case(TwoInputs(), {"sound": torch.randn(2, 4), **image()}),
    "attention": lambda: Case(Attention(), {"x": torch.randn(2, 6, 8)}),
}


def build(name: str, seed: int = 0) -> Case:
    """A case with its weights drawn from the seed; torch's own random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CASES[name]()
