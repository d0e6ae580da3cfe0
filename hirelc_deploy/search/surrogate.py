"""The drop that an evaluation would see, told from those that were made, and how far that can be trusted.

An ensemble: each member is fitted to a bootstrap of the evaluations, the mean is the prediction and the spread the
uncertainty (Lakshminarayanan et al., 2017).  A member is the formula of additive sensitivity (`additive`), which is
good for an order from the first evaluation on, times what a small network has learned of where that formula is wrong.
The networks have to earn that: they count only while they have told new evaluations better than the formula alone.
The surrogate shapes rewards and says what to evaluate next; it decides nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from hirelc_deploy.search.additive import DropModel, alike, damages, fit, noise
from hirelc_deploy.search.problem import GroupVariable, Problem, Rows
from hirelc_deploy.search.space import Evaluation

MEMBERS = 5
HIDDEN = 16
STEPS = 300
RATE = 2e-2
WEIGHT_DECAY = 0.1
JITTER = 0.1
"""Of the features while a network learns, in their standard deviations: between policies seen lie others."""

JUDGED = 16
"""New evaluations that a rank correlation is taken over: a few that are all near the limit have none."""

TRIALS = 8
"""New evaluations at least that networks have to tell better than the formula before they count."""
LESS = 0.9
"""How far off they may be on average, as a part of how far the formula is."""

TINY = 1e-6


@dataclass(frozen=True)
class Told:
    """Drops of some policies in the score's unit, by member of the ensemble: (members, policies)."""

    members: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        found: np.ndarray = self.members.mean(0)
        return found

    @property
    def deviation(self) -> np.ndarray:
        found: np.ndarray = self.members.std(0)
        return found


class Surrogate:
    """Fitted anew in every cycle.  Same evaluations, same seed: same predictions."""

    def __init__(self, problem: Problem, *, seed: int, learned: bool = True) -> None:
        """Without `learned` it is the formula alone."""
        self._problem = problem
        self._seed = seed
        self._learned = learned
        self._noise = noise(problem)
        self._blocks = [[i for i, v in enumerate(problem.variables) if v.blocks[0] == b] for b in problem.blocks]
        self._kept = {
            i: np.array(v.options) / v.options[-1]
            for i, v in enumerate(problem.variables)
            if isinstance(v, GroupVariable)
        }
        self._members: list[_Member] = []
        self._seen = np.zeros((0, len(problem.variables)), int)
        self._misses: list[tuple[float, float]] = []
        """Of evaluations that came after a prediction: what the formula, and the networks, were off, as logarithms."""
        self._judged: list[tuple[float, float]] = []
        self.rank_correlation: float | None = None
        """Of predictions with evaluations that were made after them; None before there are any."""

    @property
    def networks_count(self) -> bool:
        """Whether networks have told new evaluations better than the formula alone."""
        formula, networks = np.array(self._misses).reshape(-1, 2).T
        return len(formula) >= TRIALS and bool(networks.mean() < LESS * formula.mean())

    def fit(self, seen: Sequence[Evaluation]) -> None:
        """Learn from evaluations: all of them, anew."""
        random = np.random.default_rng(self._seed)
        rows = np.stack([self._problem.row(each.policy) for each in seen])
        logs = np.log(np.maximum([each.drop for each in seen], 0.0) + self._noise)
        if self._learned and self._members:
            self._try_on(rows[len(self._seen) :], logs[len(self._seen) :])
        self._seen = rows
        x = self._features(rows) if self._learned else None
        drawn = random.integers(len(seen), size=(MEMBERS, len(seen)))
        formulas = [fit(self._problem, [seen[i] for i in each]) for each in drawn]
        residuals: Sequence[_Residual | None] = [None] * MEMBERS
        if x is not None:
            told = np.stack([formula.drop(self._problem, rows) for formula in formulas])
            residuals = _Residual.fitted(x, drawn, logs - np.log(told + self._noise), random)
        self._members = []
        for each, formula, residual in zip(drawn, formulas, residuals, strict=True):
            corrections = np.zeros(len(seen))
            if formula.corrections is not None:  # those of one policy, drawn more than once, add up
                np.add.at(corrections, each, formula.corrections)
            self._members.append(_Member(formula, corrections, residual))

    def _try_on(self, rows: Rows, logs: np.ndarray) -> None:
        """Remember how well formula and networks told evaluations that neither has seen."""
        if len(rows):
            told = [np.log(self._told(rows, networks=each).mean + self._noise) for each in (False, True)]
            self._misses += zip(*(np.abs(each - logs).tolist() for each in told), strict=True)

    def judge(self, told: np.ndarray, seen: Sequence[Evaluation]) -> float | None:
        """Rank correlation of what was told of new policies with what was seen, of the last JUDGED there were.

        None before there are JUDGED / 2, and where all are alike.
        """
        self._judged = [*self._judged, *zip(told.tolist(), (each.drop for each in seen), strict=True)][-JUDGED:]
        before, after = np.array(self._judged).reshape(-1, 2).T
        if len(before) < JUDGED / 2 or np.ptp(before) == 0 or np.ptp(after) == 0:
            return None
        self.rank_correlation = float(spearmanr(before, after).statistic)
        return self.rank_correlation

    def __call__(self, rows: Rows) -> Told:
        return self._told(rows, networks=self.networks_count)

    def _told(self, rows: Rows, *, networks: bool) -> Told:
        x = self._features(rows) if networks else None
        # what all members need is worked out once: a million policies are asked for
        parts, common = damages(self._problem, rows), alike(self._problem, rows, self._seen)
        found = []
        for member in self._members:
            drop = member.formula.uncorrected(parts) * np.exp(common @ member.corrections)
            if x is not None and member.residual is not None:
                drop = (drop + self._noise) * np.exp(member.residual(x)) - self._noise
            found.append(drop)
        return Told(np.stack(found))

    def _features(self, rows: Rows) -> np.ndarray:
        """(policies, features): logarithms of additive damage by block, of prices, and parts of groups that stay."""
        damage = np.maximum(self._problem.damage(rows), 0.0)
        prices = self._problem.costs(rows)
        columns = [
            *(np.log(damage[:, each].sum(1) + TINY) for each in self._blocks),
            np.log(prices.size_bytes),
            np.log(prices.latency_ms),
            *(kept[rows[:, i]] for i, kept in self._kept.items()),
        ]
        return np.stack(columns, axis=1).astype(np.float32)


@dataclass(frozen=True, eq=False)
class _Member:
    formula: DropModel
    corrections: np.ndarray
    """What the formula gets wrong of each policy seen, (seen,), for those that are like it."""
    residual: "_Residual | None"


class _Residual:
    """A network with one hidden layer, run with numpy."""

    def __init__(self, centre: np.ndarray, spread: np.ndarray, weights: Sequence[np.ndarray]) -> None:
        self._centre, self._spread, self._weights = centre, spread, weights

    @classmethod
    def fitted(
        cls, x: np.ndarray, drawn: np.ndarray, off: np.ndarray, random: np.random.Generator
    ) -> "list[_Residual]":
        """One a member, all at once: to the examples that it drew, (members, drawn), of features (examples, features),
        and to how far off its formula is, (members, examples)."""
        centre, spread = x.mean(0), x.std(0) + 1e-3
        inputs = torch.tensor(((x - centre) / spread)[drawn])
        targets = torch.tensor(np.take_along_axis(off, drawn, axis=1), dtype=torch.float32)
        generator = torch.Generator().manual_seed(int(random.integers(2**31)))
        nets = _Networks(len(drawn), x.shape[1], generator)
        optimizer = torch.optim.AdamW(nets.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            optimizer.zero_grad()
            jittered = inputs + JITTER * torch.randn(inputs.shape, generator=generator)
            # each member's own mean: that of all would teach each of them less
            (len(drawn) * nn.functional.smooth_l1_loss(nets(jittered), targets)).backward()
            optimizer.step()
            schedule.step()
        weights = [parameter.detach().numpy() for parameter in nets.parameters()]
        return [cls(centre, spread, [each[member] for each in weights]) for member in range(len(drawn))]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        into, into_bias, out, bias = self._weights
        found: np.ndarray = np.tanh((x - self._centre) / self._spread @ into + into_bias) @ out + bias
        return found.squeeze(-1)


class _Networks(nn.Module):
    """One a member, side by side.  They begin near nought: where nothing was seen, the formula holds."""

    def __init__(self, members: int, features: int, generator: torch.Generator) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.randn(members, features, HIDDEN, generator=generator) / features**0.5)
        self.into_bias = nn.Parameter(torch.zeros(members, 1, HIDDEN))
        self.out = nn.Parameter(0.1 * torch.randn(members, HIDDEN, 1, generator=generator) / HIDDEN**0.5)
        self.bias = nn.Parameter(torch.zeros(members, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(members, examples, features) to (members, examples)."""
        found: Tensor = torch.tanh(x @ self.into + self.into_bias) @ self.out + self.bias
        return found.squeeze(-1)
