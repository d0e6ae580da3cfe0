"""A search problem that is small enough to be solved exactly, with everything in it that makes real ones hard.

Six layers (five precisions each, two of them tied) and three prune groups (eight counts each) in four blocks: 1.6
million legal policies.  Bytes and milliseconds of a layer are products of what comes in and what goes out; 8-bit
arithmetic rounds channels up to sixteen, and neighbours that compute differently pay for the conversion between them.
It needs the memory of the layer that reads and writes most, in bytes or in floats.
The true drop is no sum of the sensitivities: pruning hurts more than they say, layers differ from what they say, and
pruning and rounding in one block make each other worse.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from hirelc_deploy.budget import Budget, Figures, met
from hirelc_deploy.policy import FP32, INT8, Compute, PerChannel, Policy, Precision, Storage
from hirelc_deploy.search.problem import (
    GroupVariable,
    LayerFacts,
    LayerVariable,
    Prices,
    Problem,
    Rows,
    Sensitivity,
)
from hirelc_deploy.search.space import Evaluation

PRECISIONS = (
    FP32,
    INT8,
    Precision(Storage("int", 4, PerChannel()), Compute.INT8),
    Precision(Storage("int", 4, PerChannel()), Compute.FP32),
    Precision(Storage("int", 2, PerChannel()), Compute.FP32),
)
COUNTS = (6, 12, 18, 24, 30, 36, 42, 48)
BLOCKS = {"stem": ("l0",), "b1": ("l1", "l2"), "b2": ("l3", "l4"), "head": ("l5",)}
TIED = ("l1", "l3")

LAYERS = tuple(name for layers in BLOCKS.values() for name in layers)
GROUPS = {"g0": tuple(BLOCKS), "g1": ("b1",), "g2": ("b2",)}
"""The blocks that each touches: g0 is the width of the residual stream."""

BETWEEN = {
    "l0": (3, "g0"),
    "l1": ("g0", "g1"),
    "l2": ("g1", "g0"),
    "l3": ("g0", "g2"),
    "l4": ("g2", "g0"),
    "l5": ("g0", 10),
}
"""What comes into each layer and what goes out: a group's channels, or a fixed number."""

WEIGHTS = {"l0": 9, "l1": 9, "l2": 9, "l3": 9, "l4": 9, "l5": 1}
"""Of one pair of channels."""
PLACES = {"l0": 1024, "l1": 1024, "l2": 1024, "l3": 256, "l4": 256, "l5": 1}
"""At which each pair of channels is multiplied."""

BITS = np.array([precision.storage.bits for precision in PRECISIONS])
IN_INT8 = np.array([precision.compute is Compute.INT8 for precision in PRECISIONS])
INT8_MACS_PER_MS, FP32_MACS_PER_MS = 9e6, 4e6
CONVERTED_PER_MS = 2e6

DAMAGE = np.array([0.0, 0.004, 0.035, 0.03, 0.3])
"""Of a precision on a layer of patience 1, in nats."""
IMPATIENCE = {"l0": 3.0, "l1": 1.0, "l2": 0.6, "l3": 0.8, "l4": 0.5, "l5": 1.5}
PRUNING = {"g0": 0.8, "g1": 0.5, "g2": 0.3}
"""Damage of all channels of a group gone, in nats."""

TRULY = {"l0": 0.4, "l1": 2.0, "l2": 1.0, "l3": 0.5, "l4": 2.0, "l5": 0.7, "g0": 1.5, "g1": 1.2, "g2": 2.8}
"""What the drop makes of each damage: what sensitivities do not tell."""
TOGETHER = 1.0
"""Of the geometric mean of pruning and rounding in one block."""
DROP_PER_DAMAGE, BENT = 2.5, 1.2
"""Points of drop at a true damage of one, and the power of it."""
CHANCE_DROP = 80.0
"""Drops come no further."""

DROP_MAX = 1.0
BEST = {"l0": 0, "l1": 1, "l2": 2, "l3": 1, "l4": 1, "l5": 0, "g0": 4, "g1": 4, "g2": 5}
"""The best policy at a drop of DROP_MAX, by position in the options."""
MEMORY_BYTES = 100_000
"""Too little for the best policy, whose first layer computes in floats."""
BEST_COST = -3.613907
"""log(bytes / before) + log(ms / before) of it."""


@dataclass(frozen=True)
class Mended:
    """The toy where fine-tuning will leave less of a drop the larger the file is."""

    unmended_bytes: float
    """A file that keeps all of its drop; of one four times as large half is left."""
    best_cost: float
    """Of the best policy of which no more than DROP_MAX is left."""

    def problem(self) -> Problem:
        def part_left(prices: Prices) -> np.ndarray:
            return np.minimum(1.0, np.sqrt(self.unmended_bytes / prices.size_bytes))

        return replace(toy().problem, part_left=part_left)

    def gap(self, seen: Sequence[Evaluation]) -> float:
        """Of the best of these to that one, as a logarithm of bytes times milliseconds."""
        problem = self.problem()
        held = np.flatnonzero(problem.left_of(seen) <= DROP_MAX)
        costs = toy().cost(np.stack([problem.row(seen[i].policy) for i in held]))
        return float(costs.min() - self.best_cost)


MENDED = Mended(4_000, -4.942318)


@dataclass(frozen=True)
class Toy:
    """The problem, and the truth that methods may only see by evaluating."""

    problem: Problem

    def drop(self, rows: Rows) -> np.ndarray:
        """(policies,), in points."""
        return _drop(self.problem, rows)

    def cost(self, rows: Rows) -> np.ndarray:
        """What is to be least: log of bytes and of milliseconds against the original's, added, (policies,)."""
        prices = self.problem.costs(rows)
        before = self.problem.before
        return np.log(prices.size_bytes / before.size_bytes) + np.log(prices.latency_ms / before.latency_ms)

    def every_legal_row(self) -> Iterator[Rows]:
        """All of them, in chunks."""
        leaders = np.array([self.problem.position[name] != self.problem.position[TIED[1]] for name in self.names])
        sizes = self.problem.sizes[leaders]
        for numbers in np.array_split(np.arange(sizes.prod()), 16):
            rows = np.zeros((len(numbers), len(self.names)), int)
            rows[:, leaders] = np.stack(np.unravel_index(numbers, sizes), axis=1)
            yield self.problem.legal(rows)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.problem.position)


def toy(budget: Budget | None = None, *, int8_macs_per_ms: float = INT8_MACS_PER_MS) -> Toy:
    """The problem under a budget; a drop of DROP_MAX where none is given."""
    prices_at = partial(_costs, int8_macs_per_ms=int8_macs_per_ms)
    variables = (
        *(
            LayerVariable(name, PRECISIONS, (block,), tuple(n for n in TIED if n != name) if name in TIED else ())
            for block, names in BLOCKS.items()
            for name in names
        ),
        *(GroupVariable(name, COUNTS, blocks) for name, blocks in GROUPS.items()),
    )
    damage = {name: patience * DAMAGE for name, patience in IMPATIENCE.items()}
    damage |= {name: weight * (1 - np.array(COUNTS) / COUNTS[-1]) ** 2 for name, weight in PRUNING.items()}
    bare = Problem(
        variables=variables,
        blocks=BLOCKS,
        budget=Budget(drop=DROP_MAX) if budget is None else budget,
        before=Figures(),
        costs=prices_at,
        sensitivity=Sensitivity(damage, dict.fromkeys(BLOCKS, 1.0)),
        layers={name: LayerFacts(macs=PLACES[name] * 48 * 48, parameters=WEIGHTS[name] * 48 * 48) for name in LAYERS},
        evaluate=_not_yet,
    )
    prices = prices_at(bare.as_trained[None])
    before = Figures(
        latency_ms=float(prices.latency_ms[0]),
        speedup=1.0,
        size_bytes=int(prices.size_bytes[0]),
        memory_bytes=int(prices.memory[0]),
        drop=0.0,
    )
    problem = replace(bare, before=before, recipes=_recipes())

    def evaluate(policy: Policy) -> Evaluation:
        row = problem.row(policy)[None]
        assert (problem.legal(row) == row).all(), "layers that share a weight differ"
        prices, drop = problem.costs(row), float(_drop(problem, row)[0])
        figures = Figures(
            latency_ms=float(prices.latency_ms[0]),
            speedup=float(before.latency_ms / prices.latency_ms[0]),
            size_bytes=round(prices.size_bytes[0]),
            memory_bytes=round(prices.memory[0]),
            drop=drop,
        )
        return Evaluation(policy, figures, score=90.0 - drop)

    return Toy(replace(problem, evaluate=evaluate))


def chosen(problem: Problem, seen: list[Evaluation]) -> Evaluation:
    """What whoever called a method takes: the cheapest that keeps all limits.  ValueError if none does."""
    kept = [evaluation for evaluation in seen if met(problem.budget, evaluation.figures)]
    return min(kept, key=lambda each: (each.figures.size_bytes or 0) * (each.figures.latency_ms or 0.0))


def _not_yet(policy: Policy) -> Evaluation:
    raise AssertionError(policy)


def _recipes() -> dict[str, Policy]:
    return {
        f"keep={100 * count / COUNTS[-1]:g}%,{precision}": Policy(
            dict.fromkeys(LAYERS, precision), dict.fromkeys(GROUPS, count)
        )
        for count in COUNTS
        for precision in PRECISIONS
    }


def _costs(rows: Rows, *, int8_macs_per_ms: float) -> Prices:
    macs_per_ms = np.where(IN_INT8, int8_macs_per_ms, FP32_MACS_PER_MS)
    option = {name: rows[:, i] for i, name in enumerate(LAYERS)}
    kept = {name: np.array(COUNTS)[rows[:, len(LAYERS) + i]] for i, name in enumerate(GROUPS)}
    size_bytes = np.full(len(rows), 600.0)
    latency_ms = np.full(len(rows), 0.01)
    memory_bytes = np.zeros(len(rows))
    computed = np.zeros(len(rows), bool)  # the picture comes in floats
    for name, ends in BETWEEN.items():
        comes, goes = (kept[end] if isinstance(end, str) else np.full(len(rows), end) for end in ends)
        size_bytes += WEIGHTS[name] * comes * goes * BITS[option[name]] / 8 + 8 * goes
        in_int8 = IN_INT8[option[name]]
        width = np.where(in_int8, -(-comes // 16) * 16 * (-(-goes // 16) * 16), comes * goes)
        latency_ms += PLACES[name] * width * WEIGHTS[name] / 9 / macs_per_ms[option[name]]
        latency_ms += np.where(in_int8 != computed, PLACES[name] * comes / CONVERTED_PER_MS, 0.0)
        computed = in_int8
        memory_bytes = np.maximum(memory_bytes, PLACES[name] * (comes + goes) * np.where(in_int8, 1, 4))
    return Prices(size_bytes, latency_ms, memory_bytes)


def _drop(problem: Problem, rows: Rows) -> np.ndarray:
    truly = problem.damage(rows) * np.array([TRULY[name] for name in problem.position])
    at = problem.position
    total = truly.sum(1)
    for block, names in BLOCKS.items():
        rounding = truly[:, [at[name] for name in names]].sum(1)
        pruning = truly[:, [at[group] for group, blocks in GROUPS.items() if block in blocks]].sum(1)
        total = total + TOGETHER * np.sqrt(rounding * pruning)
    return np.asarray(CHANCE_DROP * (1 - np.exp(-DROP_PER_DAMAGE * total**BENT / CHANCE_DROP)))


def small(options: Sequence[Precision], damage: Sequence[float]) -> Problem:
    """Three layers of a network that no channel may be taken from, each bit of which takes a microsecond."""
    names = ("a", "b", "c")

    def costs(rows: Rows) -> Prices:
        bits = np.array([option.storage.bits for option in options])[rows[:, :3]].sum(1)
        return Prices(1000.0 + 100 * bits, 0.1 + 0.001 * bits)

    bare = Problem(
        variables=(
            *(LayerVariable(each, tuple(options), (each,)) for each in names),
            GroupVariable("g", (32,), ("a",)),
        ),
        blocks={name: (name,) for name in names},
        budget=Budget(drop=1.0),
        before=Figures(),
        costs=costs,
        sensitivity=Sensitivity(dict.fromkeys(names, np.array(damage)) | {"g": np.zeros(1)}, dict.fromkeys(names, 1.0)),
        layers=dict.fromkeys(names, LayerFacts(macs=1000, parameters=1000)),
        evaluate=lambda policy: Evaluation(policy, figures(policy), 90.0),
        recipes={str(option): Policy(dict.fromkeys(names, option), {"g": 32}) for option in options},
    )

    def figures(policy: Policy) -> Figures:
        row = bare.row(policy)[None]
        prices, drop = costs(row), 20 * float(bare.damage(row).sum())
        return Figures(latency_ms=float(prices.latency_ms[0]), size_bytes=round(float(prices.size_bytes[0])), drop=drop)

    return replace(bare, before=replace(figures(bare.policy(bare.as_trained)), speedup=1.0))
