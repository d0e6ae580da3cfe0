"""What whole artifacts say of the sum over their kernels: a factor for each kind of kernel, and a fixed part.

A kernel that is timed by itself finds its inputs where it left them; in a network its neighbours have been at the
caches.  A session has work of its own as well.  Both are fitted on artifacts whose latency was measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import lsq_linear

STIFFNESS = 0.02
"""How many artifacts it takes to move a factor away from what all artifacts together say: with few, hardly; the weight
of a factor's deviation against relative errors of the latency."""

SMALLEST_FACTOR, LARGEST_FACTOR = 0.3, 3.0


@dataclass(frozen=True)
class Correction:
    """latency = fixed + sum of factor(kind) x microseconds of that kind."""

    fixed_us: float = 0.0
    factors: Mapping[str, float] = field(default_factory=dict)
    """By kind of kernel; one that is not named has `other`."""
    other: float = 1.0
    artifacts: int = 0
    """That it was fitted on."""

    def weights(self, kinds: Sequence[str]) -> dict[str, float]:
        """The factor of each of these kinds."""
        return {kind: self.factors.get(kind, self.other) for kind in kinds}

    def us(self, parts_us: Mapping[str, float]) -> float:
        """The latency of what comes to so much by kind."""
        weights = self.weights(tuple(parts_us))
        return self.fixed_us + sum(weights[kind] * us for kind, us in parts_us.items())


@dataclass(frozen=True)
class Artifact:
    """One artifact that was measured, and what its kernels came to in the table."""

    parts_us: Mapping[str, float]
    """By kind."""
    measured_us: float


def fit(artifacts: Sequence[Artifact]) -> Correction:
    """The correction with the smallest squared relative errors, held near one factor for all (ridge regression).

    Without artifacts nothing is corrected.
    """
    if not artifacts:
        return Correction()
    kinds = sorted({kind for artifact in artifacts for kind in artifact.parts_us})
    parts = np.array([[artifact.parts_us.get(kind, 0.0) for kind in kinds] for artifact in artifacts])
    measured = np.array([artifact.measured_us for artifact in artifacts])
    common = float(np.median(measured / parts.sum(axis=1)))
    share = (parts / measured[:, None]).mean(axis=0)
    # columns: a factor a kind, then the fixed part in units of the smallest artifact
    smallest = float(measured.min())
    design = np.column_stack([parts, np.full(len(measured), smallest)]) / measured[:, None]
    stiff = np.sqrt(STIFFNESS * len(artifacts)) * np.diag([*np.sqrt(np.maximum(share, 1e-3)), 1.0])
    target = np.concatenate([np.ones(len(measured)), stiff @ np.array([common] * len(kinds) + [0.0])])
    bounds = (
        [SMALLEST_FACTOR * common] * len(kinds) + [0.0],
        [LARGEST_FACTOR * common] * len(kinds) + [1.0],
    )
    solved = lsq_linear(np.vstack([design, stiff]), target, bounds).x
    return Correction(
        fixed_us=float(solved[-1] * smallest),
        factors={kind: float(factor) for kind, factor in zip(kinds, solved, strict=False)},
        other=common,
        artifacts=len(artifacts),
    )
