"""The files that a network becomes on its target: foreseen by their bytes, drafted, written, loaded."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hirelc_deploy import __version__
from hirelc_deploy.compress.grids import fitted, put_on
from hirelc_deploy.exporters._base import RoundingErrors
from hirelc_deploy.graph import shapes_after
from hirelc_deploy.kernels._base import Grid
from hirelc_deploy.policy import CALIBRATED, FP16, INT8, Compute, Policy
from hirelc_deploy.verify.measure import example

if TYPE_CHECKING:
    from hirelc_deploy.calibration import Calibration
    from hirelc_deploy.exporters._base import Adviser, Arrays, Exported, Floats, Session
    from hirelc_deploy.scoring import Scoring
    from hirelc_deploy.search.space import SearchSpace
    from hirelc_deploy.subject import Subject
    from hirelc_deploy.trainer import Trainer

ROUNDS_BADLY = 1e-3
"""Of the outputs' variance: what rounding one activation to 8 bits may change.  On the example networks the worst
tensor changes a tenth of that, most a thousandth."""


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


class Files:
    """Writes the files of one network's policies for one target."""

    def __init__(
        self,
        subject: "Subject",
        trainer: "Trainer",
        scoring: "Scoring",
        calibration: "Calibration",
        *,
        adviser: "Adviser | None" = None,
    ) -> None:
        """An adviser says what fp16 does not hold, instead of what is seen."""
        self._subject = subject
        self._adviser = adviser
        self._runtime = subject.runtime
        self._trainer = trainer
        self._scoring = scoring
        self._calibration = calibration
        self._skeletons: dict[frozenset[str], Any] = {}

    # -- of a policy that was made real ----------------------------------------------------------------------

    def write(self, model: nn.Module, policy: Policy, grids: Mapping[str, Grid]) -> Written:
        """The artifact's file, of a model that has its norms folded and its weights on these grids.

        How ranges of activations are chosen is decided by the score of the file on the search split.
        """
        graph = self.float_graph(model)
        methods = self._runtime.range_methods if _computes_in(policy, *CALIBRATED) else ()
        if not methods:
            return Written(self._file(graph, policy, grids), {})
        seen = self._observed(graph, policy, self._calibration.arrays())
        # a resumed run writes the best alone
        file = cache(lambda method: self._file(graph, policy, grids, seen, method))
        found: dict[str, float] = self._subject.run.step(
            f"ranges/{policy.digest()}", lambda: {method: self._score(file(method)) for method in methods}
        )
        # drop: the lower, the better, whatever the direction of the score; the first of equals
        best = min(found, key=lambda method: self._scoring.drop(found[method]))
        return Written(file(best), found)

    def _observed(self, graph: Any, policy: Policy, inputs: "Iterable[Arrays]") -> Any:
        """What activations span on these inputs."""
        return self._runtime.observe(graph, policy.precisions, inputs, floats=self._in_float(policy))

    def _file(
        self, graph: Any, policy: Policy, grids: Mapping[str, Grid], seen: Any = None, ranges: str = "min-max"
    ) -> "Exported":
        return self._runtime.write(
            graph,
            policy.precisions,
            grids,
            seen=seen,
            ranges=ranges,
            floats=self._in_float(policy),
            largest=self._subject.largest,
            ir_version=self._subject.target.runtime.ir_version,
            metadata=self._metadata,
        )

    def _score(self, file: "Exported") -> float:
        """Of a file, on the search split."""
        with self.loaded({"candidate": file}) as sessions:
            return self._scoring.of_file(sessions["candidate"])

    @property
    def _metadata(self) -> dict[str, str]:
        """Written into every file."""
        return {"target": self._subject.target.name, "tool": f"hirelc-deploy {__version__}"}

    # -- of the original -------------------------------------------------------------------------------------

    def baseline(self) -> "Exported":
        """The original in fp32, stripped in the same way."""
        return self._of_original({})

    def halves(self) -> "Exported | None":
        """The original in fp16, stripped in the same way; None where the target does not compute in it."""
        return None if self.in_halves is None else self._of_original(self.in_halves.precisions)

    @property
    def in_halves(self) -> Policy | None:
        """All channels, and every layer in fp16 that can be; None where none can."""
        able = [layer for layer, choices in self.space.layers.items() if FP16 in choices]
        return Policy(dict.fromkeys(able, FP16), {}) if able else None

    def _of_original(self, precisions: Mapping[str, Any]) -> "Exported":
        return self._runtime.write(
            self._original_graph,
            precisions,
            floats=self._in_float(Policy(precisions, {})),
            ir_version=self._subject.target.runtime.ir_version,
            metadata=self._metadata,
        )

    @cached_property
    def _original_graph(self) -> Any:
        return self.float_graph(self._trainer.original)

    # -- before anything is trained --------------------------------------------------------------------------

    def predicted_bytes(self, policy: Policy) -> int:
        """The artifact's size, told from shapes and formats before anything is pruned, trained or calibrated."""
        return len(self.foreseen(policy))

    def foreseen(self, policy: Policy) -> bytes:
        """A file like the artifact's in length and nodes; its values mean nothing."""
        return self._runtime.foreseen(
            self.skeleton(frozenset(name for name, count in policy.keep.items() if count == 0)),
            shapes_after(self._subject.graph, policy.keep),
            policy.precisions,
            floats=self._in_float(policy),
            ir_version=self._subject.target.runtime.ir_version,
            metadata=self._metadata,
        )

    def draft(self, policy: Policy) -> "Exported":
        """A file with the policy's shapes and formats and untrained weights: it weighs and runs like the real one."""
        model = self._trainer.cut(policy)
        grids = fitted(model, policy.precisions, {}, largest=self._subject.largest)
        put_on(model, policy.precisions, grids, largest=self._subject.largest)
        return self.drafted(self.float_graph(model), policy, grids)

    def drafted(self, graph: Any, policy: Policy, grids: Mapping[str, Grid]) -> "Exported":
        """A file whose ranges are those of one example: neither bytes nor speed depend on them."""
        return self._file(graph, policy, grids, self._observed(graph, policy, [example(self._subject.task, 1)]))

    def skeleton(self, gone: frozenset[str] = frozenset()) -> Any:
        """The float graph without these branches, everything else at full width."""
        if gone not in self._skeletons:
            self._skeletons[gone] = self.float_graph(self._trainer.cut(Policy({}, dict.fromkeys(gone, 0))))
        return self._skeletons[gone]

    def float_graph(self, model: nn.Module) -> Any:
        """A model as the runtime's files are made of it.

        What is cut and is no layer's (a table of positions with a column a head) has the shape that is foreseen only as
        it is itself.
        """
        graph = self._subject.graph
        cut = {axis.tensor for group in graph.groups for axis in group.axes}
        return self._runtime.float_graph(
            model,
            self._subject.task.example,
            opset=self._subject.target.runtime.opset,
            unfolded={name for name in cut if name.rpartition(".")[0] not in graph.layer},
        )

    # -- ready to run ----------------------------------------------------------------------------------------

    @contextmanager
    def loaded(self, files: Mapping[str, "Exported"]) -> "Iterator[dict[str, Session]]":
        """Files by name, ready to run until the end of the block."""
        with self.on_disk(files) as paths:
            yield self.sessions(paths)

    @contextmanager
    def on_disk(self, files: Mapping[str, "Exported"]) -> "Iterator[dict[str, Path]]":
        """Where the files lie until the end of the block."""
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: Path(folder) / f"{name}{self._runtime.suffix}" for name in files}
            for name, path in paths.items():
                path.write_bytes(files[name].data)
            yield paths

    def sessions(self, paths: "Mapping[str, Path]") -> "dict[str, Session]":
        """Files that lie there, ready to run."""
        return {name: self._runtime.load(path, threads=self._subject.threads) for name, path in paths.items()}

    # -- what few bits do not hold ----------------------------------------------------------------------------

    @cached_property
    def space(self) -> "SearchSpace":
        """What may be chosen: of target and network, but for layers that fp16 ruins, which compute in fp32."""
        whole = self._subject.space
        layers = {
            layer: tuple(each for each in choices if layer not in self.needing_fp32 or each.compute is Compute.FP32)
            for layer, choices in whole.layers.items()
        }
        return replace(whole, layers=layers)

    @cached_property
    def needing_fp32(self) -> Mapping[str, str]:
        """The layers, and operators between them, of the original that fp16 ruins, and why; none where there is no
        fp16."""
        if not any(FP16 in choices for choices in self._subject.space.layers.values()):
            return {}
        found: dict[str, str] = self._subject.run.step("needing fp32", self._needing_fp32)
        return found

    def _needing_fp32(self) -> dict[str, str]:
        return self._runtime.needing_fp32(
            self._original_graph, self._few_arrays(), bearable=ROUNDS_BADLY, adviser=self._adviser
        )

    @cached_property
    def rounding_errors(self) -> RoundingErrors:
        """Of the original's activations, each alone, on a few train examples."""
        found = self._subject.run.step("rounding errors", lambda: asdict(self._rounding_errors()))
        return RoundingErrors(**found)

    def _rounding_errors(self) -> RoundingErrors:
        in_integers = {name: INT8 for name, offered in self._subject.space.layers.items() if INT8 in offered}
        return self._runtime.rounding_errors(self._original_graph, in_integers, self._few_arrays())

    def _few_arrays(self) -> "list[Arrays]":
        return [{name: tensor.numpy() for name, tensor in batch.items()} for batch in self._calibration.few()]

    @property
    def floats(self) -> "Floats":
        """What may have to compute in floats between int8 layers, since 8 bits would change the outputs, or in fp32
        among halves."""
        return self._beside_integers | self._beside_halves

    @property
    def rounding_badly(self) -> frozenset[str]:
        """The layers whose inputs 8 bits do not hold."""
        return frozenset(layer for layer, error in self.rounding_errors.inputs.items() if error > ROUNDS_BADLY)

    def notes_on_rounding(self, policy: Policy) -> tuple[str, ...]:
        """For people: what 8 bits or halves do not hold, and what became of it."""
        return (*self._notes_on_integers(policy), *self._notes_on_halves(policy))

    def _notes_on_integers(self, policy: Policy) -> Iterator[str]:
        if not _computes_in(policy, Compute.INT8):
            return
        errors = self.rounding_errors
        left = [(errors.between[name], f"{name} stays in float") for name in sorted(self._beside_integers)]
        better_off = [
            (errors.inputs[layer], f"what {layer} reads would be better off in float (compute=fp32 for that layer)")
            for layer, precision in policy.precisions.items()
            if precision.compute is Compute.INT8 and layer in self.rounding_badly
        ]
        for error, what in (*left, *better_off):
            yield f"{what}: rounding it to 8 bits changes the outputs by {100 * error:.2g} % of their variance"

    def _notes_on_halves(self, policy: Policy) -> Iterator[str]:
        if not _computes_in_less_than_fp32(policy):
            return
        for name, why in sorted(self.needing_fp32.items()):
            given = policy.precisions.get(name)
            if given is None or given.compute is Compute.FP32:
                yield f"{name} computes in fp32: {why}"
            else:
                yield f"{name} computes in {given.compute}, and would be better off in fp32: {why}"

    @property
    def _beside_integers(self) -> dict[str, Compute]:
        found = (name for name, error in self.rounding_errors.between.items() if error > ROUNDS_BADLY)
        return dict.fromkeys(found, Compute.FP16 if self.in_halves else Compute.FP32)

    @property
    def _beside_halves(self) -> dict[str, Compute]:
        return dict.fromkeys((name for name in self.needing_fp32 if name not in self.space.layers), Compute.FP32)

    def _in_float(self, policy: Policy) -> "Floats":
        found = self._beside_integers if _computes_in(policy, Compute.INT8) else {}
        return found | self._beside_halves if _computes_in_less_than_fp32(policy) else found


def _computes_in(policy: Policy, *computes: Compute) -> bool:
    """Whether any layer does so in one of these."""
    return any(precision.compute in computes for precision in policy.precisions.values())


def _computes_in_less_than_fp32(policy: Policy) -> bool:
    return any(precision.compute is not Compute.FP32 for precision in policy.precisions.values())
