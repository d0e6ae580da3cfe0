"""A search from the command line's settings to a judged artifact, and methods compared, on a network of seconds."""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import pytest
from exporting import digits, export, hasten, policy_of, quick_target, trained_digit_net
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hirelc_deploy import (
    choosing,
    compare as comparing,
    costing,
    effects,
    tensorboard,
    trainer,
    verification,
    workbench,
)
from hirelc_deploy.config import ExportSettings
from hirelc_deploy.errors import UserError
from hirelc_deploy.search.finish import Finishing
from hirelc_deploy.search.space import Evaluation

hasten()

EVALUATIONS = 6


@pytest.fixture(scope="module", autouse=True)
def small_effort() -> Iterator[None]:
    """Everything is done, and little of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costing, "SIZE_SAMPLES", 60)
        patch.setattr(effects, "COUNTS_TRIED", 3)
        patch.setattr(effects, "LOOKED_AT", 64)
        patch.setattr(trainer, "RECOVERY_EXAMPLES", 256)
        patch.setattr(choosing, "FINALISTS", 2)
        yield


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all tests: its tables, which lie beside it, are measured once."""
    return quick_target(tmp_path_factory.mktemp("target"), channel_multiple=4)


@pytest.fixture(scope="module")
def promising() -> Iterator[list[list[str]]]:
    """Digests of what the search found worth timing, after each part of it; by luck it can be nothing."""
    told: list[list[str]] = []
    asked = Finishing.promising

    def noted(self: Finishing, seen: Sequence[Evaluation], count: int) -> list[Evaluation]:
        found = asked(self, seen, count)
        if count == choosing.TIMED:
            told.append([each.policy.digest()[: costing.DIGITS] for each in found])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finishing, "promising", noted)
        yield told


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, target: str, promising: list[list[str]]) -> verification.Outcome:
    return export(
        tmp_path_factory.mktemp("searched") / "out",
        trained_digit_net(),
        digits(),
        target=target,
        search="hierarchical",
        evaluations=EVALUATIONS,
        epochs=1,
        max_drop=5.0,
        tensorboard=tmp_path_factory.getbasetemp() / "board",
    )


def test_a_search_ends_in_a_judged_artifact(searched: verification.Outcome) -> None:
    manifest = searched.manifest
    assert manifest.search.method == "hierarchical"
    assert 1 <= manifest.search.evaluations <= EVALUATIONS
    assert {check.name for check in manifest.checks} >= {"drop"}
    assert manifest.predicted.latency_ms is not None
    assert manifest.predicted.size_bytes == manifest.artifact.size_bytes


def test_files_of_what_a_search_finds_are_timed_after_each_part_of_it(
    searched: verification.Outcome, promising: list[list[str]]
) -> None:
    """And so what it believes in the end is corrected by them."""
    journal = (searched.folder / "run" / "journal.jsonl").read_text(encoding="utf-8")
    steps = [json.loads(line)["entry"].get("step", "") for line in journal.splitlines()]
    batches = [step.split("/")[2:] for step in steps if step.startswith("search/timed")]
    assert batches[0] == [], "recipes, before anything was evaluated"
    timed = list(chain.from_iterable(batches))
    first, second = promising[:2]
    assert timed == list(dict.fromkeys(first + second)), "each once, and none that was not found"
    assert all(1 <= len(batch) <= choosing.TIMED for batch in batches[1:])


def test_what_else_was_found_can_be_built(searched: verification.Outcome, tmp_path: Path, target: str) -> None:
    front = searched.manifest.search.front
    assert [each.size_bytes for each in front] == sorted(each.size_bytes for each in front)
    for one in (each for each in front if each.finished_drop_points is None):
        assert not any(
            other.size_bytes <= one.size_bytes
            and other.latency_ms <= one.latency_ms
            and max(other.drop_points, 0.0) <= max(one.drop_points, 0.0)
            for other in front
            if other is not one
        )
    assert any(each.finished_drop_points is not None for each in front)
    assert front[0].path in (searched.folder / "report.html").read_text(encoding="utf-8")
    file = searched.folder / front[0].path
    built = export(tmp_path / "out", trained_digit_net(), digits(), target=target, policy=file, epochs=1)
    assert json.loads((built.folder / "policy.json").read_text()) == json.loads(file.read_text())
    assert not built.manifest.search.front


def test_tensorboard_shows_evaluations_and_agents(
    searched: verification.Outcome, tmp_path_factory: pytest.TempPathFactory
) -> None:
    accumulated = EventAccumulator(str(tmp_path_factory.getbasetemp() / "board"))
    accumulated.Reload()
    names = accumulated.Tags()["scalars"]
    count = searched.manifest.search.evaluations
    assert [event.step for event in accumulated.Scalars("evaluation/drop")] == list(range(1, count + 1))
    assert all(event.value > 0 for event in accumulated.Scalars("evaluation/size_bytes"))
    for name in ("high-level agent 2 (a2c)/reward", "low-level agent 0 (ppo)/train/value_loss", "search/hypervolume"):
        assert name in names, names


def test_without_tensorboard_a_wish_for_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="not installed") as caught, tensorboard.logged(tmp_path):
        pass
    assert "hirelc-deploy[tensorboard]" in caught.value.fix


def test_a_search_goes_on_where_it_was(
    searched: verification.Outcome, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(*_: object) -> float:
        raise AssertionError("an evaluation that the journal has is made again")

    monkeypatch.setattr(trainer.Trainer, "recovered", no_more)
    again = export(
        searched.folder,
        trained_digit_net(),
        digits(),
        target=target,
        search="hierarchical",
        evaluations=EVALUATIONS,
        epochs=1,
        max_drop=5.0,
        resume=True,
    )
    assert policy_of(again) == policy_of(searched)
    assert again.manifest.artifact.sha256 == searched.manifest.artifact.sha256


def test_processes_evaluate_side_by_side_and_the_run_goes_on_with_another_number_of_them(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "target": target,
        "search": "hierarchical",
        "evaluations": EVALUATIONS,
        "epochs": 1,
        "max_drop": 40.0,  # there is much to try below it
    }
    asked: list[int] = []
    recovered = workbench.Workbench.recovered_scores
    monkeypatch.setattr(
        workbench.Workbench,
        "recovered_scores",
        lambda bench, policies: asked.append(len(policies)) or recovered(bench, policies),
    )
    first = export(tmp_path / "out", trained_digit_net(), digits(), workers=2, **settings)
    assert max(asked) == 2
    again = export(tmp_path / "out", trained_digit_net(), digits(), workers=1, resume=True, **settings)
    assert again.manifest.artifact == first.manifest.artifact
    assert again.manifest.search == first.manifest.search


def test_methods_are_compared_and_the_folder_says_how(tmp_path: Path, target: str) -> None:
    network = tmp_path / "net.py"
    network.write_text(
        "from exporting import trained_digit_net\n\n\ndef network():\n    return trained_digit_net()\n",
        encoding="utf-8",
    )
    settings = ExportSettings(
        model=f"{network}:network",
        data="digits",
        target=target,
        max_drop=5.0,
        evaluations=4,
        out=tmp_path / "out",
    )
    rows = comparing.compare(settings, ["recipe", "random"], seeds=1)
    assert {row.method for row in rows} == {"recipe", "random"}
    record = json.loads((settings.out / comparing.RESULT_FILE).read_text())
    assert [len(run["places"]) for run in record["runs"]] == [4, 4]
    assert (settings.out / comparing.TABLE_FILE).read_text().count("\n") == 4
    assert (settings.out / comparing.PLOT_FILE).exists()


def test_without_matplotlib_nothing_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    settings = ExportSettings(model="m", data="digits", target="host", out=tmp_path)
    with pytest.raises(UserError, match="matplotlib is not installed"):
        comparing.compare(settings, ["recipe"], seeds=1)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    settings = ExportSettings(model="m", data="digits", target="host", out=tmp_path)
    with pytest.raises(UserError, match="no method 'evolutoin'") as refused:
        comparing.compare(settings, ["recipe", "evolutoin"], seeds=1)
    assert "evolution" in refused.value.fix
    with pytest.raises(UserError, match="seeds"):
        comparing.compare(settings, ["recipe"], seeds=0)
    with pytest.raises(UserError, match="epochs is 0"):
        ExportSettings(model="m", data="digits", target="host", search="greedy", epochs=0)
