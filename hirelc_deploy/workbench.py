"""A network on its target: what a policy would cost, what it scores, and the file that it becomes.

`predict` and `evaluate` are the two functions that a search is handed.  Everything slow is journalled in the
run folder before it is used, so that a run that was killed goes on with the same figures and weights.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from hirelc_deploy import __version__
from hirelc_deploy.budget import Figures
from hirelc_deploy.calibration import Calibration
from hirelc_deploy.choices import search_space
from hirelc_deploy.compress.distil import FineTuning, as_tensors
from hirelc_deploy.compress.grids import fitted, put_on
from hirelc_deploy.compress.importance import Method
from hirelc_deploy.compress.posttraining import PostTraining
from hirelc_deploy.cost.network import Network
from hirelc_deploy.cpu import cpu_flags
from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters import load_runtime
from hirelc_deploy.exporters._base import RoundingErrors
from hirelc_deploy.graph import forward, shapes_after
from hirelc_deploy.kernels._base import Grid
from hirelc_deploy.policy import CALIBRATED, FP16, INT8, Compute, Policy, Precision
from hirelc_deploy.pool import Engine, in_turn
from hirelc_deploy.pricing import Pricing
from hirelc_deploy.search.space import Evaluation
from hirelc_deploy.trainer import Trainer
from hirelc_deploy.verify import accuracy, text, timing
from hirelc_deploy.verify.machines import Here
from hirelc_deploy.verify.measure import Measurement, example, foretold
from hirelc_deploy.verify.profiling import tables_at

if TYPE_CHECKING:
    from hirelc_deploy.exporters._base import Arrays, Exported, Session
    from hirelc_deploy.graph.model_graph import ModelGraph
    from hirelc_deploy.profiles import Target
    from hirelc_deploy.rundir import RunFolder
    from hirelc_deploy.task import Task

ROUNDS_BADLY = 1e-3
"""Of the outputs' variance: what rounding one activation to 8 bits may change.  On the example networks the worst
tensor changes a tenth of that, most a thousandth."""

GRID = "grid/"
"""What the names of grids begin with, where they are saved beside weights."""

PREDICTION_SECONDS = 1.0
"""Spent on timing one policy's file beside the baseline."""


@dataclass(frozen=True)
class Compressed:
    """A policy made real, in PyTorch: norms folded, every weight on its grid."""

    model: nn.Module
    grids: Mapping[str, Grid]
    """Of every layer that is not stored in floats."""
    simulated_score: float
    """On the search split, under the number formats."""


@dataclass(frozen=True)
class Written:
    """The file of a policy, and what the choice of its activations' ranges went by."""

    file: "Exported"
    scores_by_ranges: Mapping[str, float]
    """On the search split, by method; the best is the file's.  Empty without int8 layers."""

    @property
    def note(self) -> str | None:
        """For people."""
        if not self.scores_by_ranges:
            return None
        each = ", ".join(f"{method} {score:.2f}" for method, score in self.scores_by_ranges.items())
        return f"ranges of activations by the score on the search split: {each}"


class Workbench:
    """Model, task and target of one run, and what was found out about them."""

    def __init__(
        self,
        model: nn.Module,
        task: "Task",
        graph: "ModelGraph",
        target: "Target",
        run: "RunFolder",
        *,
        importance: Method,
        fine_tuning: FineTuning,
        post_training: PostTraining,
        threads: int,
        batch: int,
        progress: Callable[[str, int], Any],
        target_spec: str | None = None,
        engine: Engine = in_turn,
    ) -> None:
        """`progress(what, steps)` gives a context manager that yields what is called after each step.

        `target_spec` is what the user named the target by: FILE.toml has its tables beside it.
        """
        self.model = model.eval()
        self.task = task
        self.graph = graph
        self.target = target
        self.run = run
        self.space = search_space(graph, target)
        self.runtime = load_runtime(target.runtime.name)
        self.largest = target.largest_code(target.flags(cpu_flags()))
        self._calibration = Calibration(task, fine_tuning.seed)
        self._threads = threads
        self._batch = batch
        self.progress = progress
        self.engine = engine
        self._skeletons: dict[frozenset[str], Any] = {}
        self.trainer = Trainer(
            self.model,
            task,
            graph,
            run,
            self._calibration,
            importance=importance,
            fine_tuning=fine_tuning,
            post_training=post_training,
            largest=self.largest,
            is_symmetric=self.runtime.is_symmetric,
            progress=progress,
        )
        here = Here(self.runtime, threads=threads)
        self.pricing = Pricing(target, tables_at(target_spec or target.name, target, here.where), here, progress)

    # -- what the search is handed ---------------------------------------------------------------------------

    def predict(self, policy: Policy) -> Figures:
        """Size, from the shapes alone, and latency, timed on a file with these shapes and untrained weights."""
        figures = self.run.step(f"predict/{policy.digest()}", lambda: self._price(policy))
        return Figures(**figures)

    def evaluate(self, policy: Policy) -> Evaluation:
        """The policy made real (`compressed`) and scored on the search split."""
        figures = self.predict(policy)
        score = self.compressed(policy).simulated_score
        drop = self.task.drop(self.original_score, score)
        return Evaluation(policy, replace(figures, drop=drop), score)

    @cached_property
    def original_score(self) -> float:
        """Of the original on the search split."""
        return self.run.step("original score", lambda: self._score(self._search_outputs(self.model)))

    # -- a policy made real ----------------------------------------------------------------------------------

    def compressed(self, policy: Policy) -> Compressed:
        """Channels removed, fine-tuned under the formats, norms folded, weights on their grids.

        From the journal if known.
        """
        name = policy.digest()
        saved = safetensors.torch.load(self.run.blob(f"weights/{name}", lambda: self._made(policy, name)))
        # a new model, so that a resumed run goes on with the very same tensors
        model = self.trainer.cut(policy)
        grids: dict[str, dict[str, Tensor]] = {}
        for key in [key for key in saved if key.startswith(GRID)]:
            layer, _, role = key.removeprefix(GRID).rpartition("/")
            grids.setdefault(layer, {})[role] = saved.pop(key)
        model.load_state_dict(saved)
        score = self.run.step(f"score/{name}", lambda: self._score(self.simulated_outputs(model, policy)))
        self.run.drop_state(name)
        return Compressed(model.eval(), grids, score)

    def _made(self, policy: Policy, name: str) -> bytes:
        """Weights and grids to be saved."""
        model, grids = self.trainer.trained(policy, name)
        tensors = dict(model.state_dict())
        for layer, grid in grids.items():
            tensors |= {f"{GRID}{layer}/{role}": values for role, values in grid.items()}
        return safetensors.torch.save(
            {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
        )

    def simulated_outputs(self, model: nn.Module, policy: Policy) -> accuracy.Outputs:
        """What a compressed model says of the search split under its number formats: the file, foreseen."""
        with self.trainer.simulated(model, policy, {}) as simulation:
            simulation.calibrate(self._calibration.tensors())
            return self._search_outputs(model)

    def _search_outputs(self, model: nn.Module) -> accuracy.Outputs:
        return accuracy.outputs(torch_session(model), self.task.search)[0]

    def _score(self, outputs: accuracy.Outputs) -> float:
        score = self.task.score(outputs, self.task.search.targets)
        if not math.isfinite(score):
            raise UserError(
                f"the score on the search split is {score}",
                fix="do the model's outputs hold NaN or infinity there? mend the model, the data or the task's score",
            )
        return score

    # -- what a search looks at ------------------------------------------------------------------------------

    def recovered_scores(self, policies: Sequence[Policy]) -> list[float]:
        """On the search split, after channels are gone, weights on their grids, and a short fine-tuning.

        What an evaluation is: the same for all policies, and seconds long.
        """
        new = {name: policy for policy in policies if (name := _recovery(policy)) not in self.run}
        scores = self.engine(self._recovered_score, list(new.values()))
        found = [self.run.step(_recovery(policy), lambda: next(scores)) for policy in policies]
        for name in new:
            self.run.drop_state(name)
        return found

    def _recovered_score(self, policy: Policy) -> float:
        return self._score(self.simulated_outputs(self.trainer.recovered(policy, _recovery(policy)), policy))

    def look_at(self, examples: int, batch: int) -> list[dict[str, Tensor]]:
        """The first train examples of those that are only looked at, in batches."""
        return list(self._calibration.first(examples, batch))

    # -- files -----------------------------------------------------------------------------------------------

    def write(self, model: nn.Module, policy: Policy, grids: Mapping[str, Grid]) -> "Written":
        """The artifact's file, of a model that has its norms folded and its weights on these grids.

        How ranges of activations are chosen is decided by the score of the file on the search split.
        """
        graph = self._float_graph(model)
        methods = self.runtime.range_methods if _computes_in(policy, *CALIBRATED) else ()
        if not methods:
            return Written(self._file(graph, policy, grids), {})
        seen = self._observed(graph, policy, self._calibration.arrays())
        # a resumed run writes the best alone
        file = cache(lambda method: self._file(graph, policy, grids, seen, method))
        found: dict[str, float] = self.run.step(
            f"ranges/{policy.digest()}", lambda: {method: self._file_score(file(method)) for method in methods}
        )
        # drop: the lower, the better, whatever the direction of the score; the first of equals
        best = min(found, key=lambda method: self.task.drop(self.original_score, found[method]))
        return Written(file(best), found)

    def _observed(self, graph: Any, policy: Policy, inputs: "Iterable[Arrays]") -> Any:
        """What activations span on these inputs."""
        return self.runtime.observe(graph, policy.precisions, inputs, floats=self._in_float(policy))

    def _file(
        self, graph: Any, policy: Policy, grids: Mapping[str, Grid], seen: Any = None, ranges: str = "min-max"
    ) -> "Exported":
        return self.runtime.write(
            graph,
            policy.precisions,
            grids,
            seen=seen,
            ranges=ranges,
            floats=self._in_float(policy),
            largest=self.largest,
            ir_version=self.target.runtime.ir_version,
            metadata=self.metadata,
        )

    def _file_score(self, file: "Exported") -> float:
        """Of a file, on the search split."""
        with self.loaded({"candidate": file}) as sessions:
            return self._score(accuracy.outputs(sessions["candidate"], self.task.search)[0])

    @contextmanager
    def loaded(self, files: Mapping[str, "Exported"]) -> "Iterator[dict[str, Session]]":
        """Files by name, ready to run until the end of the block."""
        with self._on_disk(files) as paths:
            yield self._sessions(paths)

    def _sessions(self, paths: "Mapping[str, Path]") -> "dict[str, Session]":
        return {name: self.runtime.load(path, threads=self._threads) for name, path in paths.items()}

    @contextmanager
    def _on_disk(self, files: Mapping[str, "Exported"]) -> "Iterator[dict[str, Path]]":
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: Path(folder) / f"{name}{self.runtime.suffix}" for name in files}
            for name, path in paths.items():
                path.write_bytes(files[name].data)
            yield paths

    @cached_property
    def _original_graph(self) -> Any:
        return self._float_graph(self.trainer.original)

    def write_baseline(self) -> "Exported":
        """The original in fp32, stripped in the same way."""
        return self.runtime.write(
            self._original_graph, {}, ir_version=self.target.runtime.ir_version, metadata=self.metadata
        )

    def write_halves(self) -> "Exported | None":
        """The original in fp16, stripped in the same way; None where the target does not compute in it."""
        policy = self._in_halves
        if policy is None:
            return None
        return self.runtime.write(
            self._original_graph, policy.precisions, ir_version=self.target.runtime.ir_version, metadata=self.metadata
        )

    @property
    def _in_halves(self) -> Policy | None:
        """All channels, and every layer in fp16 that can be."""
        able = [layer for layer, choices in self.space.layers.items() if FP16 in choices]
        return Policy(dict.fromkeys(able, FP16), {}) if able else None

    @property
    def metadata(self) -> dict[str, str]:
        """Written into every file."""
        return {"target": self.target.name, "tool": f"hirelc-deploy {__version__}"}

    def predicted_bytes(self, policy: Policy) -> int:
        """The artifact's size, told from shapes and formats before anything is pruned, trained or calibrated."""
        gone = frozenset(name for name, count in policy.keep.items() if count == 0)
        return self.runtime.predicted_bytes(
            self._skeleton(gone),
            shapes_after(self.graph, policy.keep),
            policy.precisions,
            floats=self._in_float(policy),
            ir_version=self.target.runtime.ir_version,
            metadata=self.metadata,
        )

    def _in_float(self, policy: Policy) -> frozenset[str]:
        """What stays in float between the policy's int8 layers: rounded to 8 bits it would change the outputs."""
        return self._floats_between if _computes_in(policy, Compute.INT8) else frozenset()

    @property
    def _floats_between(self) -> frozenset[str]:
        return frozenset(name for name, error in self.rounding_errors.between.items() if error > ROUNDS_BADLY)

    @property
    def _rounding_badly(self) -> frozenset[str]:
        """The layers whose inputs 8 bits do not hold."""
        return frozenset(layer for layer, error in self.rounding_errors.inputs.items() if error > ROUNDS_BADLY)

    def notes_on_latency(self, policy: Policy) -> tuple[str, ...]:
        """For people: the kernels that no table of a device has which is not this machine."""
        if self.pricing.is_device:
            return ()
        unknown = sorted(self.pricing.predictor(self.network.with_counts(policy.keep)).unknown)
        if not unknown:
            return ()
        return (
            f"the table of {self.target.name} lacks {len(unknown)} of the kernels that the network can become, and "
            f"a roofline answered for them: {text.listed(unknown)}",
        )

    def notes_on_rounding(self, policy: Policy) -> tuple[str, ...]:
        """For people: the activations of int8 layers that 8 bits do not hold, and what became of them."""
        if not _computes_in(policy, Compute.INT8):
            return ()
        errors = self.rounding_errors
        left = [(errors.between[name], f"{name} stays in float") for name in sorted(self._in_float(policy))]
        better_off = [
            (errors.inputs[layer], f"what {layer} reads would be better off in float (compute=fp32 for that layer)")
            for layer, precision in policy.precisions.items()
            if precision.compute is Compute.INT8 and layer in self._rounding_badly
        ]
        return tuple(
            f"{what}: rounding it to 8 bits changes the outputs by {100 * error:.2g} % of their variance"
            for error, what in (*left, *better_off)
        )

    @cached_property
    def rounding_errors(self) -> RoundingErrors:
        """Of the original's activations, each alone, on a few train examples."""
        found = self.run.step("rounding errors", lambda: asdict(self._rounding_errors()))
        return RoundingErrors(**found)

    def _rounding_errors(self) -> RoundingErrors:
        in_integers = {name: INT8 for name, offered in self.space.layers.items() if INT8 in offered}
        examples = [{name: tensor.numpy() for name, tensor in batch.items()} for batch in self._calibration.few()]
        return self.runtime.rounding_errors(self._original_graph, in_integers, examples)

    def _skeleton(self, gone: frozenset[str]) -> Any:
        """The float graph without these branches, everything else at full width."""
        if gone not in self._skeletons:
            self._skeletons[gone] = self._float_graph(self.trainer.cut(Policy({}, dict.fromkeys(gone, 0))))
        return self._skeletons[gone]

    def _float_graph(self, model: nn.Module) -> Any:
        return self.runtime.float_graph(model, self.task.example, opset=self.target.runtime.opset)

    def draft(self, policy: Policy) -> "Exported":
        """A file with the policy's shapes and formats and untrained weights: it weighs and runs like the real one."""
        model = self.trainer.cut(policy)
        grids = fitted(model, policy.precisions, {}, largest=self.largest)
        put_on(model, policy.precisions, grids, largest=self.largest)
        return self._drafted(self._float_graph(model), policy, grids)

    def _drafted(self, graph: Any, policy: Policy, grids: Mapping[str, Grid]) -> "Exported":
        """A file whose ranges are those of one example: neither bytes nor speed depend on them."""
        return self._file(graph, policy, grids, self._observed(graph, policy, [example(self.task, 1)]))

    def fastest_computes(self, keep: Mapping[str, int]) -> dict[str, Compute]:
        """What each layer computes in so that the network is fastest with these counts of units.

        The predictor says, from kernels that are measured now if no table has them; its answer and all layers alike
        are then timed, and the fastest file wins.  Integers are left out for a layer whose input 8 bits do not hold.
        """
        found = self.run.step(f"fastest/{Policy({}, keep).digest()}", lambda: self._fastest(keep))
        return {layer: Compute(compute) for layer, compute in found.items()}

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
        times_ms = self._times(keep, candidates)
        return candidates[min(range(len(candidates)), key=times_ms.__getitem__)]

    @cached_property
    def computes_allowed(self) -> dict[str, tuple[Compute, ...]]:
        """What each layer and those that share its weight may compute in, fp32 first."""
        return {layer: self._allowed(layer) for layer in self.space.layers}

    def _allowed(self, layer: str) -> tuple[Compute, ...]:
        together = (layer, *self.graph.layer[layer].shares_weight_with)
        if not self._rounding_badly.isdisjoint(together):
            return (Compute.FP32,)
        computes = self.space.computes
        return tuple(c for c in computes[layer] if all(c in computes[twin] for twin in together))

    @cached_property
    def network(self) -> Network:
        """What the runtime makes of the network, as a function of the policy."""
        return self.runtime.network(
            self._skeleton(frozenset()),
            self.graph,
            self.space.computes,
            self.space.groups,
            batch=self._batch,
            floats=self._floats_between,
        )

    def times_ms(self, policies: Sequence[Policy]) -> list[float] | None:
        """Of the policies' files, side by side, in units of the target's tables; None where those are empty."""
        with self.loaded({str(i): self.draft(policy) for i, policy in enumerate(policies)}) as sessions:
            seen = timing.interleave(sessions, example(self.task, self._batch), seconds=PREDICTION_SECONDS)
        unit = self.pricing.unit()
        return None if unit is None else [each.p50_ms(timing.clock_for(self._threads)) * unit for each in seen.values()]

    def learn(self, policy: Policy, latency_ms: float) -> bool:
        """Let a file that was measured just now correct the predictor, if the target's tables have its kernels.

        Returns whether it was learned from.
        """
        unit = self.pricing.unit()
        return unit is not None and self.pricing.learn(self.network.with_counts(policy.keep), policy, latency_ms * unit)

    def as_foretold(self, seen: Measurement, policy: Policy) -> Measurement:
        """What was measured here of a file whose target is another device: with the latencies that were predicted."""
        told = self.predict(policy)
        assert told.latency_ms is not None
        assert told.speedup is not None
        return foretold(
            seen,
            told.latency_ms * told.speedup,
            told.latency_ms,
            halves_ms=None if self._in_halves is None else self._foretold_ms(self._in_halves),
            is_final=not self.runtime.builds_on_device,
        )

    def _foretold_ms(self, policy: Policy) -> float:
        return float(self.pricing.predictor(self.network.with_counts(policy.keep)).foretell([policy]).ms[0])

    def _times(self, keep: Mapping[str, int], candidates: Sequence[Mapping[str, Compute]]) -> list[float]:
        """Milliseconds of the network with these counts in each of these computes, side by side, in 8 bits."""
        model = self.trainer.cut(Policy({}, keep))
        graph = self._float_graph(model)
        grids = fitted(model, dict.fromkeys(self.space.layers, INT8), {}, largest=self.largest)

        def file(computes: Mapping[str, Compute]) -> "Exported":
            in_integers = {name: c for name, c in computes.items() if c is not Compute.FP32}
            policy = Policy({name: Precision(INT8.storage, c) for name, c in in_integers.items()}, keep)
            return self._drafted(graph, policy, grids)

        with self.loaded({str(i): file(computes) for i, computes in enumerate(candidates)}) as sessions:
            seen = timing.interleave(sessions, example(self.task, self._batch), seconds=PREDICTION_SECONDS)
        return [each.p50_ms(timing.clock_for(self._threads)) for each in seen.values()]

    def _price(self, policy: Policy) -> dict[str, Any]:
        if not self.pricing.is_device:
            before, after = (self._foretold_ms(each) for each in (Policy({}, {}), policy))
            return {"size_bytes": self.predicted_bytes(policy), "latency_ms": after, "speedup": before / after}
        inputs = example(self.task, self._batch)
        with self._on_disk({"baseline": self.write_baseline(), "policy": self.draft(policy)}) as paths:
            times = timing.interleave(self._sessions(paths), inputs, seconds=PREDICTION_SECONDS)
            needs = self.runtime.footprint(paths["policy"], inputs, threads=self._threads)
        clock = timing.clock_for(self._threads)
        speedup = timing.ratio(times["baseline"], times["policy"], clock=clock)
        return {
            "size_bytes": self.predicted_bytes(policy),
            # one thread's CPU time is its wall clock on an idle machine, and close to that on a busy one
            "latency_ms": times["policy"].p50_ms(clock),
            "speedup": speedup.value,
            "memory_bytes": None if needs is None else needs.memory_bytes,
        }


def _recovery(policy: Policy) -> str:
    """Names the step, and the states of its training."""
    return f"recovery/{policy.digest()}"


def _computes_in(policy: Policy, *computes: Compute) -> bool:
    """Whether any layer does so in one of these."""
    return any(precision.compute in computes for precision in policy.precisions.values())


def torch_session(model: nn.Module) -> Callable[["Arrays"], dict[str, Any]]:
    """The model as a function of arrays, in eval mode."""

    @torch.inference_mode()
    def run(inputs: "Arrays") -> dict[str, Any]:
        return {name: output.numpy() for name, output in forward(model.eval(), as_tensors(inputs)).items()}

    return run
