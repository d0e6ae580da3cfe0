"""A network on its target: what a policy would cost, what it scores, and what it becomes.

`predict` and `evaluate` are the two functions that a search is handed.  Everything slow is journalled in the
run folder before it is used, so that a run that was killed goes on with the same figures and weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from hirelc_deploy.budget import Figures
from hirelc_deploy.calibration import Calibration
from hirelc_deploy.compress.distil import FineTuning
from hirelc_deploy.compress.importance import Measure
from hirelc_deploy.compress.posttraining import PostTraining
from hirelc_deploy.files import Files
from hirelc_deploy.kernels._base import Grid
from hirelc_deploy.latencies import Latencies
from hirelc_deploy.policy import Policy
from hirelc_deploy.pool import Engine, in_turn
from hirelc_deploy.pricing import Pricing
from hirelc_deploy.scoring import Scoring
from hirelc_deploy.search.space import Evaluation
from hirelc_deploy.subject import Subject
from hirelc_deploy.trainer import Trainer
from hirelc_deploy.verify import accuracy
from hirelc_deploy.verify.machines import Here
from hirelc_deploy.verify.profiling import tables_at

if TYPE_CHECKING:
    from hirelc_deploy.exporters._base import Adviser
    from hirelc_deploy.graph.model_graph import ModelGraph
    from hirelc_deploy.profiles import Target
    from hirelc_deploy.rundir import RunFolder
    from hirelc_deploy.search.space import SearchSpace
    from hirelc_deploy.task import Task

GRID = "grid/"
"""What the names of grids begin with, where they are saved beside weights."""


@dataclass(frozen=True)
class Compressed:
    """A policy made real, in PyTorch: norms folded, every weight on its grid."""

    model: nn.Module
    grids: Mapping[str, Grid]
    """Of every layer that is not stored in floats."""
    simulated_score: float
    """On the search split, under the number formats."""


class Workbench:
    """Model, task and target of one run, and who works on them: trainer, scoring, files and latencies."""

    def __init__(
        self,
        model: nn.Module,
        task: "Task",
        graph: "ModelGraph",
        target: "Target",
        run: "RunFolder",
        *,
        importance: Measure,
        fine_tuning: FineTuning,
        post_training: PostTraining,
        threads: int,
        batch: int,
        progress: Callable[[str, int], Any],
        target_spec: str | None = None,
        engine: Engine = in_turn,
        adviser: "Adviser | None" = None,
    ) -> None:
        """`progress(what, steps)` gives a context manager that yields what is called after each step.

        `target_spec` is what the user named the target by: FILE.toml has its tables beside it.  An adviser says what
        fp16 does not hold.
        """
        subject = Subject(model.eval(), task, graph, target, run, threads=threads, batch=batch)
        self.model, self.task, self.graph, self.target, self.run = model, task, graph, target, run
        self.runtime, self.largest = subject.runtime, subject.largest
        self.progress = progress
        self.engine = engine
        self.calibration = Calibration(task, fine_tuning.seed)
        self.scoring = Scoring(subject)
        self.trainer = Trainer(
            model,
            task,
            graph,
            run,
            self.calibration,
            importance=importance,
            fine_tuning=fine_tuning,
            post_training=post_training,
            largest=self.largest,
            is_symmetric=self.runtime.is_symmetric,
            progress=progress,
        )
        self.files = Files(subject, self.trainer, self.scoring, self.calibration, adviser=adviser)
        here = Here(self.runtime, threads=threads)
        self.pricing = Pricing(target, tables_at(target_spec or target.name, target, here.where), here, progress)
        self.latencies = Latencies(subject, self.files, self.pricing, self.trainer)

    @property
    def space(self) -> "SearchSpace":
        """What may be chosen."""
        return self.files.space

    # -- what the search is handed ---------------------------------------------------------------------------

    def predict(self, policy: Policy) -> Figures:
        """Size, from the shapes alone, and latency, timed on a file with these shapes and untrained weights."""
        figures = self.run.step(f"predict/{policy.digest()}", lambda: self.latencies.price(policy))
        return Figures(**figures)

    def evaluate(self, policy: Policy) -> Evaluation:
        """The policy made real (`compressed`) and scored on the search split."""
        figures = self.predict(policy)
        score = self.compressed(policy).simulated_score
        return Evaluation(policy, replace(figures, drop=self.scoring.drop(score)), score)

    # -- a policy made real ----------------------------------------------------------------------------------

    def compressed(self, policy: Policy) -> Compressed:
        """Channels removed, fine-tuned under the formats, norms folded, weights on their grids.

        From the journal if known.
        """
        name = policy.digest()
        made = self.run.blob(
            f"weights/{name}", lambda: self.run.load_state(_ahead(name)) or self._made(policy, name, self.trainer)
        )
        self.run.drop_state(_ahead(name))
        saved = safetensors.torch.load(made)
        # a new model, so that a resumed run goes on with the very same tensors
        model = self.trainer.cut(policy)
        grids: dict[str, dict[str, Tensor]] = {}
        for key in [key for key in saved if key.startswith(GRID)]:
            layer, _, role = key.removeprefix(GRID).rpartition("/")
            grids.setdefault(layer, {})[role] = saved.pop(key)
        model.load_state_dict(saved)
        score = self.run.step(f"score/{name}", lambda: self.scoring.of(self.simulated_outputs(model, policy)))
        self.run.drop_state(name)
        return Compressed(model.eval(), grids, score)

    def compress_ahead(self, policies: Sequence[Policy]) -> None:
        """Make policies side by side, if there are processes for it, so that `compressed` finds them.

        Not those that keep all channels: what corrects these is journalled, and only this process may do that.
        """
        smaller = [each for each in policies if self.trainer.is_smaller(each)]
        # alone it has all threads, and is seen to go on; by what is asked for and not by what is left of it, since the
        # number of threads decides the weights, and those of a resumed run are the same
        if len(smaller) < 2 or self.engine.at_once < 2:
            return
        new = [each for each in smaller if self._has_to_be_made(each.digest())]
        if not new:
            return
        self.trainer.get_ready()
        with self.progress("fine-tuning side by side", len(new)) as advance:
            for _ in self.engine(self._made_ahead, new):
                advance()

    def _has_to_be_made(self, name: str) -> bool:
        return not self.run.has_blob(f"weights/{name}") and self.run.load_state(_ahead(name)) is None

    def _made_ahead(self, policy: Policy) -> float:
        """In another process, which cannot write the journal: left as a state, and nothing to tell."""
        name = policy.digest()
        self.run.save_state(_ahead(name), self._made(policy, name, self.trainer.quietly()))
        return 0.0

    def _made(self, policy: Policy, name: str, trainer: Trainer) -> bytes:
        """Weights and grids to be saved."""
        model, grids = trainer.trained(policy, name)
        tensors = dict(model.state_dict())
        for layer, grid in grids.items():
            tensors |= {f"{GRID}{layer}/{role}": values for role, values in grid.items()}
        return safetensors.torch.save(
            {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
        )

    def simulated_outputs(self, model: nn.Module, policy: Policy) -> accuracy.Outputs:
        """What a compressed model says of the search split under its number formats: the file, foreseen."""
        with self.trainer.simulated(model, policy, {}) as simulation:
            simulation.calibrate(self.calibration.tensors())
            return self.scoring.outputs(model)

    # -- what a search looks at ------------------------------------------------------------------------------

    def recovered_scores(self, policies: Sequence[Policy]) -> list[float]:
        """On the search split, after channels are gone, weights on their grids, and a short fine-tuning.

        What an evaluation is: the same for all policies, and seconds long.
        """
        new = {name: policy for policy in policies if (name := _recovery(policy)) not in self.run}
        if any(map(self.trainer.is_smaller, new.values())):
            self.trainer.get_ready()
        scores = self.engine(self._recovered_score, list(new.values()))
        found = [self.run.step(_recovery(policy), lambda: next(scores)) for policy in policies]
        for name in new:
            self.run.drop_state(name)
        return found

    def _recovered_score(self, policy: Policy) -> float:
        return self.scoring.of(self.simulated_outputs(self.trainer.recovered(policy, _recovery(policy)), policy))

    def score_anew(self, policy: Policy) -> float:
        """The same of one policy whose weights are drawn anew: trained as long towards the same outputs."""
        name = f"anew/{policy.digest()}"
        score = self.run.step(
            name, lambda: self.scoring.of(self.simulated_outputs(self._anew.recovered(policy, name), policy))
        )
        self.run.drop_state(name)
        return score

    @cached_property
    def _anew(self) -> Trainer:
        return self.trainer.anew()

    def look_at(self, examples: int, batch: int) -> list[dict[str, Tensor]]:
        """The first train examples of those that are only looked at, in batches."""
        return list(self.calibration.first(examples, batch))


def _ahead(name: str) -> str:
    """Names the state that holds what another process has made of a policy."""
    return f"ahead/{name}"


def _recovery(policy: Policy) -> str:
    """Names the step, and the states of its training."""
    return f"recovery/{policy.digest()}"
