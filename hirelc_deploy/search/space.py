"""What can be decided, and what a decision is known to give."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from hirelc_deploy.budget import Figures
from hirelc_deploy.policy import Compute, Policy, Precision


@dataclass(frozen=True)
class SearchSpace:
    """Every choice that target and network allow: each policy made of them can be built and run."""

    layers: Mapping[str, tuple[Precision, ...]]
    """By layer; the first is the layer as it was trained."""
    groups: Mapping[str, tuple[int, ...]]
    """Counts of units by prune group, ascending, on the target's multiples; 0 where the branch can go."""
    totals: Mapping[str, int]
    """Units of each group before anything is removed."""
    blocks: Mapping[str, tuple[str, ...]]
    """Layers by block."""

    @property
    def computes(self) -> dict[str, tuple[Compute, ...]]:
        """What each layer can compute in, as it was trained first."""
        return {
            layer: tuple(dict.fromkeys(precision.compute for precision in choices))
            for layer, choices in self.layers.items()
        }


@dataclass(frozen=True)
class Evaluation:
    """A policy that was made real and scored on the search split."""

    policy: Policy
    figures: Figures
    """Size and latency as predicted, the drop as seen on the search split."""
    score: float
    """In the task's unit."""

    @property
    def drop(self) -> float:
        """In the task's unit, positive is worse: what every evaluation knows."""
        assert self.figures.drop is not None, "an evaluation without its drop"
        return self.figures.drop


@dataclass(frozen=True)
class Choice:
    """What a method decided, and everything that it had evaluated for it, in order."""

    best: Evaluation
    evaluations: tuple[Evaluation, ...]
    finished: tuple[Evaluation, ...] = ()
    """Those that were fine-tuned in full, the best among them."""
    hardness: Mapping[str, float] = field(default_factory=dict)
    """Of evaluations, by their policy's digest: how hard a drop is to mend."""
    whole: Mapping[str, float] = field(default_factory=dict)
    """Of the same: the part of the layers that is whole."""
    recipes: Mapping[str, Policy] = field(default_factory=dict)
    """What an engineer would have tried by hand, by name, whether it was evaluated or not."""
