"""What every method is handed: decisions as whole numbers, prices of many policies at once, and real evaluations.

A policy is a row of whole numbers, one a variable: which of its options a layer or a prune group takes.  Rows are what
methods work on, thousands at a time; only what is really evaluated becomes a `Policy`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from hirelc_deploy.budget import Budget, Figures
from hirelc_deploy.policy import FP32, Policy, Precision
from hirelc_deploy.search.space import Evaluation

Rows = np.ndarray
"""Policies, (policies, variables): positions in the variables' options."""


@dataclass(frozen=True)
class LayerVariable:
    """How one layer is stored and computed."""

    name: str
    options: tuple[Precision, ...]
    """The first is the layer as it was trained."""
    blocks: tuple[str, ...]
    """The one block that it belongs to."""
    together: tuple[str, ...] = ()
    """Layers that share its weight, and so take the same option."""

    @property
    def as_trained(self) -> int:
        return 0


@dataclass(frozen=True)
class GroupVariable:
    """How many units of one prune group stay."""

    name: str
    options: tuple[int, ...]
    """Ascending; the last is all of them."""
    blocks: tuple[str, ...]
    """Those that it touches: with one, its agent decides; with several, the level above does."""
    group: str = ""
    """Its name in a policy, where that is not the variable's: a group may be called like a layer."""
    gone_at_zero: tuple[str, ...] = ()
    """Layers that go with its last unit, where all may go."""

    @property
    def in_policy(self) -> str:
        return self.group or self.name

    @property
    def as_trained(self) -> int:
        return len(self.options) - 1


Variable = LayerVariable | GroupVariable


@dataclass(frozen=True)
class Prices:
    """What policies are told to cost, each (policies,)."""

    size_bytes: np.ndarray
    latency_ms: np.ndarray
    memory_bytes: np.ndarray | None = None
    """Only where it is limited, and a law tells it."""

    @property
    def memory(self) -> np.ndarray:
        """Bytes.  ValueError where no law tells them."""
        if self.memory_bytes is None:
            raise ValueError("the memory of these policies was not told")
        return self.memory_bytes


def prices_of(evaluations: Sequence[Evaluation]) -> Prices:
    """Of policies that were evaluated."""
    size_bytes, latency_ms, memory_bytes = (
        np.array([getattr(e.figures, name) for e in evaluations], float)
        for name in ("size_bytes", "latency_ms", "memory_bytes")
    )
    return Prices(size_bytes, latency_ms, None if np.isnan(memory_bytes).any() else memory_bytes)


class Costs(Protocol):
    """Prices rows, thousands in one call."""

    def __call__(self, rows: Rows) -> Prices: ...


@dataclass(frozen=True)
class Sensitivity:
    """What is known of the network's patience before anything was evaluated."""

    damage: Mapping[str, np.ndarray]
    """By variable, (options,): Kullback-Leibler divergence of the outputs in nats, that option alone being taken."""
    fisher: Mapping[str, float]
    """By block: mean squared gradient of the loss, times the weights there are."""


@dataclass(frozen=True)
class LayerFacts:
    """What agents see of a layer."""

    macs: int
    parameters: int


def _not_offered(policy: Policy) -> Evaluation:
    raise NotImplementedError("this problem has no evaluations of weights that are drawn anew")


@dataclass(frozen=True)
class Problem:
    """One network on one target under one budget."""

    variables: tuple[Variable, ...]
    blocks: Mapping[str, tuple[str, ...]]
    """Layers by block, in the order of the forward pass."""
    budget: Budget
    before: Figures
    """Of the network as it was trained, in fp32."""
    costs: Costs
    sensitivity: Sensitivity
    layers: Mapping[str, LayerFacts]
    evaluate: Callable[[Policy], Evaluation]
    """The expensive step."""
    evaluate_anew: Callable[[Policy], Evaluation] = field(default=_not_offered)
    """The same of weights that are drawn anew, for `scratch`."""
    prepare: Callable[[Sequence[Policy]], None] = lambda _: None
    """Told of policies that are evaluated next, so that the expensive part is made for all of them side by side."""
    at_once: int = 1
    """So many are worth handing to `prepare` together."""
    recipes: Mapping[str, Policy] = field(default_factory=dict)
    """What an engineer would try by hand, by name."""
    advisers: Mapping[str, Callable[[int], Sequence[Policy]]] = field(default_factory=dict)
    """Tools of others, by name, each asked for so many policies."""
    score_error: float = 0.0
    """Standard error of one score on the search split, in the score's unit."""
    test_error: float = 0.0
    """The same on the test split, which nothing but its size is known of."""
    score_spread: float = 0.0
    """Standard deviation of one example's score, in the score's unit; nought where it is not known."""
    part_left: Callable[[Prices], np.ndarray] | None = None
    """Of an evaluation's drop, once the policy is fine-tuned in full, as far as that is told, (policies,); None where
    what is evaluated is what counts."""

    @cached_property
    def position(self) -> Mapping[str, int]:
        """Of each variable in a row."""
        return {variable.name: i for i, variable in enumerate(self.variables)}

    @cached_property
    def sizes(self) -> np.ndarray:
        """How many options each variable has, (variables,)."""
        return np.array([len(variable.options) for variable in self.variables])

    @cached_property
    def as_trained(self) -> np.ndarray:
        """The row that changes nothing, (variables,)."""
        return np.array([variable.as_trained for variable in self.variables])

    def row(self, policy: Policy) -> np.ndarray:
        """A policy as a row.  What it leaves out stays as trained; ValueError for what no variable offers."""
        return np.array([self._option(variable, policy) for variable in self.variables])

    def policy(self, row: Sequence[int] | np.ndarray) -> Policy:
        """A row as a policy."""
        return policy_of(self.variables, row)

    def legal(self, rows: Rows) -> Rows:
        """Rows in which layers that share a weight take the option of the first of them."""
        return with_ties(rows, self._ties)

    def damage(self, rows: Rows) -> np.ndarray:
        """Additive: what single options do to the outputs, (policies, variables), in nats."""
        return np.stack([self.sensitivity.damage[v.name][rows[:, i]] for i, v in enumerate(self.variables)], axis=1)

    def whole(self, policy: Policy) -> float:
        """The part of the layers that is whole: of those that have two bits for a weight a half counts, of those that
        have one, or are gone, nothing."""
        groups = [variable for variable in self.variables if isinstance(variable, GroupVariable)]
        gone = {name for group in groups if policy.keep.get(group.in_policy) == 0 for name in group.gone_at_zero}
        layers = [variable.name for variable in self.variables if isinstance(variable, LayerVariable)]
        bits = [0 if name in gone else policy.precisions.get(name, FP32).storage.bits for name in layers]
        return float(np.mean(np.clip((np.array(bits) - 1) / 2, 0.0, 1.0)))

    def left(self, drops: np.ndarray, prices: Prices) -> np.ndarray:
        """What fine-tuning is told to leave of drops of evaluations, (policies,): what limits are held against."""
        return drops if self.part_left is None else drops * self.part_left(prices)

    def left_of(self, evaluations: Sequence[Evaluation]) -> np.ndarray:
        """The same of policies that were evaluated, (evaluations,)."""
        return self.left(np.array([each.drop for each in evaluations], float), prices_of(evaluations))

    @cached_property
    def _ties(self) -> Mapping[int, tuple[int, ...]]:
        return ties(self.variables)

    def _option(self, variable: Variable, policy: Policy) -> int:
        if isinstance(variable, LayerVariable):
            precision = policy.precisions.get(variable.name)
            return variable.as_trained if precision is None else variable.options.index(precision)
        count = policy.keep.get(variable.in_policy)
        return variable.as_trained if count is None else variable.options.index(count)


def ties(variables: Sequence[Variable]) -> dict[int, tuple[int, ...]]:
    """Of layers that share a weight, the position of the first and those of the others."""
    position = {variable.name: i for i, variable in enumerate(variables)}
    found: dict[int, tuple[int, ...]] = {}
    for i, variable in enumerate(variables):
        if isinstance(variable, LayerVariable):
            others = tuple(j for j in (position[name] for name in variable.together) if j > i)
            if others:
                found[i] = others
    return found


def with_ties(rows: Rows, tied: Mapping[int, tuple[int, ...]]) -> Rows:
    """Rows in which what is tied takes the option of the first."""
    if not tied:
        return rows
    found = rows.copy()
    for first, others in tied.items():
        for other in others:
            found[:, other] = found[:, first]
    return found


def policy_of(variables: Sequence[Variable], row: Sequence[int] | np.ndarray) -> Policy:
    """What a row decides."""
    pairs = list(zip(variables, row, strict=True))
    return Policy(
        {v.name: v.options[int(i)] for v, i in pairs if isinstance(v, LayerVariable)},
        {v.in_policy: v.options[int(i)] for v, i in pairs if isinstance(v, GroupVariable)},
    )


class Log(Protocol):
    """Takes a value that people may want to follow, and the number of evaluations there were."""

    def __call__(self, name: str, value: float, step: int, /) -> object: ...


class Spent(Exception):  # noqa: N818  # not an error: the method has had its evaluations
    """No evaluation is left."""


class Evaluations:
    """The real evaluations of one run of a method: counted, never the same policy twice, in order."""

    def __init__(
        self,
        problem: Problem,
        limit: int,
        told: Callable[[Evaluation], None] = lambda _: None,
        note: Callable[[str], None] = lambda _: None,
        log: Log = lambda name, value, step: None,
    ) -> None:
        """`told` hears of each new one; `note` takes what a method has to say to people, `log` what it did."""
        self.problem = problem
        self.limit = limit
        self.seen: list[Evaluation] = []
        self.note = note
        self._told = told
        self._log = log
        self._known: dict[str, Evaluation] = {}

    @property
    def left(self) -> int:
        return self.limit - len(self.seen)

    def go_on(self, problem: Problem, limit: int) -> None:
        """To an aim that has moved: the same network under another budget, and so many evaluations in all."""
        self.problem = problem
        self.limit = limit

    def reprice(self, told: Callable[[Evaluation], Evaluation]) -> None:
        """What there is, as it is told by now: the same policies and scores at other prices."""
        anew = {id(each): told(each) for each in self.seen}
        self._known = {digest: anew[id(each)] for digest, each in self._known.items()}
        self.seen = [anew[id(each)] for each in self.seen]

    def __contains__(self, policy: Policy) -> bool:
        return policy.digest() in self._known

    def of(self, policy: Policy) -> Evaluation:
        """The policy made real and scored; what is known already costs nothing.  Raises Spent."""
        digest = policy.digest()
        if digest not in self._known:
            if self.left <= 0:
                raise Spent
            self._known[digest] = evaluation = self.problem.evaluate(policy)
            self.seen.append(evaluation)
            figures = evaluation.figures
            self.log({"drop": figures.drop, "size_bytes": figures.size_bytes, "latency_ms": figures.latency_ms})
            self._told(evaluation)
        return self._known[digest]

    def log(self, values: Mapping[str, float | None], prefix: str = "evaluation") -> None:
        """Values by name, as of now; None is left out."""
        for name, value in values.items():
            if value is not None:
                self._log(f"{prefix}/{name}", value, len(self.seen))

    def of_rows(self, rows: Rows) -> list[Evaluation]:
        """Those of some rows, in order, as far as the limit goes: Spent is raised if there is not one of them left."""
        found: list[Evaluation] = []
        policies = [self.problem.policy(row) for row in rows]
        new = {each.digest(): each for each in policies if each not in self}
        self.problem.prepare(list(new.values())[: self.left])
        for policy in policies:
            try:
                found.append(self.of(policy))
            except Spent:
                if not found:
                    raise
                break
        return found
