"""What an engineer would do by hand: one number for all channels, one precision for all layers.

The search has to beat it, so it gets every advantage: sizes are known exactly, latencies are timed, and what
it proposes is fine-tuned before it is judged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from hirelc_deploy.budget import Budget, Figures, excess, judge
from hirelc_deploy.config import nearest
from hirelc_deploy.errors import UserError
from hirelc_deploy.kernels import every_storage
from hirelc_deploy.policy import FP16, FP32, INT8, Compute, Policy, Precision, Storage
from hirelc_deploy.search.space import Choice, Evaluation, SearchSpace

FASTEST = "fastest"

DEFAULT_STORAGE = {Compute.INT8: str(INT8.storage), Compute.INT8_DYNAMIC: str(INT8.storage)}
"""What a recipe of integers that names no storage means."""

LADDER_KEEP_PERCENT = (100.0, 75.0, 50.0, 37.5, 25.0, 12.5)
LADDER_COMPUTE = (Compute.INT8, Compute.FP8, Compute.FP16, Compute.FP32)

Predict = Callable[[Policy], Figures]
"""Size and latency of a policy; the drop stays unknown."""

Evaluate = Callable[[Policy], Evaluation]
"""The expensive step: the policy made real."""


@dataclass(frozen=True)
class Recipe:
    """A uniform choice.

    A layer that cannot compute so is stored so all the same, if it can be, and computes as it was trained; else it
    stays as it was trained, in halves where it has them.
    """

    keep_percent: float
    compute: Compute | None
    """None for whatever is fastest on the target, layer by layer (`cost.fastest`)."""
    storage: str | None = None
    """int4, int4/tensor, codebook3, vector1 …; None is the first that the compute allows."""

    def __str__(self) -> str:
        stored = "" if self.storage is None else f"storage={self.storage},"
        return f"keep={self.keep_percent:g}%,{stored}compute={self.compute or FASTEST}"

    @classmethod
    def parse(cls, text: str) -> "Recipe":
        """keep=50%,compute=int8 in any order.  Raises UserError.

        Without `keep` all channels stay; without `compute` it is int8 where a storage is given, else fp32.
        """
        parts = _parts(text)
        compute = parts.get("compute", Compute.FP32 if "storage" not in parts else Compute.INT8)
        known = [*map(str, Compute), FASTEST]
        if compute not in known:
            raise UserError(
                f"the recipe's compute is {compute!r}", fix=f"did you mean {nearest(compute, known)}? one of {known}"
            )
        chosen = None if compute == FASTEST else Compute(compute)
        return cls(_percent(parts.get("keep", "100%")), chosen, _storage(parts.get("storage")))

    def policy(self, space: SearchSpace, computes: Mapping[str, Compute] | None = None) -> Policy:
        """The recipe on every layer and group of a space.  Raises UserError if it fits no layer at all.

        `computes` gives what each layer computes in where the recipe leaves that open.
        """
        if self.compute is None and computes is None:
            raise ValueError("what is fastest has to be measured first")
        self.require_fit(space)
        precisions, fits = {}, False
        for layer, choices in space.layers.items():
            compute = self.compute or (computes or {}).get(layer, Compute.FP32)
            precisions[layer] = self._nearest(choices, compute)
            fits |= self._fits(precisions[layer], compute)
        if not fits:
            raise UserError(
                f"what is fastest on this target leaves no layer that can be {self}",
                fix="name the compute: " + " or ".join(sorted({str(each.compute) for each in self._fitting(space)})),
            )
        return Policy(precisions, self.counts(space))

    def require_fit(self, space: SearchSpace) -> None:
        """Raises UserError if no layer can be stored so in the compute that the recipe names, or in any."""
        if self._fitting(space):
            return
        offered = sorted({str(precision.compute) for c in space.layers.values() for precision in c})
        each = {precision.storage for choices in space.layers.values() for precision in choices}
        stored = sorted(_bare(storage) if storage.is_float else str(storage) for storage in each)
        raise UserError(
            f"no layer of this network can be {self} on this target",
            fix=f"there is compute={' or '.join(offered)} with storage={', '.join(stored)}",
        )

    def _fitting(self, space: SearchSpace) -> list[Precision]:
        """Of all layers' choices."""
        every = (precision for choices in space.layers.values() for precision in choices)
        return [precision for precision in every if self._fits(precision, self.compute or precision.compute)]

    def _nearest(self, choices: Sequence[Precision], compute: Compute) -> Precision:
        """What one layer becomes; an embedding, say, has no integer kernel, and most of a small file's bytes."""
        fitting = (choice for choice in choices if self._fits(choice, compute))
        trained, stored = choices[0], self.storage or DEFAULT_STORAGE.get(compute)
        packed = (choice for choice in choices if choice.compute is trained.compute and _is(choice.storage, stored))
        halves = (choice for choice in choices if choice == FP16 and compute is not Compute.FP32)
        return next(chain(fitting, packed, halves), trained)

    def counts(self, space: SearchSpace) -> dict[str, int]:
        """The units that stay, by group."""
        return {group: self._count(space, group) for group in space.groups}

    def _fits(self, precision: Precision, compute: Compute) -> bool:
        return precision.compute is compute and (self.storage is None or _is(precision.storage, self.storage))

    def _count(self, space: SearchSpace, group: str) -> int:
        """The nearest count on offer, the larger of two, but never none: whole branches are not a uniform matter."""
        wanted = self.keep_percent / 100 * space.totals[group]
        counts = [count for count in space.groups[group] if count > 0]
        return min(counts, key=lambda count: (abs(count - wanted), -count))


def ladder(space: SearchSpace) -> dict[str, Policy]:
    """The recipes that are tried, by name, without those that come out the same."""
    recipes = [Recipe(keep, compute) for keep in LADDER_KEEP_PERCENT for compute in LADDER_COMPUTE]
    offered = {precision.compute for choices in space.layers.values() for precision in choices}
    found: dict[str, Policy] = {}
    for recipe in recipes:
        if recipe.compute in offered and (policy := recipe.policy(space)) not in found.values():
            found[str(recipe)] = policy
    return found


def search(
    space: SearchSpace, budget: Budget, predict: Predict, evaluate: Evaluate, *, evaluations: int | None = None
) -> Choice:
    """The best rung of the ladder.

    With a limit on the drop, the rungs that keep the other limits are evaluated from the cheapest on, by bytes
    times milliseconds, and the first that holds the drop wins.  With other limits only, the rungs that keep them
    are evaluated, the dearest first, as it likely scores best, and the best score wins.  Without any limit there
    is nothing to trade: full width, INT8.  If no rung keeps all limits, the one that misses by the least is
    returned.  `evaluations` is a maximum.  A limit on what is not predicted (memory, on some systems) is left to the
    measurement.
    """
    rungs = ladder(space)
    if not budget.given:
        chosen = evaluate(next(iter(rungs.values())))
        return Choice(chosen, (chosen,))
    figures = {name: predict(policy) for name, policy in rungs.items()}
    before_drop = replace(budget, drop=None)
    holding = [name for name in rungs if _keeps(before_drop, figures[name])]
    holding.sort(key=lambda name: _cost(figures[name]), reverse=budget.drop is None)
    if not holding:
        name = min(rungs, key=lambda name: excess(budget, figures[name]))
        chosen = evaluate(rungs[name])
        return Choice(chosen, (chosen,))
    seen: list[Evaluation] = []
    for name in holding[:evaluations]:
        seen.append(evaluate(rungs[name]))
        if budget.drop is not None and _keeps(budget, seen[-1].figures):
            return Choice(seen[-1], tuple(seen))
    return Choice(min(seen, key=lambda each: each.drop), tuple(seen))


def _keeps(budget: Budget, figures: Figures) -> bool:
    """Whether no limit is known to be missed."""
    return all(check.ok is not False for check in judge(budget, figures))


def _cost(figures: Figures) -> float:
    """Bytes times milliseconds."""
    return float(figures.size_bytes or 0) * (figures.latency_ms or 0.0)


def _parts(text: str) -> dict[str, str]:
    known = ("keep", "storage", "compute")
    parts: dict[str, str] = {}
    for part in text.split(","):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not value or name not in known:
            hint = nearest(name, known)
            raise UserError(
                f"{part!r} is no part of a recipe", fix=f"write keep=50%,compute=int8 (did you mean {hint}?)"
            )
        if name in parts:
            raise UserError(
                f"the recipe {text!r} says {name} twice", fix=f"leave out one of {name}={parts[name]}, {part}"
            )
        parts[name] = value
    return parts


def _is(storage: Storage, name: str | None) -> bool:
    """Whether that is what a recipe calls it, with its granularity or without."""
    return name in (str(storage), _bare(storage))


def _bare(storage: Storage) -> str:
    """Without its granularity: int4 of int4/channel."""
    return str(storage).partition("/")[0]


def _storage(text: str | None) -> str | None:
    """A storage as a recipe names it.  Raises UserError, with the nearest, if no format can be that."""
    known = [
        "fp32",
        "fp16",
        str(FP32.storage),
        str(FP16.storage),
        *(name for storage in every_storage() for name in (str(storage), _bare(storage))),
    ]
    if text is None or text in known:
        return text
    bare = sorted({name for name in known if "/" not in name})
    raise UserError(
        f"the recipe's storage is {text!r}",
        fix=f"did you mean {nearest(text, known)}? There is {', '.join(bare)}, each with /channel, /tensor or /group32 "
        "where the format has that",
    )


def _percent(text: str) -> float:
    number = text.removesuffix("%")
    try:
        percent = float(number)
    except ValueError:
        percent = float("nan")
    if not text.endswith("%") or not 0 < percent <= 100:
        raise UserError(f"keep is {text!r}", fix="it is a part of the channels, above 0 % and up to 100 %: keep=50%")
    return percent
