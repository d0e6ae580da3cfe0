"""A manifest for people: the table at the end of an export, and the page that lies beside the file."""

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table
from rich.text import Text

from hirelc_deploy.budget import Check
from hirelc_deploy.rundir import write_atomic
from hirelc_deploy.verify import text
from hirelc_deploy.verify.manifest import Manifest, p50

FILE_NAME = "report.html"

COLUMNS = ("before", "after", "predicted", "measured", "budget")

_STYLES = {True: "green", False: "bold red", None: "yellow"}
_VERDICT_STYLES = {"pass": "bold green", "fail": "bold red", "unverified": "bold yellow"}


@dataclass(frozen=True)
class Row:
    """One figure as it is shown; empty where there is nothing to say.

    `before` and `after` are the fp32 file and the artifact.  `measured` is what `predicted` is held against: for
    accuracy that is the search split, while before and after are on the test split.
    """

    figure: str
    before: str = ""
    after: str = ""
    predicted: str = ""
    measured: str = ""
    check: Check | None = None
    budget: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """In the order of COLUMNS."""
        return (self.before, self.after, self.predicted, self.measured, self.budget)

    @property
    def outcome(self) -> str:
        return "" if self.check is None else text.outcome(self.check.ok)


def rows(manifest: Manifest) -> tuple[Row, ...]:
    """Every figure of an artifact, and then the checks that have no figure of their own."""
    figures = (
        _size(manifest),
        _latency(manifest),
        _accuracy(manifest),
        *_gains(manifest),
        *_needs(manifest),
        *_energy(manifest),
    )
    shown = {row.check.name for row in figures if row.check is not None}
    unit = manifest.task.unit
    others = (
        Row(check.name, after=text.measured(check, unit), check=check, budget=text.limit(check, unit))
        for check in manifest.checks
        if check.name not in shown
    )
    return (*figures, *others)


def closing_table(manifest: Manifest) -> Table:
    """Before, after, predicted, measured and budget, with the verdict below."""
    table = Table(title=f"{manifest.model.spec} on {manifest.target}", caption=f"verdict: {manifest.verdict}")
    table.caption_style = _VERDICT_STYLES[manifest.verdict]
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    table.add_column("ok")
    for row in rows(manifest):
        style = "" if row.check is None else _STYLES[row.check.ok]
        # Text, because a layer called "blocks[0]" is markup to rich
        table.add_row(Text(row.figure), *(Text(cell) for cell in row.cells), Text(row.outcome, style))
    return table


def html(manifest: Manifest) -> str:
    """One page that needs nothing beside it: no script, no font, no image, light and dark."""
    environment = Environment(
        loader=PackageLoader("hirelc_deploy"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = text.size
    return environment.get_template("report.html.j2").render(
        m=manifest,
        columns=COLUMNS,
        rows=rows(manifest),
        headline=_headline(manifest),
        largest_layer_bytes=max((layer.weight_bytes for layer in manifest.layers), default=0) or 1,
    )


def write(manifest: Manifest, folder: Path) -> None:
    """Write the page into the artifact folder.  Raises UserError if the disk does not take it."""
    write_atomic(folder / FILE_NAME, html(manifest).encode())


def _headline(manifest: Manifest) -> tuple[tuple[str, str], ...]:
    """What everybody looks for first: figure and what it is of."""
    measured, unit = manifest.measured, manifest.task.unit
    found = [(text.times(measured.compression), "smaller")]
    if measured.speedup is not None:
        found.append((text.times(measured.speedup), f"faster ({measured.basis.latency})"))
    if measured.drop_points is not None:
        found.append((text.points(measured.drop_points, unit), f"lost ({measured.basis.accuracy})"))
    return tuple(found)


def _size(manifest: Manifest) -> Row:
    predicted, measured, error = manifest.predicted, manifest.measured, manifest.error
    return _row(
        manifest,
        "size",
        "size_bytes",
        before=text.size(manifest.baseline.size_bytes),
        after=text.size(measured.size_bytes),
        predicted=text.quantity("size_bytes", predicted.size_bytes, ""),
        measured=text.size(measured.size_bytes) + _off_pct(error.size_pct),
    )


def _latency(manifest: Manifest) -> Row:
    predicted, measured, before = manifest.predicted, manifest.measured, manifest.baseline.latency_ms
    after = text.quantity("latency_ms", p50(measured.latency_ms), "")
    return _row(
        manifest,
        "latency, median" + _unless_measured(measured.basis.latency),
        "latency_ms",
        before=text.quantity("latency_ms", p50(before), ""),
        after=after,
        predicted=text.quantity("latency_ms", predicted.latency_ms, ""),
        measured=after + _off_pct(manifest.error.latency_pct),
    )


def _accuracy(manifest: Manifest) -> Row:
    off, unit = manifest.error.accuracy_points, manifest.task.unit
    return Row(
        "score" + _unless_measured(manifest.measured.basis.accuracy),
        before=_score(manifest.baseline.accuracy, unit),
        after=_score(manifest.measured.accuracy, unit),
        predicted=_score(manifest.predicted.accuracy, unit),
        measured=_score(manifest.measured.accuracy_search, unit) + ("" if off is None else f" ({off:+.2f})"),
    )


def _gains(manifest: Manifest) -> tuple[Row, ...]:
    """Figures that are of both files at once."""
    predicted, measured, unit = manifest.predicted, manifest.measured, manifest.task.unit
    drop = text.quantity("drop", measured.drop_points, unit)
    if measured.drop_ci95 is not None:
        drop += " [{:.2f}, {:.2f}]".format(*measured.drop_ci95)
    speedup = text.quantity("speedup", measured.speedup, unit)
    if measured.speedup_ci95 is not None:
        speedup += " [{:.2f}, {:.2f}]".format(*measured.speedup_ci95)
    agreement = [] if measured.agreement is None else [_agreement(manifest)]
    return (
        _row(manifest, "compression", "compression", after=text.times(measured.compression)),
        _row(
            manifest,
            "speed-up",
            "speedup",
            after=speedup,
            predicted="" if predicted.speedup is None else text.times(predicted.speedup),
            measured=""
            if predicted.speedup is None
            else text.quantity("speedup", measured.speedup, unit) + _off_pct(manifest.error.speedup_pct),
        ),
        _row(manifest, "drop", "drop", after=drop),
        *agreement,
    )


def _needs(manifest: Manifest) -> tuple[Row, ...]:
    """What a process needs beside time to run; a limit on what nobody could measure is shown as well."""
    found = (
        _need(manifest, "peak memory", "memory_bytes", manifest.error.memory_pct),
        _need(manifest, "load", "load_ms", manifest.error.load_pct),
    )
    return tuple(row for row in found if row.after != text.NOT_MEASURED or row.check is not None)


def _need(manifest: Manifest, what: str, name: str, off_pct: float | None) -> Row:
    before, after, predicted = (
        text.quantity(name, getattr(record, name), "")
        for record in (manifest.baseline, manifest.measured, manifest.predicted)
    )
    elsewhere = _unless_measured(manifest.measured.basis.latency)
    measured = after + _off_pct(off_pct)
    return _row(manifest, what + elsewhere, name, before=before, after=after, predicted=predicted, measured=measured)


def _energy(manifest: Manifest) -> tuple[Row, ...]:
    """Of an inference, where a board has sensors for it."""
    before, after = manifest.baseline.energy_mj, manifest.measured.energy_mj
    if after is None:
        return ()
    return (Row("energy", text.quantity("energy_mj", before, ""), text.millijoules(after)),)


def _agreement(manifest: Manifest) -> Row:
    """Of the file with the original on the test split; as predicted, of the file with its simulation on search."""
    after, simulated = manifest.measured.agreement, manifest.error.agreement
    return Row("agreement", after=_score(after, "%"), predicted="" if simulated is None else text.score(simulated, "%"))


def _row(
    manifest: Manifest,
    figure: str,
    check_name: str,
    *,
    before: str = "",
    after: str,
    predicted: str = "",
    measured: str = "",
) -> Row:
    """A row with the check of this name, if there is one."""
    check = next((check for check in manifest.checks if check.name == check_name), None)
    budget = "" if check is None else text.limit(check, manifest.task.unit)
    return Row(figure, before, after, predicted, measured, check, budget)


def _score(value: float | None, unit: str) -> str:
    return text.NOT_MEASURED if value is None else text.score(value, unit)


def _off_pct(error_pct: float | None) -> str:
    """How far the prediction was from the measurement beside it."""
    return "" if error_pct is None else f" ({error_pct:+.1f} %)"


def _unless_measured(basis: str) -> str:
    return "" if basis == "measured" else f" ({basis})"
