"""What a user would lose: hours of finished evaluations, or the certainty that a resumed run is the same run."""

import errno
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from hirelc_deploy import rundir
from hirelc_deploy.errors import UserError
from hirelc_deploy.rundir import RunFolder, write_atomic

FINGERPRINT = {"model": "abc", "data": "def", "settings.epochs": "4"}
ROOT = Path(__file__).parents[1]

# every value depends on the one before, so that a lost or repeated step shows in the last
LOOP = """
import hashlib, sys
from pathlib import Path
from hirelc_deploy.rundir import RunFolder

def note(key):
    with open(sys.argv[2], "a") as log:
        log.write(key + "\\n")

with RunFolder.open(Path(sys.argv[1]), {"model": "abc"}, resume=True) as run:
    value, weights = 0.1, b""
    for i in range(40):
        def train():
            note(f"step{i}")
            begun = run.load_state("training")
            for epoch in range(int(begun or b"0"), 3):
                run.save_state("training", b"%d" % (epoch + 1))
            return {"score": value / 3 + i, "epochs": 3}
        value = run.step(f"step{i}", train)["score"]
        run.drop_state("training")
        weights = run.blob(f"weights{i}", lambda: hashlib.sha256(weights + repr(value).encode()).digest() * 100)
    print(repr(value), hashlib.sha256(weights).hexdigest())
"""


def reopen(path: Path, resume: bool = True) -> RunFolder:
    return RunFolder.open(path, FINGERPRINT, resume)


def refuse_to_compute() -> float:
    raise AssertionError("a finished step was computed again")


def start_loop(path: Path, log: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LOOP, str(path), str(log)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish_loop(path: Path, log: Path) -> str:
    output, errors = start_loop(path, log).communicate(timeout=60)
    assert output, errors
    return output


def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = finish_loop(tmp_path / "calm", tmp_path / "calm.log")
    journal, log = tmp_path / "killed" / "journal.jsonl", tmp_path / "killed.log"
    moment = random.Random(0)
    kills_within = 0
    for _ in range(12):
        grown = (journal.stat().st_size if journal.exists() else 0) + moment.randint(0, 1500)
        process = start_loop(tmp_path / "killed", log)
        while process.poll() is None and (not journal.exists() or journal.stat().st_size < grown):
            time.sleep(0.0005)
        process.kill()
        kills_within += process.wait() != 0
        process.communicate()
    assert kills_within >= 5
    assert finish_loop(tmp_path / "killed", log) == undisturbed
    assert len(log.read_text().splitlines()) <= 40 + kills_within  # at most the running step is lost


def test_a_journal_cut_at_any_byte_goes_on_to_the_same_end(tmp_path: Path) -> None:
    def run_through(folder: Path) -> list[float]:
        with reopen(folder) as run:
            return [run.step(f"step{i}", partial(float.__mul__, 0.1, float(i))) for i in range(3)]

    expected = run_through(tmp_path / "whole")
    journal = (tmp_path / "whole" / "journal.jsonl").read_bytes()
    for length in range(0, len(journal), 7):
        folder = tmp_path / f"cut{length}"
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(journal[:length])
        assert run_through(folder) == expected
        assert (folder / "journal.jsonl").read_bytes() == journal


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    folder = tmp_path_factory.mktemp("run") / "run"
    with reopen(folder, resume=False) as run:
        first = run.step("score", lambda: [value])
    with reopen(folder) as run:
        (replayed,) = run.step("score", lambda: [refuse_to_compute()])
    assert replayed.hex() == first[0].hex() == value.hex()


def test_what_a_caller_does_to_a_value_does_not_change_the_replay(tmp_path: Path) -> None:
    with reopen(tmp_path) as run:
        run.step("scores", lambda: [1.0]).append(2.0)
        assert run.step("scores", lambda: [refuse_to_compute()]) == [1.0]


@pytest.mark.parametrize("value", [(1, 2), {1: "a"}, float("nan"), [float("inf")], {"a": {1}}])
def test_a_value_that_json_would_change_is_refused_and_not_recorded(tmp_path: Path, value: Any) -> None:
    with reopen(tmp_path) as run:
        with pytest.raises((TypeError, ValueError)):
            run.step("key", lambda: value)
        assert run.step("key", lambda: 1) == 1


def test_a_changed_line_in_the_middle_is_refused_by_its_number(tmp_path: Path) -> None:
    with reopen(tmp_path) as run:
        for i in range(3):
            run.step(f"step{i}", lambda: 93.25)
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace("93.25", "98.25")
    journal.write_text("".join(lines))
    with pytest.raises(UserError, match=r"line 3 of .* is damaged"):
        reopen(tmp_path)


def test_a_difference_is_named_with_its_old_and_new_value(tmp_path: Path) -> None:
    reopen(tmp_path, resume=False).close()
    with pytest.raises(UserError) as refused:
        RunFolder.open(tmp_path, {"model": "abc", "data": "def", "settings.epochs": "8", "settings.seed": "1"}, True)
    assert "settings.epochs was 4 and is 8" in refused.value.what
    assert "settings.seed was not given and is 1" in refused.value.what
    assert "model" not in refused.value.what


def test_a_folder_with_a_run_needs_resume(tmp_path: Path) -> None:
    reopen(tmp_path, resume=False).close()
    with pytest.raises(UserError, match="already holds a run") as refused:
        reopen(tmp_path, resume=False)
    assert "--resume" in refused.value.fix
    reopen(tmp_path, resume=True).close()


def test_a_journal_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "JOURNAL_SCHEMA", rundir.JOURNAL_SCHEMA + 1)
    reopen(tmp_path).close()
    monkeypatch.undo()
    with pytest.raises(UserError, match="another version"):
        reopen(tmp_path)


def test_blobs_without_their_journal_are_not_taken_over(tmp_path: Path) -> None:
    with reopen(tmp_path) as run:
        run.save_state("training", b"of another model")
    (tmp_path / "journal.jsonl").unlink()
    with pytest.raises(UserError, match="journal is gone"):
        reopen(tmp_path)


def test_two_processes_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with reopen(tmp_path), pytest.raises(UserError, match="another process"):
        reopen(tmp_path)
    reopen(tmp_path).close()


def test_a_blob_is_computed_once_and_checked_when_read(tmp_path: Path) -> None:
    key = "weights/of the first evaluation" * 20  # longer than a file name may be
    with reopen(tmp_path) as run:
        assert run.blob(key, lambda: b"weights") == b"weights"
    with reopen(tmp_path) as run:
        assert run.blob(key, lambda: b"other") == b"weights"
    (file,) = (tmp_path / "blobs").iterdir()
    file.write_bytes(b"weighty")
    with reopen(tmp_path) as run, pytest.raises(UserError, match="damaged"):
        run.blob(key, lambda: b"other")
    file.unlink()
    with reopen(tmp_path) as run, pytest.raises(UserError, match="gone"):
        run.blob(key, lambda: b"other")


def test_states_are_replaced_read_back_checked_and_dropped(tmp_path: Path) -> None:
    with reopen(tmp_path) as run:
        assert run.load_state("training") is None
        run.save_state("training", b"epoch 1")
        run.save_state("training", b"")
        run.save_state("training", b"epoch 2")
    with reopen(tmp_path) as run:
        assert run.load_state("training") == b"epoch 2"
        (file,) = (tmp_path / "states").iterdir()
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(UserError, match="damaged"):
            run.load_state("training")
        run.drop_state("training")
        run.drop_state("training")
        assert run.load_state("training") is None


class FullDisk:
    """Takes `room` bytes and then says that the disk is full, in the middle of a write as a real one does."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.write = os.write

    def __call__(self, file: int, data: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.write(file, data[: self.room])
        self.room -= written
        return written


def test_a_full_disk_keeps_earlier_work_and_the_run_goes_on_when_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reopen(tmp_path) as run:
        run.step("first", lambda: 1.5)
        run.save_state("training", b"epoch 1")
        for fails in (
            lambda: run.step("second", lambda: 2.5),
            lambda: run.blob("weights", lambda: bytes(100)),
            lambda: run.save_state("training", bytes(100)),
        ):
            monkeypatch.setattr(rundir.os, "write", FullDisk(room=20))
            with pytest.raises(UserError, match="no space is left") as refused:
                fails()
            monkeypatch.undo()
            assert "--resume" in refused.value.fix
        assert not list(tmp_path.rglob("*.unfinished"))
        run.step("third", lambda: 3.5)
    with reopen(tmp_path) as run:
        assert run.step("first", refuse_to_compute) == 1.5
        assert run.step("third", refuse_to_compute) == 3.5
        assert run.step("second", lambda: 2.75) == 2.75
        assert run.load_state("training") == b"epoch 1"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_no_permission_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def forbidden(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rundir.os, "open", forbidden)
    with pytest.raises(UserError, match="no permission"):
        reopen(tmp_path)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="not a folder"):
        reopen(tmp_path / "out")


def test_an_error_of_the_step_itself_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    def broken() -> float:
        raise OSError(errno.ENOSPC, "of another disk")

    with reopen(tmp_path) as run, pytest.raises(OSError, match="another disk"):
        run.step("step", broken)


def test_a_report_may_go_to_a_device_or_through_a_link(tmp_path: Path) -> None:
    write_atomic(Path(os.devnull), b"x")
    assert not Path(os.devnull).is_file()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomic(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"x"
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        write_atomic(tmp_path, b"x")


def test_processes_beside_it_note_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several would write the same file at once, and one of them find its own gone."""
    monkeypatch.setattr(rundir, "NOTE_SECONDS", 0.0)
    with reopen(tmp_path) as run:
        child = multiprocessing.get_context("fork").Process(target=run.save_state, args=("b", b"x"))
        child.start()
        child.join()
        assert child.exitcode == 0
        assert run.load_state("b") == b"x"
        assert not (tmp_path / "seconds").exists()


def test_time_is_added_up_over_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(rundir.time, "monotonic", lambda: now)
    with reopen(tmp_path) as run:
        now += 25
        run.step("a", lambda: 1)
        now += 5  # not noted: lost to the kill
    now = 7.0  # of another boot
    with reopen(tmp_path) as run:
        now += 40
        run.save_state("b", b"")
        assert run.seconds == 65
    with reopen(tmp_path) as run:
        assert run.seconds == 65
    (tmp_path / "seconds").write_text("soon")
    with pytest.raises(UserError, match="holds no number"):
        reopen(tmp_path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "manifest.json"
    write_atomic(file, b"old")
    monkeypatch.setattr(rundir.os, "write", FullDisk(room=2))
    with pytest.raises(UserError):
        write_atomic(file, b"new and longer")
    monkeypatch.undo()
    assert file.read_bytes() == b"old"
    write_atomic(file, b"new and longer")
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("place", ["missing/verdict.xml", "folder"])
def test_a_place_where_no_file_can_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_atomic(tmp_path / place, b"<testsuite/>")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_entry_is_on_the_disk_before_the_next_step_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    with reopen(tmp_path) as run:
        monkeypatch.setattr(rundir.os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
        run.step("first", lambda: 1)
        journal = tmp_path / "journal.jsonl"
        assert synced == [journal.stat().st_size]
        assert json.loads(journal.read_text().splitlines()[-1])["entry"] == {"step": "first", "value": 1}
