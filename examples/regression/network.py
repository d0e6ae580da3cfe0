"""The network of the regression example: inputs (N, 1, 16, 16), outputs (N, 1) in degrees."""

from torch import Tensor, nn

LARGEST_DEGREES = 45.0


def conv_bn_relu(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class AngleNet(nn.Module):
    """A plain CNN; the positions of its last 4x4 map matter, so it is flattened and not averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_bn_relu(1, 16, 1), conv_bn_relu(16, 32, 2), conv_bn_relu(32, 32, 1), conv_bn_relu(32, 32, 2)
        )
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.activation = nn.ReLU()
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1)
        return LARGEST_DEGREES * self.head(self.activation(self.hidden(x)))


def network() -> AngleNet:
    """About 56,000 parameters."""
    return AngleNet()
