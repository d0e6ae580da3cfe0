"""The level above: agents that allot, and the count of their votes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hirelc_deploy.search.agents import Agent
from hirelc_deploy.search.board import Board, Games

SHARPNESS = 1.0
"""How strongly a difference in what agents earned shifts their weights: one unit of reward, a factor of e."""


def count(votes: Sequence[np.ndarray], weights: Sequence[float] | np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """The value with most weight in each entry, (games, entries); of equals the one that the first agent with it named.

    Values are categories: there is no mean of "quantise" and "prune", and none of two widths either.
    """
    best = votes[0].copy()
    games = np.arange(len(best))
    for entry, length in enumerate(lengths):
        weight = np.zeros((len(best), length))
        for vote, each in zip(votes, weights, strict=True):
            weight[games, vote[:, entry]] += each
        of_first = [weight[games, vote[:, entry]] for vote in votes]
        winner = np.argmax(np.stack(of_first), axis=0)  # argmax takes the first of equals
        best[:, entry] = np.stack([vote[:, entry] for vote in votes])[winner, games]
    return best


@dataclass
class _Earned:
    """Rewards of what one agent proposed alone, as they were really evaluated."""

    total: float = 0.0
    count: int = 0

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


class Council:
    """An ensemble of high-level agents."""

    def __init__(self, board: Board, agents: Sequence[Agent]) -> None:
        self.board = board
        self.agents = agents
        self._earned = [_Earned() for _ in agents]

    @property
    def weights(self) -> np.ndarray:
        """Of the agents' votes, summing to one."""
        means = np.array([each.mean for each in self._earned])
        known = np.array([each.count > 0 for each in self._earned])
        means = np.where(known, means, means[known].mean() if known.any() else 0.0)
        raised = np.exp(SHARPNESS * (means - means.max()))
        found: np.ndarray = raised / raised.sum()
        return found

    def earned(self, agent: int, reward: float) -> None:
        """Tell of a proposal of one agent that was really evaluated."""
        self._earned[agent].total += reward
        self._earned[agent].count += 1

    def vote(self, games: Games, *, explore: bool) -> None:
        """Allot all blocks by votes."""
        weights = self.weights
        for block in range(len(self.board.blocks)):
            seen = self.board.see_high(games, block)
            votes = [agent.move(seen, explore=explore) for agent in self.agents]
            self.board.play_high(games, block, count(votes, weights, self.board.high_move))

    def alone(self, agent: int, games: Games, *, explore: bool) -> None:
        """Allot all blocks as one agent would."""
        for block in range(len(self.board.blocks)):
            self.board.play_high(
                games, block, self.agents[agent].move(self.board.see_high(games, block), explore=explore)
            )
