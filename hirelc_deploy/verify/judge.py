"""Whether an artifact is good enough: its figures against the budget, its file against the manifest."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hirelc_deploy import budget as budgets
from hirelc_deploy.budget import NOT_SLOWER, Budget, Check, Figures
from hirelc_deploy.errors import ExitStatus, UserError
from hirelc_deploy.verify import manifest as manifests, text
from hirelc_deploy.verify.manifest import Artifact, Baseline, Basis, LayerRecord, Manifest, Measured, VerdictWord

if TYPE_CHECKING:
    from hirelc_deploy.exporters._base import Runtime

LOADS = "the file loads"
RUNS_AS = "layers run as asked"
SCORED = "scored on the file"


@dataclass(frozen=True)
class Verdict:
    """All checks of an artifact and what follows from them."""

    checks: tuple[Check, ...]
    allow_estimates: bool = False
    """Whether what could not be measured here is good enough for exit status 0; the word stays `unverified`."""

    @property
    def word(self) -> VerdictWord:
        outcomes = {check.ok for check in self.checks}
        if False in outcomes:
            return "fail"
        return "unverified" if None in outcomes else "pass"

    @property
    def status(self) -> ExitStatus:
        if self.word == "unverified":
            return ExitStatus.OK if self.allow_estimates else ExitStatus.UNVERIFIED
        return ExitStatus.OK if self.word == "pass" else ExitStatus.BUDGET_MISSED


def judge(
    budget: Budget,
    measured: Measured,
    layers: Sequence[LayerRecord],
    *,
    of_the_file: Iterable[Check],
    allow_estimates: bool = False,
) -> Verdict:
    """Judge figures on their point estimates, limits inclusive.

    `of_the_file` is what can only be checked where the file is: `loads` and `unchanged`.
    """
    checks = [*budget_checks(budget, measured), *of_the_file, scored_check(measured), runs_as_check(layers)]
    return Verdict(tuple(checks), allow_estimates)


def gate(folder: Path, budget: Budget | None, allow_estimates: bool) -> Verdict:
    """Judge an artifact folder as it lies there, by the limits of its manifest; those of `budget` take their place.

    Nothing is run: the file is hashed and its size taken again, and the figures are those of the manifest.
    Raises UserError if there is no valid manifest.
    """
    manifest = manifests.read(folder)
    intact = unchanged(folder, manifest.artifact)
    not_recorded = Check(LOADS, None, None, None)
    loaded = next((check for check in manifest.checks if check.name == LOADS), not_recorded)
    return judge(
        manifest.budget if budget is None else manifest.budget.with_limits_of(budget),
        _with_size_on_disk(folder, manifest),
        manifest.layers,
        of_the_file=(loaded, *intact),
        allow_estimates=allow_estimates,
    )


def figures(measured: Measured) -> Figures:
    """What a budget is judged on: absolute latency by the median of the wall clock."""
    return Figures(
        latency_ms=manifests.p50(measured.latency_ms),
        speedup=measured.speedup,
        size_bytes=measured.size_bytes,
        memory_bytes=measured.memory_bytes,
        drop=measured.drop_points,
    )


def budget_checks(budget: Budget, measured: Measured) -> tuple[Check, ...]:
    """The checks of a budget.  A figure that was not measured can fail its check; it never passes one."""
    basis = _basis_of(measured)
    return tuple(
        replace(check, ok=None) if check.ok and basis.get(check.name, "measured") != "measured" else check
        for check in budgets.judge(budget, figures(measured))
    )


def runs_as_check(layers: Sequence[LayerRecord]) -> Check:
    """Every layer that is left computes as the policy says; the first that do not are named."""
    left = [layer for layer in layers if layer.kept > 0]
    wrong = [f"{a.name} as {a.runs_as}, not {a.compute}" for a in left if a.runs_as not in (None, a.compute)]
    unread = [f"{layer.name} cannot be read" for layer in left if layer.runs_as is None]
    limit = f"all {len(left)}"
    if wrong:
        return Check(RUNS_AS, limit, text.listed(wrong), False)
    if unread:
        return Check(RUNS_AS, limit, "cannot be read" if len(unread) == len(left) else text.listed(unread), None)
    return Check(RUNS_AS, limit, limit, True)


def scored_check(measured: Measured) -> Check:
    """The accuracy is that of the file's own outputs, and not of a simulation."""
    taken = measured.basis.accuracy == "measured" and measured.accuracy is not None
    return Check(SCORED, "measured", measured.basis.accuracy if measured.accuracy is not None else None, taken or None)


def loads(runtime: "Runtime", path: Path, *, threads: int) -> Check:
    """Whether the runtime takes the file, and if not, in its own words."""
    try:
        runtime.load(path, threads=threads)
    except UserError as error:
        return Check(LOADS, None, error.what, False)
    return Check(LOADS, None, "loaded", True)


def unchanged(folder: Path, artifact: Artifact) -> tuple[Check, Check]:
    """The file is the one that was measured, by checksum; and of its size, which says more when it is not."""
    path = folder / artifact.path
    if not path.is_file():
        return (
            Check("sha256", artifact.sha256, f"{artifact.path} is missing", False),
            Check("size on disk", artifact.size_bytes, None, False),
        )
    found = Artifact.of(path)
    return (
        Check("sha256", artifact.sha256, found.sha256, found.sha256 == artifact.sha256),
        Check("size on disk", artifact.size_bytes, found.size_bytes, found.size_bytes == artifact.size_bytes),
    )


def warnings(budget: Budget, measured: Measured, baseline_fp16: Baseline | None = None) -> tuple[str, ...]:
    """What no limit forbids and a user still wants to hear; for the manifest's notes."""
    found = []
    slower = measured.speedup is not None and measured.speedup < 1
    if slower and budget.latency_ms is None and budget.speedup is None:
        found.append(
            f"slower than fp32: {text.times(measured.speedup or 0)} (no limit on latency or speed-up was given)"
        )
    own, halves = (manifests.p50(each.latency_ms) if each else None for each in (measured, baseline_fp16))
    if own is not None and halves is not None and own > halves:
        found.append(f"slower than fp16: {text.milliseconds(own)}, and {text.milliseconds(halves)} as it was in fp16")
    rounds = measured.rounds
    if rounds is not None and not rounds.are_quiet:
        found.append(
            f"the core was slower than it can be in all but {rounds.quiet} of {rounds.all} rounds, which are too few: "
            "something else ran on it, or its clock was lowered. Ratios may be off by a half; verify measures again"
        )
    return tuple(found)


def _with_size_on_disk(folder: Path, manifest: Manifest) -> Measured:
    """The size limit is judged on the file that is there, whatever the manifest says about it."""
    path = folder / manifest.artifact.path
    if not path.is_file():
        return manifest.measured
    return manifest.measured.model_copy(update={"size_bytes": path.stat().st_size})


def _basis_of(measured: Measured) -> Mapping[str, Basis]:
    """How the figure of each check came about."""
    basis = measured.basis
    return {
        "latency_ms": basis.latency,
        "speedup": basis.latency,
        NOT_SLOWER: basis.latency,
        "size_bytes": basis.size,
        "memory_bytes": basis.latency,  # taken on the same machine
        "drop": basis.accuracy,
    }
