"""What fine-tuning starts from: python benchmarks/starting_points.py small14

Policies of one network, finished from four starts, each towards the original's outputs and with the same schedule:

- pruned:      the original's weights, as every policy is made;
- generation:  the original's weights after one epoch in which, batch by batch, one of the policies or the whole network
               was trained: its channels cut out of the whole network's weights, its formats simulated, its gradients
               put back where they belong.  The epoch is taken off what follows;
- scratch:     weights drawn anew: what pruning saves nobody from asking;
- scratch longer: the same, with as many epochs more as the original was trained for.

Writes benchmarks/results/starting_points_NETWORK.json, and docs/starting-points.md from all of them.  `--starts` takes
some of the starts; the last is long.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _bench import RESULTS, ROOT, machine, markdown, save, workbench
from torch import Tensor, nn

from hirelc_deploy.compress.batchnorm import reestimate
from hirelc_deploy.compress.distil import Teacher, as_tensors
from hirelc_deploy.compress.fold import present
from hirelc_deploy.compress.prune import prune
from hirelc_deploy.compress.simulate import Simulation
from hirelc_deploy.graph import forward
from hirelc_deploy.policy import Policy
from hirelc_deploy.search.recipe import Recipe
from hirelc_deploy.trainer import Trainer, drawn_anew
from hirelc_deploy.workbench import Workbench

OUT = Path("out/benchmarks/starting_points")
RECIPES = (
    "keep=50%,storage=int4,compute=fp32",
    "keep=25%,storage=int4,compute=fp32",
    "keep=12.5%,storage=int4,compute=fp32",
)
EPOCHS = 4
RATE = 1e-3
"""Peak of Adam's rate while the whole network is trained."""


# -- one epoch for all of them ---------------------------------------------------------------------------------


@dataclass
class Part:
    """A network that is cut out of the whole one, and where its weights are there."""

    model: nn.Module
    places: dict[str, Tensor]
    """By parameter of the whole network: positions in it, flattened, of the cut one's."""
    simulation: Simulation | None
    grids: torch.optim.Optimizer | None

    def read(self, whole: dict[str, Tensor]) -> None:
        """Take the whole network's weights."""
        for name, place in self.places.items():
            mine = self._parameter(name)
            mine.data.copy_(whole[name].data.flatten()[place].view_as(mine))

    def give(self, whole: dict[str, Tensor]) -> None:
        """Add gradients to the whole network's."""
        for name, place in self.places.items():
            gradient = self._parameter(name).grad
            if gradient is not None:
                whole[name].grad.view(-1).index_add_(0, place, gradient.flatten())

    def _parameter(self, name: str) -> Tensor:
        layer, _, role = name.rpartition(".")
        module = self.model.get_submodule(layer)
        if hasattr(module, "parametrizations") and role in module.parametrizations:
            found: Tensor = module.parametrizations[role].original
            return found
        return module.get_parameter(role)


def places_of(model: nn.Module, bench: Workbench, policy: Policy, scored: Any) -> dict[str, Tensor]:
    """What stays of each parameter: of a copy that holds positions instead of weights, cut as the network is."""
    numbered = copy.deepcopy(model)  # float32 holds whole numbers up to 16.7 million
    for parameter in numbered.parameters():
        parameter.data = torch.arange(parameter.numel(), dtype=torch.float32).view_as(parameter)
    cut = prune(numbered, bench.graph, policy, scored).model
    return {name: parameter.data.flatten().long() for name, parameter in cut.named_parameters()}


@contextmanager
def parts_of(model: nn.Module, bench: Workbench, policies: Sequence[Policy]) -> "Iterator[list[Part]]":
    """The whole network, in floats, and the policies' parts of it under their formats."""
    trainer, scored = bench.trainer, bench.trainer._scores
    found = [Part(copy.deepcopy(model), {n: torch.arange(p.numel()) for n, p in model.named_parameters()}, None, None)]
    with ExitStack() as formats:
        for policy in policies:
            cut = prune(model, bench.graph, policy, scored).model
            reestimate(cut, bench.calibration.tensors())
            norms = present(trainer._norms, cut)
            grids = trainer._fitted(cut, policy, norms)
            simulation = formats.enter_context(trainer.simulated(cut, policy, grids, norms))
            simulation.calibrate(bench.calibration.tensors())
            trained = [p for name, p in cut.named_parameters() if ".trained_" in name]
            optimizer = torch.optim.Adam(trained, RATE) if trained else None
            found.append(Part(cut, places_of(model, bench, policy, scored), simulation, optimizer))
        yield found


def generation(bench: Workbench, policies: Sequence[Policy], *, seed: int) -> nn.Module:
    """The network after an epoch of training in which the policies and the whole take turns."""
    model, task = copy.deepcopy(bench.model), bench.task
    whole = dict(model.named_parameters())
    teacher = Teacher(bench.model, task.train)
    steps = -(-task.train.examples // task.train.batch)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    with parts_of(model, bench, policies) as parts:
        for step, (positions, inputs, target) in enumerate(task.train.shuffled(seed, 0)):
            part = parts[step % len(parts)]
            part.read(whole)
            part.model.train()
            if part.simulation is not None:
                part.simulation.train(True)
            outputs = forward(part.model, as_tensors(inputs))
            loss = teacher.distance(outputs, teacher.outputs(positions, inputs))
            loss = loss + 0.5 * task.loss(outputs, torch.from_numpy(target))
            part.model.zero_grad()
            for parameter in whole.values():
                parameter.grad = torch.zeros_like(parameter)
            loss.backward()
            part.give(whole)
            optimizer.step()
            schedule.step()
            if part.grids is not None:
                part.grids.step()
    reestimate(model, bench.calibration.tensors())
    return model


def restarted(trainer: Trainer, start: nn.Module, epochs: int) -> Trainer:
    """Makes policies of other weights of the same network, in so many epochs."""
    found = trainer.starting_from(start.eval())
    found._fine_tuning = replace(trainer._fine_tuning, epochs=epochs)
    return found


# -- what it comes to ------------------------------------------------------------------------------------------


def measure(network: str, out: Path, seed: int, wanted: Sequence[str]) -> dict[str, Any]:
    original_epochs = json.loads((RESULTS / f"train_{network}.json").read_text())["epochs"]
    with workbench(network, out / f"{network}-{seed}", epochs=EPOCHS, seed=seed) as bench:
        policies = {text: Recipe.parse(text).policy(bench.space, {}) for text in RECIPES}
        began = time.monotonic()
        shared = generation(bench, list(policies.values()), seed=seed)
        seconds = time.monotonic() - began
        anew = drawn_anew(bench.model, seed)
        starts = {
            "pruned": (bench.model, EPOCHS),
            "generation": (shared, EPOCHS - 1),
            "scratch": (anew, EPOCHS),
            "scratch longer": (anew, EPOCHS + original_epochs),
        }
        rows = []
        for name in wanted:
            model, epochs = starts[name]
            for text, policy in policies.items():
                trainer = restarted(bench.trainer, model, epochs)
                rows.append({"policy": text, "start": name, "epochs": epochs, **drops(bench, trainer, policy, name)})
                print(rows[-1], flush=True)
        return {
            "machine": machine(),
            "seed": seed,
            "generation_seconds": seconds,
            "whole_network_after_a_generation": bench.scoring.drop(bench.scoring.of(bench.scoring.outputs(shared))),
            "score_error": bench.scoring.error(bench.task.search.examples),
            "rows": rows,
        }


def drops(bench: Workbench, trainer: Trainer, policy: Policy, name: str) -> dict[str, float]:
    """On the search split: of an evaluation, and of the finished policy."""
    key = f"{name}/{policy.digest()}"

    def drop(model: nn.Module) -> float:
        return bench.scoring.drop(bench.scoring.of(bench.simulated_outputs(model, policy)))

    return {
        "evaluated": bench.run.step(f"evaluated/{key}", lambda: drop(trainer.recovered(policy, f"evaluated/{key}"))),
        "finished": bench.run.step(f"finished/{key}", lambda: drop(trainer.trained(policy, f"finished/{key}")[0])),
    }


PAGE = ROOT / "docs" / "starting-points.md"

INTRODUCTION = """# What fine-tuning starts from

Written by `python benchmarks/starting_points.py NETWORK`, whose head says what the starts are.  Drop in points on the
search split: of an evaluation (4,096 images) and of the finished policy.

An epoch that the policies of a search have in common (*generation*) brings evaluations much nearer to what they end at.
Finished, with as many epochs in all, policies are no better for it, so a search leaves its weights as they were trained
and learns what an evaluation's drop comes to (docs/findings.md).  Weights drawn anew end where no one would want them.

Measured when every pruned network was trained at one rate, 2e-3, and before those that stay told channels that go;
today's rate follows from how far it is from the original ([fine-tuning.md](fine-tuning.md),
[compensation.md](compensation.md)).
"""


def page() -> str:
    """From all result files."""
    sections = [INTRODUCTION]
    for path in sorted(RESULTS.glob("starting_points_*.json")):
        found = json.loads(path.read_text())
        rows = [
            (row["policy"], row["start"], str(row["epochs"]), f"{row['evaluated']:.2f}", f"{row['finished']:.2f}")
            for row in sorted(found["rows"], key=lambda row: RECIPES.index(row["policy"]))
        ]
        sections.append(
            f"## `{path.stem.removeprefix('starting_points_')}`\n\nOne seed; one standard error of a score is "
            f"{found['score_error']:.2f} points.  After a generation the whole network's drop is "
            f"{found['whole_network_after_a_generation']:.2f}.\n\n"
            + markdown(("policy", "start", "epochs", "drop of an evaluation", "finished"), rows)
        )
    return "\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--starts", default="pruned,generation,scratch,scratch longer", help="which of them")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    found = measure(options.network, options.out, options.seed, options.starts.split(","))
    save(found, RESULTS / f"starting_points_{options.network}.json")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
