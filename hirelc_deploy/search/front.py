"""What was found, as a front: policies that no other one beats in drop, bytes and milliseconds at once.

A drop below nought counts as nought.  Scores scatter, and of many evaluations that lose nothing some score better than
the original by luck: who is allowed a drop has no use for that, and a search that counts it is paid for mild policies.
"""

from collections.abc import Sequence

import numpy as np
from pymoo.indicators.hv import HV
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from hirelc_deploy.budget import Figures
from hirelc_deploy.search.problem import Prices, Problem, prices_of
from hirelc_deploy.search.space import Evaluation


def places_of(drops: np.ndarray, prices: Prices, before: Figures) -> np.ndarray:
    """(policies, 3): drop in the score's unit, log of bytes and of milliseconds against the original's."""
    assert before.size_bytes
    assert before.latency_ms
    sizes, latencies = prices.size_bytes / before.size_bytes, prices.latency_ms / before.latency_ms
    return np.stack([drops, np.log(sizes), np.log(latencies)], axis=1)


def points(problem: Problem, evaluations: Sequence[Evaluation]) -> np.ndarray:
    """The places of evaluations, (evaluations, 3), by what is told to be left of their drops."""
    return places_of(problem.left_of(evaluations), prices_of(evaluations), problem.before)


def front(places: np.ndarray) -> np.ndarray:
    """Positions of the points that none is better than; the lower, the better."""
    if not len(places):
        return np.zeros(0, int)
    found: np.ndarray = NonDominatedSorting().do(places, only_non_dominated_front=True)
    return np.sort(found)


def counted(places: np.ndarray) -> np.ndarray:
    """The same places with drops as they count, (points, 3)."""
    return np.maximum(places, [0.0, -np.inf, -np.inf])


def hypervolume(places: np.ndarray, reference: Sequence[float] | np.ndarray) -> float:
    """`volume` with drops as they count."""
    return volume(counted(places), reference)


def volume(places: np.ndarray, reference: Sequence[float] | np.ndarray) -> float:
    """The volume between the points and a reference that is worse than them; points beyond it count nothing."""
    inside = places[(places < np.asarray(reference)).all(1)]
    return float(HV(ref_point=np.asarray(reference))(inside)) if len(inside) else 0.0


FIFTHS = (-1.28, -0.52, 0.0, 0.52, 1.28)
"""Of a normal distribution, in deviations: the middles of five parts that are equally likely."""


def most_added(
    places: np.ndarray,
    seen: np.ndarray,
    reference: Sequence[float] | np.ndarray,
    deviations: np.ndarray | None = None,
) -> tuple[int, float] | None:
    """Of candidates, (candidates, 3), the one that adds most hypervolume to what was seen, and how much it adds.

    With `deviations` of the logarithms of their drops, (candidates,), how much it may be expected to add.
    None if there is none below the reference.
    """
    below = np.flatnonzero((places < np.asarray(reference)).all(1))
    contenders = below[front(counted(places[below]))]
    if not len(contenders):
        return None
    seen_alone = hypervolume(seen, reference)
    logs = np.zeros((len(contenders), 1)) if deviations is None else np.outer(deviations[contenders], FIFTHS)
    volumes = [
        np.mean([hypervolume(np.vstack([seen, place * [times, 1.0, 1.0]]), reference) for times in np.exp(each)])
        for place, each in zip(places[contenders], logs, strict=True)
    ]
    best = int(np.argmax(volumes))
    return int(contenders[best]), float(volumes[best]) - seen_alone
