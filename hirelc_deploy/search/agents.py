"""Agents: algorithms of stable-baselines3 on the board, hundreds of games at once, in turn.

`learn()` of that library owns one environment, so while one agent learns, the others play as they are: a high-level
agent learns what to allot with the low-level agents frozen, a low-level agent learns with the votes frozen.  A step is
one block's decision, a game is one policy, and the reward comes at its end.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from hirelc_deploy.search.board import Board, Games, Goals

GAMES = 256
"""Played side by side."""

HIDDEN = (64, 64)

Worth = Callable[[Games], np.ndarray]
"""The reward of finished games, (games,)."""

Draw = Callable[[int], Goals]
"""So many goals to play for."""


class Game(VecEnv):
    """GAMES games of one agent, as stable-baselines3 wants them."""

    def __init__(self, board: Board, features: int, entries: Sequence[int], worth: Worth, draw: Draw) -> None:
        box = gym.spaces.Box(-np.inf, np.inf, (features,), np.float32)
        super().__init__(GAMES, box, gym.spaces.MultiDiscrete(list(entries)))
        self.board = board
        self.worth = worth
        self.draw = draw
        self.reward = 0.0
        """Mean of the games that were finished last."""
        self.games = board.begin(draw(GAMES))
        self.turns = len(board.blocks)
        """Moves that the agent makes in a game."""
        self.block = 0
        self._moves = np.zeros((GAMES, len(entries)), int)
        self._infos: list[dict[str, Any]] = [{} for _ in range(GAMES)]

    # what the two kinds of game differ in

    @abstractmethod
    def see(self) -> np.ndarray:
        """What the agent knows before it moves, (games, features)."""

    @abstractmethod
    def play(self, moves: np.ndarray) -> None:
        """The agent's own part of a step, (games, entries)."""

    def finish(self) -> None:
        """What others do behind the last move."""

    def start(self) -> None:
        """What others do before the first move."""

    # the interface

    def reset(self) -> np.ndarray:
        self.games = self.board.begin(self.draw(GAMES))
        self.block = 0
        self.start()
        return self.see()

    def step_async(self, actions: np.ndarray) -> None:
        self._moves = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        self.play(self._moves)
        self.block += 1
        if self.block < self.turns:
            return self.see(), np.zeros(GAMES, np.float32), np.zeros(GAMES, bool), self._infos
        self.finish()
        rewards = self.worth(self.games).astype(np.float32)
        self.reward = float(rewards.mean())
        return self.reset(), rewards, np.ones(GAMES, bool), self._infos

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name, None)] * GAMES

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError("the games are one object")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError("the games are one object")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * GAMES


class LowGame(Game):
    """Blocks in turn choose formats and widths; what they are allotted was voted before."""

    def __init__(self, board: Board, worth: Worth, draw: Draw, allot: Callable[[Games], None]) -> None:
        super().__init__(board, board.low_features, board.low_move, worth, draw)
        self._allot = allot

    def start(self) -> None:
        self._allot(self.games)

    def see(self) -> np.ndarray:
        return self.board.see_low(self.games, self.block)

    def play(self, moves: np.ndarray) -> None:
        self.board.play_low(self.games, self.block, moves)


class OwnGame(LowGame):
    """One block alone chooses, once a game; those before and behind it are played by their own agents."""

    def __init__(
        self,
        board: Board,
        own: int,
        worth: Worth,
        draw: Draw,
        allot: Callable[[Games], None],
        others: Callable[[Games, int], None],
    ) -> None:
        super().__init__(board, worth, draw, allot)
        self.turns = 1
        self._own = own
        self._others = others

    def start(self) -> None:
        super().start()
        for block in range(self._own):
            self._others(self.games, block)

    def see(self) -> np.ndarray:
        return self.board.see_low(self.games, self._own)

    def play(self, moves: np.ndarray) -> None:
        self.board.play_low(self.games, self._own, moves)

    def finish(self) -> None:
        for block in range(self._own + 1, len(self.board.blocks)):
            self._others(self.games, block)


class HighGame(Game):
    """Blocks in turn are allotted their shares; then the low-level agents play."""

    def __init__(self, board: Board, worth: Worth, draw: Draw, decide: Callable[[Games], None]) -> None:
        super().__init__(board, board.high_features, board.high_move, worth, draw)
        self._decide = decide

    def see(self) -> np.ndarray:
        return self.board.see_high(self.games, self.block)

    def play(self, moves: np.ndarray) -> None:
        self.board.play_high(self.games, self.block, moves)

    def finish(self) -> None:
        self._decide(self.games)


class Agent:
    """A policy network and the algorithm that trains it."""

    def __init__(self, algorithm: str, game: Game, *, seed: int) -> None:
        """`ppo` or `a2c`; an update follows GAMES games."""
        self.game = game
        self.name = algorithm
        steps = game.turns
        settings: dict[str, Any] = {
            "n_steps": steps,
            "learning_rate": 2e-3,
            "gamma": 1.0,
            "ent_coef": 0.003,
            "policy_kwargs": {"net_arch": list(HIDDEN), "activation_fn": torch.nn.Tanh},
            "seed": seed,
            "device": "cpu",
        }
        self.model: BaseAlgorithm
        if algorithm == "ppo":
            batch_size = GAMES * max(n for n in range(1, 5) if steps % n == 0)  # no batch is left over
            self.model = PPO("MlpPolicy", game, batch_size=batch_size, n_epochs=4, gae_lambda=0.95, **settings)
        elif algorithm == "a2c":
            self.model = A2C("MlpPolicy", game, **settings)
        else:
            raise ValueError(f"there is no agent {algorithm!r}")
        # the library's own logger makes a folder for every call of `learn`, and writes nothing into it
        self.model.set_logger(Logger(folder=None, output_formats=[]))

    def learn(self, steps: int) -> dict[str, float]:
        """At least so many steps of the board.  How it went: the reward of the last games, and what the algorithm
        says of its last update."""
        self.model.learn(steps, reset_num_timesteps=False)
        said = self.model.logger.name_to_value.items()
        return {"reward": self.game.reward, **{name: float(value) for name, value in said if name.startswith("train/")}}

    @torch.no_grad()
    def move(self, seen: np.ndarray, *, explore: bool) -> np.ndarray:
        """(games, entries): drawn from the policy, or the likeliest."""
        moves, _ = self.model.predict(seen, deterministic=not explore)
        return moves
