"""Which branches can go altogether, and which modules go with them: tried, like the groups, before they are offered."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hirelc_deploy.copying import copied
from hirelc_deploy.graph.calling import Inputs, forward
from hirelc_deploy.graph.layers import OPERATORS
from hirelc_deploy.graph.model_graph import Group, Layer, Vanishing
from hirelc_deploy.graph.proof import sift
from hirelc_deploy.graph.slicing import first_names, reads
from hirelc_deploy.graph.trial import TOLERANCE, relative_error, shapes
from hirelc_deploy.graph.vanish import replace, vanish


def with_vanishing(
    jittered: nn.Module, inputs: Inputs, groups: Sequence[Group], layers: Sequence[Layer]
) -> tuple[Group, ...]:
    """The same groups; those whose branch can go have 0 as their first legal count.  `jittered` is not changed.

    A branch goes if, with its last layers silenced, the network runs (it does nothing with the silence but add it),
    its outputs keep their shapes and depend on every input as before, and they are those of the network with the
    branch's result set to zero.  All branches that are offered have also gone together once.
    """
    trial = _Trial(copied(jittered), inputs)
    found = {group.name: branch for group in groups if (branch := trial.branch(group)) is not None}
    able = [group for group in groups if group.name in found]

    def wrong_together(some: Sequence[Group]) -> str | None:
        return None if trial.holds([found[group.name] for group in some]) else "nothing reaches the output"

    for group, _ in sift(able, wrong_together):
        del found[group.name]

    def offered(group: Group) -> Group:
        branch = found.get(group.name)
        if branch is None:
            return group
        gone = tuple(layer.name for layer in layers if layer.name in branch.modules)
        return dataclasses.replace(group, legal=(0, *group.legal), gone_at_zero=gone, vanishing=branch)

    return tuple(offered(group) for group in groups)


class _Trial:
    """One copy of a network whose branches are silenced, tried and restored one after the other."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model = model
        self.inputs = {name: _leaf(tensor) for name, tensor in inputs.items()}
        self.modules = dict(model.named_modules())
        self.first = first_names(model)
        outputs, self.flow = _record_flow(model, self.inputs)
        self.outputs = {name: output.detach() for name, output in outputs.items()}
        self.reached = self._reached(outputs)
        self.roots = self._roots_of(self.reached)

    def branch(self, group: Group) -> Vanishing | None:
        """How the group's branch goes, or None if it does not.

        Usually all of its readers are the ends of branches.  With a gate on the group (squeeze-and-excitation in
        an inverted residual) only the last is one, and the gate goes because nothing it does is seen any more.
        """
        ends = {m.module for m in group.members if m.module in self.flow and reads(self.modules[m.module], m.role)}
        if not ends or not all(self._reads_nothing_else(group, name) for name in ends):
            return None
        readers = tuple(name for name in self.flow if name in ends)
        return self._branch_behind(group, readers) or (
            self._branch_behind(group, readers[-1:]) if readers[1:] else None
        )

    def _branch_behind(self, group: Group, readers: tuple[str, ...]) -> Vanishing | None:
        behind = self._fed_only_by(readers)
        if behind is None:
            return None
        outputs = self._silenced([Vanishing(readers, behind)])
        if outputs is None:
            return None
        before = self._unreached(outputs, except_for={*readers, *behind})
        branch = Vanishing(readers, (*before, *behind))
        if not all(member.module in branch.modules for member in group.members):
            return None
        return branch if self.holds([branch]) else None

    def holds(self, branches: Sequence[Vanishing]) -> bool:
        """Whether the network without these branches is the network with zeros for their results."""
        outputs = self._silenced(branches)
        if outputs is None or not self._roots_of(self._reached(outputs)) >= self.roots:
            return False
        return relative_error(outputs, self._masked(branches), self.outputs) <= TOLERANCE

    def _silenced(self, branches: Sequence[Vanishing]) -> dict[str, Tensor] | None:
        """The outputs without the branches; None if the network does not run without, or its outputs change shape."""
        try:
            with self._without(branches):
                outputs = forward(self.model, self.inputs)
        except Exception:  # in whatever way it fails: a network that cannot run without the branch keeps it
            return None
        return outputs if shapes(outputs) == shapes(self.outputs) else None

    def _masked(self, branches: Sequence[Vanishing]) -> dict[str, Tensor]:
        ends = {name for branch in branches for name in (*branch.silenced, *branch.bypassed)}
        hooks = [
            self.modules[name].register_forward_hook(lambda _, __, output: torch.zeros_like(output)) for name in ends
        ]
        try:
            with torch.no_grad():
                return forward(self.model, self.inputs)
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _without(self, branches: Sequence[Vanishing]) -> Iterator[None]:
        names = [name for branch in branches for name in branch.modules]
        try:
            vanish(self.model, branches)
            yield
        finally:
            for name in names:
                replace(self.model, name, self.modules[name])

    def _reads_nothing_else(self, group: Group, reader: str) -> bool:
        """Whether all that a layer reads is this group; behind a concatenation it may read others as well."""
        weight = self.first[f"{reader}.weight"]
        shape = self.model.get_parameter(weight).shape
        return any(
            axis.tensor == weight and axis.role == "in" and axis.per_unit * group.total == shape[axis.axis]
            for axis in group.axes
        )

    def _fed_only_by(self, readers: Sequence[str]) -> tuple[str, ...] | None:
        """Modules that see nothing but the readers' results, one behind the other: BatchNorm, Dropout, LayerScale.

        One without weights that is also fed from elsewhere (a Dropout for two branches) stays as it is; None if one
        with weights is.
        """
        fed = {result for name in readers for _, result in self.flow[name]}
        behind = []
        for name, calls in self.flow.items():  # in the order of the forward pass
            from_branch = [read in fed for read, _ in calls]
            if name in readers or not any(from_branch) or isinstance(self.modules[name], OPERATORS):
                continue
            fed.update(result for read, result in calls if read in fed)
            if all(from_branch):
                behind.append(name)
            elif self.modules[name].state_dict():
                return None
        return tuple(behind)

    def _reached(self, outputs: Mapping[str, Tensor]) -> set[str]:
        """Parameters and inputs from which a gradient path leads to an output."""
        leaves = {f"input {name}": tensor for name, tensor in self.inputs.items()}
        leaves |= dict(self.model.named_parameters(remove_duplicate=False))
        found = _leaves_behind(outputs.values())
        return {name for name, leaf in leaves.items() if id(leaf) in found}

    def _roots_of(self, reached: Collection[str]) -> set[str]:
        """What carries the inputs: the inputs themselves, and the embeddings that look integers up."""
        embeddings = {f"{name}.weight" for name, module in self.modules.items() if isinstance(module, nn.Embedding)}
        return {name for name in reached if name.startswith("input ") or name in embeddings}

    def _unreached(self, outputs: Mapping[str, Tensor], except_for: Collection[str]) -> tuple[str, ...]:
        """Modules with weights of their own, none of which reaches the output any more."""
        reached = self._reached(outputs)
        lost = []
        for name, module in self.modules.items():
            own = {f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
            leaf = next(module.children(), None) is None
            if leaf and own & self.reached and not own & reached and name not in except_for:
                lost.append(name)
        return tuple(lost)


def _leaves_behind(outputs: Iterable[Tensor]) -> set[int]:
    """Ids of the leaves that autograd would send a gradient to, read from its graph without running it."""
    leaves = set()
    seen = set()
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):  # where gradients are accumulated: a leaf
            leaves.add(id(function.variable))
        waiting.extend(behind for behind, _ in function.next_functions if behind is not None)
    return leaves


Moment = tuple[int, int]
"""A tensor at one time: its id and version, since `out += shortcut` makes another value of the same tensor."""

Flow = dict[str, list[tuple[Moment, Moment]]]
"""Leaf module -> (first input, output) of each call, in the order of first calls."""


def _record_flow(model: nn.Module, inputs: Inputs) -> tuple[dict[str, Tensor], Flow]:
    flow: Flow = {}
    held: list[Tensor] = []  # so that no id is given twice
    reading: dict[nn.Module, Moment] = {}

    def moment(value: Any) -> Moment:
        tensor = next(iter(_tensors_among((value,))), None)
        if tensor is None:
            return (-1, -1)
        held.append(tensor)
        return id(tensor), tensor._version

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        reading[module] = moment((*args, *kwargs.values()))

    def after(module: nn.Module, _: Any, output: Any) -> None:
        flow.setdefault(names[module], []).append((reading[module], moment(output)))

    names = {module: name for name, module in model.named_modules() if next(module.children(), None) is None}
    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in names]
    hooks += [module.register_forward_hook(after) for module in names]
    try:
        return forward(model, inputs), flow
    finally:
        for hook in hooks:
            hook.remove()


def _tensors_among(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors_among(value)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())
