"""The networks of the Fashion-MNIST example.  Inputs are (N, 1, 28, 28), outputs (N, 10) logits.

They stand for the families that a deployment meets: a residual CNN in two widths (`wide`, `small`), a
network of depthwise separable convolutions (`depthwise`) and a vision transformer (`vit`).  Those whose names end
in 14 read images of 14x14 pixels, so that hundreds of policies can be evaluated in an hour.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias and its BatchNorm; padding keeps the map's size at stride 1."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(inputs, outputs, 3, stride)
        self.conv2 = conv_bn(outputs, outputs, 3)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem at full resolution, then one stage a width, each after the first at half the resolution."""

    def __init__(self, widths: Sequence[int], blocks: int = 2) -> None:
        super().__init__()
        self.stem = conv_bn(1, widths[0], 3)
        stages = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(BasicBlock(inputs, width, stride))
                inputs = width
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(x.mean((2, 3)))


class SeparableConv(nn.Module):
    """A depthwise 3x3 convolution and a pointwise one (MobileNet, Howard et al., 2017)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = conv_bn(inputs, inputs, 3, stride, groups=inputs)
        self.pointwise = conv_bn(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.pointwise(F.relu(self.depthwise(x))))


class MobileNet(nn.Module):
    """Separable convolutions, (outputs, stride) each, behind a full convolution."""

    def __init__(self, stem: int, layers: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.stem = conv_bn(1, stem, 3)
        blocks = []
        inputs = stem
        for outputs, stride in layers:
            blocks.append(SeparableConv(inputs, outputs, stride))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.head_dim = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch, heads, tokens, head_dim)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, each beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Square patches, learned positions, the mean of the tokens before the head."""

    def __init__(
        self, width: int, depth: int, heads: int, hidden: int, patch: int = 4, pixels: int = 28, padding: int = 0
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch, padding)
        tokens = ((pixels + 2 * padding) // patch) ** 2
        self.positions = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def wide() -> ResNet:
    """About 700,000 parameters; the network that this project's figures are quoted on."""
    return ResNet((32, 64, 128))


def small() -> ResNet:
    """About 175,000 parameters."""
    return ResNet((16, 32, 64))


def depthwise() -> MobileNet:
    """About 200,000 parameters."""
    return MobileNet(32, [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (256, 1)])


def vit() -> VisionTransformer:
    """About 670,000 parameters."""
    return VisionTransformer(width=128, depth=4, heads=4, hidden=384)


def small14() -> ResNet:
    """`small`, for images of 14x14 pixels."""
    return small()


def depthwise14() -> MobileNet:
    """`depthwise`, for images of 14x14 pixels."""
    return depthwise()


def vit14() -> VisionTransformer:
    """Narrower and less deep than `vit`, for images of 14x14 pixels, which a border makes 16x16: 16 tokens."""
    return VisionTransformer(width=96, depth=3, heads=4, hidden=288, pixels=14, padding=1)


NETWORKS = {
    "wide": wide,
    "small": small,
    "depthwise": depthwise,
    "vit": vit,
    "small14": small14,
    "depthwise14": depthwise14,
    "vit14": vit14,
}
