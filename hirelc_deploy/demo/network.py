"""The network of the demo: a residual CNN for scikit-learn's digits, inputs (N, 1, 8, 8), outputs (N, 10) logits."""

import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias and its BatchNorm; padding keeps the map's size at stride 1."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv_bn(inputs, outputs, 3, stride)
        self.conv2 = conv_bn(outputs, outputs, 3)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class DigitNet(nn.Module):
    """Three blocks of 32 channels at full resolution, where most of the time goes, and one of 64 at 4x4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, 32, 3)
        self.blocks = nn.Sequential(BasicBlock(32, 32), BasicBlock(32, 32), BasicBlock(32, 32), BasicBlock(32, 64, 2))
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(x.mean((2, 3)))


def network() -> DigitNet:
    """About 114,000 parameters."""
    return DigitNet()
