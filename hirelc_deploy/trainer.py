"""Policies made real in PyTorch: channels removed, formats fitted, the network trained under them, norms folded.

In full for what may be shipped (`trained`), for seconds for what a search asks about (`recovered`).
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hirelc_deploy.calibration import Calibration
from hirelc_deploy.compress.batchnorm import reestimate
from hirelc_deploy.compress.compensate import Moments, compensate, moments, staying
from hirelc_deploy.compress.distil import FineTuning, Teacher, as_tensors, distil, loss_of
from hirelc_deploy.compress.fold import Pairs, fold, foldable, present
from hirelc_deploy.compress.grids import fitted, put_on
from hirelc_deploy.compress.importance import Measure, scores
from hirelc_deploy.compress.inputs import energies
from hirelc_deploy.compress.posttraining import PostTraining, post_train
from hirelc_deploy.compress.prune import Kept, Pruned, prune
from hirelc_deploy.compress.simulate import Simulation, put_on_unfolded, simulated
from hirelc_deploy.copying import copied
from hirelc_deploy.kernels._base import Grid
from hirelc_deploy.policy import QUANTIZE_FIRST, Policy

if TYPE_CHECKING:
    from hirelc_deploy.graph.model_graph import ModelGraph
    from hirelc_deploy.rundir import RunFolder
    from hirelc_deploy.task import Task

Learning = tuple["Task", Teacher]
"""Whose train split is learned from, and what the original says of it."""

TAYLOR_BATCHES = 8

RECOVERY_EXAMPLES, RECOVERY_BATCH = 4096, 32
"""Train examples of an evaluation's fine-tuning, which sees each of them once.  In small batches: many steps mend more
than smooth ones (8,192 examples leave `small14` at half its width a drop of 3.2 points, in batches of 128 of 5.7)."""


def _unseen(detail: str = "") -> None:
    """Of a step of training that nobody is shown."""


class Trainer:
    """One network, and how its copies are cut, rounded and trained."""

    def __init__(
        self,
        model: nn.Module,
        task: "Task",
        graph: "ModelGraph",
        run: "RunFolder",
        calibration: Calibration,
        *,
        importance: Measure,
        fine_tuning: FineTuning,
        post_training: PostTraining,
        largest: int,
        is_symmetric: bool,
        progress: Callable[[str, int], Any],
    ) -> None:
        """`run` holds the states of a training that was interrupted; `largest` bounds the integers of int8 layers, and
        `is_symmetric` says whether the runtime has activations around nought; `progress` as in `Workbench`."""
        self._model = model
        self._start = model  # whose weights policies begin with
        self._compensates = True
        self._task = task
        self._graph = graph
        self._run = run
        self._calibration = calibration
        self._importance = importance
        self._fine_tuning = fine_tuning
        self._post_training = post_training
        self._largest = largest
        self._is_symmetric = is_symmetric
        self._progress = progress
        self._recoveries: dict[tuple[int, int], Learning] = {}

    def quietly(self) -> "Trainer":
        """The same for a process beside this one, which shows nothing."""
        found = copy.copy(self)
        found._progress = lambda *_: nullcontext(_unseen)
        return found

    def get_ready(self) -> None:
        """See what every policy with fewer channels needs: once, and not in each copy of this process."""
        if self._compensates:
            _ = self._moments
        _ = self._scores

    def anew(self) -> "Trainer":
        """The same for weights that are drawn anew, from which nothing is saved when channels go."""
        found = self.starting_from(drawn_anew(self._model, self._fine_tuning.seed))
        found._compensates, found._importance = False, "l2"
        return found

    def starting_from(self, start: nn.Module) -> "Trainer":
        """The same for other weights of the network, in eval mode, which learn from the original all the same."""
        found = copy.copy(self)
        for known in ("_scores", "_moments"):  # those of the weights before
            found.__dict__.pop(known, None)
        found._start = start
        return found

    # -- without training ------------------------------------------------------------------------------------

    @property
    def original(self) -> nn.Module:
        """A copy of the network as it was trained, norms folded."""
        return self._folded(self._model)

    def cut(self, policy: Policy) -> nn.Module:
        """A copy with the policy's channels, norms folded, and not trained."""
        return self._folded(self._cut(policy).model)

    def settled(self, policy: Policy) -> nn.Module:
        """The same with its statistics estimated again."""
        model = self._pruned(policy).model
        reestimate(model, self._calibration.few())
        return self._folded(model)

    def kept(self, policy: Policy) -> Mapping[str, tuple[int, ...]]:
        """The units of each group that stay."""
        return self._cut(policy).kept

    def simulated(
        self, model: nn.Module, policy: Policy, grids: Mapping[str, Grid], norms: Pairs | None = None
    ) -> AbstractContextManager[Simulation]:
        """The arithmetic of the runtime's file on a model, until the end of the block."""
        return simulated(
            model,
            policy.precisions,
            grids,
            largest=self._largest,
            norms=norms,
            is_symmetric=self._is_symmetric,
        )

    # -- in full ---------------------------------------------------------------------------------------------

    def trained(self, policy: Policy, name: str) -> tuple[nn.Module, dict[str, Grid]]:
        """The policy's network, norms folded, every weight on its grid, and the grids; `name` is that of its states.

        Fine-tuned, or without epochs corrected.
        """
        pruned = self._pruned(policy)
        epochs = self._fine_tuning.epochs
        if not epochs:
            return self._corrected(pruned, policy)
        if policy.order == QUANTIZE_FIRST and self.is_smaller(policy):
            first = replace(self._fine_tuning, epochs=epochs // 2)
            second = replace(self._fine_tuning, epochs=epochs - epochs // 2)
            model, grids = self._quantised_first(policy, name, (first, None), (second, None))
        else:
            model, grids = self._fine_tuned(pruned, policy, name)
        put_on(model, policy.precisions, grids, largest=self._largest)
        return model, grids

    def _fine_tuned(self, pruned: Pruned, policy: Policy, name: str) -> tuple[nn.Module, dict[str, Grid]]:
        """Trained under the formats.

        With all channels there, a network that was corrected is near where it should be: it is trained from there, as
        it will be stored.  Once channels are gone there is much to learn, and BatchNorm helps with it.
        """
        if not self.is_smaller(policy):
            model, grids = self._corrected(pruned, policy)
            if grids:
                grids = self._distilled(model, policy, grids, {}, self._fine_tuning, name)
            return model, grids
        return self._relearned(pruned.model, policy, self._fine_tuning, name)

    def _relearned(
        self, model: nn.Module, policy: Policy, settings: FineTuning, name: str, learning: "Learning | None" = None
    ) -> tuple[nn.Module, dict[str, Grid]]:
        """What channels were taken from: statistics estimated again, formats fitted, trained, norms folded."""
        reestimate(model, self._calibration.tensors())
        norms = present(self._norms, model)
        grids = self._fitted(model, policy, norms)
        grids = self._distilled(model, policy, grids, norms, settings, name, learning)
        return self._folded(model), grids

    def _quantised_first(
        self, policy: Policy, name: str, *stages: "tuple[FineTuning, Learning | None]"
    ) -> tuple[nn.Module, dict[str, Grid]]:
        """Formats are fitted and trained on the whole network, what its quantised weights need least is removed, and
        formats are fitted and trained again; a stage of fine-tuning for each."""
        (first, learn_first), (second, learn_second) = stages
        whole = copied(self._start)
        norms = present(self._norms, whole)
        grids = self._fitted(whole, policy, norms)
        if first.epochs and grids:
            grids = self._distilled(whole, policy, grids, norms, first, f"{name}/whole", learn_first)
            self._run.drop_state(f"{name}/whole")
        put_on_unfolded(whole, policy.precisions, grids, largest=self._largest, norms=norms)
        seen = self._moments_of(whole)
        scored = self._scores_of(whole, seen)
        model = prune(whole, self._graph, policy, scored, before=self._compensation(seen)).model
        return self._relearned(model, policy, second, name, learn_second)

    def _distilled(
        self,
        model: nn.Module,
        policy: Policy,
        grids: dict[str, Grid],
        norms: Pairs,
        settings: FineTuning,
        name: str,
        learning: "Learning | None" = None,
    ) -> dict[str, Grid]:
        """Train a model in place, and what of its grids can be trained; the grids.

        On all of the train split, or on what `learning` gives.
        """
        task, teacher = learning or (self._task, self._teacher)
        with self.simulated(model, policy, grids, norms) as simulation:
            simulation.calibrate(self._calibration.tensors())
            # of an evaluation the search shows the progress
            shown = self._progress("fine-tuning", settings.epochs) if learning is None else nullcontext(_unseen)
            with shown as advance:
                distil(
                    model,
                    teacher,
                    task,
                    simulation,
                    settings,
                    settle=lambda: reestimate(model, self._calibration.tensors()),
                    checkpoints=self._run,
                    name=name,
                    advance=advance,
                )
            return simulation.weight_grids()

    def _corrected(self, pruned: Pruned, policy: Policy) -> tuple[nn.Module, dict[str, Grid]]:
        """What can be done without training."""
        # with all channels there, statistics are what training has left
        if self.is_smaller(policy) and self._post_training.statistics:
            reestimate(pruned.model, self._calibration.tensors())
        model = self._folded(pruned.model)
        corrected = post_train(
            model,
            policy.precisions,
            self._post_training,
            self._calibration.few,
            largest=self._largest,
            is_symmetric=self._is_symmetric,
            graph=self._graph,
            kept=pruned.kept,
            progress=self._progress,
        )
        self._run.step(_smoothed(policy), lambda: corrected.smoothed)
        return model, corrected.grids

    def notes(self, policy: Policy) -> tuple[str, ...]:
        """For people: what channels were scaled by between norms and what reads them."""
        step = _smoothed(policy)
        if step not in self._run:
            return ()
        taken: dict[str, str] = self._run.step(step, lambda: {})
        makers: dict[str, list[str]] = {}
        for norm, maker in taken.items():
            makers.setdefault(maker, []).append(norm)
        return tuple(f"channels were scaled by {maker}: {', '.join(norms)}" for maker, norms in sorted(makers.items()))

    def is_smaller(self, policy: Policy) -> bool:
        """Whether it takes channels away."""
        return any(policy.keep.get(group.name, group.total) < group.total for group in self._graph.groups)

    def _fitted(self, model: nn.Module, policy: Policy, norms: Pairs) -> dict[str, Grid]:
        layers = [name for name, precision in policy.precisions.items() if not precision.storage.is_float]
        if not layers:
            return {}
        met = energies(model, layers, self._calibration.few())
        return fitted(model, policy.precisions, met, largest=self._largest, norms=norms)

    # -- for seconds -----------------------------------------------------------------------------------------

    def recovered(self, policy: Policy, name: str) -> nn.Module:
        """The policy's network after a training of seconds, norms folded, every weight on its grid."""
        pruned = self._pruned(policy)
        once = replace(self._fine_tuning, epochs=1)
        if not self.is_smaller(policy):
            model = pruned.model
            norms = present(self._norms, model)
            grids = self._fitted(model, policy, norms)
            if grids:
                grids = self._distilled(model, policy, grids, norms, once, name, self._recovery(0, 1))
            model = self._folded(model)
        elif policy.order == QUANTIZE_FIRST:
            stages = (once, self._recovery(0, 2)), (once, self._recovery(1, 2))
            model, grids = self._quantised_first(policy, name, *stages)
        else:
            model, grids = self._relearned(pruned.model, policy, once, name, self._recovery(0, 1))
        put_on(model, policy.precisions, grids, largest=self._largest)
        return model

    def _recovery(self, part: int, parts: int) -> "Learning":
        """What an evaluation is trained on, drawn by the seed, and what the original says of it; in several parts where
        it is trained in several stages."""
        if (part, parts) not in self._recoveries:
            task = copy.copy(self._task)
            train = self._task.train
            drawn = np.random.default_rng(self._fine_tuning.seed).permutation(train.examples)[:RECOVERY_EXAMPLES]
            indices = train.indices[np.sort(drawn[part::parts])]
            task.train = replace(train, indices=indices, batch=min(RECOVERY_BATCH, train.batch))
            self._recoveries[part, parts] = (task, Teacher(self._model, task.train))
        return self._recoveries[part, parts]

    # -- what both need --------------------------------------------------------------------------------------

    def _cut(self, policy: Policy) -> Pruned:
        """Without the policy's channels, and what is left as it was."""
        # what keeps all channels need not look at the data for it
        return prune(self._start, self._graph, policy, self._scores if self.is_smaller(policy) else {})

    def _pruned(self, policy: Policy) -> Pruned:
        """The same with what is left changed so that it says what was lost."""
        if not self._compensates or not self.is_smaller(policy):
            return self._cut(policy)
        return prune(self._start, self._graph, policy, self._scores, before=self._compensation(self._moments))

    def _compensation(self, seen: Mapping[str, Moments]) -> Callable[[nn.Module, Kept], None]:
        return lambda model, kept: compensate(model, self._graph, kept, seen, self._norms)

    @cached_property
    def _moments(self) -> Mapping[str, Moments]:
        return self._moments_of(self._start)

    def _moments_of(self, model: nn.Module) -> Mapping[str, Moments]:
        return moments(model, self._graph, self._calibration.tensors())

    @cached_property
    def _scores(self) -> Mapping[str, Tensor]:
        return self._scores_of(self._start, self._moments if self._importance == "obs" else {})

    def _scores_of(self, model: nn.Module, seen: Mapping[str, Moments]) -> Mapping[str, Tensor]:
        if self._importance == "obs":
            with self._progress("choosing channels", len(self._graph.groups)) as advance:
                told = staying(model, self._graph, seen, self._norms, advance=advance)
            return scores(model, self._graph, "l2") | told
        batches = [batch for batch, _ in zip(self._task.train, range(TAYLOR_BATCHES), strict=False)]
        return scores(model, self._graph, self._importance, batches, partial(loss_of, self._task))

    @cached_property
    def _norms(self) -> Pairs:
        """The BatchNorms that can be folded."""
        return foldable(self._model, as_tensors(self._task.example))

    def _folded(self, model: nn.Module) -> nn.Module:
        return fold(model, present(self._norms, model)).eval()

    @cached_property
    def _teacher(self) -> Teacher:
        return Teacher(self._model, self._task.train)


def drawn_anew(model: nn.Module, seed: int) -> nn.Module:
    """A copy with weights as its layers draw them; what no layer draws, such as positions, is drawn from a normal
    distribution with the mean and the spread that it has."""
    found = copied(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in found.modules():
            draw = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(draw):
                draw()
            else:
                for parameter in module.parameters(recurse=False):
                    parameter.normal_(parameter.mean().item(), parameter.std(correction=0).item())
    return found.eval()


def _smoothed(policy: Policy) -> str:
    """The step of the journal that says what `smooth` did."""
    return f"smoothed/{policy.digest()}"
