"""An export that is killed at any moment and resumed is the export that nobody disturbed."""

import hashlib
import itertools
import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked_export
import numpy as np
import pytest
import torch
from exporting import DigitNet, quick_target

from hirelc_deploy.cli import main
from hirelc_deploy.errors import ExitStatus

KILLS = 10
CHECKPOINT_SECONDS = 0.1
EPOCHS = 4

FORKS = multiprocessing.get_context("forkserver")
"""Children of a process that has imported everything: the seconds that importing takes are no moments of an export."""


@dataclass(frozen=True)
class Command:
    """One export, to be run in any number of folders."""

    options: dict[str, str]

    def arguments(self, out: Path, *, resume: bool, **changed: str) -> list[str]:
        named = {**self.options, "out": str(out), **changed}
        flags = itertools.chain.from_iterable((f"--{name}", value) for name, value in named.items())
        return ["export", *flags, *(["--resume"] if resume else [])]

    def start(self, out: Path) -> BaseProcess:
        """In a process of its own, resumed if it was begun before."""
        arguments = self.arguments(out, resume=(out / "run").exists())
        process = FORKS.Process(target=forked_export.run, args=(arguments, CHECKPOINT_SECONDS))
        process.start()
        return process

    def finish(self, out: Path) -> None:
        process = self.start(out)
        process.join(120)
        assert process.exitcode == 0

    def kill(self, out: Path, when: Callable[[], object]) -> bool:
        """Run until `when` returns and kill; whether it was still running."""
        process = self.start(out)
        while process.is_alive() and not (out / "run" / "journal.jsonl").exists():
            time.sleep(0.005)
        while process.is_alive() and not when():
            time.sleep(0.005)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    folder = tmp_path_factory.mktemp("command")
    (folder / "net.py").write_text("from exporting import DigitNet\n\ndef net():\n    return DigitNet(16)\n")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(DigitNet(16).state_dict(), folder / "net.pt")
        torch.save(DigitNet(16).state_dict(), folder / "other.pt")
    FORKS.set_forkserver_preload([forked_export.__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the server knows nothing of pytest's paths
        yield Command(
            {
                "target": quick_target(folder),
                "model": f"{folder / 'net.py'}:net",
                "checkpoint": str(folder / "net.pt"),
                "data": "digits",
                "recipe": "keep=50%,compute=int8",
                "epochs": str(EPOCHS),
            }
        )


@dataclass(frozen=True)
class Calm:
    """The run that nobody disturbed; no test may change it."""

    out: Path
    seconds: float


@pytest.fixture(scope="module")
def calm(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    out = tmp_path_factory.mktemp("resume") / "calm"
    began = time.monotonic()
    command.finish(out)
    return Calm(out, time.monotonic() - began)


def decided(out: Path) -> dict[str, str]:
    """What must not depend on who was killed when."""
    files = ("policy.json", "model.onnx", "baseline.onnx")
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in files}


def test_killed_at_ten_random_moments_it_ends_as_undisturbed(command: Command, calm: Calm, tmp_path: Path) -> None:
    moments, kills, finished = random.Random(0), 0, 0
    while kills < KILLS:
        out = tmp_path / str(finished)
        end = time.monotonic() + moments.uniform(0, calm.seconds / 2)
        if command.kill(out, lambda end=end: time.monotonic() > end):
            kills += 1
        else:  # it came to its end before: the next kills need a new run
            assert decided(out) == decided(calm.out)
            finished += 1
    command.finish(out)
    assert decided(out) == decided(calm.out)


def test_killed_while_fine_tuning_it_goes_on_from_there(command: Command, calm: Calm, tmp_path: Path) -> None:
    out = tmp_path / "out"
    states = out / "run" / "states"

    def saved() -> list[Path]:
        return [file for file in states.iterdir() if not file.name.endswith(".unfinished")]

    assert command.kill(out, saved)
    assert len(saved()) == 1
    command.finish(out)
    assert decided(out) == decided(calm.out)
    assert not saved()


def other_data(folder: Path) -> str:
    random = np.random.default_rng(0)
    arrays = {f"x_{split}": random.random((100, 1, 8, 8), np.float32) for split in ("train", "test")}
    labels = {f"y_{split}": np.arange(100) % 10 for split in ("train", "test")}
    np.savez(folder / "other.npz", **arrays, **labels)
    return str(folder / "other.npz")


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("epochs", "5", "settings.epochs was 4 and is 5"),
        ("recipe", "keep=25%,compute=int8", "settings.recipe was keep=50%,compute=int8 and is keep=25%,compute=int8"),
        ("checkpoint", "other.pt", "model was "),
        ("data", "other.npz", "data was "),
        ("model", "edited.py:net", "code was "),
    ],
)
def test_something_else_is_not_resumed(
    command: Command,
    calm: Calm,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    named: str,
) -> None:
    if option == "checkpoint":
        value = str(Path(command.options["checkpoint"]).with_name(value))
    if option == "data":
        value = other_data(tmp_path)
    if option == "model":  # the same weights, and another forward
        source = Path(command.options["model"].rpartition(":")[0])
        value = f"{source.with_name('edited.py')}:net"
        source.with_name("edited.py").write_text(source.read_text() + "\n# edited\n")
    journal = calm.out / "run" / "journal.jsonl"
    before = journal.read_bytes(), decided(calm.out)
    assert main(command.arguments(calm.out, resume=True, **{option: value})) == ExitStatus.USER_ERROR
    what, fix = capsys.readouterr().err.splitlines()
    assert f"holds a run of something else: {named}" in what or f"; {named}" in what
    assert what.count(" was ") == (2 if option == "recipe" else 1)  # a recipe is another policy as well
    assert fix.startswith("  fix: ")
    assert (journal.read_bytes(), decided(calm.out)) == before
