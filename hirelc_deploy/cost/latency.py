"""The latency of policies, told from the times of kernels: hundreds of thousands of policies a second.

    latency = fixed + sum over the kernels that run of factor(kind of kernel) x time(kernel)

Times of kernels come from a target's table (`prices`).  What their sum does not see (a session's own work, caches
that a neighbour has filled or emptied) is fitted from whole artifacts (`correction`).

Kernels that depend on the same decisions are put together in one array over those decisions, a `Factor`: pricing a
policy is one look-up in each, and finding the fastest computes is a matter of the same arrays (`fastest`).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hirelc_deploy.cost.kernel import Kernel, kind_of
from hirelc_deploy.cost.network import Channels, Network, State, Term
from hirelc_deploy.policy import Policy


class Prices(Protocol):
    """Times of kernels in microseconds (`hirelc_deploy.cost.prices`, `hirelc_deploy.cost.estimate`)."""

    unknown: set[str]
    """Families of kernels that were asked for and are in no table."""

    def __call__(self, kernel: Kernel) -> float: ...

    def grid(self, kernel: Kernel, inputs: Sequence[int], outputs: Sequence[int]) -> np.ndarray:
        """Of a kernel with all of these channels, (inputs, outputs); none of them is zero."""
        ...

    def errors(self, kernel: Kernel, inputs: Sequence[int], outputs: Sequence[int]) -> np.ndarray:
        """How well those are known: relative, one standard deviation."""
        ...


CHUNK = 8192
"""Policies that are priced at once: what is computed on the way stays in the caches."""

STATE_VALUES = (False, True)


@dataclass(frozen=True)
class Decisions:
    """Policies as arrays, in the order of the network's layers and groups."""

    computes: np.ndarray
    """Position in the layer's list of computes, (policies, layers)."""
    counts: np.ndarray
    """Position in the group's list of counts, (policies, groups)."""

    def __len__(self) -> int:
        return len(self.computes)


def decisions_of(network: Network, policies: Sequence[Policy]) -> Decisions:
    """Policies as arrays; a layer or group that a policy does not name stays as it was trained."""
    computes = np.zeros((len(policies), len(network.computes)), np.int16)
    counts = np.zeros((len(policies), len(network.counts)), np.int32)
    for row, policy in enumerate(policies):
        for i, (layer, able) in enumerate(network.computes.items()):
            if layer in policy.precisions:
                computes[row, i] = able.index(policy.precisions[layer].compute)
        for i, (group, offered) in enumerate(network.counts.items()):
            counts[row, i] = offered.index(policy.keep.get(group, network.totals[group]))
    return Decisions(computes, counts)


@dataclass(frozen=True)
class Factor:
    """Microseconds by decision: one axis a variable, then the channels that are read and those that are written."""

    variables: tuple[str, ...]
    """Layers and states."""
    inputs: Channels
    outputs: Channels
    table_us: np.ndarray


class Latency:
    """A network's latency on one target, as a function of the policy."""

    def __init__(self, network: Network, prices: Prices) -> None:
        self.network = network
        self.layers = tuple(network.computes)
        self.groups = tuple(network.counts)
        self.kinds = tuple(dict.fromkeys(kind_of(term.kernel) for term in network.terms))
        self._values: dict[str, tuple[object, ...]] = dict(network.computes) | {
            state.name: STATE_VALUES for state in network.states
        }
        self._priced = [(term, *self._tables(term, prices)) for term in network.terms]
        self._decides = Deciding(network)

    def decisions(self, policies: Sequence[Policy]) -> Decisions:
        """Policies as arrays; a layer or group that a policy does not name stays as it was trained."""
        return decisions_of(self.network, policies)

    def factors(self, weights: Mapping[str, float]) -> list[Factor]:
        """The sum as arrays over decisions, each kind of kernel weighted; kinds that are not named weigh nothing."""
        return self._put_together([(term, weights.get(kind_of(term.kernel), 0.0) * us) for term, us, _ in self._priced])

    def squared_errors(self, weights: Mapping[str, float]) -> list[Factor]:
        """The variance of that sum, in square microseconds: kernels are off independently of one another."""
        return self._put_together(
            [(term, (weights.get(kind_of(term.kernel), 0.0) * us * error) ** 2) for term, us, error in self._priced]
        )

    def _put_together(self, tables: Sequence[tuple[Term, np.ndarray]]) -> list[Factor]:
        alike: dict[tuple[tuple[str, ...], Channels, Channels], list[np.ndarray]] = defaultdict(list)
        for term, table in tables:
            if table.any():
                scope = tuple(dict.fromkeys(condition.variable for condition in term.when))
                alike[scope, term.inputs, term.outputs].append(self._where(term, scope, table))
        return [Factor(*key, np.sum(each, axis=0)) for key, each in alike.items()]

    def us(self, decisions: Decisions, factors: Sequence[Factor]) -> np.ndarray:
        """Microseconds of the kernels of each policy, (policies,)."""
        found = np.zeros(len(decisions))
        for start in range(0, len(decisions), CHUNK):
            rows = slice(start, start + CHUNK)
            decided = self._decides.of(Decisions(decisions.computes[rows], decisions.counts[rows]))
            for factor in factors:
                found[rows] += decided.look_up(factor)
        return found

    def parts_us(self, decisions: Decisions) -> np.ndarray:
        """Microseconds by kind of kernel, (policies, kinds): what a correction is fitted on."""
        each = [self.us(decisions, self.factors({kind: 1.0})) for kind in self.kinds]
        return np.stack(each, axis=1) if each else np.zeros((len(decisions), 0))

    def at(self, factors: Sequence[Factor], counts: Mapping[str, int]) -> list[tuple[tuple[str, ...], np.ndarray]]:
        """Factors where these counts of units stay: their variables, and microseconds over those alone."""
        decided = Decided(self._decides, self.decisions([Policy({}, counts)]))
        places = [[int(np.ravel(decided.position(c))[0]) for c in (f.inputs, f.outputs)] for f in factors]
        return [
            (f.variables, f.table_us[..., read, written]) for f, (read, written) in zip(factors, places, strict=True)
        ]

    def _where(self, term: Term, scope: tuple[str, ...], table_us: np.ndarray) -> np.ndarray:
        """The term's table over the variables of its conditions: zeros where they do not hold."""
        holds = np.ones([len(self._values[variable]) for variable in scope], bool)
        for condition in term.when:
            axis = scope.index(condition.variable)
            able = np.array([value in condition.values for value in self._values[condition.variable]])
            holds &= able.reshape([-1 if i == axis else 1 for i in range(len(scope))])
        return holds[..., None, None] * table_us

    def _tables(self, term: Term, prices: Prices) -> tuple[np.ndarray, np.ndarray]:
        """Microseconds of a kernel and their relative errors over the channels that it can have, (inputs, outputs).

        Where it has none it takes no time.
        """
        inputs, outputs = (values_of(self.network, channels) for channels in (term.inputs, term.outputs))
        us, errors = np.zeros((2, len(inputs), len(outputs)))
        there = np.ix_([read > 0 for read in inputs], [written > 0 for written in outputs])
        read, written = ([size for size in sizes if size > 0] for sizes in (inputs, outputs))
        if not read or not written:  # its branch is gone
            return us, errors
        if term.scales:
            us[there] = prices.grid(term.kernel, read, written)
            errors[there] = prices.errors(term.kernel, read, written)
        else:
            whole = [[size] for size in term.kernel.channels]
            part = np.array(read)[:, None] / term.inputs.full
            us[there] = np.broadcast_to(prices(term.kernel) * part, (len(read), len(written)))
            errors[there] = prices.errors(term.kernel, *whole)[0, 0]
        return term.part * us, errors


def values_of(network: Network, channels: Channels) -> tuple[int, ...]:
    """The numbers of channels that can stay: by the group's counts where it is one group's, else ascending."""
    cuts = [[cut * (network.totals[g] - n) for n in network.counts[g]] for g, cut in channels.cut_per_unit.items()]
    if len(cuts) == 1:
        return tuple(channels.full - cut for cut in cuts[0])
    reachable = {0}
    for each in cuts:
        reachable = {before + cut for before in reachable for cut in each}
    return tuple(sorted(channels.full - cut for cut in reachable))


class Deciding:
    """From decisions to positions in the tables of factors."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.layer = {name: i for i, name in enumerate(network.computes)}
        self.group = {name: i for i, name in enumerate(network.counts)}

    def of(self, decisions: Decisions) -> "Decided":
        decided = Decided(self, decisions)
        for state in self.network.states:
            decided.known[state.name] = decided.state(state)
        return decided


class Decided:
    """Some policies, and what follows from them; nothing is computed twice."""

    def __init__(self, deciding: Deciding, decisions: Decisions) -> None:
        self._network = deciding.network
        self._group = deciding.group
        self._counts = decisions.counts
        self.known: dict[str, np.ndarray] = {
            layer: decisions.computes[:, i].astype(np.intp) for layer, i in deciding.layer.items()
        }
        self._channels: dict[Channels, np.ndarray | int] = {}

    def state(self, state: State) -> np.ndarray:
        """Whether it holds, as 0 or 1, (policies,)."""
        each = [self.holds(condition.variable, condition.values) for condition in state.conditions]
        if not each:
            return np.full(len(self._counts), int(state.of == "all"), np.intp)
        combine = np.logical_and if state.of == "all" else np.logical_or
        return combine.reduce(each).astype(np.intp)

    def holds(self, variable: str, values: frozenset[object]) -> np.ndarray:
        """Whether a variable has one of these values, (policies,)."""
        possible = self._network.computes.get(variable, STATE_VALUES)
        return np.array([value in values for value in possible])[self.known[variable]]

    def look_up(self, factor: Factor) -> np.ndarray:
        """Microseconds of each policy, (policies,)."""
        position: np.ndarray | int = 0
        for axis, variable in enumerate(factor.variables):
            position = position * factor.table_us.shape[axis] + self.known[variable]
        for channels, size in zip((factor.inputs, factor.outputs), factor.table_us.shape[-2:], strict=True):
            position = position * size + self.position(channels)
        return factor.table_us.ravel()[position]

    def position(self, channels: Channels) -> np.ndarray | int:
        """Of the number of channels that stay, in `values_of` them: (policies,), or nought where none can go."""
        if channels not in self._channels:
            self._channels[channels] = self._found(channels)
        return self._channels[channels]

    def _found(self, channels: Channels) -> np.ndarray | int:
        if not channels.cut_per_unit:
            return 0
        if len(channels.cut_per_unit) == 1:
            return self._counts[:, self._group[next(iter(channels.cut_per_unit))]].astype(np.intp)
        left = np.full(len(self._counts), channels.full)
        for group, cut in channels.cut_per_unit.items():
            units = np.array(self._network.counts[group])[self._counts[:, self._group[group]]]
            left -= cut * (self._network.totals[group] - units)
        return np.searchsorted(values_of(self._network, channels), left)
