"""What a target's tables say of a network's latency: measured on this machine where it is the target."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING, Any

from hirelc_deploy.cost.correction import Artifact
from hirelc_deploy.cost.estimate import EstimatedPrices
from hirelc_deploy.cost.needs import families
from hirelc_deploy.cost.predictor import Predictor, add_artifact, read_artifacts
from hirelc_deploy.cost.prices import times_of
from hirelc_deploy.cpu import cpu_flags
from hirelc_deploy.profiles._table import SHARED, Row
from hirelc_deploy.verify import profiling

if TYPE_CHECKING:
    from hirelc_deploy.cost.network import Network
    from hirelc_deploy.policy import Policy
    from hirelc_deploy.profiles import Tables, Target
    from hirelc_deploy.verify.machines import Machine


class Pricing:
    """The tables of one target, and the machine that can add to them."""

    def __init__(
        self, target: "Target", tables: "Tables", machine: "Machine", progress: Callable[[str, int], Any]
    ) -> None:
        """`progress(what, steps)` gives a context manager that yields what is called after each step."""
        self.is_device = target.is_here(cpu_flags())
        """Whether latencies of this machine are the target's."""
        self._target = target
        self._tables = tables
        self._machine = machine
        self._progress = progress

    def predictor(self, network: "Network", *, seconds: float | None = None) -> Predictor:
        """The latency of the network's policies.

        Kernels that no table has are measured first, where this machine is the target.  Raises UserError where it is
        not and nothing is known of the target.
        """
        self._measure(network, seconds)
        return self._told(network, self._known())

    def known(self, network: "Network") -> dict[str, Any]:
        """All that is known of the target, kernels that no table had measured, as plain data.

        Tables grow, and every export corrects them: a run that is to be repeated keeps what it went by.
        """
        self._measure(network, None)
        known = self._known()
        return {
            "rows": [list(astuple(row)) for row in known.rows],
            "artifacts": [asdict(artifact) for artifact in known.artifacts],
        }

    def told_by(self, network: "Network", known: Mapping[str, Any], more: Sequence[Artifact] = ()) -> Predictor:
        """The latency of the network's policies by what was `known`, and corrected by some artifacts more."""
        artifacts = [*(Artifact(**each) for each in known["artifacts"]), *more]
        return self._told(network, _Known([Row(*each) for each in known["rows"]], artifacts))

    def anchor_us(self) -> float | None:
        """What the kernel takes that times are in units of; None where the target has neither table nor estimate."""
        times_us = times_of(self._tables.rows(), threads=1)
        if not times_us and self._target.estimate is not None:
            return EstimatedPrices(self._target.estimate)(profiling.ANCHOR)
        return times_us.get(profiling.ANCHOR)

    def unit(self) -> float | None:
        """By what a time of this moment is multiplied to be in units of the tables; None where those are empty."""
        return profiling.unit(self._machine, times_of(self._tables.rows(), threads=self._machine.where.threads))

    def pace(self) -> float:
        """How many times slower this machine is now than when its tables were made; 1 where that cannot be told, and
        where the target is another."""
        unit = self.unit() if self.is_device else None
        return 1.0 if unit is None else 1.0 / unit

    def learn(self, network: "Network", policy: "Policy", latency_ms: float) -> bool:
        """Let a measured file, in units of the tables, correct the predictor; not where they lack one of its kernels.

        Returns whether it was learned from.
        """
        predictor = self._told(network, self._known())
        if predictor.unknown:
            return False
        add_artifact(self._tables.own, predictor.artifact(policy, latency_ms))
        return True

    def shared(self, network: "Network") -> int:
        """How many of the network's kernels have something else on the core in the tables."""
        needed = {family.kernel.family for family in families(network)}
        rows = [row for row in self._tables.rows() if row.core == SHARED]
        return sum(kernel.family in needed for kernel in times_of(rows, threads=self._machine.where.threads))

    def _measure(self, network: "Network", seconds: float | None) -> None:
        """What no table has, where this machine is the target."""
        if self.is_device:
            wanted = families(network)
            with self._progress("measuring kernels", len(wanted)) as advance:
                profiling.profile(wanted, self._tables, self._machine, seconds=seconds, advance=advance)

    def _known(self) -> "_Known":
        return _Known(self._tables.rows(), read_artifacts(self._tables.own))

    def _told(self, network: "Network", known: "_Known") -> Predictor:
        if not known.rows and self._target.estimate is not None:
            return Predictor(network, EstimatedPrices(self._target.estimate))
        return Predictor.of_table(network, known.rows, known.artifacts, threads=self._machine.where.threads)


@dataclass(frozen=True)
class _Known:
    """Of a target."""

    rows: Sequence[Row]
    artifacts: Sequence[Artifact]
