"""What a user would lose: a report that shows another figure than the manifest, or cannot be read alone."""

from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hirelc_deploy import report
from hirelc_deploy.budget import Budget, Check
from hirelc_deploy.verify.environment import environment
from hirelc_deploy.verify.judge import judge
from hirelc_deploy.verify.manifest import LayerRecord, Manifest, Measured

VOID = {"meta", "br", "hr", "img", "link", "input"}


def manifest(**changes: Any) -> Manifest:
    """The `wide` network of the examples, compressed, with one layer that runs otherwise and one that is gone."""
    figures = {
        "size_bytes": 98_212,
        "accuracy": 93.12,
        "accuracy_search": 92.9,
        "latency_ms": {"p50": 0.261, "p90": 0.28, "p99": 0.35},
        "compression": 28.6,
        "speedup": 8.72,
        "drop_points": 0.31,
        "drop_ci95": (-0.02, 0.64),
        "agreement": 97.2,
        "basis": {"size": "measured", "accuracy": "measured", "latency": "measured"},
    }
    conv: dict[str, Any] = {"op": "Conv2d", "of": 32, "storage": "int8/channel", "encoding": "int8", "compute": "int8"}
    layers = (
        LayerRecord(name="stem.0", kept=8, weight_bytes=72, runs_as="int8", **conv),
        LayerRecord(name="blocks[0]<conv1>", kept=8, weight_bytes=576, runs_as="fp32", **conv),
        LayerRecord(name="blocks.1.conv2", kept=0, weight_bytes=0, runs_as=None, **conv),
    )
    budget = Budget(latency_ms=0.5, size_bytes=100_000, drop=1.0)
    verdict = judge(budget, Measured.model_validate(figures), layers, of_the_file=[])
    values = {
        "tool_version": "0.1.0",
        "created": "2026-01-01T00:00:00+00:00",
        "target": "host",
        "runtime": {"name": "onnxruntime", "version": "1.31.0"},
        "model": {"spec": "networks.py:wide", "checkpoint_sha256": "ab" * 32},
        "task": {"spec": "fashion", "sha256": "cd" * 32, "test_examples": 10_000, "search_seen_in_training": False},
        "artifact": {"path": "model.onnx", "sha256": "ef" * 32, "size_bytes": 98_212},
        "baseline": {"size_bytes": 2_812_345, "accuracy": 93.43, "latency_ms": {"p50": 2.276, "p90": 2.3, "p99": 2.9}},
        "predicted": {"size_bytes": 98_100, "accuracy": 93.0, "latency_ms": 0.25, "speedup": 8.8},
        "measured": figures,
        "error": {"size_pct": -0.114, "latency_pct": -4.2, "accuracy_points": 0.1, "speedup_pct": 1.3},
        "layers": layers,
        "search": {"method": "recipe", "evaluations": 12, "seconds": 754.2, "seed": 0, "order": ("prune", "quantize")},
        "budget": budget,
        "checks": verdict.checks,
        "verdict": verdict.word,
        "environment": environment(threads=1, batch=1, clock="cpu"),
        "notes": ("group head left out: <its flatten is channel-last>",),
    }
    return Manifest.model_validate(values | changes)


def printed(made: Manifest) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(report.closing_table(made))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what is referred to and what is read."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip()

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row[0] == first)


def test_the_table_shows_each_figure_beside_its_prediction_and_limit() -> None:
    lines = {
        line.split("│")[1].strip(): [c.strip() for c in line.split("│")[1:-1]]
        for line in printed(manifest()).splitlines()
        if "│" in line
    }
    assert lines["size"] == ["size", "2.81 MB", "98.2 KB", "98.1 KB", "98.2 KB (-0.1 %)", "≤ 100 KB", "ok"]
    assert lines["speed-up"][3:5] == ["8.80 ×", "8.72 × (+1.3 %)"]
    assert lines["score"] == ["score", "93.43 %", "93.12 %", "93.00 %", "92.90 % (+0.10)", "", ""]
    assert lines["drop"] == ["drop", "", "0.31 points [-0.02, 0.64]", "", "", "≤ 1.00 points", "ok"]
    assert lines["layers run as asked"][-1] == "FAILED"


def test_the_table_prints_names_that_rich_would_take_for_markup() -> None:
    assert "blocks[0]<conv1> as fp32, not int8" in printed(manifest())


def test_the_page_stands_alone_and_is_well_formed() -> None:
    source = report.html(manifest())
    page = Page(source)
    assert page.references == []
    assert "<script" not in source
    assert "@import" not in source
    assert "url(" not in source
    assert "prefers-color-scheme: dark" in source


def test_the_page_shows_verdict_figures_layers_and_what_was_left_out() -> None:
    source = report.html(manifest())
    page = Page(source)
    assert source.index(">fail<") < source.index("Figures and checks")
    assert page.row("size")[1:] == ["2.81 MB", "98.2 KB", "98.1 KB", "98.2 KB (-0.1 %)", "≤ 100 KB", "ok"]
    assert page.row("stem.0") == ["stem.0", "Conv2d", "8 of 32", "int8/channel", "int8", "72 B", "int8", "int8"]
    assert page.row("blocks[0]<conv1>")[-2:] == ["int8", "fp32"]
    assert page.row("blocks.1.conv2")[2:] == ["0 of 32", "gone"]
    assert "group head left out: &lt;its flatten is channel-last&gt;" in source
    assert "hirelc-deploy verify ." in source


def test_what_was_not_measured_is_not_shown_as_measured() -> None:
    figures = manifest().measured.model_dump() | {
        "latency_ms": {"p50": 0.261},
        "basis": {"size": "measured", "accuracy": "measured", "latency": "estimate"},
    }
    made = manifest(measured=figures, verdict="unverified")
    page = Page(report.html(made))
    assert page.row("latency, median (estimate)")
    assert "faster (estimate)" in report.html(made)
    nothing = figures | {"latency_ms": None, "speedup": None, "accuracy": None, "drop_points": None, "drop_ci95": None}
    made = manifest(measured=nothing, baseline={"size_bytes": 9, "accuracy": None, "latency_ms": None})
    assert Page(report.html(made)).row("speed-up")[2] == "–"
    assert printed(made)


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"epochs": 1, "importance": "obs"}, "1 epoch of fine-tuning; channels removed by obs"),
        (
            {"epochs": 6, "importance": "l2", "augment": ("flip", "shift")},
            "6 epochs of fine-tuning, train images changed by flip and shift; channels removed by l2",
        ),
        (
            {"epochs": 0, "importance": "obs", "post_training": ("statistics", "biases")},
            "none; weights corrected by statistics, biases; channels removed by obs",
        ),
        ({"epochs": 0, "importance": "obs"}, "none; weights corrected by nothing; channels removed by obs"),
    ],
)
def test_the_page_says_how_weights_were_trained(training: dict[str, Any], told: str) -> None:
    assert f"<dt>training</dt><dd>{told}</dd>" in report.html(manifest(training=training))
    assert "<dt>training</dt>" not in report.html(manifest())  # as manifests of before have it


def test_a_score_in_millimetres_loses_no_points() -> None:
    task = {"spec": "s", "sha256": "", "test_examples": 1, "search_seen_in_training": False, "unit": "mm"}
    source = report.html(manifest(task=task))
    assert "0.31 mm" in source
    assert "points" not in source


@pytest.mark.parametrize("ok", [True, False, None])
def test_every_check_has_its_row(ok: bool | None) -> None:
    checks = (Check("size_bytes", 100, 90, ok), Check("sha256", "ab" * 32, "cd" * 32, ok))
    rows = report.rows(manifest(checks=checks))
    assert sorted(row.check.name for row in rows if row.check is not None) == ["sha256", "size_bytes"]


def test_the_page_is_written_beside_the_file(tmp_path: Path) -> None:
    report.write(manifest(), tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.html(manifest())
