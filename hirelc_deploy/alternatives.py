"""What a search leaves beside the artifact: the other policies worth having, and what it believed of the chosen one."""

from pathlib import Path

import numpy as np

from hirelc_deploy.policy import Policy
from hirelc_deploy.rundir import write_atomic
from hirelc_deploy.search.front import counted, front
from hirelc_deploy.search.space import Choice, Evaluation
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
        finished_drop_points=next((end.drop for end in choice.finished if _alike(end.policy, each.policy)), None),
    )


def predicted(choice: Choice) -> Predicted:
    """What was believed before the file was there: of a search its tables' latency, not that of a draft."""
    best = choice.best
    told = next((each.figures for each in choice.evaluations if _alike(each.policy, best.policy)), best.figures)
    return Predicted(
        size_bytes=told.size_bytes,
        accuracy=best.score,
        latency_ms=told.latency_ms,
        speedup=told.speedup,
        memory_bytes=best.figures.memory_bytes,
        load_ms=best.figures.load_ms,
    )


def _alike(one: Policy, other: Policy) -> bool:
    """Whether they make the same file but for what training leaves: the order is not looked at."""
    return one.precisions == other.precisions and one.keep == other.keep
