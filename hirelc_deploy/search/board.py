"""The game that agents play: blocks in turn, each with its layers and groups, and moves that are always legal.

A low-level move gives every layer of one block a compute, a format, a bit width and a granularity, and every group
inside it a level of width.  A high-level move allots the block its share of size, latency and damage, says whether it
should mostly quantise, mostly prune or do both, and gives groups that span blocks their width, where the first of the
blocks is met.  Moves are vectors of small whole numbers of one length for all blocks; what a block does not have is
passed over.  Tables turn a move into options: the nearest that there is, so that no move is illegal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np

from hirelc_deploy.policy import Compute, Precision
from hirelc_deploy.search.goal import Goal
from hirelc_deploy.search.problem import GroupVariable, LayerVariable, Problem, Rows

WIDTHS = 17
"""Levels of width that a move tells apart: sixteenths, and none."""

SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Times its natural share that a block can be allotted."""

MODES = ("quantise", "both", "prune")
LEAST_KEPT_QUANTISING = 0.5
"""Part of its units that a group keeps in a block that should mostly quantise."""
LEAST_BITS_PRUNING = 4
"""Of a weight in a block that should mostly prune."""

SIZE, LATENCY, DAMAGE, MODE = range(4)
"""Positions in a high-level move."""

SHOWN = 2
"""Groups across blocks whose widths a low-level agent sees: what comes into its block, and what goes out."""

TINY = 1e-6


@dataclass(frozen=True)
class Goals:
    """What some games are played for, (games,) each: how much drop, and how size weighs against latency."""

    drop_max: np.ndarray
    size_part: np.ndarray
    """0: latency alone is worth something; 1: size alone.  Where one of them has a budget, see `Goal`."""

    def of(self, games: np.ndarray) -> "Goals":
        """Those of the games with these numbers, (games,)."""
        return Goals(self.drop_max[games], self.size_part[games])

    def goal(self, base: Goal[float]) -> Goal[np.ndarray]:
        """The user's goal, varied: a policy that holds twice the drop is a place on the front as well."""
        free = base.latency_weight and base.size_weight
        return Goal(
            drop_max=self.drop_max,
            latency_ms_max=base.latency_ms_max,
            size_bytes_max=base.size_bytes_max,
            latency_ms_before=base.latency_ms_before,
            size_bytes_before=base.size_bytes_before,
            latency_weight=2 * (1 - self.size_part) if free else np.full_like(self.size_part, base.latency_weight),
            size_weight=2 * self.size_part if free else np.full_like(self.size_part, base.size_weight),
            memory_bytes_max=base.memory_bytes_max,
        )


@dataclass
class Games:
    """Many games side by side, as far as they have come."""

    rows: Rows
    goals: Goals
    allotted: np.ndarray
    """High-level moves without their widths, (games, blocks, 4)."""
    told: np.ndarray = field(init=False)
    """Log of bytes and of milliseconds against the original's, damage against what is allowed, and log of memory
    against its budget, nought without one: (games, 4)."""

    def __post_init__(self) -> None:
        self.told = np.zeros((len(self.rows), 4), np.float32)

    def __len__(self) -> int:
        return len(self.rows)


class Board:
    """What does not change from game to game."""

    def __init__(self, problem: Problem, *, corrected_by_fisher: bool = True) -> None:
        self.problem = problem
        self.base = Goal.of_problem(problem)
        self.blocks = tuple(problem.blocks)
        self._layers = [[problem.position[name] for name in layers] for layers in problem.blocks.values()]
        inside, across = _groups(problem)
        self._inside = [inside[block] for block in self.blocks]
        self._across = [across[block] for block in self.blocks]
        self._words = _Words(problem)
        self._choice = {i: self._words.table(problem.variables[i]) for each in self._layers for i in each}
        self._at_least_bits = {i: _at_least_bits(problem.variables[i]) for i in self._choice}
        self._width = {i: _widths(problem.variables[i]) for each in (*self._inside, *self._across) for i in each}
        self._slots = max(map(len, self._layers))
        self._inner = max(map(len, self._inside), default=0)
        self._outer = max(map(len, self._across), default=0)
        everywhere = [i for each in self._across for i in each]
        self._touching = [[i for i in everywhere if b in problem.variables[i].blocks][:SHOWN] for b in self.blocks]
        self._natural = _natural_shares(problem, self.blocks, corrected_by_fisher)
        self._facts = _facts(problem, self.blocks, self._natural)
        self._layer_facts = _layer_facts(problem, self._layers, self._slots)

    # -- moves -----------------------------------------------------------------------------------------------

    @property
    def low_move(self) -> list[int]:
        """How many values each entry of a low-level move has."""
        return self._words.lengths * self._slots + [WIDTHS] * self._inner

    @property
    def high_move(self) -> list[int]:
        return [len(SHARES)] * 3 + [len(MODES)] + [WIDTHS] * self._outer

    def play_low(self, games: Games, block: int, moves: np.ndarray) -> None:
        """Let a block's layers and inner groups take what the moves say, (games, entries)."""
        mode = games.allotted[:, block, MODE]
        per_layer = len(self._words.lengths)
        for slot, i in enumerate(self._layers[block]):
            words = moves[:, slot * per_layer : (slot + 1) * per_layer]
            option = self._choice[i][tuple(words.T)]
            pruning = mode == MODES.index("prune")
            games.rows[:, i] = np.where(pruning, self._at_least_bits[i][option], option)
        first = per_layer * self._slots
        for slot, i in enumerate(self._inside[block]):
            level = moves[:, first + slot]
            quantising = mode == MODES.index("quantise")
            least = round(LEAST_KEPT_QUANTISING * (WIDTHS - 1))
            games.rows[:, i] = self._width[i][np.where(quantising, np.maximum(level, least), level)]
        games.rows = self.problem.legal(games.rows)
        self._tell(games)

    def play_high(self, games: Games, block: int, moves: np.ndarray) -> None:
        """Allot a block its shares, and give width to the groups that begin there and go beyond it."""
        games.allotted[:, block] = moves[:, : MODE + 1]
        for slot, i in enumerate(self._across[block]):
            games.rows[:, i] = self._width[i][moves[:, MODE + 1 + slot]]
        self._tell(games)

    # -- what agents see -------------------------------------------------------------------------------------

    def begin(self, goals: Goals) -> Games:
        """Nothing decided yet: all as trained, shares natural."""
        count = len(goals.drop_max)
        neutral = [SHARES.index(1.0)] * 3 + [MODES.index("both")]
        allotted = np.tile(np.array(neutral), (count, len(self.blocks), 1))
        return Games(np.tile(self.problem.as_trained, (count, 1)), goals, allotted)

    def see_low(self, games: Games, block: int) -> np.ndarray:
        """(games, features), float32: the block, its layers, what it was allotted, the goal, how far budgets are."""
        count = len(games)
        return np.concatenate(
            [
                self._fixed(block, count),
                np.broadcast_to(self._layer_facts[block], (count, self._layer_facts.shape[1])),
                self._allotted(games, block),
                self._widths_across(games, block),
                self._goal(games),
            ],
            axis=1,
        ).astype(np.float32, copy=False)

    def see_high(self, games: Games, block: int) -> np.ndarray:
        """(games, features), float32: the block, what is allotted already, the goal, how far budgets are."""
        rest = games.allotted[:, :block, :MODE].sum(1) / (2.0 * len(self.blocks))
        return np.concatenate([self._fixed(block, len(games)), rest, self._goal(games)], axis=1).astype(
            np.float32, copy=False
        )

    @cached_property
    def low_features(self) -> int:
        return self.see_low(self.begin(_any_goal()), 0).shape[1]

    @cached_property
    def high_features(self) -> int:
        return self.see_high(self.begin(_any_goal()), 0).shape[1]

    def _fixed(self, block: int, count: int) -> np.ndarray:
        return np.broadcast_to(self._facts[block], (count, self._facts.shape[1]))

    def _allotted(self, games: Games, block: int) -> np.ndarray:
        """Shares of size, latency and damage, logarithms, corrected by Fisher; and the mode."""
        move = games.allotted[:, block]
        log_shares = np.log(np.array(SHARES))[move[:, :MODE]] + self._natural[block]
        return np.concatenate([log_shares, np.eye(len(MODES))[move[:, MODE]]], axis=1)

    def _widths_across(self, games: Games, block: int) -> np.ndarray:
        """Parts that stay of groups that span blocks, of the first SHOWN which touch this one."""
        found = np.ones((len(games), SHOWN))
        for slot, i in enumerate(self._touching[block]):
            found[:, slot] = self._kept[i][games.rows[:, i]]
        return found

    @cached_property
    def _kept(self) -> dict[int, np.ndarray]:
        """Part of the units that stay, by option."""
        return {
            i: np.array(v.options) / v.options[-1]
            for i, v in enumerate(self.problem.variables)
            if isinstance(v, GroupVariable)
        }

    def _goal(self, games: Games) -> np.ndarray:
        """The goal, what the policy costs by now, and how far from each budget that is."""
        goals = games.goals
        size, latency, damage, over_memory = games.told.T
        base = self.base
        over_ms = latency - np.log((base.latency_ms_max or base.latency_ms_before) / base.latency_ms_before)
        over_bytes = size - np.log((base.size_bytes_max or base.size_bytes_before) / base.size_bytes_before)
        seen = [
            np.log(goals.drop_max / self.base.drop_max),
            goals.size_part,
            size,
            latency,
            damage,
            over_ms,
            over_bytes,
        ]
        return np.stack(seen if base.memory_bytes_max is None else [*seen, over_memory], axis=1)

    def _tell(self, games: Games) -> None:
        prices = self.problem.costs(games.rows)
        games.told[:, 0] = np.log(prices.size_bytes / self.base.size_bytes_before)
        games.told[:, 1] = np.log(prices.latency_ms / self.base.latency_ms_before)
        if self.base.memory_bytes_max is not None:
            games.told[:, 3] = np.log(prices.memory / self.base.memory_bytes_max)
        damage = self.problem.damage(games.rows).sum(1)
        games.told[:, 2] = np.log((damage + TINY) / games.goals.drop_max) / 4


def _any_goal() -> Goals:
    return Goals(np.ones(1), np.full(1, 0.5))


def _groups(problem: Problem) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Groups inside one block, and those that span several, by the first block that they touch."""
    inside: dict[str, list[int]] = {block: [] for block in problem.blocks}
    across: dict[str, list[int]] = {block: [] for block in problem.blocks}
    order = list(problem.blocks)
    for i, variable in enumerate(problem.variables):
        if isinstance(variable, GroupVariable):
            first = min(variable.blocks, key=order.index)
            (inside if len(variable.blocks) == 1 else across)[first].append(i)
    return inside, across


class _Words:
    """The words that describe a precision, over all layers: compute, format, bit width, granularity."""

    def __init__(self, problem: Problem) -> None:
        options = {o for v in problem.variables if isinstance(v, LayerVariable) for o in v.options}
        self._words: tuple[list[Compute], list[str], list[int], list[str]] = (
            sorted({o.compute for o in options}),
            sorted({o.storage.format for o in options}),
            sorted({o.storage.bits for o in options}),
            sorted({str(o.storage.granularity) for o in options}),
        )

    @property
    def lengths(self) -> list[int]:
        return [len(words) for words in self._words]

    def table(self, variable: object) -> np.ndarray:
        """By word in each of the four: the option that is nearest, compute first, then bits, format, granularity."""
        assert isinstance(variable, LayerVariable)
        found = np.zeros(self.lengths, int)
        for place in product(*map(range, self.lengths)):
            found[place] = min(range(len(variable.options)), key=lambda i: self._distance(variable.options[i], place))
        return found

    def _distance(self, option: Precision, place: Sequence[int]) -> tuple[int, int, int, int]:
        computes, formats, bits, granularities = self._words
        return (
            int(option.compute != computes[place[0]]),
            abs(bits.index(option.storage.bits) - place[2]),
            int(option.storage.format != formats[place[1]]),
            int(str(option.storage.granularity) != granularities[place[3]]),
        )


def _at_least_bits(variable: object) -> np.ndarray:
    """By option: itself, or with more bits the nearest of the same compute, where it has too few for pruning."""
    assert isinstance(variable, LayerVariable)
    options = variable.options

    def raised(option: Precision) -> int:
        enough = [
            i
            for i, other in enumerate(options)
            if other.compute is option.compute and other.storage.bits >= LEAST_BITS_PRUNING
        ]
        return min(enough, key=lambda i: options[i].storage.bits, default=options.index(option))

    return np.array([i if o.storage.bits >= LEAST_BITS_PRUNING else raised(o) for i, o in enumerate(options)])


def _widths(variable: object) -> np.ndarray:
    """By level of width: the option with the nearest count; the lowest level is the fewest that may stay."""
    assert isinstance(variable, GroupVariable)
    counts = np.array(variable.options)
    wanted = counts[-1] * np.arange(WIDTHS) / (WIDTHS - 1)
    return np.abs(counts[None] - wanted[:, None]).argmin(1)


def _natural_shares(problem: Problem, blocks: Sequence[str], corrected: bool) -> np.ndarray:
    """Logarithms of a block's share of parameters, of operations and of what may be damaged, (blocks, 3).

    A block that is more sensitive by its Fisher information, a weight, is given more of size and latency and less of
    what may be damaged.
    """
    parameters = np.array([sum(problem.layers[n].parameters for n in problem.blocks[b]) for b in blocks], float)
    macs = np.array([sum(problem.layers[n].macs for n in problem.blocks[b]) for b in blocks], float)
    information = np.array([problem.sensitivity.fisher.get(b, 0.0) for b in blocks])
    even = np.full(len(blocks), 1 / len(blocks))
    shares = np.log(np.stack([_part(parameters), _part(macs), even], axis=1))
    if corrected and information.any():
        minded = np.log(_part(information)) - np.log(even)
        minded = np.clip(minded - minded.mean(), -2, 2) / 4
        shares += np.stack([minded, minded, -minded], axis=1)
    found: np.ndarray = shares
    return found


def _part(values: np.ndarray) -> np.ndarray:
    """Of the sum; nothing is less than a thousandth of it."""
    total = max(float(values.sum()), TINY)
    found: np.ndarray = np.maximum(values / total, 1e-3)
    return found


def _facts(problem: Problem, blocks: Sequence[str], natural: np.ndarray) -> np.ndarray:
    """What tells blocks apart, (blocks, features): which it is, where it lies, and how large and sensitive it is."""
    depth = np.linspace(-1, 1, len(blocks))[:, None]
    information = np.array([[problem.sensitivity.fisher.get(b, 0.0)] for b in blocks])
    return np.concatenate(
        [np.eye(len(blocks)), depth, natural / 4, np.log(_part(information)) / 4],
        axis=1,
    )


def _layer_facts(problem: Problem, layers: Sequence[Sequence[int]], slots: int) -> np.ndarray:
    """By block, (blocks, slots * 4): operations and parameters of each layer, how much the mildest and the strongest
    choices would do to it; nothing for what a block does not have."""
    names = [variable.name for variable in problem.variables]
    macs = _log_part({names[i]: problem.layers[names[i]].macs for each in layers for i in each})
    parameters = _log_part({names[i]: problem.layers[names[i]].parameters for each in layers for i in each})
    found = np.zeros((len(layers), slots, 4))
    for block, each in enumerate(layers):
        for slot, i in enumerate(each):
            damage = problem.sensitivity.damage[names[i]]
            # of what it was trained as there is none, unless it has no other choice
            damage = np.log((damage[1:] if len(damage) > 1 else damage) + TINY) / 8
            found[block, slot] = (macs[names[i]], parameters[names[i]], damage.min(), damage.max())
    return found.reshape(len(layers), -1)


def _log_part(values: Mapping[str, int]) -> dict[str, float]:
    shares = np.log(_part(np.array(list(values.values()), float))) / 4
    return dict(zip(values, shares.tolist(), strict=True))
