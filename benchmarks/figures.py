"""The README's table of figures and docs/predictions.md, from the result files: python benchmarks/figures.py --write

Without --write the table is printed.  `--record NAME=DIR` takes the manifest of an artifact folder as the result
file of that name and its kind of CPU first.  A test holds what is written and the result files together.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from _bench import CPU_KINDS, RESULTS, ROOT, between_marks, cpu_kind, cpu_text, markdown, record_export

from hirelc_deploy.verify.manifest import Manifest

README = ROOT / "README.md"

FASHION = "`python benchmarks/fashion_mnist.py {}`"
ROWS = (
    ("digits (`demo`)", "demo", "`make demo`"),
    ("`wide`", "wide_hierarchical", FASHION.format("wide --search hierarchical")),
    (
        "`wide`, 90 × and 10 × as limits",
        "wide_hierarchical_goals",
        FASHION.format("wide --search hierarchical --goals"),
    ),
    (
        "`wide`, that policy trained for longer",
        "wide_policy",
        FASHION.format("wide --policy benchmarks/results/policy_wide_goals.json --epochs 30"),
    ),
    ("`wide`, recipe by hand", "wide", FASHION.format("wide")),
    ("`small`", "small_hierarchical", FASHION.format("small --search hierarchical")),
    (
        "`small`, 35 × and 5 × as limits",
        "small_hierarchical_goals",
        FASHION.format("small --search hierarchical --goals"),
    ),
    ("`small`, recipe by hand", "small", FASHION.format("small")),
    ("`depthwise`", "depthwise_hierarchical", FASHION.format("depthwise --search hierarchical")),
    ("`vit`", "vit_hierarchical", FASHION.format("vit --search hierarchical")),
)
"""Of each artifact a line for every kind of CPU that it was made on."""

HEAD = (
    "| network | fp32 file | file | smaller | faster [95 %] | accuracy before, after "
    "| drop, points [95 %] | CPU with | command |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


def table() -> str:
    """The table and the machine it is from, in Markdown."""
    on_record = [
        (name, Manifest.model_validate_json(path.read_text()), command)
        for name, artifact, command in ROWS
        for kind in CPU_KINDS
        if (path := RESULTS / f"export_{artifact}_{kind}.json").exists()
    ]
    rows = [_row(*each) for each in on_record]
    manifests = [manifest for _, manifest, _ in on_record]
    machines = {cpu_text(m.environment.cpu, m.environment.flags) for m in manifests}
    runtimes = {str(m.runtime) for m in manifests}
    where = f"CPUs: {'; '.join(sorted(machines))}. {'; '.join(sorted(runtimes))}, one thread, batch 1."
    return f"{HEAD}{''.join(rows)}\n{where}\n"


def _row(name: str, manifest: Manifest, command: str) -> str:
    before, after = manifest.baseline, manifest.measured
    assert after.drop_ci95 is not None
    assert after.speedup_ci95 is not None
    missed = {check.name for check in manifest.checks if check.ok is False}
    size, speed, drop = (", **missed**" * (limit in missed) for limit in ("size_bytes", "speedup", "drop"))
    cells = (
        name,
        f"{before.size_bytes / 1000:.1f} KB",
        f"{after.size_bytes / 1000:.1f} KB",
        f"{after.compression:.1f} ×{size}",
        f"{after.speedup:.1f} × [{after.speedup_ci95[0]:.1f}, {after.speedup_ci95[1]:.1f}]{speed}",
        f"{before.accuracy:.2f} %, {after.accuracy:.2f} %",
        f"{after.drop_points:.2f} [{after.drop_ci95[0]:.2f}, {after.drop_ci95[1]:.2f}]{drop}",
        cpu_kind(manifest.environment.flags).upper(),
        command,
    )
    return f"| {' | '.join(cells)} |\n"


def with_table(readme: str) -> str:
    """The README with today's table between its marks."""
    return between_marks(readme, "figures", table())


PREDICTIONS = ROOT / "docs" / "predictions.md"

PREDICTIONS_HEAD = """# What was predicted, and what was measured

Written by `python benchmarks/figures.py --write` from `benchmarks/results/export_*.json`.  Predicted: size from shapes
and formats; speed-up and milliseconds of a search as it went by them, which is by the target's tables or, since
2026-12-01, by a draft of the file where that was timed in the course of it; of a recipe from a draft of its file; the
score from the simulation in PyTorch, on the search split, as is the one that was measured on the file.  In brackets by
how much the prediction was the larger.  Milliseconds move with the machine's own speed, which on a shared machine
differs by the hour: both files of a ratio move together.  What a search tells in milliseconds is brought to the
machine's pace at the measurement by one kernel that is always the same; records from before 2026-11-29 are not.  Those
from before 2026-11-30, 20:00, were timed beside whatever else ran on the core.

"""

ERRORS: dict[str, tuple[Callable[[Manifest], float | None], float, str]] = {
    "size": (lambda m: m.error.size_pct, 0.5, "%"),
    "speed-up": (lambda m: m.error.speedup_pct, 5.0, "%"),
    "latency": (lambda m: m.error.latency_pct, 5.0, "%"),
    "score": (lambda m: m.error.accuracy_points, 0.5, "points"),
}
"""What is predicted, and how far off it may be: the project's own aim."""


def predictions() -> str:
    """Every artifact on record: what was predicted of it beside what was measured, and the worst of each figure."""
    by_name = {
        path.stem.removeprefix("export_"): Manifest.model_validate_json(path.read_text())
        for path in sorted(RESULTS.glob("export_*.json"))
    }
    rows = [(name, manifest.search.method, *_beside(manifest)) for name, manifest in by_name.items()]
    page = PREDICTIONS_HEAD + markdown(("artifact", "chosen by", "size", "speed-up", "latency", "score"), rows)
    for figure, (error_of, aim, unit) in ERRORS.items():
        errors = {name: error for name, manifest in by_name.items() if (error := error_of(manifest)) is not None}
        if errors:
            worst = max(errors, key=lambda name: abs(errors[name]))
            held = sum(abs(error) <= aim for error in errors.values())
            page += (
                f"\n- {figure}: {held} of {len(errors)} within {aim:g} {unit}; the worst is `{worst}`, "
                f"{errors[worst]:+.2g} {unit}"
            )
    return page + "\n"


def _beside(manifest: Manifest) -> tuple[str, ...]:
    """Predicted, measured and the error, of each figure; a dash where nothing was predicted."""
    told, seen = manifest.predicted, manifest.measured
    pairs = (
        (told.size_bytes and told.size_bytes / 1000, seen.size_bytes / 1000, ".1f", " KB"),
        (told.speedup, seen.speedup, ".2f", " ×"),
        (told.latency_ms, seen.latency_ms and seen.latency_ms.p50, ".3f", " ms"),
        (told.accuracy, seen.accuracy_search, ".2f", " %"),
    )
    errors = [error_of(manifest) for error_of, _, _ in ERRORS.values()]
    units = [unit for _, _, unit in ERRORS.values()]
    return tuple(
        "–"
        if error is None
        else f"{before:{digits}}, {after:{digits}}{of} ({error:+.{1 if unit == '%' else 2}f} {unit})"
        for (before, after, digits, of), error, unit in zip(pairs, errors, units, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    parser.add_argument("--record", metavar="NAME=DIR", help="copy DIR/manifest.json to results/export_NAME_CPU.json")
    options = parser.parse_args()
    if options.record:
        name, _, folder = options.record.partition("=")
        record_export(Path(folder), name)
    if options.write:
        README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
        PREDICTIONS.write_text(predictions(), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
