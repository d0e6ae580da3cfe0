"""Copies of networks that keep what they have computed."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from hirelc_deploy.copying import copied


class KeepsItsBias(nn.Module):
    """As LeViT's attention does: a bias by place is looked up once for each resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.biases = nn.Parameter(torch.arange(5.0))
        self.known: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        (bias,) = self.known.setdefault("cpu", [self.biases[[0, 2, 4]]])
        return self.layer(x) + bias


def with_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old form, which checkpoints are full of
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)))


@pytest.mark.parametrize("make", [KeepsItsBias, with_weight_norm])
def test_a_network_that_keeps_what_it_computed_is_copied(make: type[nn.Module]) -> None:
    model, x = make(), torch.ones(2, 4)
    expected = model(x)
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)

    own = copied(model)

    assert torch.equal(own(x), expected)
    assert not {id(tensor) for tensor in own.parameters()} & {id(tensor) for tensor in model.parameters()}
    own(x).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tensors_that_are_shared_stay_shared() -> None:
    model = KeepsItsBias()
    model(torch.ones(2, 4))
    model.first = model.known["cpu"][0]

    own = copied(model)

    assert own.first is own.known["cpu"][0]
    assert own.first is not model.first
