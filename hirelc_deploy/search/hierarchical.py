"""The hierarchical search: agents propose, a surrogate prices, real evaluations decide (HiReLC, arXiv 2606.26002).

    hand recipes are evaluated
    repeat: high-level agents learn what to allot, low-level agents what to make of it, in turn
            their proposals are refined
            a few times: the most promising one is evaluated, the surrogate fitted again, the others refined by it
            votes are weighted by what each agent's proposals earned, budgets that were missed weigh more

Agents play for goals that vary about the user's own, so that one search finds a front and not one point of it.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from scipy.special import ndtr

from hirelc_deploy.search.additive import cost, excess, halved_ladder, recipes
from hirelc_deploy.search.agents import Agent, HighGame, LowGame, OwnGame
from hirelc_deploy.search.board import Board, Games, Goals
from hirelc_deploy.search.council import Council
from hirelc_deploy.search.front import hypervolume, most_added, places_of, points
from hirelc_deploy.search.goal import Goal, Multipliers, reference
from hirelc_deploy.search.problem import Evaluations, Prices, Problem, Rows, prices_of
from hirelc_deploy.search.proposals import ROUNDS, refined
from hirelc_deploy.search.space import Evaluation
from hirelc_deploy.search.surrogate import Surrogate

RECIPES = 2
"""Hand recipes that are evaluated first, at most, and at most a third of all."""

A_CYCLE = 4
"""Evaluations between two rounds of learning."""

FOR_THE_GOAL, FINISHED_FOR_THE_GOAL = 4, 2
"""Every so manieth evaluation is picked for the user's goal alone, the others for the front about it: without, and with
fine-tuning that follows and makes few of them real."""

MENDING = 30
"""Rounds of changes that are tried on every proposal when an evaluation has moved the surrogate."""

HARD = Multipliers(drop=1e2, latency=1e4, size=1e4, memory=1e4)
"""Of a pick for the goal: what misses a budget is not wanted, and what is known to miss one least of all."""

HIGH_AGENTS = ("ppo", "ppo", "a2c")
HIGH_STEPS, LOW_STEPS = 4_000, 16_000
"""Steps of the board that each agent learns from in a cycle."""

PROPOSALS = 256
"""Games whose policies compete for an evaluation, in each cycle: by votes, and as many by single agents."""

DROP_OCTAVES = (-2.0, 1.0)
"""Goals of drop, as powers of two times the user's."""

LEAST_DEVIATION, TINY = 0.2, 1e-6
"""Of the logarithm of a drop that the surrogate tells: what it was off by on evaluations of a network that it had not
seen (docs/findings.md); and the least drop that has a logarithm here."""

DOUBT_BELOW = 0.4
"""A rank correlation of the surrogate with new evaluations below which its uncertainty counts twice."""

NOTHING_GAINED, PATIENCE = 1e-3, 4
"""Part of the hypervolume that a cycle has to add, and cycles without that, before the search ends early."""


@dataclass(frozen=True)
class Parts:
    """What the search is made of; each can be left out to see what it adds."""

    hierarchy: bool = True
    """Without: low-level agents alone, shares natural, widths across blocks drawn from the recipes."""
    shared: bool = True
    """Without: every block has a low-level agent of its own."""
    fisher: bool = True
    surrogate: bool = True
    """Without: the formula of additive damage alone, as the other methods have it."""
    vote: bool = True
    """Without: one high-level agent."""
    latency: bool = True
    """Without: latency is not in the reward."""
    refinement: bool = True
    agents: bool = True
    """Without: proposals are drawn at random, and refined."""


def search(
    problem: Problem,
    evaluations: Evaluations,
    *,
    seed: int,
    parts: Parts = Parts(),  # frozen
) -> None:
    """Evaluate until nothing is left or nothing is gained.  Raises Spent where that is in the middle of something."""
    with _randomness_of_its_own(seed):
        _Search(problem, evaluations, seed=seed, parts=parts).run()


@contextmanager
def _randomness_of_its_own(seed: int) -> Iterator[None]:
    """Stable-baselines3 seeds the generators of torch, numpy and Python, which others draw from as well."""
    of_numpy, of_python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            np.random.set_state(of_numpy)
            random.setstate(of_python)


@dataclass
class _Pool:
    """Policies that compete for an evaluation."""

    rows: Rows
    goals: Goals
    """What each was proposed for."""
    origins: list[int | None]
    """The high-level agent that proposed each alone, None where it was voted."""


class _Search:
    def __init__(self, problem: Problem, evaluations: Evaluations, *, seed: int, parts: Parts) -> None:
        self._problem = problem
        self._evaluations = evaluations
        self._parts = parts
        self._random = np.random.default_rng(seed)
        self._goal = Goal.of_problem(problem)
        self._reference = reference(self._goal)
        self._multipliers = Multipliers.first(self._goal)
        self._surrogate = Surrogate(problem, seed=seed, learned=parts.surrogate)
        self._board = Board(problem, corrected_by_fisher=parts.fisher)
        low: list[LowGame]
        if parts.shared:
            low = [LowGame(self._board, self._worth, self._draw, self._allot)]
        else:
            blocks = range(len(self._board.blocks))
            low = [OwnGame(self._board, own, self._worth, self._draw, self._allot, self._move) for own in blocks]
        self._low = [Agent("ppo", game, seed=seed) for game in low]
        names = HIGH_AGENTS if parts.vote else HIGH_AGENTS[:1]
        high = [HighGame(self._board, self._worth, self._draw, self._decide) for _ in names]
        self._council = Council(
            self._board,
            [Agent(name, game, seed=seed + 1 + i) for i, (name, game) in enumerate(zip(names, high, strict=True))],
        )

    def run(self) -> None:
        if not self._evaluations.seen:
            self._evaluate_recipes()
        volumes = [self._volume()]
        cycle = 0
        while self._evaluations.left:
            cycle += 1
            self._surrogate.fit(self._evaluations.seen)
            if self._parts.agents:
                self._learn()
            if not self._evaluate_the_best_of(self._proposals()):
                self._evaluations.note("every policy that was proposed is evaluated already: the search ends")
                return
            volumes.append(self._volume())
            self._evaluations.log({"hypervolume": volumes[-1]} | asdict(self._multipliers), "search")
            told = {"rank correlation": self._surrogate.rank_correlation, "networks": self._surrogate.networks_count}
            self._evaluations.log(told, "surrogate")
            self._evaluations.note(
                f"cycle {cycle}: {len(self._evaluations.seen)} evaluations, {self._summary(volumes[-1])}"
            )
            # while nothing lies within the limits there is no volume to gain
            if len(volumes) > PATIENCE and 0 < volumes[-1] <= (1 + NOTHING_GAINED) * volumes[-1 - PATIENCE]:
                self._evaluations.note(f"nothing was gained in {PATIENCE} cycles: the search ends")
                return

    # -- learning --------------------------------------------------------------------------------------------

    def _learn(self) -> None:
        if self._parts.hierarchy:
            for i, agent in enumerate(self._council.agents):
                self._evaluations.log(agent.learn(HIGH_STEPS), f"high-level agent {i} ({agent.name})")
            weights = {f"weight of agent {i}": float(weight) for i, weight in enumerate(self._council.weights)}
            self._evaluations.log(weights, "votes")
        for i, agent in enumerate(self._low):
            self._evaluations.log(agent.learn(LOW_STEPS // len(self._low)), f"low-level agent {i} ({agent.name})")

    def _worth(self, games: Games) -> np.ndarray:
        return self._reward(games.rows, games.goals)

    def _reward(self, rows: Rows, goals: Goals) -> np.ndarray:
        prices = self._problem.costs(rows)
        if not self._parts.latency:
            prices = replace(prices, latency_ms=np.full(len(rows), self._goal.latency_ms_before))
        left = self._problem.left(self._drop(rows), prices)
        return goals.goal(self._goal).reward(left, prices, self._multipliers)

    def _drop(self, rows: Rows) -> np.ndarray:
        """As the surrogate tells it, with its uncertainty counted half, or in full where it is doubted: what is hardly
        known is not hoped for."""
        told = self._surrogate(rows)
        return told.mean + (1.0 if self._is_doubted else 0.5) * told.deviation

    @property
    def _is_doubted(self) -> bool:
        """Whether the surrogate was wrong about what comes before what."""
        correlation = self._surrogate.rank_correlation
        return correlation is not None and correlation < DOUBT_BELOW

    def _draw(self, count: int) -> Goals:
        octaves = self._random.uniform(*DROP_OCTAVES, count)
        return Goals(self._goal.drop_max * 2**octaves, self._random.random(count))

    def _allot(self, games: Games) -> None:
        """What low-level agents find when a game begins."""
        if self._parts.hierarchy:
            self._council.vote(games, explore=True)
        else:
            self._widths_of_recipes(games)

    def _widths_of_recipes(self, games: Games) -> None:
        """Without a level above, groups that span blocks are as wide as in some recipe."""
        known = recipes(self._problem)
        drawn = known[self._random.integers(len(known), size=len(games))]
        for i, variable in enumerate(self._problem.variables):
            if len(variable.blocks) > 1:
                games.rows[:, i] = drawn[:, i]

    def _decide(self, games: Games) -> None:
        """The low-level agents play."""
        for block in range(len(self._board.blocks)):
            self._move(games, block)

    def _move(self, games: Games, block: int) -> None:
        """The one low-level agent plays, or the block's own."""
        agent = self._low[block % len(self._low)]
        self._board.play_low(games, block, agent.move(self._board.see_low(games, block), explore=True))

    # -- proposing -------------------------------------------------------------------------------------------

    def _proposals(self) -> _Pool:
        rows, goals, origins = [], [], []
        everyone: list[int | None] = [None]
        if self._parts.hierarchy and len(self._council.agents) > 1:
            everyone += range(len(self._council.agents))
        for origin in everyone:
            games = self._board.begin(self._draw(PROPOSALS if origin is None else PROPOSALS // 2))
            if not self._parts.agents:
                games.rows = self._at_random(len(games))
            else:
                if origin is None:
                    self._allot(games)
                else:
                    self._council.alone(origin, games, explore=True)
                self._decide(games)
            rows.append(games.rows)
            goals.append(games.goals)
            origins += [origin] * len(games)
        # what was evaluated is proposed as well: what changes gain there is worth as much
        incumbents, near = self._incumbents()
        rows.append(incumbents)
        goals.append(near)
        origins += [None] * len(incumbents)
        drop_max, size_part = (
            np.concatenate([getattr(each, name) for each in goals]) for name in ("drop_max", "size_part")
        )
        pool = _Pool(np.concatenate(rows), Goals(drop_max, size_part), origins)
        self._refine(pool, ROUNDS)
        return pool

    def _refine(self, pool: _Pool, rounds: int) -> None:
        if self._parts.refinement:

            def worth(rows: Rows, games: np.ndarray) -> np.ndarray:
                return self._reward(rows, pool.goals.of(games))

            pool.rows = refined(self._problem, pool.rows, worth, self._random, rounds)

    def _at_random(self, count: int) -> Rows:
        return self._problem.legal(self._random.integers(self._problem.sizes, size=(count, len(self._problem.sizes))))

    def _incumbents(self) -> tuple[Rows, Goals]:
        """Evaluated policies, some of them many times, each for a goal that is drawn."""
        seen = self._evaluations.seen
        drawn = self._random.integers(len(seen), size=PROPOSALS)
        rows = np.stack([self._problem.row(seen[i].policy) for i in drawn])
        return rows, self._draw(PROPOSALS)

    def _evaluate_the_best_of(self, pool: _Pool) -> bool:
        """A few, one after the other, each chosen with what the one before has taught, or as many at once as are made
        side by side.  False if there was none."""
        told: list[float] = []
        seen: list[Evaluation] = []
        origins: list[int | None] = []
        most, at_once = max(A_CYCLE, self._problem.at_once), self._problem.at_once
        while len(seen) < most and self._evaluations.left:
            if seen:
                self._surrogate.fit(self._evaluations.seen)
                self._refine(pool, MENDING)
            best = self._best(pool.rows, min(at_once, most - len(seen), self._evaluations.left))
            if not best:
                break
            told += self._surrogate(pool.rows[best]).mean.tolist()
            seen += self._evaluations.of_rows(pool.rows[best])
            origins += [pool.origins[i] for i in best]
        if seen:
            self._learn_from(seen, np.array(told), origins)
        return bool(seen)

    def _best(self, rows: Rows, count: int) -> list[int]:
        """Which of them to evaluate now, at most `count`; none if all were evaluated before.

        As the surrogate tells it; where it has been wrong about what comes before what, as one of its members does,
        another every time.  What is chosen counts as seen where it was told, so that the next one is another.  Where
        none is told to lie within the limits there is no front to add to, and the nearest to the goal is taken.
        """
        seen, problem = self._evaluations.seen, self._problem
        known = {problem.row(each.policy).tobytes() for each in seen}
        _, first = np.unique(rows, axis=0, return_index=True)
        fresh = np.array([i for i in np.sort(first) if rows[i].tobytes() not in known], int)
        if not len(fresh):
            return []
        prices, told = problem.costs(rows[fresh]), self._surrogate(rows[fresh])
        deviation = np.hypot(np.log(np.maximum(told.members, TINY)).std(0), LEAST_DEVIATION)
        places, open_, found = points(problem, seen), np.arange(len(fresh)), []
        every = FOR_THE_GOAL if problem.part_left is None else FINISHED_FOR_THE_GOAL
        for turn in range(len(seen), len(seen) + min(count, len(fresh))):
            drop = told.members[self._random.integers(len(told.members))] if self._is_doubted else told.mean
            left = problem.left(drop, prices)
            expected = places_of(left, prices, problem.before)[open_]
            added = None if turn % every == 0 else most_added(expected, places, self._reference, deviation[open_])
            best = int(self._promise(left, deviation, prices)[open_].argmax()) if added is None else added[0]
            found.append(int(fresh[open_[best]]))
            places = np.vstack([places, expected[best]])
            open_ = np.delete(open_, best)
        return found

    def _promise(self, left: np.ndarray, deviation: np.ndarray, prices: Prices) -> np.ndarray:
        """What each policy is worth as a pick for the user's goal, (policies,); `deviation` is that of the logarithm of
        its drop.

        With a limit on the drop: how much cheaper than the cheapest that holds the limits it is expected to be, since a
        drop below its limit is worth nothing to the user.  The reward where none holds them yet, none is cheaper, or
        no drop is limited.
        """
        goal, seen = self._goal, self._evaluations.seen
        reward = goal.reward(left, prices, HARD)
        costs, limit = cost(goal, prices), self._problem.budget.drop
        holding = (self._problem.left_of(seen) <= goal.drop_max) & (excess(goal, prices_of(seen)) == 0)
        if not limit or limit < 0 or not holding.any():
            return reward
        cheaper = cost(goal, prices_of(seen))[holding].min() - costs
        cheaper[excess(goal, prices) > 0] = 0.0
        if not (cheaper > 0).any():
            return reward
        holds = ndtr(np.log(goal.drop_max / np.maximum(left, TINY)) / deviation)
        return np.maximum(cheaper, 0.0) * holds

    # -- evaluating ------------------------------------------------------------------------------------------

    def _evaluate_recipes(self) -> None:
        """Where the recipes reach the drop that is allowed, by halving: where the surrogate has to be good."""
        most = self._goal.drop_max
        halved_ladder(self._evaluations, RECIPES, lambda each: bool(self._problem.left_of([each])[0] <= most))

    def _learn_from(self, seen: list[Evaluation], told: np.ndarray, origins: list[int | None]) -> None:
        correlation = self._surrogate.judge(told, seen)
        if correlation is not None and self._is_doubted:
            self._evaluations.note(
                f"the surrogate ranked the last policies with a correlation of {correlation:.2f}: it is doubted"
            )
        drops, prices = self._problem.left_of(seen), prices_of(seen)
        rewards = self._goal.reward(drops, prices, self._multipliers)
        for reward, origin in zip(rewards, origins, strict=True):
            if origin is not None:
                self._council.earned(origin, float(reward))
        best, goal = int(np.argmax(rewards)), self._goal
        missed = {name for name, (told, most) in goal.limited(prices).items() if told[best] > most}
        self._multipliers = self._multipliers.after(missed | ({"drop"} if drops[best] > goal.drop_max else set()))

    def _volume(self) -> float:
        return hypervolume(points(self._problem, self._evaluations.seen), self._reference)

    def _summary(self, volume: float) -> str:
        correlation = self._surrogate.rank_correlation
        trusted = "" if correlation is None else f", surrogate's rank correlation {correlation:.2f}"
        seen = self._evaluations.seen
        rewards = self._goal.reward(self._problem.left_of(seen), prices_of(seen), HARD)
        best = seen[int(np.argmax(rewards))]
        size_bytes, latency_ms = best.figures.size_bytes, best.figures.latency_ms
        assert size_bytes is not None
        return (
            f"the best {size_bytes / 1e3:.1f} KB, {latency_ms:.3f} ms, drop {best.drop:.2f}; "
            f"hypervolume {volume:.3f}{trusted}"
        )
