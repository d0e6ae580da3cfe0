"""The command line: exit statuses, messages, and that what was typed reaches the pipeline."""

import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import hirelc_deploy
from hirelc_deploy import __version__, console
from hirelc_deploy.cli import main
from hirelc_deploy.config import OPTIONS, ExportSettings
from hirelc_deploy.errors import ExitStatus, UserError

EXPORT = ["export", "--target", "host", "--model", "net.py:build", "--data", "digits"]


@dataclass
class Pipeline:
    """Stands in for the pipeline: does `then`, and remembers what it was asked for."""

    then: Any = ExitStatus.OK
    asked: Any = None

    def export(self, settings: ExportSettings) -> SimpleNamespace:
        self.asked = settings
        if isinstance(self.then, BaseException):
            raise self.then
        return SimpleNamespace(manifest=None, status=self.then)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    standing_in = Pipeline()
    table = ModuleType("hirelc_deploy.report")
    table.closing_table = lambda manifest: "before, after"  # type: ignore[attr-defined]
    for name, module in (("pipeline", standing_in), ("report", table)):
        monkeypatch.setattr(hirelc_deploy, name, module, raising=False)
        monkeypatch.setitem(sys.modules, f"hirelc_deploy.{name}", module)  # type: ignore[arg-type]
    return standing_in


@pytest.mark.parametrize("status", list(ExitStatus))
def test_the_status_of_the_pipeline_is_the_status_of_the_command(pipeline, capsys, status):
    pipeline.then = status
    assert main(EXPORT) == status
    assert capsys.readouterr().out == "before, after\n"


@pytest.mark.parametrize(("option", "value"), [("recipe", "keep=50%"), ("policy", Path("policy.json"))])
def test_what_is_built_instead_of_searched_reaches_the_pipeline(pipeline, option, value):
    assert main([*EXPORT, f"--{option}", str(value)]) == 0
    assert getattr(pipeline.asked, option) == value


def test_every_option_reaches_the_pipeline_in_its_unit(pipeline):
    limits = "--max-latency 5ms --min-speedup 3 --max-size 400KB --max-memory 2MiB --max-drop 1.5 --allow-estimates"
    rest = (
        "--checkpoint net.pt --search recipe --importance taylor --evaluations 7 "
        "--epochs 0 --seed 1 --threads 3 --batch 4 --out here --resume "
        "--host user@orin --host-trtexec /opt/trtexec"
    )
    assert main([*EXPORT, *limits.split(), *rest.split()]) == 0
    assert pipeline.asked == ExportSettings(
        model="net.py:build",
        data="digits",
        target="host",
        checkpoint=Path("net.pt"),
        max_latency_ms=5.0,
        min_speedup=3.0,
        max_size_bytes=400_000,
        max_memory_bytes=2 * 1024 * 1024,
        max_drop=1.5,
        search="recipe",
        importance="taylor",
        allow_estimates=True,
        evaluations=7,
        epochs=0,
        seed=1,
        threads=3,
        batch=4,
        host="user@orin",
        host_trtexec="/opt/trtexec",
        out=Path("here"),
        resume=True,
    )


def test_without_options_the_defaults_of_the_settings_hold(pipeline):
    main(EXPORT)
    assert pipeline.asked == ExportSettings(model="net.py:build", data="digits", target="host")


def test_the_help_of_export_states_every_option_and_every_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    main(["export", "--help"])
    shown = capsys.readouterr().out
    for name, option in OPTIONS.items():
        (line,) = (line for line in shown.splitlines() if re.search(f" --{name.replace('_', '-')} ", line))
        default = {field.name: field.default for field in fields(ExportSettings)}[option.field]
        if isinstance(default, int | str | Path) and not isinstance(default, bool):
            assert re.search(rf"{re.escape(str(default))} ?\(default|\(default {re.escape(str(default))}", line), line


def test_options_come_from_a_file_as_well(pipeline, tmp_path):
    file = tmp_path / "export.toml"
    file.write_text('model = "net.py:build"\ndata = "digits"\ntarget = "host"\nepochs = 9\nallow-estimates = true\n')
    assert main(["export", "--config", str(file), "--epochs", "1"]) == 0
    assert (pipeline.asked.model, pipeline.asked.epochs, pipeline.asked.allow_estimates) == ("net.py:build", 1, True)


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["export", "--targt", "host"], "--targt", "hirelc-deploy export --help"),
        (["exprt"], "exprt", "hirelc-deploy --help"),
        (["export", "--epochs", "many"], "--epochs", "hirelc-deploy export --help"),
        (["verify"], "DIR", "hirelc-deploy verify --help"),
        (["export", "--epochs"], "--epochs", "hirelc-deploy --help"),
        ([*EXPORT, "--max-latency", "5"], "max-latency: '5' is a time without a unit", "5ms"),
        (["export", "--data", "digits", "--target", "host"], "model is missing", "--model"),
        ([*EXPORT, "--search", "annealing"], "search is 'annealing'", "recipe"),
        ([*EXPORT, "--config", "none.toml"], "none.toml does not exist", "path"),
    ],
)
def test_a_mistake_is_one_message_and_status_1(pipeline, capsys, arguments, what, fix):
    assert main(arguments) == ExitStatus.USER_ERROR
    shown = capsys.readouterr()
    first, second = shown.err.splitlines()
    assert first.startswith("error: ")
    assert what in first
    assert second.startswith("  fix: ")
    assert fix in second
    assert shown.out == ""


def test_a_users_mistake_in_the_pipeline_shows_no_traceback(pipeline, capsys):
    pipeline.then = UserError("the file [red]a.pt[/red] is gone", fix="bring it back")
    assert main(EXPORT) == ExitStatus.USER_ERROR
    assert capsys.readouterr().err == "error: the file [red]a.pt[/red] is gone\n  fix: bring it back\n"


def test_an_error_of_ours_shows_its_traceback_and_is_70(pipeline, capsys):
    pipeline.then = ZeroDivisionError("seven by nothing")
    assert main(EXPORT) == ExitStatus.INTERNAL == 70
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "ZeroDivisionError: seven by nothing" in shown


def test_an_interrupted_run_says_how_to_go_on(pipeline, capsys):
    pipeline.then = KeyboardInterrupt()
    assert main(EXPORT) == 130
    shown = capsys.readouterr().err
    assert "--resume" in shown
    assert "Traceback" not in shown


def test_no_verb_shows_the_help_and_is_a_mistake(capsys):
    assert main([]) == ExitStatus.USER_ERROR
    shown = capsys.readouterr()
    assert "export" in shown.out + shown.err
    assert "error:" not in shown.err


def test_the_process_ends_with_the_status_1_for_a_mistyped_option():
    done = subprocess.run(
        [sys.executable, "-m", "hirelc_deploy", "targets", "--colour"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "--colour" in done.stderr


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hirelc-deploy {__version__}\n"


def test_targets_lists_the_host_and_what_it_runs_whole_in_a_log(capsys):
    assert main(["targets"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "host" in line)
    assert "onnxruntime >= 1.16" in row
    assert "int8" in row
    assert "Conv1d, Conv2d, Linear" in row


@pytest.mark.parametrize("verb", ["gate", "verify", "report"])
def test_a_folder_without_an_artifact_is_a_mistake(verb, tmp_path, capsys):
    pytest.importorskip("hirelc_deploy.pipeline")
    assert main([verb, str(tmp_path)]) == ExitStatus.USER_ERROR
    assert "manifest.json" in capsys.readouterr().err


def test_progress_in_a_log_is_the_first_step_the_last_and_one_line_now_and_then(capsys):
    now_s = iter(range(0, 1000, 4))  # one step takes 4 s, so every eighth is due
    with console.progress("fine-tuning", 20, clock=lambda: float(next(now_s))) as advance:
        for step in range(20):
            advance(f"loss {step}")
    assert capsys.readouterr().err.splitlines() == [
        "fine-tuning 1/20, 0:04 passed, 1:16 left, loss 0",
        "fine-tuning 9/20, 0:36 passed, 0:44 left, loss 8",
        "fine-tuning 17/20, 1:08 passed, 0:12 left, loss 16",
        "fine-tuning 20/20, 1:20 passed, 0:00 left, loss 19",
    ]


def test_a_long_message_stays_on_one_line_in_a_log(capsys):
    console.note("x " * 300)
    assert capsys.readouterr().err.count("\n") == 1
