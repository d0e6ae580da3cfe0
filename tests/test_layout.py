"""How tensors lie in memory: faster where a network bears it, and never in its way."""

import pytest
import torch
from torch import Tensor, nn

from hirelc_deploy.compress.simulate import simulated
from hirelc_deploy.graph import forward
from hirelc_deploy.layout import channels_last, laid_like
from hirelc_deploy.policy import Compute, PerChannel, Precision, Storage

IMAGES = {"x": torch.zeros(2, 3, 6, 6)}
INT4 = Precision(Storage("int", 4, PerChannel()), Compute.FP32)


class Convolution(nn.Module):
    """Flattened as tutorials have it: `view` asks for the order that tensors have by themselves."""

    def __init__(self, *, views: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.views = views

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x.view(x.size(0), -1) if self.views else x.flatten(1)


@pytest.mark.parametrize("views", [True, False])
def test_a_network_that_knows_one_order_alone_keeps_it(views: bool) -> None:
    model = Convolution(views=views)
    expected = forward(model, IMAGES)["output"]
    found = channels_last(model, IMAGES)
    assert found is model
    assert model.conv.weight.is_contiguous() is views
    torch.testing.assert_close(forward(model, IMAGES)["output"], expected)


def test_weights_of_volumes_and_lines_stay_as_they_are() -> None:
    for conv, shape in ((nn.Conv3d(3, 4, 3), (2, 3, 4, 4, 4)), (nn.Conv1d(3, 4, 3), (2, 3, 4))):
        assert channels_last(conv, {"input": torch.zeros(shape)}) is conv
        assert conv.weight.is_contiguous()


def test_what_is_stored_lies_as_the_weight_does() -> None:
    """Else a network would bear under its formats what it does not bear without them."""
    model = channels_last(Convolution(views=False), IMAGES)
    weight = model.get_submodule("conv").get_parameter("weight").detach()
    with simulated(model, {"conv": INT4}, {"conv": {"scale": weight.abs().amax((1, 2, 3))[:, None] / 7}}, largest=127):
        stored = model.get_submodule("conv").weight
        assert isinstance(stored, Tensor)
        assert not torch.equal(stored, weight)
        assert stored.is_contiguous(memory_format=torch.channels_last)


def test_what_has_no_channels_to_be_last_is_handed_back() -> None:
    for shape in ((3, 4), (2, 3, 1, 1), (2, 3, 4, 4)):
        tensor = torch.zeros(shape)
        assert laid_like(tensor, torch.zeros(shape)) is tensor
