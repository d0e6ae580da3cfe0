"""Statistics of BatchNorm, estimated again after channels are gone or weights have moved."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hirelc_deploy.graph import forward

NORMS = (nn.modules.batchnorm._BatchNorm,)
"""What all of PyTorch's have in common, and those of others that are made of them."""


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Replace the running mean and variance by their average over `batches` of inputs; leaves eval mode.

    Weights do not change.  A model without BatchNorm is not run.
    """
    norms = [module for module in model.modules() if isinstance(module, NORMS) and module.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()  # dropout and the like stay off
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # PyTorch's word for a plain average over all batches
        norm.train()
    for inputs in batches:
        forward(model, inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
