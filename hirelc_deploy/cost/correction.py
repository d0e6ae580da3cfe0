"""What whole artifacts say of the sum over their kernels: a factor for each kind of kernel, and a fixed part.

A kernel that is timed by itself finds its inputs where it left them; in a network its neighbours have been at the
caches.  A session has work of its own as well.  Both are fitted on artifacts whose latency was measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import lsq_linear

NOISE = 0.04
"""Relative error of a latency that is due to nothing that is fitted, one standard deviation."""

COMMON_SPREAD, KIND_SPREAD = 0.1, 0.1
"""How far from one the factor of all kinds is believed to lie before an artifact is seen, and how far each kind's from
that.  A kind that no artifact has stays at the common factor: three artifacts in int8 say little of fp32."""

FIXED_SPREAD_US = 30.0
"""Of a session's own work."""

SMALLEST, LARGEST = -0.5, 2.0
"""A factor's distance from one, and a kind's from the common one, stays between these."""


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
    """The likeliest correction: relative errors of NOISE, and factors as they are believed to be (ridge regression).

    Without artifacts nothing is corrected.
    """
    if not artifacts:
        return Correction()
    kinds = sorted({kind for artifact in artifacts for kind in artifact.parts_us})
    parts = np.array([[artifact.parts_us.get(kind, 0.0) for kind in kinds] for artifact in artifacts])
    measured = np.array([artifact.measured_us for artifact in artifacts])
    told = parts.sum(axis=1)
    # unknowns: each kind's distance from the common factor, that one's from 1, and the fixed part
    seen = np.column_stack([parts, told, np.ones(len(measured))]) / measured[:, None] / NOISE
    believed = np.diag([*[1 / KIND_SPREAD] * len(kinds), 1 / COMMON_SPREAD, 1 / FIXED_SPREAD_US])
    target = np.concatenate([(1 - told / measured) / NOISE, np.zeros(len(believed))])
    bounds = ([SMALLEST] * (len(kinds) + 1) + [0.0], [LARGEST] * (len(kinds) + 1) + [np.inf])
    *apart, common, fixed_us = lsq_linear(np.vstack([seen, believed]), target, bounds).x
    return Correction(
        fixed_us=float(fixed_us),
        factors={kind: float(1 + common + each) for kind, each in zip(kinds, apart, strict=True)},
        other=float(1 + common),
        artifacts=len(artifacts),
    )
