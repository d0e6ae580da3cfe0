"""Blocks of a network that nobody has described: where it repeats a structure, each repetition is one."""

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn

from hirelc_deploy.graph.model_graph import Block

REPEATS = 2
"""Elements of a list, and layers in each of them, from which on the list counts as a repetition of blocks."""


def blocks(model: nn.Module, layers: Sequence[str]) -> tuple[Block, ...]:
    """Every layer in exactly one block, blocks in the order of their first layer.

    The root and every module above a repetition (a ModuleList or Sequential of at least two elements with at
    least two layers each) are opened; what is met there is a block, except a plain Sequential of layers,
    whose layers have nothing in common: each is a block of its own.
    """
    layers_beneath = Counter(ancestor for layer in layers for ancestor in _ancestors(layer))
    found = _blocks_in("", model, layers, layers_beneath)
    position = {layer: i for i, layer in enumerate(layers)}
    return tuple(sorted(found, key=lambda block: position[block.layers[0]]))


def _blocks_in(name: str, module: nn.Module, layers: Sequence[str], beneath: Counter[str]) -> Iterator[Block]:
    if not beneath[name]:
        return
    if name in layers:
        yield Block(name, (name,))
    elif not name or _repeats(name, module, beneath) or _is_plain_sequence(name, module, layers):
        for key, child in module.named_children():
            yield from _blocks_in(_join(name, key), child, layers, beneath)
    else:
        yield Block(name, tuple(layer for layer in layers if layer.startswith(f"{name}.")))


def _repeats(name: str, module: nn.Module, beneath: Counter[str]) -> bool:
    for path, container in module.named_modules(prefix=name):
        if isinstance(container, (nn.ModuleList, nn.Sequential)):
            elements = [key for key, _ in container.named_children() if beneath[_join(path, key)] >= REPEATS]
            if len(elements) >= REPEATS:
                return True
    return False


def _is_plain_sequence(name: str, module: nn.Module, layers: Sequence[str]) -> bool:
    return isinstance(module, nn.Sequential) and any(_join(name, key) in layers for key, _ in module.named_children())


def _ancestors(layer: str) -> Iterator[str]:
    """The layer itself, then every module around it; the root is ''."""
    while layer:
        yield layer
        layer = layer.rpartition(".")[0]
    yield ""


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
