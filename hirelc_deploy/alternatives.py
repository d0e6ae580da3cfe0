"""What a search leaves beside the artifact: the other policies worth having, and what it believed of the chosen one."""

from pathlib import Path

import numpy as np

from hirelc_deploy.policy import Policy
from hirelc_deploy.rundir import write_atomic
from hirelc_deploy.search.front import front
from hirelc_deploy.search.space import Choice
from hirelc_deploy.verify.manifest import FrontRecord, Predicted


def write_front(folder: Path, choice: Choice) -> tuple[FrontRecord, ...]:
    """Policies that no other evaluated one beats, each as a file that `--policy` takes.  None without a search."""
    figures = [(each, each.figures.size_bytes, each.figures.latency_ms) for each in choice.evaluations]
    priced = [(each, size, ms) for each, size, ms in figures if size is not None and ms is not None]
    if len(priced) < 2:
        return ()
    best = front(np.array([(each.drop, size, ms) for each, size, ms in priced], float))
    chosen = sorted((priced[i] for i in best), key=lambda each: each[1:])
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, (each, size_bytes, latency_ms) in enumerate(chosen, start=1):
        file = folder / f"{number:02}.json"
        write_atomic(file, each.policy.to_json())
        finished = next((end.drop for end in choice.finished if _alike(end.policy, each.policy)), None)
        records.append(
            FrontRecord(
                path=f"{folder.name}/{file.name}",
                size_bytes=size_bytes,
                latency_ms=latency_ms,
                speedup=each.figures.speedup,
                drop_points=each.drop,
                finished_drop_points=finished,
            )
        )
    return tuple(records)


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
    )


def _alike(one: Policy, other: Policy) -> bool:
    """Whether they make the same file but for what training leaves: the order is not looked at."""
    return one.precisions == other.precisions and one.keep == other.keep
