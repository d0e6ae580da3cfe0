"""What policies cost on a network's target: bytes and milliseconds, a table look-up each."""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from hirelc_deploy.budget import Figures
from hirelc_deploy.cost.latency import Decisions
from hirelc_deploy.cost.memory import Activations, DecodedPredictor, MemoryLaw, MemoryPredictor
from hirelc_deploy.cost.size import SizePredictor
from hirelc_deploy.cost.weights import Positions
from hirelc_deploy.offers import Offers
from hirelc_deploy.policy import Policy, Precision
from hirelc_deploy.search.problem import (
    GroupVariable,
    LayerVariable,
    Prices,
    Rows,
    Variable,
    policy_of,
    ties,
    with_ties,
)

if TYPE_CHECKING:
    from hirelc_deploy.cost.predictor import Predictor
    from hirelc_deploy.workbench import Workbench

SIZE_SAMPLES = 160
"""Files whose size is told exactly; the additive prediction is fitted to them."""

ORIGINAL = Policy({}, {})
"""The network as it was trained."""

DIGITS = 12
"""Of a policy's digest, to tell a run's policies apart."""


class Costing:
    """Of one workbench's network; what no table has is measured where this machine is the target."""

    def __init__(
        self,
        bench: "Workbench",
        offers: Offers,
        *,
        limits_memory: bool = False,
        timed: tuple[tuple[Policy, ...], ...] = (),
    ) -> None:
        """Memory is told only where it has a limit: it takes files to know what a network needs.

        `timed` are policies whose files are timed, and correct the latencies of others, beside those of recipes;
        policies that stand together are timed side by side.
        """
        self._bench = bench
        self._limits_memory = limits_memory
        self._timed = timed
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
        own = [told.artifact(policy, latency_ms) for policy, latency_ms in self._seen]
        return bench.pricing.told_by(bench.latencies.network, known, own)

    def latency_ms(self, policy: Policy) -> float:
        """As the policy's file was timed, else as tables and the files that were timed tell it."""
        seen_ms = self._seen_ms.get(policy.digest())
        return float(self.predictor.foretell([policy]).ms[0]) if seen_ms is None else seen_ms

    @cached_property
    def _seen(self) -> list[tuple[Policy, float]]:
        """Policies of this network whose files were timed, and milliseconds in units of the tables.

        What is timed at another hour is compared by the original's file, which is timed beside it each time.
        """
        bench = self._bench
        batches: dict[str, Sequence[Policy]] = {"search/timed": self._offers.timed_policies()}
        for batch in self._timed:
            batches["/".join(["search/timed", *(policy.digest()[:DIGITS] for policy in batch)])] = batch
        seen: list[tuple[Policy, float]] = []
        for step, policies in batches.items():
            times_ms: list[float] | None = bench.run.step(
                step, partial(bench.latencies.times_ms, [ORIGINAL, *policies])
            )
            if times_ms is not None:
                now_ms, *each_ms = times_ms
                if not seen:
                    seen.append((ORIGINAL, now_ms))
                (_, before_ms), *_ = seen
                seen += zip(policies, (before_ms / now_ms * ms for ms in each_ms), strict=True)
        return seen

    @cached_property
    def _seen_ms(self) -> dict[str, float]:
        is_told = not self._bench.pricing.is_device or self.predictor.unknown
        return {} if is_told else {policy.digest(): ms for policy, ms in self._seen}

    def corrected_by(self, policies: Sequence[Policy]) -> "Costing":
        """The same, corrected by these policies' files as well, which are timed where this machine is the target."""
        new = tuple(policy for policy in policies if not any(policy in batch for batch in self._timed))
        if not new or not self._bench.pricing.is_device:
            return self
        return Costing(self._bench, self._offers, limits_memory=self._limits_memory, timed=(*self._timed, new))

    @cached_property
    def before(self) -> Figures:
        """Of the network as it was trained."""
        return Figures(
            latency_ms=self.latency_ms(ORIGINAL),
            speedup=1.0,
            size_bytes=len(self._bench.files.baseline().data),
            memory_bytes=self.memory_bytes(ORIGINAL),
            drop=0.0,
        )

    @cached_property
    def costs(self) -> "TableCosts":
        """Prices of rows, as a search asks for them."""
        return TableCosts(self._offers.variables, self.predictor, self.sizes, self._memory)

    @cached_property
    def sizes(self) -> SizePredictor:
        exact = self._samples_told["size_bytes"]
        return SizePredictor(self._graph, *options_of(self._offers.variables), self._sampled, exact)

    # -- memory ----------------------------------------------------------------------------------------------

    def memory_bytes(self, policy: Policy) -> int | None:
        """At the peak of a process that loads and runs the policy's file; None where no limit asks, or no law tells."""
        told = self._bench.latencies.memory_bytes(policy) if self._limits_memory else None
        return None if told is None else round(self._memory_factor * told)

    @property
    def _law(self) -> MemoryLaw | None:
        return self._bench.runtime.memory_law if self._limits_memory else None

    @cached_property
    def _memory(self) -> MemoryPredictor | None:
        if self._law is None:
            return None
        exact = self._samples_told["decoded_bytes"]
        return MemoryPredictor(
            self._law,
            DecodedPredictor(self._graph, *options_of(self._offers.variables), self._sampled, exact),
            Activations(self.predictor.latency.network),
            factor=self._memory_factor,
        )

    @cached_property
    def _memory_factor(self) -> float:
        """What files of this network need where this machine is the target, against what the law says."""
        bench = self._bench
        if not bench.pricing.is_device:
            return 1.0
        policies = self._offers.timed_policies()
        seen = bench.run.step("search/memory", lambda: [bench.latencies.seen_memory_bytes(p) for p in policies])
        told = [bench.latencies.memory_bytes(policy) for policy in policies]
        ratios = [s / t for s, t in zip(seen, told, strict=True) if s and t]
        return float(np.exp(np.log(ratios).mean())) if ratios else 1.0

    # -- samples ---------------------------------------------------------------------------------------------

    @cached_property
    def _samples(self) -> Rows:
        """Random policies that additive predictions are fitted to, (SIZE_SAMPLES, variables)."""
        variables = self._offers.variables
        lengths = [len(variable.options) for variable in variables]
        rows = np.random.default_rng(0).integers(lengths, size=(SIZE_SAMPLES, len(lengths)))
        rows[0] = [variable.as_trained for variable in variables]
        return with_ties(rows, ties(variables))

    @property
    def _sampled(self) -> Positions:
        return positions(self._offers.variables, self._samples)

    @cached_property
    def _samples_told(self) -> dict[str, list[int]]:
        """`size_bytes` of each one's file, exact, and where memory is told `decoded_bytes` of loading it."""
        step = "search/files" if self._law is None else "search/files and memory"
        told: dict[str, list[int]] = self._bench.run.step(step, self._told_one_by_one)
        return told

    def _told_one_by_one(self) -> dict[str, list[int]]:
        policies = [policy_of(self._offers.variables, row) for row in self._samples]
        told: dict[str, list[int]] = {"size_bytes": [], "decoded_bytes": []}
        with self._bench.progress("sizes of files", len(policies)) as advance:
            for policy in policies:
                file = self._bench.files.foreseen(policy)
                told["size_bytes"].append(len(file))
                if self._law is not None:
                    told["decoded_bytes"].append(self._law.decoded_bytes(file))
                advance("")
        return told


class TableCosts:
    """Prices of rows: tables of kernels, and sizes that add up."""

    def __init__(
        self,
        variables: Sequence[Variable],
        predictor: "Predictor",
        sizes: SizePredictor,
        memory: MemoryPredictor | None = None,
    ) -> None:
        self._memory = memory
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
        decisions = Decisions(computes.astype(np.int16), rows[:, self._groups].astype(np.int32))
        chosen = positions(self._variables, rows)
        size_bytes = self._sizes(chosen)
        memory_bytes = None if self._memory is None else self._memory(size_bytes, chosen, decisions)
        return Prices(size_bytes, self._predictor.of(decisions).ms, memory_bytes)


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
