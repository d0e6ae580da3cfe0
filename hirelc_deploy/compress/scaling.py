"""Channels scaled where one tensor's factor is undone by another's: what `equalise` and `smooth` have in common."""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from hirelc_deploy.copying import copied
from hirelc_deploy.graph import forward
from hirelc_deploy.graph.proof import sift
from hirelc_deploy.graph.trial import SEED, TOLERANCE, jitter, private_copy, relative_error

MOST_OCTAVES = 7.0
"""A channel is scaled by no more than 2 to this power, up or down.

One that is all but dead would otherwise get a bias that is the largest value in its tensor, and so the range of an
int8 activation.
"""

PROOF_OCTAVES = 8.0
"""As far as a proof scales: enough to bring a bound (ReLU6) or a curve (GELU) to light."""


class Scalable(Protocol):
    """Tensors that may be scaled together."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the octaves that it takes."""

    def scale(self, tensors: Mapping[str, Tensor], octaves: Tensor) -> None:
        """In place, parameters by name; `octaves` are the factors' log2."""


Found = TypeVar("Found", bound=Scalable)


def proved(model: nn.Module, found: Sequence[Found], example: Mapping[str, Tensor]) -> list[Found]:
    """Those that can be scaled by anything, in a network with any weights, without a change of its outputs."""
    if not found:
        return []
    trial = jitter(private_copy(model))
    expected = forward(trial, example)
    random = torch.Generator().manual_seed(SEED)
    drawn = {each.name: PROOF_OCTAVES * (2 * torch.rand(each.shape, generator=random) - 1) for each in found}

    def wrong_with(tried: Sequence[Found]) -> str | None:
        scaled = copied(trial)
        tensors = dict(scaled.named_parameters())
        for each in tried:
            each.scale(tensors, drawn[each.name])
        error = relative_error(forward(scaled, example), expected)
        return None if error <= TOLERANCE else f"scaling its channels changes the outputs (relative error {error:.2g})"

    refused = {each.name for each, _ in sift(found, wrong_with)}
    return [each for each in found if each.name not in refused]
