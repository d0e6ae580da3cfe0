"""Which policy is built: one that was given, what a recipe comes to, or what a search finds."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hirelc_deploy import console, tensorboard
from hirelc_deploy.budget import Budget
from hirelc_deploy.choices import completed, search_space
from hirelc_deploy.config import ExportSettings
from hirelc_deploy.errors import UserError
from hirelc_deploy.policy import Policy
from hirelc_deploy.posing import Posing
from hirelc_deploy.search import methods, recipe as recipes
from hirelc_deploy.search.finish import FINALISTS, Finishing
from hirelc_deploy.search.problem import Evaluations, Spent
from hirelc_deploy.search.recipe import Recipe
from hirelc_deploy.search.space import Choice, Evaluation
from hirelc_deploy.workbench import Workbench

if TYPE_CHECKING:
    from hirelc_deploy.graph.model_graph import ModelGraph
    from hirelc_deploy.profiles import Target

EVALUATIONS = 32
"""Of a search, where no number was given."""

TIMED = 6
"""Policies whose files are timed after each part of a search."""


def asked_for(settings: ExportSettings) -> Policy | Recipe | None:
    """What is to be built without a search, as far as it can be read before the network is known."""
    if settings.policy is not None:
        return _read_policy(settings.policy)
    return Recipe.parse(settings.recipe) if settings.recipe is not None else None


def given(asked: Policy | Recipe | None, network: "ModelGraph", target: "Target") -> Policy | None:
    """The policy that it comes to on this network and target; None if it has to be searched or measured for."""
    if isinstance(asked, Recipe):
        space = search_space(network, target)
        if asked.compute is not None:
            return asked.policy(space)
        asked.require_fit(space)
        return None
    return None if asked is None else completed(asked, network, target)


def choose(
    settings: ExportSettings, budget: Budget, bench: Workbench, asked: Policy | Recipe | None, policy: Policy | None
) -> Choice:
    """The policy: the given one, what a recipe comes to where speed is measured, or what a search finds."""
    for left in bench.graph.left_out:
        console.note(f"left as it is: {left.name}: {left.reason}")
    if isinstance(asked, Recipe):  # now that it is known what is fastest, and what fp16 ruins
        computes = None if asked.compute else bench.latencies.fastest_computes(asked.counts(bench.space))
        policy = asked.policy(bench.space, computes)
    posing = Posing(bench, budget, order=settings.order)

    def complete(found: Policy) -> Evaluation:
        # a policy from a file has an order of its own
        return bench.evaluate(found if settings.policy is not None else posing.ordered(found))

    if policy is not None:
        evaluation = complete(policy)
        return Choice(evaluation, (evaluation,))
    name = method(settings, budget)
    if name == "recipe" and not _can_search(settings, budget):
        return recipes.search(bench.space, budget, bench.predict, complete, evaluations=settings.evaluations)
    return _searched(settings, bench, posing, name, complete)


def _searched(
    settings: ExportSettings, bench: Workbench, posing: Posing, name: str, complete: Callable[[Policy], Evaluation]
) -> Choice:
    """What the method of this name leads to, search and finishing taking turns."""

    def prepare(found: Sequence[Policy]) -> None:
        bench.compress_ahead([posing.ordered(each) for each in found])

    limit = settings.evaluations or EVALUATIONS
    with tensorboard.logged(settings.tensorboard) as log:
        problem = posing.problem()
        finishing = Finishing(problem, complete, most=FINALISTS, prepare=prepare, note=console.note)
        with console.progress("searching", limit) as advance:
            seen = Evaluations(problem, limit, lambda each: advance(describe(each, bench.task.unit)), console.note, log)
            finishing.recipe(seen)
            for part in finishing.parts:
                seen.go_on(finishing.aim, round(part * limit))
                with suppress(Spent):
                    methods.load(name)(seen.problem, seen, seed=settings.seed)
                # a search goes where predictions are too hopeful: so what it found is timed, and all told anew
                found = [each.policy for each in finishing.promising(seen.seen, TIMED)]
                problem = posing.timed(problem, found)
                seen.reprice(posing.repriced)
                finishing.reprice(problem, posing.repriced)
                if part < 1:
                    finishing.some(seen.seen)
    return finishing.choice(seen.seen)


def describe(evaluation: Evaluation, unit: str) -> str:
    """An evaluation in a few words: what it costs, and what it loses."""
    figures = evaluation.figures
    assert figures.size_bytes is not None
    return (
        f"{figures.size_bytes / 1e3:.1f} KB, {figures.speedup:.2f} x faster, drop {figures.drop:.2f} {unit} "
        "before it is finished"
    )


def method(settings: ExportSettings, budget: Budget) -> str:
    """Of the search: the one that was asked for, else the hierarchical one where there is something to search for."""
    return settings.search or ("hierarchical" if _can_search(settings, budget) else "recipe")


def _can_search(settings: ExportSettings, budget: Budget) -> bool:
    """Evaluations are trained, and without a limit there is nothing to trade."""
    return bool(settings.epochs) and budget.given


def told(settings: ExportSettings, budget: Budget) -> str:
    """How the policy was chosen, for the manifest."""
    if settings.policy is not None:
        return "policy"
    return f"recipe {settings.recipe}" if settings.recipe is not None else method(settings, budget)


def _read_policy(path: Path) -> Policy:
    try:
        return Policy.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", fix="name a policy.json of an artifact") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}", fix="name a policy.json of an artifact") from error
