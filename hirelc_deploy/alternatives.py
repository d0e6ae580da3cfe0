"""What a search leaves beside the artifact: the other policies worth having, and what it believed of the chosen one."""

from pathlib import Path

import numpy as np

from hirelc_deploy.budget import Budget, met
from hirelc_deploy.policy import Policy
from hirelc_deploy.rundir import write_atomic
from hirelc_deploy.search.front import counted, front
from hirelc_deploy.search.space import Choice, Evaluation
from hirelc_deploy.verify import text
from hirelc_deploy.verify.manifest import FrontRecord, Predicted


def write_front(folder: Path, choice: Choice) -> tuple[FrontRecord, ...]:
    """Policies that no other evaluated one beats, and those that were finished, each as a file that `--policy` takes.
    None without a search.

    They are compared by their figures as the manifest gives them, where a drop below nought counts as nought.  Of
    policies that are alike in all of these one is kept: one that was finished, else the first.
    """
    found = [(record, each.policy) for each in choice.evaluations if (record := _record(each, choice)) is not None]
    if len(found) < 2:
        return ()
    found.sort(key=lambda one: one[0].finished_drop_points is None)
    places = counted(np.array([(it.drop_points, it.size_bytes, it.latency_ms) for it, _ in found], float))
    _, unlike = np.unique(places, axis=0, return_index=True)
    finished = {i for i, (record, _) in enumerate(found) if record.finished_drop_points is not None}
    kept = {*unlike[front(places[unlike])].tolist(), *finished}
    best = sorted((found[i] for i in kept), key=lambda one: (one[0].size_bytes, one[0].latency_ms))
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, (record, policy) in enumerate(best, start=1):
        file = folder / f"{number:02}.json"
        write_atomic(file, policy.to_json())
        records.append(record.model_copy(update={"path": f"{folder.name}/{file.name}"}))
    return tuple(records)


def _record(each: Evaluation, choice: Choice) -> FrontRecord | None:
    """Without the name of its file, which only some have; None where size or latency is not known."""
    size_bytes, latency_ms = each.figures.size_bytes, each.figures.latency_ms
    if size_bytes is None or latency_ms is None:
        return None
    return FrontRecord(
        path="",
        size_bytes=size_bytes,
        latency_ms=latency_ms,
        speedup=each.figures.speedup,
        drop_points=each.drop,
        hardness_points=choice.hardness.get(each.policy.digest()),
        whole_part=choice.whole.get(each.policy.digest()),
        finished_drop_points=next((end.drop for end in choice.finished if _alike(end.policy, each.policy)), None),
        recipe=_recipe(each, choice),
    )


def against_recipes(choice: Choice, budget: Budget, unit: str) -> str | None:
    """For people: how the chosen policy does beside the best uniform recipe with the same fine-tuning, on the search
    split; None where no recipe was finished.  `unit` is that of the score."""
    chosen = _recipe(choice.best, choice)
    if chosen is not None:
        return f"the chosen policy is a uniform recipe ({chosen}): nothing that was finished beside it is better"
    named = [(name, each) for each in choice.finished if (name := _recipe(each, choice)) is not None]
    if not named:
        return None
    holding = [(name, each) for name, each in named if met(budget, each.figures)]
    if not holding:
        name, nearest = min(named, key=lambda one: one[1].drop)
        return f"no uniform recipe that was finished holds the limits, the nearest being {_told(name, nearest, unit)}"
    name, best = min(holding, key=lambda one: _product(one[1]))
    times = _product(best) / _product(choice.best)
    return (
        f"with the same fine-tuning the best uniform recipe that holds the limits, {_told(name, best, unit)}, has "
        f"{times:.2f} times the bytes times milliseconds of the chosen policy (predicted, drops on the search split)"
    )


def _recipe(evaluation: Evaluation, choice: Choice) -> str | None:
    """The name of the recipe that its policy is."""
    return next((name for name, policy in choice.recipes.items() if _alike(policy, evaluation.policy)), None)


def _product(evaluation: Evaluation) -> float:
    """Bytes times milliseconds, these as a part of the original's."""
    assert evaluation.figures.size_bytes
    assert evaluation.figures.speedup
    return evaluation.figures.size_bytes / evaluation.figures.speedup


def _told(name: str, evaluation: Evaluation, unit: str) -> str:
    figures = evaluation.figures
    assert figures.size_bytes
    assert figures.speedup
    drop = text.points(evaluation.drop, unit)
    return f"{name} ({text.size(figures.size_bytes)}, {text.times(figures.speedup)} faster, drop {drop})"


def predicted(choice: Choice, *, pace: float = 1.0) -> Predicted:
    """What was believed before the file was there: of a search its tables' latency, not that of a draft.

    `pace` is how many times slower the machine was when the file was measured than when its tables were made.
    """
    best = choice.best
    told = next((each.figures for each in choice.evaluations if _alike(each.policy, best.policy)), best.figures)
    latency_ms = told.latency_ms
    if latency_ms is not None and told is not best.figures:  # the best one's own was seen, on a draft of its file
        latency_ms *= pace
    return Predicted(
        size_bytes=told.size_bytes,
        accuracy=best.score,
        latency_ms=latency_ms,
        speedup=told.speedup,
        memory_bytes=best.figures.memory_bytes,
        load_ms=best.figures.load_ms,
    )


def _alike(one: Policy, other: Policy) -> bool:
    """Whether they make the same file but for what training leaves: the order is not looked at."""
    return one.precisions == other.precisions and one.keep == other.keep
