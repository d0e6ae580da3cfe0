"""In what each layer should compute so that the whole network is fastest: an exact answer, borders included.

The latency is a sum of terms of few variables each, so it is minimised by eliminating one variable after another
(dynamic programming on a graph; Bertele and Brioschi, 1972): a variable's terms are added up, its best value for
every choice of its neighbours is written down, and the neighbours' table takes the terms' place.  A network is nearly
a chain, so few variables meet in one table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from hirelc_deploy.cost.latency import STATE_VALUES, Factor, Latency
from hirelc_deploy.cost.network import State
from hirelc_deploy.errors import UserError
from hirelc_deploy.policy import Compute

LARGEST_TABLE = 2**22
"""Entries that one elimination may need; a network that is less of a chain than any seen would need more."""


class TooEntangledError(UserError):
    """More layers decide together than a table can hold."""


@dataclass(frozen=True)
class _Table:
    """Microseconds over variables."""

    variables: tuple[str, ...]
    us: np.ndarray


def fastest(
    latency: Latency,
    factors: Sequence[Factor],
    counts: Mapping[str, int],
    allowed: Mapping[str, Sequence[Compute]],
) -> dict[str, Compute]:
    """The computes with the smallest sum of `factors` where these counts of units stay.

    `allowed` narrows what a layer may compute in; a layer that it does not name may do all that the network offers.
    Raises TooEntangledError where no table could hold the choice.
    """
    network = latency.network
    values: dict[str, tuple[object, ...]] = {**network.computes, **{s.name: STATE_VALUES for s in network.states}}
    tables = [_Table(*factor) for factor in latency.at(factors, counts)]
    tables += [_defining(state, values) for state in network.states]
    tables += [
        _Table((layer,), np.where([c in able for c in network.computes[layer]], 0.0, np.inf))
        for layer, able in allowed.items()
    ]
    tables += [_tied(pair, values) for pair in network.alike]
    chosen = _minimise(tables, values)
    return {layer: network.computes[layer][chosen[layer]] for layer in network.computes}


def _defining(state: State, values: Mapping[str, tuple[object, ...]]) -> _Table:
    """Nothing where a state is what its conditions make of it, and more than anything else where it is not."""
    variables = tuple(dict.fromkeys(condition.variable for condition in state.conditions))
    us = np.full([*(len(values[variable]) for variable in variables), len(STATE_VALUES)], np.inf)
    for place in product(*(range(len(values[variable])) for variable in variables)):
        now = {variable: values[variable][i] for variable, i in zip(variables, place, strict=True)}
        each = (now[condition.variable] in condition.values for condition in state.conditions)
        us[(*place, STATE_VALUES.index(all(each) if state.of == "all" else any(each)))] = 0.0
    return _Table((*variables, state.name), us)


def _tied(pair: tuple[str, str], values: Mapping[str, tuple[object, ...]]) -> _Table:
    """Nothing where both are the same."""
    one, other = (values[variable] for variable in pair)
    return _Table(pair, np.where([[a == b for b in other] for a in one], 0.0, np.inf))


def _minimise(tables: list[_Table], values: Mapping[str, tuple[object, ...]]) -> dict[str, int]:
    """The position of each variable's best value."""
    answers: list[tuple[str, tuple[str, ...], np.ndarray]] = []
    left = set(values)
    while left:
        # the variable with the smallest table first: a good order for networks that are nearly chains
        variable = min(sorted(left), key=lambda name: _size(_scope(tables, name), values))
        scope = _scope(tables, variable)
        if _size(scope, values) > LARGEST_TABLE:
            raise TooEntangledError(
                f"what is fastest cannot be told: {len(scope)} decisions meet at {variable}",
                fix="say what layers compute in: compute=int8 or compute=fp32",
            )
        total = np.zeros([len(values[name]) for name in scope])
        for table in (table for table in tables if variable in table.variables):
            total = total + _spread(table, scope)
        axis = scope.index(variable)
        others = tuple(name for name in scope if name != variable)
        answers.append((variable, others, total.argmin(axis)))
        tables = [table for table in tables if variable not in table.variables]
        tables.append(_Table(others, total.min(axis)))
        left.remove(variable)
    chosen: dict[str, int] = {}
    for variable, others, best in reversed(answers):
        chosen[variable] = int(best[tuple(chosen[name] for name in others)])
    return chosen


def _scope(tables: Sequence[_Table], variable: str) -> tuple[str, ...]:
    """Itself and all that it meets in a table."""
    met = {variable} | {name for table in tables if variable in table.variables for name in table.variables}
    return tuple(sorted(met))


def _size(scope: Sequence[str], values: Mapping[str, tuple[object, ...]]) -> int:
    return int(np.prod([len(values[name]) for name in scope]))


def _spread(table: _Table, scope: tuple[str, ...]) -> np.ndarray:
    """A table with an axis for every variable of the scope."""
    order = sorted(range(len(table.variables)), key=lambda axis: scope.index(table.variables[axis]))
    present = [table.variables[axis] for axis in order]
    sizes = iter(np.transpose(table.us, order).shape)
    return np.transpose(table.us, order).reshape([next(sizes) if name in present else 1 for name in scope])
