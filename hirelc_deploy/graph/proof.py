"""Every group is proved before it is offered.

Cut half of its units out of a copy, and compare with an uncut copy in which the weights that read the cut
channels are zero: the two are the same function, or the group is wrong.  A wrong group (a channel-last flatten,
attention heads mixed up) fits in every shape and runs; only its outputs tell.
"""

import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hirelc_deploy.copying import copied
from hirelc_deploy.graph.calling import Inputs, forward
from hirelc_deploy.graph.model_graph import Group, LeftOut
from hirelc_deploy.graph.pruning import first_line
from hirelc_deploy.graph.slicing import cut
from hirelc_deploy.graph.trial import SEED, TOLERANCE, relative_error, shapes

OUTPUT = "its channels are the network's output"
UNREAD = "no layer was found that reads its channels: they are mixed in a way that cannot be followed"
SINGLE = "all its channels hang together: there is nothing to choose"


def prove(
    jittered: nn.Module, inputs: Inputs, groups: Sequence[Group]
) -> tuple[tuple[Group, ...], tuple[LeftOut, ...]]:
    """The groups that are proved, and the others with what went wrong; `jittered` is not changed.

    All are tried together first: one wrong group among them spoils the outputs.  Then the halves, and so on, so
    that f wrong groups among n cost about 2 f log2(n) trials instead of n.  The network's own outputs are passed
    over, and a single unit that nothing reads, such as a regressor's: that they stay needs no reason.
    """
    trial = _Trial(jittered, inputs)
    unread = [group for group in groups if all(axis.role == "out" for axis in group.axes)]
    single = [group for group in groups if group.total == 1 and group not in unread]
    tried = [group for group in groups if group not in unread and group not in single]
    wrong = sift(tried, trial)
    refused = {group.name for group, _ in wrong}
    left_out = (
        *(LeftOut(group.name, UNREAD) for group in unread if group.total > 1 and trial([group]) != OUTPUT),
        *(LeftOut(group.name, SINGLE) for group in single),
        *(LeftOut(group.name, reason) for group, reason in wrong),
    )
    return tuple(group for group in tried if group.name not in refused), left_out


class Named(Protocol):
    """What is told apart by its name."""

    @property
    def name(self) -> str: ...


Tried = TypeVar("Tried", bound=Named)


def sift(groups: Sequence[Tried], wrong_with: Callable[[Sequence[Tried]], str | None]) -> list[tuple[Tried, str]]:
    """The groups (or what else is tried together) that are wrong, each with its reason, so that all others pass."""
    reason = wrong_with(groups) if groups else None
    if reason is None:
        return []
    wrong = _in_halves(groups, wrong_with, reason)
    refused = {group.name for group, _ in wrong}
    kept = [group for group in groups if group.name not in refused]
    if wrong and (not kept or wrong_with(kept) is None):
        return wrong
    # Each half passed, their union does not: take them in one by one, and leave out whoever breaks what stands.
    standing: list[Tried] = []
    for group in kept:
        reason = wrong_with([*standing, group])
        if reason is None:
            standing.append(group)
        else:
            wrong.append((group, f"together with other groups, {reason}"))
    return wrong


def _in_halves(
    groups: Sequence[Tried], wrong_with: Callable[[Sequence[Tried]], str | None], reason: str
) -> list[tuple[Tried, str]]:
    """The groups that are wrong among some that do not pass together, for the reason given."""
    if len(groups) == 1:
        return [(groups[0], reason)]
    middle = len(groups) // 2
    found = []
    for half in (groups[:middle], groups[middle:]):
        worse = wrong_with(half)
        if worse is not None:
            found.extend(_in_halves(half, wrong_with, worse))
    return found


class _Trial:
    """Says what is wrong with cutting half of some groups' units, or None."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model = model
        self.inputs = inputs
        with torch.no_grad():
            self.outputs = forward(model, inputs)

    @torch.no_grad()
    def __call__(self, groups: Sequence[Group]) -> str | None:
        choices = [(group, _half_of(group)) for group in groups]
        try:
            cut_copy = copied(self.model)
            remove(cut_copy, choices)
            outputs = forward(cut_copy, self.inputs)
            if shapes(outputs) != shapes(self.outputs):
                return OUTPUT
            masked = self._masked(groups, cuts_of(choices))
        except Exception as error:  # a network may fail in any way; its own words are the reason
            return f"with half of its units removed the network fails: {first_line(error)}"
        error_size = relative_error(outputs, masked, self.outputs)
        if not error_size <= TOLERANCE:
            return f"removing its units is not the same as not reading them (relative error {error_size:.2g})"
        return None

    def _masked(self, groups: Sequence[Group], cuts: Mapping[tuple[str, int], set[int]]) -> dict[str, Tensor]:
        """The uncut network's outputs where nobody reads what would be cut."""
        masked = copied(self.model)
        tensors = dict(masked.named_parameters())
        for axis in (axis for group in groups for axis in group.axes if axis.role == "in"):
            gone = torch.tensor(sorted(cuts[axis.tensor, axis.axis]))
            tensors[axis.tensor].index_fill_(axis.axis, gone, 0.0)
        gone_by_vector = {
            id(tensors[name]): gone for (name, _), gone in cuts.items() if name in tensors and tensors[name].ndim == 1
        }
        with _NormOverKept(gone_by_vector):
            return forward(masked, self.inputs)


def remove(model: nn.Module, choices: Sequence[tuple[Group, Collection[int]]]) -> None:
    """Cut (group, units that go) pairs in place, and let modules that count a group's units know how many are left."""
    cut(model, cuts_of(choices))
    for group, gone in choices:
        for counter in group.counters:
            setattr(
                model.get_submodule(counter.module), counter.attribute, counter.per_unit * (group.total - len(gone))
            )


def cuts_of(choices: Iterable[tuple[Group, Collection[int]]]) -> dict[tuple[str, int], set[int]]:
    """(Group, units that go) pairs as positions of tensors."""
    cuts: dict[tuple[str, int], set[int]] = {}
    for group, units in choices:
        for axis in group.axes:
            cuts.setdefault((axis.tensor, axis.axis), set()).update(p for unit in units for p in axis.entries[unit])
    return cuts


def _half_of(group: Group) -> list[int]:
    """Units to remove: half of them, drawn by the group's own name, so that every trial draws the same ones.

    Random ones: had always the last half to go, a wrong order of the places behind a flatten could pass.
    """
    random = torch.Generator().manual_seed(SEED + zlib.crc32(group.name.encode()))
    return sorted(torch.randperm(group.total, generator=random)[: group.total // 2].tolist())


class _NormOverKept(TorchFunctionMode):
    """LayerNorm and GroupNorm take their statistics over the channels that stay, as they will once the rest is gone.

    Found by the norm's scale, because subclasses (ConvNeXt's channels-first LayerNorm) permute before they norm.
    """

    def __init__(self, gone: Mapping[int, Collection[int]]) -> None:
        super().__init__()
        self.gone = gone
        """Channels that go, by the id of a vector parameter."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.layer_norm, F.group_norm):
            x, divisor, weight, bias, eps = _norm_arguments(*args, **kwargs)
            if id(weight) in self.gone:
                axis = x.ndim - 1 if func is F.layer_norm else 1
                kept = torch.tensor([i for i in range(x.shape[axis]) if i not in set(self.gone[id(weight)])])
                shape_or_groups = [len(kept)] if func is F.layer_norm else divisor
                bias = bias[kept] if bias is not None else None
                normed = func(x.index_select(axis, kept), shape_or_groups, weight[kept], bias, eps)
                return torch.zeros_like(x).index_copy(axis, kept, normed)
        return func(*args, **kwargs)


def _norm_arguments(
    input: Tensor,
    divisor: Any = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    normalized_shape: Any = None,
    num_groups: Any = None,
) -> tuple[Tensor, Any, Any, Any, float]:
    """The two functionals' arguments, whether they came by position or by name."""
    return input, divisor or normalized_shape or num_groups, weight, bias, eps
