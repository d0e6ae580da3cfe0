"""What each layer computes in where a recipe says `compute=fastest`: what makes the whole network fastest, measured.

Single layers say little: a layer in integers costs what turns tensors to integers and back, unless its neighbours are
in integers too.  So files of the whole network are timed: all layers alike first, then, from the best of those, kind
by kind.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hirelc_deploy.policy import Compute

WORTH = 0.01
"""Part of the time that a change of one kind of layers has to gain; less is noise."""

ROUNDS = 2
"""Over all kinds: what is best for one depends on its neighbours."""

Computes = Mapping[str, Compute]
"""By layer."""

Times = Callable[[Sequence[Computes]], Sequence[float]]
"""Milliseconds of the network in each of these, taken side by side; they compare within one call alone."""


@dataclass(frozen=True)
class Kind:
    """Layers of one shape: what is faster for one is faster for all."""

    layers: tuple[str, ...]
    offered: tuple[Compute, ...]
    """fp32 first."""


def fastest(kinds: Sequence[Kind], times: Times) -> dict[str, Compute]:
    """The computes of all layers; `kinds` are tried in their order, so the most expensive come first."""
    uniform = [_uniform(kinds, compute) for compute in dict.fromkeys(c for kind in kinds for c in kind.offered)]
    now = _best(uniform, times)
    for _ in range(ROUNDS):
        before = now
        for kind in kinds:
            others = [compute for compute in kind.offered if compute is not now[kind.layers[0]]]
            now = _best([now, *({**now, **dict.fromkeys(kind.layers, compute)} for compute in others)], times)
        if now == before:
            break
    return now


def _uniform(kinds: Sequence[Kind], compute: Compute) -> dict[str, Compute]:
    """Every layer that can in one compute, the others in fp32."""
    return {layer: compute if compute in kind.offered else kind.offered[0] for kind in kinds for layer in kind.layers}


def _best(candidates: Sequence[dict[str, Compute]], times: Times) -> dict[str, Compute]:
    """The fastest, or the first if none gains enough."""
    if len(candidates) == 1:
        return candidates[0]
    taken = times(candidates)
    best = min(range(len(candidates)), key=taken.__getitem__)
    return candidates[best] if taken[best] < (1 - WORTH) * taken[0] else candidates[0]
