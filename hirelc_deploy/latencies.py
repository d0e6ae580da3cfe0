"""How long a network's policies take on its target: told by tables, timed where the target is at hand."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hirelc_deploy.compress.grids import fitted
from hirelc_deploy.cost.latency import decisions_of
from hirelc_deploy.cost.memory import Activations
from hirelc_deploy.cost.network import Network
from hirelc_deploy.policy import INT8, Compute, Policy, Precision
from hirelc_deploy.verify import text, timing
from hirelc_deploy.verify.measure import Measurement, example, foretold

if TYPE_CHECKING:
    from hirelc_deploy.budget import Figures
    from hirelc_deploy.exporters._base import Exported, Footprint
    from hirelc_deploy.files import Files
    from hirelc_deploy.pricing import Pricing
    from hirelc_deploy.subject import Subject
    from hirelc_deploy.trainer import Trainer

PREDICTION_SECONDS = 1.0
"""Spent on timing one policy's file beside the baseline."""


class Latencies:
    """Of one network on one target."""

    def __init__(self, subject: "Subject", files: "Files", pricing: "Pricing", trainer: "Trainer") -> None:
        self.pricing = pricing
        self._subject = subject
        self._files = files
        self._trainer = trainer

    @cached_property
    def network(self) -> Network:
        """What the runtime makes of the network, as a function of the policy."""
        return self._subject.runtime.network(
            self._files.skeleton(),
            self._subject.graph,
            self._subject.space.computes,
            self._subject.space.groups,
            batch=self._subject.batch,
            floats=self._files.floats,
        )

    # -- of one policy ---------------------------------------------------------------------------------------

    def price(self, policy: Policy) -> dict[str, Any]:
        """Bytes, milliseconds, speed-up, and what loading takes, by their names in `Figures`.

        Seen of a file with these shapes and untrained weights, or told by the tables of a target that is elsewhere,
        and by its runtime's laws of loading, if it has any.
        """
        file = self._files.foreseen(policy)
        if not self.pricing.is_device:
            before, after = (self._told_ms(each) for each in (Policy({}, {}), policy))
            return {
                "size_bytes": len(file),
                "latency_ms": after,
                "speedup": before / after,
                "memory_bytes": self._told_memory_bytes(policy, file),
                "load_ms": self._told_load_ms(file),
            }
        inputs = example(self._subject.task, self._subject.batch)
        with self._files.on_disk({"baseline": self._files.baseline(), "policy": self._files.draft(policy)}) as paths:
            times = timing.interleave(
                self._files.sessions(paths),
                inputs,
                threads=self._subject.threads,
                seconds=PREDICTION_SECONDS,
                patience_s=timing.PATIENCE_S,
            )
            needs = self._footprint(paths["policy"])
        clock = timing.clock_for(self._subject.threads)
        speedup = timing.ratio(times["baseline"], times["policy"], clock=clock)
        return {
            "size_bytes": len(file),
            # one thread's CPU time is its wall clock on an idle machine, and close to that on a busy one
            "latency_ms": times["policy"].p50_ms(clock),
            "speedup": speedup.value,
            "memory_bytes": None if needs is None else needs.memory_bytes,
            "load_ms": None if needs is None else needs.load_ms,
        }

    def times_ms(self, policies: Sequence[Policy]) -> list[float] | None:
        """Of the policies' files, side by side, in units of the target's tables.

        None where those are empty, and where something else had the core too often for the times to say much.
        """
        seen = self._timed([self._files.draft(policy) for policy in policies])
        unit = self.pricing.unit()
        if unit is None or not all(each.is_quiet for each in seen):
            return None
        return [self._ms(each) * unit for each in seen]

    def learn(self, policy: Policy, latency_ms: float) -> bool:
        """Let a file that was measured just now correct the predictor, if the target's tables have its kernels.

        Returns whether it was learned from.
        """
        unit = self.pricing.unit()
        return unit is not None and self.pricing.learn(self.network.with_counts(policy.keep), policy, latency_ms * unit)

    def as_foretold(self, seen: Measurement, told: "Figures") -> Measurement:
        """What was measured here of a file whose target is another device: with the latencies that were predicted."""
        assert told.latency_ms is not None
        assert told.speedup is not None
        halves = self._files.in_halves
        return foretold(
            seen,
            told.latency_ms * told.speedup,
            told.latency_ms,
            halves_ms=None if halves is None else self._told_ms(halves),
            is_final=not self._subject.runtime.builds_on_device,
        )

    @property
    def notes_on_tables(self) -> tuple[str, ...]:
        """For people: what tables told that may not be so."""
        shared = self.pricing.shared(self.network)
        if not shared:
            return ()
        return (
            f"the table of {self._subject.target.name} has {shared} of the kernels that the network can become as they "
            "were beside something else on the core, and may tell them to be slower than they are: `hirelc-deploy "
            "profile` measures them again",
        )

    def notes(self, policy: Policy) -> tuple[str, ...]:
        """For people: the kernels that no table of a device has which is not this machine."""
        if self.pricing.is_device:
            return ()
        unknown = sorted(self.pricing.predictor(self.network.with_counts(policy.keep)).unknown)
        if not unknown:
            return ()
        return (
            f"the table of {self._subject.target.name} lacks {len(unknown)} of the kernels that the network can "
            f"become, and a roofline answered for them: {text.listed(unknown)}",
        )

    def memory_bytes(self, policy: Policy) -> int | None:
        """At the peak of a process that loads and runs the policy's file, told by the runtime's law of memory."""
        return self._told_memory_bytes(policy, self._files.foreseen(policy))

    def _told_memory_bytes(self, policy: Policy, file: bytes) -> int | None:
        law = self._subject.runtime.memory_law
        if law is None:
            return None
        network = self.network.with_counts(policy.keep)
        activations = Activations(network)(decisions_of(network, [policy]))
        return round(float(law(np.array([len(file)]), np.array([law.decoded_bytes(file)]), activations)[0]))

    def _told_load_ms(self, file: bytes) -> float | None:
        """By the runtime's law; None where it or the target's speed is not known."""
        law, anchor_us = self._subject.runtime.load_law, self.pricing.anchor_us()
        if law is None or anchor_us is None:
            return None
        return law(file, anchor_us=anchor_us)

    def seen_memory_bytes(self, policy: Policy) -> int | None:
        """Of a file with the policy's shapes and formats, in a process of its own; None where no system tells it."""
        with self._files.on_disk({"policy": self._files.draft(policy)}) as paths:
            needs = self._footprint(paths["policy"])
        return None if needs is None else needs.memory_bytes

    def _footprint(self, path: Path) -> "Footprint | None":
        inputs = example(self._subject.task, self._subject.batch)
        return self._subject.runtime.footprint(path, inputs, threads=self._subject.threads)

    def _told_ms(self, policy: Policy) -> float:
        return float(self.pricing.predictor(self.network.with_counts(policy.keep)).foretell([policy]).ms[0])

    # -- the fastest of several ------------------------------------------------------------------------------

    def fastest_computes(self, keep: Mapping[str, int]) -> dict[str, Compute]:
        """What each layer computes in so that the network is fastest with these counts of units.

        The predictor says, from kernels that are measured now if no table has them; its answer and all layers alike
        are then timed, and the fastest file wins.  Integers are left out for a layer whose input 8 bits do not hold.
        """
        found = self._subject.run.step(f"fastest/{Policy({}, keep).digest()}", lambda: self._fastest(keep))
        return {layer: Compute(compute) for layer, compute in found.items()}

    @cached_property
    def computes_allowed(self) -> dict[str, tuple[Compute, ...]]:
        """What each layer and those of its kind that share its weight may compute in, fp32 first."""
        return {layer: self._allowed(layer) for layer in self._files.space.layers}

    def _allowed(self, layer: str) -> tuple[Compute, ...]:
        together = (layer, *self._subject.graph.alike(layer))
        computes = self._files.space.computes
        able = tuple(c for c in computes[layer] if all(c in computes[twin] for twin in together))
        if self._files.rounding_badly.isdisjoint(together):
            return able
        return tuple(c for c in able if c in (Compute.FP32, Compute.FP16))

    def _fastest(self, keep: Mapping[str, int]) -> dict[str, Compute]:
        allowed = self.computes_allowed
        predictor = self.pricing.predictor(self.network.with_counts(keep))
        candidates = [predictor.fastest(keep, allowed)]
        if not self.pricing.is_device:
            return candidates[0]
        for compute in dict.fromkeys(compute for able in allowed.values() for compute in able):
            alike = {layer: compute if compute in able else able[0] for layer, able in allowed.items()}
            if alike not in candidates:
                candidates.append(alike)
        times_ms = [self._ms(each) for each in self._timed(self._in_computes(keep, candidates))]
        return candidates[min(range(len(candidates)), key=times_ms.__getitem__)]

    def _in_computes(self, keep: Mapping[str, int], candidates: Sequence[Mapping[str, Compute]]) -> "list[Exported]":
        """Drafts of the network with these counts in each of these computes, in 8 bits."""
        model = self._trainer.cut(Policy({}, keep))
        graph = self._files.float_graph(model)
        in_8_bits = dict.fromkeys(self._subject.space.layers, INT8)
        grids = fitted(model, in_8_bits, {}, largest=self._subject.largest)
        policies = [
            Policy({name: Precision(INT8.storage, c) for name, c in computes.items() if c is not Compute.FP32}, keep)
            for computes in candidates
        ]
        return [self._files.drafted(graph, policy, grids) for policy in policies]

    def _timed(self, files: "Sequence[Exported]") -> list[timing.Timing]:
        """Of each, side by side."""
        with self._files.loaded({str(i): file for i, file in enumerate(files)}) as sessions:
            seen = timing.interleave(
                sessions,
                example(self._subject.task, self._subject.batch),
                threads=self._subject.threads,
                seconds=PREDICTION_SECONDS,
                patience_s=timing.PATIENCE_S,
            )
        return list(seen.values())

    def _ms(self, seen: timing.Timing) -> float:
        return seen.p50_ms(timing.clock_for(self._subject.threads))
