"""The latency of a network's policies on a target, as tables and measured artifacts tell it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hirelc_deploy.cost.correction import Artifact, Correction, fit
from hirelc_deploy.cost.fastest import fastest
from hirelc_deploy.cost.latency import Decisions, Factor, Latency, Prices
from hirelc_deploy.cost.network import Network
from hirelc_deploy.cost.prices import MeasuredPrices, times_of
from hirelc_deploy.errors import UserError
from hirelc_deploy.policy import Compute, Policy
from hirelc_deploy.profiles._table import Row
from hirelc_deploy.rundir import write_atomic

US_PER_MS = 1000.0


@dataclass(frozen=True)
class Foretold:
    """Latencies of some policies, (policies,), and how well they are known."""

    ms: np.ndarray
    error: np.ndarray
    """Relative, one standard deviation: of interpolation, rooflines and, once fitted, the correction."""


class Predictor:
    """Latency as a function of the policy: table, correction, and the fastest computes."""

    def __init__(self, network: Network, prices: Prices, artifacts: Sequence[Artifact] = ()) -> None:
        self.latency = Latency(network, prices)
        self.unknown = frozenset(prices.unknown)
        """Families of kernels that no table has: a roofline answers for them."""
        self.correction = fit(artifacts)
        self._artifacts = artifacts

    @classmethod
    def of_table(
        cls, network: Network, rows: Sequence[Row], artifacts: Sequence[Artifact], *, threads: int
    ) -> "Predictor":
        """Raises UserError if there is no row for so many threads, or one that names no kernel."""
        times_us = times_of(rows, threads=threads)
        if not times_us:
            raise UserError(
                f"the target's table has no latencies for {threads} threads",
                fix=f"measure them: hirelc-deploy profile --threads {threads}",
            )
        return cls(network, MeasuredPrices(times_us), artifacts)

    def foretell(self, policies: Sequence[Policy]) -> Foretold:
        return self.of(self.latency.decisions(policies))

    def of(self, decisions: Decisions) -> Foretold:
        """Of policies that are arrays already: what a search asks a million times."""
        us = self.correction.fixed_us + self.latency.us(decisions, self._factors)
        off_us = np.sqrt(self.latency.us(decisions, self._squares))
        return Foretold(us / US_PER_MS, np.hypot(off_us / us, self._residual))

    def fastest(
        self, counts: Mapping[str, int], allowed: Mapping[str, Sequence[Compute]] | None = None
    ) -> dict[str, Compute]:
        """What each layer should compute in where these counts of units stay."""
        return fastest(self.latency, self._factors, counts, allowed or {})

    def artifact(self, policy: Policy, measured_ms: float) -> Artifact:
        """A measured file, as the correction learns from it."""
        parts = self.latency.parts_us(self.latency.decisions([policy]))[0]
        by_kind = {kind: float(us) for kind, us in zip(self.latency.kinds, parts, strict=True) if us}
        return Artifact(by_kind, measured_ms * US_PER_MS)

    @cached_property
    def _weights(self) -> dict[str, float]:
        return self.correction.weights(self.latency.kinds)

    @cached_property
    def _factors(self) -> list[Factor]:
        return self.latency.factors(self._weights)

    @cached_property
    def _squares(self) -> list[Factor]:
        return self.latency.squared_errors(self._weights)

    @cached_property
    def _residual(self) -> float:
        """Relative, of the artifacts that the correction was fitted on."""
        return residual(self.correction, self._artifacts)


def residual(correction: Correction, artifacts: Sequence[Artifact]) -> float:
    """Root mean square of the relative errors; 0 without artifacts."""
    errors = [correction.us(artifact.parts_us) / artifact.measured_us - 1 for artifact in artifacts]
    return float(np.sqrt(np.mean(np.square(errors)))) if errors else 0.0


def artifacts_path(table: Path) -> Path:
    """Where the measured artifacts of a table lie."""
    return table.with_suffix(".artifacts.json")


def read_artifacts(table: Path) -> list[Artifact]:
    """The measured artifacts of a table.  Raises UserError if their file is broken."""
    path = artifacts_path(table)
    if not path.exists():
        return []
    try:
        return [Artifact(**each) for each in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path.name} cannot be read: {error}", fix="delete it; exports fill it again") from error


def add_artifact(table: Path, artifact: Artifact) -> None:
    """Keep a measured artifact for the next correction."""
    kept = [asdict(each) for each in (*read_artifacts(table), artifact)]
    artifacts_path(table).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(artifacts_path(table), (json.dumps(kept, indent=1) + "\n").encode())
