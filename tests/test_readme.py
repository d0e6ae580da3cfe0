"""What the README says is what happens: its commands run, and its figures are those of the result files."""

import json
import re
import shlex
import shutil
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from exporting import hasten

from hirelc_deploy import choosing, cli, costing
from hirelc_deploy.errors import ExitStatus

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Wide enough that what is left of it is faster on any machine, however busy: the ten lines set a limit on latency.
NETWORK = """
from torch import nn


def build():
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2),
    )
"""

hasten()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with the three files that the README names: bright images against dark ones."""
    import torch
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    random = np.random.default_rng(0)
    y = random.integers(0, 2, 400)
    x = (random.normal(size=(400, 1, 8, 8)) + 4.0 * y[:, None, None, None] - 2.0).astype(np.float32)
    np.savez("data.npz", x_train=x[:300], y_train=y[:300], x_test=x[300:], y_test=y[300:])
    scope: dict[str, object] = {}
    exec(NETWORK, scope)
    torch.manual_seed(0)
    net = scope["build"]()  # type: ignore[operator]
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(net(torch.from_numpy(x[:300])), torch.from_numpy(y[:300]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_file(net.state_dict(), "net.safetensors")
    return tmp_path


def commands(page: str = README, after: str = "## Your own model, in ten lines") -> list[list[str]]:
    """The `hirelc-deploy` commands of the indented lines below a heading, in order, without their comments."""
    block = page.partition(after)[2].partition("\n- ")[0]
    code = "\n".join(line[4:] for line in block.splitlines() if line.startswith("    "))
    lines = re.sub(r"\\\n\s*", " ", code).splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("hirelc-deploy ")]


def test_the_ten_lines_do_what_they_say(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "EVALUATIONS", 8)  # the same search, cut short
    monkeypatch.setattr(costing, "SIZE_SAMPLES", 60)
    export, report, gate = commands()
    assert cli.main(export) == ExitStatus.OK
    assert "verdict: pass" in capsys.readouterr().out
    assert cli.main(report) == ExitStatus.OK
    assert (project / "out" / "net" / "report.html").stat().st_size > 0
    assert cli.main(gate) == ExitStatus.OK


def test_a_policy_is_searched_once_and_gated_for_every_checkpoint(project: Path) -> None:
    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    (project / "edge.toml").write_text(page.partition("```toml\n")[2].partition("```")[0])
    search, export, gate, verify = commands(page, "## Once, by hand")
    assert cli.main([*search, "--recipe", "keep=50%,compute=int8"]) == ExitStatus.OK  # in place of the search
    shutil.copy("out/search/policy.json", "edge-policy.json")
    assert cli.main(export) == ExitStatus.OK
    assert cli.main(gate) == ExitStatus.OK
    assert "<testsuite" in (project / "out" / "gate.xml").read_text()
    assert cli.main(verify) == ExitStatus.OK
    in_workflow = [line for line in page.splitlines() if line.lstrip().startswith("- run: hirelc-deploy export")]
    assert [shlex.split(line.partition("hirelc-deploy ")[2]) for line in in_workflow] == [export]


def test_the_python_lines_do_what_they_say(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = README.partition("```python\n")[2].partition("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("0 ")
    assert (project / "out" / "from-python" / "model.onnx").is_file()


def test_the_figures_are_those_of_the_result_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("figures", None)
    import figures

    assert figures.with_table(README) == README
    assert figures.predictions() == figures.PREDICTIONS.read_text(encoding="utf-8")


def test_the_page_of_number_formats_is_that_of_the_result_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import number_formats

    assert (ROOT / "docs" / "number-formats.md").read_text(encoding="utf-8") == number_formats.page()
    assert number_formats.with_highlights(README) == README


@pytest.mark.parametrize("name", ["fine_tuning", "latency_prediction", "order", "search_methods", "starting_points"])
def test_a_page_is_that_of_its_result_files(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = import_module(name)
    assert benchmark.PAGE.read_text(encoding="utf-8") == benchmark.page()


def test_the_methods_side_by_side_are_those_of_the_result_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import search_methods

    assert search_methods.with_methods(README) == README


def test_sizes_are_told_within_what_is_promised() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "size_prediction.json").read_text(encoding="utf-8"))
    assert record["policies"] >= 50
    assert len(record["networks"]) >= 3
    for seen in record["networks"].values():
        assert all(abs(each["predicted"] / each["bytes"] - 1) <= 0.005 for each in seen)


def test_errors_of_latencies_are_those_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import latency_prediction

    records = latency_prediction.results()
    assert {target for target, _ in records} == set(latency_prediction.TARGETS)
    for record in records.values():
        for name, by_how in latency_prediction.judge(record).items():
            for how, errors in by_how.items():
                assert errors["mape_pct"] == pytest.approx(record["errors"][name][how]["mape_pct"], rel=0.01)
