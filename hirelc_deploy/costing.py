"""What policies cost on a network's target: bytes and milliseconds, a table look-up each."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from hirelc_deploy.budget import Figures
from hirelc_deploy.cost.latency import Decisions
from hirelc_deploy.cost.size import Positions, SizePredictor
from hirelc_deploy.offers import Offers
from hirelc_deploy.policy import Policy, Precision
from hirelc_deploy.search.problem import GroupVariable, LayerVariable, Prices, Rows, Variable, policy_of

if TYPE_CHECKING:
    from hirelc_deploy.cost.predictor import Predictor
    from hirelc_deploy.workbench import Workbench

SIZE_SAMPLES = 160
"""Files whose size is told exactly; the additive prediction is fitted to them."""


class Costing:
    """Of one workbench's network; what no table has is measured where this machine is the target."""

    def __init__(self, bench: "Workbench", offers: Offers) -> None:
        self._bench = bench
        self._graph = bench.graph
        self._offers = offers

    @cached_property
    def predictor(self) -> "Predictor":
        """Latencies of all policies; kernels that no table has are measured now, where this is the target.

        There some files of this very network correct the sum over kernels as well.
        """
        bench = self._bench
        known = bench.run.step("search/table", lambda: bench.pricing.known(bench.latencies.network))
        told = bench.pricing.told_by(bench.latencies.network, known)
        if not bench.pricing.is_device or told.unknown:
            return told
        policies = self._offers.timed_policies()
        times_ms: list[float] | None = bench.run.step("search/times", lambda: bench.latencies.times_ms(policies))
        if times_ms is None:
            return told
        pairs = zip(policies, times_ms, strict=True)
        own = [told.artifact(policy, latency_ms) for policy, latency_ms in pairs]
        return bench.pricing.told_by(bench.latencies.network, known, own)

    @cached_property
    def before(self) -> Figures:
        """Of the network as it was trained."""
        return Figures(
            latency_ms=float(self.predictor.foretell([Policy({}, {})]).ms[0]),
            speedup=1.0,
            size_bytes=len(self._bench.files.baseline().data),
            drop=0.0,
        )

    @cached_property
    def costs(self) -> "TableCosts":
        """Prices of rows, as a search asks for them."""
        return TableCosts(self._offers.variables, self.predictor, self.sizes)

    @cached_property
    def sizes(self) -> SizePredictor:
        precisions, counts = options_of(self._offers.variables)
        lengths = [len(variable.options) for variable in self._offers.variables]
        rows = np.random.default_rng(0).integers(lengths, size=(SIZE_SAMPLES, len(lengths)))
        rows[0] = [variable.as_trained for variable in self._offers.variables]
        policies = [policy_of(self._offers.variables, row) for row in rows]
        exact: list[int] = self._bench.run.step("search/sizes", lambda: self._exact_sizes(policies))
        return SizePredictor(self._graph, precisions, counts, positions(self._offers.variables, rows), exact)

    def _exact_sizes(self, policies: Sequence[Policy]) -> list[int]:
        found = []
        with self._bench.progress("sizes of files", len(policies)) as advance:
            for policy in policies:
                found.append(self._bench.files.predicted_bytes(policy))
                advance("")
        return found


class TableCosts:
    """Prices of rows: tables of kernels, and sizes that add up."""

    def __init__(self, variables: Sequence[Variable], predictor: "Predictor", sizes: SizePredictor) -> None:
        self._variables = variables
        self._predictor = predictor
        self._sizes = sizes
        layers = {v.name: i for i, v in enumerate(variables) if isinstance(v, LayerVariable)}
        groups = {v.in_policy: i for i, v in enumerate(variables) if isinstance(v, GroupVariable)}
        precisions, _ = options_of(variables)
        network = predictor.latency.network
        self._layers = [layers[name] for name in predictor.latency.layers]
        self._groups = [groups[name] for name in predictor.latency.groups]
        self._computes = [
            np.array([network.computes[name].index(o.compute) for o in precisions[name]])
            for name in predictor.latency.layers
        ]

    def __call__(self, rows: Rows) -> Prices:
        computes = np.stack([of[rows[:, i]] for of, i in zip(self._computes, self._layers, strict=True)], axis=1)
        told = self._predictor.of(Decisions(computes.astype(np.int16), rows[:, self._groups].astype(np.int32)))
        return Prices(self._sizes(positions(self._variables, rows)), told.ms)


def options_of(variables: Sequence[Variable]) -> tuple[dict[str, Sequence[Precision]], dict[str, Sequence[int]]]:
    """Those of layers and those of groups, by name."""
    return (
        {v.name: v.options for v in variables if isinstance(v, LayerVariable)},
        {v.in_policy: v.options for v in variables if isinstance(v, GroupVariable)},
    )


def positions(variables: Sequence[Variable], rows: Rows) -> Positions:
    """Rows as sizes are told of them."""
    columns = list(zip(variables, rows.T, strict=True))
    return Positions(
        {v.name: column for v, column in columns if isinstance(v, LayerVariable)},
        {v.in_policy: column for v, column in columns if isinstance(v, GroupVariable)},
    )
