"""What a target's tables say of a network's latency: measured on this machine where it is the target."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hirelc_deploy.cost.estimate import EstimatedPrices
from hirelc_deploy.cost.needs import families
from hirelc_deploy.cost.predictor import Predictor, add_artifact, read_artifacts
from hirelc_deploy.cost.prices import times_of
from hirelc_deploy.cpu import cpu_flags
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
        if self.is_device:
            wanted = families(network)
            with self._progress("measuring kernels", len(wanted)) as advance:
                profiling.profile(wanted, self._tables, self._machine, seconds=seconds, advance=advance)
        return self._known(network)

    def unit(self) -> float | None:
        """By what a time of this moment is multiplied to be in units of the tables; None where those are empty."""
        return profiling.unit(self._machine, times_of(self._tables.rows(), threads=self._machine.where.threads))

    def learn(self, network: "Network", policy: "Policy", latency_ms: float) -> bool:
        """Let a measured file, in units of the tables, correct the predictor; not where they lack one of its kernels.

        Returns whether it was learned from.
        """
        predictor = self._known(network)
        if predictor.unknown:
            return False
        add_artifact(self._tables.own, predictor.artifact(policy, latency_ms))
        return True

    def _known(self, network: "Network") -> Predictor:
        rows = self._tables.rows()
        if not rows and self._target.estimate is not None:
            return Predictor(network, EstimatedPrices(self._target.estimate))
        artifacts = read_artifacts(self._tables.own)
        return Predictor.of_table(network, rows, artifacts, threads=self._machine.where.threads)
