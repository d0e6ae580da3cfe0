"""BatchNorm folded into the layer before it: what an exporter does as well, done where numbers are still chosen.

Folding multiplies every channel of a weight, so a grid that is to be in the file has to be a grid of folded weights.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hirelc_deploy.compress.batchnorm import NORMS
from hirelc_deploy.copying import copied
from hirelc_deploy.graph import forward
from hirelc_deploy.graph.trial import TOLERANCE, jitter, private_copy, relative_error

FOLDED_INTO = (nn.modules.conv._ConvNd, nn.Linear)

Pairs = Mapping[str, str]
"""Layer -> the BatchNorm that reads its output and nothing else does."""


def foldable(model: nn.Module, example: Mapping[str, Tensor]) -> dict[str, str]:
    """The pairs of a network, found by what a norm is called with, each proved: folded, the outputs are the same."""
    trial = jitter(private_copy(model))
    expected = forward(trial, example)
    found = _candidates(trial, example)
    if _same(trial, found, example, expected):
        return found
    return {layer: norm for layer, norm in found.items() if _same(trial, {layer: norm}, example, expected)}


def present(pairs: Pairs, model: nn.Module) -> dict[str, str]:
    """The pairs both of whose modules a pruned network still has."""
    modules = dict(model.named_modules())
    return {
        layer: norm
        for layer, norm in pairs.items()
        if isinstance(modules.get(layer), FOLDED_INTO) and isinstance(modules.get(norm), NORMS)
    }


@torch.no_grad()
def fold(model: nn.Module, pairs: Pairs) -> nn.Module:
    """A copy in which these norms are gone and their layers have a bias."""
    folded = copied(model)
    for layer_name, norm_name in pairs.items():
        layer: Any = folded.get_submodule(layer_name)
        norm: Any = folded.get_submodule(norm_name)
        factor = channel_factor(norm)
        layer.weight.copy_(layer.weight * along_channels(factor, layer))
        mean = norm.running_mean if layer.bias is None else norm.running_mean - layer.bias
        shift = torch.zeros_like(mean) if norm.bias is None else norm.bias
        trained = layer.weight.requires_grad
        layer.bias = nn.Parameter(shift - mean * factor, requires_grad=trained)
        if type(norm).__module__.startswith("torch."):
            parent, _, name = norm_name.rpartition(".")
            setattr(folded.get_submodule(parent), name, nn.Identity())
        else:
            _neutralise(norm)
    return folded


def _neutralise(norm: nn.Module) -> None:
    """Let a norm change nothing.  Another library's may do more, such as timm's, which has the activation in it."""
    assert isinstance(norm, NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.eps = 0.0
    norm.running_mean.zero_()
    norm.running_var.fill_(1.0)
    if norm.affine:
        norm.weight.fill_(1.0)
        norm.bias.zero_()


def channel_factor(norm: nn.Module) -> Tensor:
    """What folding multiplies each output channel by, (channels,); no gradient."""
    assert isinstance(norm, NORMS)
    assert norm.running_var is not None
    factor = (norm.running_var + norm.eps).rsqrt()
    return factor if norm.weight is None else norm.weight.detach() * factor


def along_channels(values: Tensor, layer: nn.Module) -> Tensor:
    """(output channels,) in a shape that multiplies the layer's weight."""
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # (in, out / groups, ...): groups lie along the inputs
        by_group = values.reshape(layer.groups, 1, -1).expand(-1, layer.in_channels // layer.groups, -1)
        return by_group.reshape(layer.in_channels, -1, *[1] * len(layer.kernel_size))
    return values.reshape(-1, 1, *[1] * len(getattr(layer, "kernel_size", ())))


def _same(model: nn.Module, pairs: Pairs, example: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return not pairs or relative_error(forward(fold(model, pairs), example), expected) <= TOLERANCE


def _candidates(model: nn.Module, example: Mapping[str, Tensor]) -> dict[str, str]:
    """Pairs of which the norm reads the very tensor that the layer wrote; each runs once, with weights of its own."""
    names = {module: name for name, module in model.named_modules()}
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []  # tensors are kept, so that no two share an identity

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        calls.append((module, args[0] if args else kwargs["input"], output))

    watched = [module for module in names if isinstance(module, (*FOLDED_INTO, *NORMS))]
    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in watched]
    try:
        with torch.no_grad():
            forward(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    called = [module for module, _, _ in calls]
    weights = [id(module.weight) for module in watched]
    wrote = {id(output): (layer, output) for layer, _, output in calls if isinstance(layer, FOLDED_INTO)}
    found = {}
    for norm, read, _ in calls:
        layer, output = wrote.get(id(read), (None, None))
        if (
            layer is not None
            and output is not None
            and isinstance(norm, NORMS)
            and norm.track_running_stats
            and called.count(layer) == called.count(norm) == 1
            and weights.count(id(layer.weight)) == 1
            and (not isinstance(layer, nn.Linear) or output.dim() == 2)
        ):
            found[names[layer]] = names[norm]
    return found
