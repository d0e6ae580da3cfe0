"""The run folder: a finished step is on disk before the next begins, so a killed run goes on where it was.

    journal.jsonl   one line a finished step, append-only, each line with the checksum of its entry
    blobs/          bytes that a step made (weights, model files); their checksums are in the journal
    states/         checkpoints of a step that is still running, replaced as it goes
    seconds         how long processes have worked here
    lock            held while a process works here

The first line of the journal is the run's fingerprint: what model, data and settings its steps belong to.
"""

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from hirelc_deploy.errors import UserError

JSONValue = None | bool | int | float | str | Sequence["JSONValue"] | Mapping[str, "JSONValue"]
"""What a step may return: lists and string-keyed dicts of plain values, floats finite."""

Value = TypeVar("Value", bound=JSONValue)

JOURNAL_SCHEMA = 1

NOTE_SECONDS = 10.0
"""How often the time that was spent is written down, at most: so much of it a kill may take."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_FOLDER = {errno.EEXIST, errno.ENOTDIR}
_NO_PLACE = {errno.ENOENT, errno.EISDIR, errno.ENAMETOOLONG}


class RunFolder:
    """Steps that are computed once, by key, and replayed from disk ever after.  One process, one thread."""

    def __init__(self, path: Path, journal: "_Journal", resources: ExitStack) -> None:
        self.path = path
        self._journal = journal
        self._resources = resources
        # values as JSON text, so that every replay hands out a fresh object
        self._steps = {e["step"]: _to_json(e["value"]) for e in journal.entries if "step" in e}
        self._blobs = {e["blob"]: e["sha256"] for e in journal.entries if "blob" in e}
        self._seconds_before = _seconds(path / "seconds")
        self._opened = self._noted = time.monotonic()
        self._process = os.getpid()

    @property
    def seconds(self) -> float:
        """Spent on this run by every process that worked on it, but for what a kill took."""
        return self._seconds_before + time.monotonic() - self._opened

    @classmethod
    def open(cls, path: Path, fingerprint: Mapping[str, str], resume: bool) -> "RunFolder":
        """Begin a run in `path`, or go on with the one that it holds.

        `fingerprint` names whatever decides the results: {"model": sha256, "settings.epochs": "4"}.
        With `resume`, a folder without a run begins one: the first attempt may have died before its first line.

        Raises UserError if the folder is in use, holds a run and `resume` is false, holds a run whose
        fingerprint differs, has a damaged journal, or cannot be written.
        """
        with ExitStack() as resources:
            with disk_errors(path):
                for folder in (path, path / "blobs", path / "states"):
                    folder.mkdir(parents=True, exist_ok=True)
                resources.callback(os.close, _lock(path))
                journal = _Journal(path / "journal.jsonl")
                resources.callback(journal.close)
            if journal.entries:
                _check_same_run(path, journal.entries[0], fingerprint, resume)
            else:
                _check_no_remains(path)
                with disk_errors(path):
                    journal.append({"journal": JOURNAL_SCHEMA, "fingerprint": dict(fingerprint)})
                    _sync_folder(path)
            return cls(path, journal, resources.pop_all())

    def __contains__(self, key: str) -> bool:
        """Whether a step is finished."""
        return key in self._steps

    def has_blob(self, key: str) -> bool:
        """Whether the bytes of a step are there."""
        return key in self._blobs

    def step(self, key: str, compute: Callable[[], Value]) -> Value:
        """The value of a step: replayed where the journal has it, else computed and recorded.

        Floats come back bit for bit.  Raises TypeError or ValueError for a value that JSON would change
        (tuples, integer keys, NaN), and UserError if it cannot be written.
        """
        if key not in self._steps:
            value = compute()
            text = _to_json(value)
            if json.loads(text) != value:
                raise TypeError(f"step {key!r} returned a value that JSON changes: {value!r}")
            with disk_errors(self.path):
                self._journal.append({"step": key, "value": value})
            self._steps[key] = text
            self._note_seconds()
        replayed: Value = json.loads(self._steps[key])
        return replayed

    def blob(self, key: str, compute: Callable[[], bytes]) -> bytes:
        """The bytes of a step, kept in a file of their own.

        Raises UserError if the file is gone or differs from its checksum, or if it cannot be written.
        """
        file = self.path / "blobs" / _file_name(key)
        if key in self._blobs:
            return self._read_blob(key, file)
        data = compute()
        write_atomic(file, data)
        digest = hashlib.sha256(data).hexdigest()
        with disk_errors(self.path):
            self._journal.append({"blob": key, "file": file.name, "sha256": digest})
        self._blobs[key] = digest
        self._note_seconds()
        return data

    def save_state(self, name: str, data: bytes) -> None:
        """Replace the checkpoint of a running step; a kill leaves the old one or the new one, whole."""
        write_atomic(self._state_file(name), hashlib.sha256(data).digest() + data)
        self._note_seconds()

    def load_state(self, name: str) -> bytes | None:
        """The last checkpoint saved, or None.  Raises UserError if the file is damaged."""
        file = self._state_file(name)
        with disk_errors(self.path):
            if not file.exists():
                return None
            content = file.read_bytes()
        digest, data = content[:32], content[32:]
        if hashlib.sha256(data).digest() != digest:
            raise UserError(
                f"the checkpoint {file} is damaged: its checksum differs",
                fix="delete that file and run again with --resume; only the step that was running begins anew",
            )
        return data

    def drop_state(self, name: str) -> None:
        """Forget a checkpoint: its step is finished.  Nothing happens if there is none."""
        with disk_errors(self.path):
            self._state_file(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process in."""
        self._resources.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _note_seconds(self) -> None:
        """In the process that opened the folder: those beside it save states only, and would write the same file."""
        now = time.monotonic()
        if os.getpid() == self._process and now - self._noted >= NOTE_SECONDS:
            write_atomic(self.path / "seconds", repr(self.seconds).encode())
            self._noted = now

    def _state_file(self, name: str) -> Path:
        return self.path / "states" / _file_name(name)

    def _read_blob(self, key: str, file: Path) -> bytes:
        with disk_errors(self.path):
            data = file.read_bytes() if file.exists() else None
        if data is None or hashlib.sha256(data).hexdigest() != self._blobs[key]:
            state = "gone" if data is None else "damaged: its checksum differs"
            raise UserError(f"{file}, which holds {key}, is {state}", fix="start the run again with another --out")
        return data


class _Journal:
    """Append-only JSON lines, {"entry": ..., "sha256": of the entry}."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes() if path.exists() else b""
        whole, newline, _torn = content.rpartition(b"\n")
        self.entries = [_entry(path, n, line) for n, line in enumerate(whole.splitlines(), start=1)]
        self._end = len(whole) + len(newline)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        # an unfinished last line is all that a kill can leave; its step was not finished either
        os.ftruncate(self._file, self._end)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Record one entry; when this returns, it is on the disk."""
        text = _to_json(entry)
        line = f'{{"entry":{text},"sha256":"{_digest(text)}"}}\n'.encode()
        try:
            _write_all(self._file, line)
            os.fsync(self._file)
        except BaseException:
            os.ftruncate(self._file, self._end)  # a later entry must not follow half a line
            raise
        self._end += len(line)

    def close(self) -> None:
        os.close(self._file)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that is seen whole or not at all, even after a power cut.

    What is there and no file, such as /dev/stdout, is written to as it is; a link stays one.  Raises UserError if the
    disk is full or may not be written; the file that was there is kept.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        with disk_errors(path):
            path.write_bytes(data)
        return
    unfinished = path.with_name(f".{path.name}.unfinished")
    with disk_errors(path):
        try:
            with unfinished.open("wb", buffering=0) as file:
                _write_all(file.fileno(), data)
                os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)  # on a full disk its bytes are needed elsewhere
            raise
        _sync_folder(path.parent)


def _write_all(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _seconds(file: Path) -> float:
    """What was noted; nought of a run that begins.  Raises UserError if that is no number."""
    with disk_errors(file):
        text = file.read_bytes() if file.exists() else b"0"
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"{file} is damaged: it holds no number", fix="delete it; only that time is lost") from error


def _sync_folder(path: Path) -> None:
    """Make a rename or a new file in `path` survive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _lock(path: Path) -> int:
    """A file descriptor that holds the folder until it is closed, which the system does for a killed process."""
    file = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise UserError(
            f"another process is working in {path}",
            fix="wait until it ends, or choose another --out",
        ) from error
    return file


def _check_same_run(path: Path, first: Mapping[str, Any], fingerprint: Mapping[str, str], resume: bool) -> None:
    if not resume:
        raise UserError(f"{path} already holds a run", fix="go on with it by --resume, or choose another --out")
    if first.get("journal") != JOURNAL_SCHEMA:
        raise UserError(
            f"the run in {path} was made by another version: journal {first.get('journal')}, not {JOURNAL_SCHEMA}",
            fix="go on with the version that made it, or choose another --out",
        )
    before: Mapping[str, str] = first["fingerprint"]
    changed = [
        f"{name} was {before.get(name, 'not given')} and is {fingerprint.get(name, 'not given')}"
        for name in sorted(before.keys() | fingerprint.keys())
        if before.get(name) != fingerprint.get(name)
    ]
    if changed:
        raise UserError(
            f"{path} holds a run of something else: {'; '.join(changed)}",
            fix="change it back to go on, or choose another --out",
        )


def _check_no_remains(path: Path) -> None:
    """A run writes its fingerprint before anything else, so files without one are of an unknown run."""
    if any(file for folder in ("blobs", "states") for file in (path / folder).iterdir()):
        raise UserError(f"{path} holds files of a run whose journal is gone", fix="choose another --out")


def _entry(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """The entry of one line.  Raises UserError, naming the line, if it is not what was written."""
    try:
        record = json.loads(line)
        entry: dict[str, Any] = record["entry"]
        intact = record["sha256"] == _digest(_to_json(entry))
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise UserError(
            f"line {number} of {path} is damaged: its checksum differs",
            fix="start the run again with another --out; or delete that line and all after it, then --resume",
        )
    return entry


def _to_json(value: Any) -> str:
    """Compact JSON; floats as their shortest text that reads back to the same bits.  Raises ValueError for NaN."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _file_name(key: str) -> str:
    """Keys may be long and hold slashes; file names may not."""
    return _digest(key)[:32]


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a user can mend about the disk into a UserError; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"no space is left on the disk that holds {path}",
                fix="free some space and run again with --resume: every finished step is kept",
            ) from error
        if error.errno in _FORBIDDEN:
            raise UserError(
                f"no permission for {error.filename or path}: {error.strerror}",
                fix="give yourself read and write permission there, or choose another place",
            ) from error
        if error.errno in _NO_FOLDER:
            raise UserError(f"{error.filename or path} is not a folder", fix="choose another place") from error
        if error.errno in _NO_PLACE:
            raise UserError(
                f"{path} cannot be written: {error.strerror}", fix="make its folder first, or choose another place"
            ) from error
        raise
