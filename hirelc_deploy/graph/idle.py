"""Layers that are called for nothing: what they make reaches no output, or is the same whatever the inputs are.

The first an exporter leaves out of the file, the second it may compute once and for all (a table of position biases,
made by a network of its own).  Neither runs, so nothing is gained by what they are stored or computed in.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hirelc_deploy.copying import copied
from hirelc_deploy.graph.calling import Inputs, forward
from hirelc_deploy.graph.model_graph import Layer, LeftOut
from hirelc_deploy.graph.proof import sift
from hirelc_deploy.graph.trial import SEED

UNREACHED = "what it makes reaches no output: it is not in the file"
CONSTANT = "what it makes is the same for all inputs: it is computed once and for all"

DRAWS = 16
"""Of noise, since a layer that only decides between two may decide the same again."""


def idle(model: nn.Module, jittered: nn.Module, inputs: Inputs, layers: Sequence[Layer]) -> tuple[LeftOut, ...]:
    """Those of the layers that are, with the reason; `inputs` is one example, and all weights take gradients.

    `jittered` has noise on every weight; neither it nor the model is changed.

    Layers that share a weight are passed over, since another one may need it, and so are embeddings of constants, whose
    weight is stored.
    """
    alone = [layer for layer in layers if not layer.shares_weight_with]
    unreached = _unreached(model, inputs, alone)
    gone = {each.name for each in unreached}
    rest = [layer for layer in alone if layer.name not in gone and layer.op != "Embedding"]
    return (*unreached, *_constant(jittered, inputs, rest))


def _unreached(model: nn.Module, inputs: Inputs, layers: Sequence[Layer]) -> list[LeftOut]:
    """By the graph of gradients, which tells too little where an output has none; so weights of noise are tried, of
    which the outputs must show nothing."""
    expected = forward(model, inputs)
    reached = _parameters_behind(expected.values())
    if not reached:  # a network without gradients says nothing of any layer
        return []
    weights = {layer.name: model.get_submodule(layer.name).get_parameter("weight") for layer in layers}
    found = [LeftOut(name, UNREACHED) for name, weight in weights.items() if id(weight) not in reached]

    @torch.no_grad()
    def wrong_with(tried: Sequence[LeftOut]) -> str | None:
        changed = copied(model)
        random = torch.Generator().manual_seed(SEED)
        for _ in range(DRAWS):
            for each in tried:
                weight = changed.get_submodule(each.name).get_parameter("weight")
                weight.copy_(torch.randn(weight.shape, generator=random))
            outputs = forward(changed, inputs)
            if not all(torch.equal(outputs[name], output) for name, output in expected.items()):
                return "its weights change the outputs"
        return None

    read = {each.name for each, _ in sift(found, wrong_with)}
    return [each for each in found if each.name not in read]


def _parameters_behind(outputs: Iterable[Tensor]) -> set[int]:
    """The ids of those that gradients of these tensors would reach."""
    pending: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen, found = set(pending), set()
    while pending:
        node = pending.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        behind = {each for each, _ in node.next_functions if each is not None} - seen
        seen |= behind
        pending += behind
    return found


@torch.no_grad()
def _constant(jittered: nn.Module, inputs: Inputs, layers: Sequence[Layer]) -> list[LeftOut]:
    """Layers that read the very same values whatever the network reads; none if it does not run on other inputs.

    With noise on every weight, and not where they read nothing but noughts: what is silent as trained may speak up.
    """
    first = _read(jittered, inputs, layers)
    others = []
    for other in _others(inputs):
        with suppress(Exception):  # inputs that mean something (lengths, places) may not be any
            others.append(_read(jittered, other, layers))
    same = [name for name, read in first.items() if all(_are_equal(read, other.get(name, ())) for other in others)]
    # a network that reads nothing of its inputs was not shown others
    return [LeftOut(name, CONSTANT) for name in same] if others and len(same) < len(first) else []


def _are_equal(read: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether all that is read both times is the same, and more than noughts."""
    return len(read) == len(other) and all(x.any() and torch.equal(x, y) for x, y in zip(read, other, strict=True))


def _read(model: nn.Module, inputs: Inputs, layers: Sequence[Layer]) -> dict[str, list[Tensor]]:
    """By layer, what it is called with each time."""
    found: dict[str, list[Tensor]] = {}

    def read(name: str, _layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        found.setdefault(name, []).append(x.clone())

    hooks = [
        model.get_submodule(layer.name).register_forward_pre_hook(partial(read, layer.name), with_kwargs=True)
        for layer in layers
    ]
    try:
        forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


OTHERS = 3
"""Other inputs that a network is shown, beside those that are noughts or ones."""


def _others(inputs: Inputs) -> Iterator[dict[str, Tensor]]:
    """Inputs of the same kinds with other values.

    Integers and flags are drawn from those that there are: in another order alone they would be the same to whatever
    adds them up or looks for the largest.  Where there is but one of them, noughts or ones have to do.
    """
    random = torch.Generator().manual_seed(SEED)
    for _ in range(OTHERS):
        drawn = {name: _drawn(x, random) for name, x in inputs.items()}
        if not any(torch.equal(drawn[name], x) for name, x in inputs.items()):
            yield drawn
    if not all(x.is_floating_point() for x in drawn.values()):
        yield {name: x if x.is_floating_point() else _uniform(x) for name, x in drawn.items()}


def _drawn(x: Tensor, random: torch.Generator) -> Tensor:
    if x.is_floating_point():
        spread = x.std() if x.numel() > 1 and x.std() > 0 else 1.0
        return x + spread * torch.randn(x.shape, generator=random).to(x.dtype)
    return x.flatten()[torch.randint(x.numel(), (x.numel(),), generator=random)].view_as(x)


def _uniform(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.any() else torch.ones_like(x)
