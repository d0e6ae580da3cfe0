"""What users get wrong, through the command line: one message with what, why and fix, status 1, nothing lost.

Each kind of mistake has its finer tests beside its code (test_bad_input_data, test_checkpoint, test_config, test_cli,
test_rundir); here they are met as a user meets them.
"""

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from exporting import DigitNet, quick_target
from PIL import Image
from safetensors.torch import save_file

from hirelc_deploy import rundir
from hirelc_deploy.cli import main
from hirelc_deploy.errors import ExitStatus
from hirelc_deploy.verify import manifest as manifests

NET = """
from exporting import DigitNet

def net():
    return DigitNet(8)

def pixels():
    from torch import nn
    return nn.Sequential(DigitNet(8), nn.Unflatten(1, (10, 1, 1)))

def broken():
    widths = {"small": 8}
    return DigitNet(widths["large"])
"""


class RunsCode:
    """What a pickle can do to whoever loads it."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, ("executed",)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, and the working directory: a network, its weights, data, and a bad one of each kind."""
    monkeypatch.chdir(tmp_path)
    quick_target(tmp_path, channel_multiple=8)
    Path("net.py").write_text(NET)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = DigitNet(8).state_dict()
        torch.save(networks.Residual().state_dict(), "other.pt")
    torch.save(weights, "net.pt")
    save_file(weights, "net.safetensors")
    torch.save({**weights, "head.bias": torch.full((10,), float("nan"))}, "nan.pt")
    torch.save({"state_dict": RunsCode()}, "code.pt")
    torch.save({name: tensor.int() for name, tensor in weights.items()}, "whole.pt")
    Path("theirs").mkdir()
    Path("theirs", "policy.json").write_text("mine")
    return tmp_path


def npz(
    name: str,
    *,
    shape: tuple[int, ...] = (1, 8, 8),
    test_shape: tuple[int, ...] | None = None,
    labels: int = 10,
    hole: float = 0.0,
) -> None:
    shapes = {"train": shape, "test": test_shape or shape}
    arrays = {f"x_{split}": np.zeros((120, *each), np.float32) for split, each in shapes.items()}
    arrays["x_train"][7] = hole
    np.savez(name, **arrays, y_train=np.arange(120) % labels, y_test=np.arange(120) % labels)  # type: ignore[arg-type]


def images_with_an_empty_class() -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = Path("images", split, name)
            folder.mkdir(parents=True)
            Image.new("L", (8, 8)).save(folder / "0.png")
    Path("images", "train", "dog", "0.png").unlink()


def export(**changed: str | None) -> list[str]:
    """An export that would succeed, but for what is changed."""
    right = {
        "target": "quick.toml",
        "model": "net.py:net",
        "checkpoint": "net.pt",
        "data": "digits",
        "epochs": "0",
        "out": "out",
    }
    options = {name.replace("_", "-"): value for name, value in (right | changed).items() if value is not None}
    return ["export", *(part for name, value in options.items() for part in (f"--{name}", value))]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What the user is told and the fix, which is all that is printed."""
    assert main(arguments) == ExitStatus.USER_ERROR
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    first, second = shown.err.splitlines()
    assert first.startswith("error: ")
    assert second.startswith("  fix: ")
    assert shown.out == ""
    return first, second


def assert_refused(changed: Mapping[str, str | None], what: str, fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command, once mended, is not told that a run is there already."""
    said = refusal(export(**changed), capsys)
    assert what in said[0]
    assert fix in said[1]
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("changed", "what", "fix"),
    [
        ({"model": "nets.py:net"}, "nets.py does not exist", "path"),
        ({"model": "net.py:network"}, "net.py has no callable 'network'", "broken, net"),
        ({"model": "net.py:broken"}, "net.py:broken raised KeyError: 'large' ", "on its own"),
        ({"checkpoint": "none.pt"}, "none.pt does not exist", "path"),
        ({"checkpoint": "other.pt"}, "other.pt is a checkpoint of another network", "the checkpoint was saved from"),
        ({"checkpoint": "nan.pt"}, "nan.pt has NaN or infinity in head.bias", "earlier checkpoint"),
        ({"checkpoint": "code.pt"}, "could run code, so it was not read", "torch.save(model.state_dict(), FILE)"),
        ({"data": "none.npz"}, "none.npz does not exist", "path"),
        ({"data": "labels.npz"}, "label 11, and the model has 10 outputs", "numbered from 0"),
        ({"data": "nan.npz"}, "data holds NaN or infinity: input of example 7", "remove such examples"),
        ({"data": "sizes.npz"}, "x_test holds float32 of the shape (1, 6, 8) an example", "as the model takes them"),
        ({"model": "net.py:pixels", "checkpoint": None}, "shape (10, 1, 1) an example", "flatten"),
        ({"policy": "foreign.json", "search": "recipe"}, "policy says what is built", "leave one out"),
        ({"recipe": "keep=50%", "evaluations": 7}, "recipe says what is built, and evaluations 7", "leave one out"),
        ({"out": "theirs"}, "theirs holds policy.json and no run that made it", "choose another --out"),
        ({"checkpoint": "whole.pt"}, "stem.weight of whole.pt holds torch.int32, not floats", "quantised"),
        ({"out": "."}, "out is the folder that you are in", "--out out/net"),
        ({"data": "colour.npz"}, "the model does not run on the task's example", "as `forward` takes them"),
        ({"data": "images"}, "train/dog holds no images", "remove"),
        ({"target": "hots"}, "'hots'", "did you mean host?"),
        ({"recipe": "keep=50"}, "keep is '50'", "keep=50%"),
        ({"recipe": "kepe=50%"}, "kepe", "did you mean keep?"),
        ({"policy": "half.json"}, "bits is 4.7, not a whole number", "policy.json"),
        ({"policy": "none.json"}, "none.json cannot be read", "policy.json"),
        ({"policy": "foreign.json"}, "'blocks.0.conv1', which is no layer of this network", "did you mean"),
        ({"config": "twice.toml"}, "says max_drop twice", "leave one of them out"),
        ({"config": "export.toml"}, "unknown key 'max-latancy'", "did you mean max-latency?"),
        ({"max_size": "400"}, "'400' is a size without a unit", "400KB"),
        ({"min_speedup": "-1"}, "the limit speedup = -1.0 can never be judged", "above 0"),
    ],
)
def test_a_mistake_is_told_in_one_message_and_leaves_nothing_behind(
    here: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, str], what: str, fix: str
) -> None:
    match changed.get("data"):
        case "labels.npz":
            npz("labels.npz", labels=12)
        case "nan.npz":
            npz("nan.npz", hole=float("nan"))
        case "sizes.npz":
            npz("sizes.npz", test_shape=(1, 6, 8))
        case "colour.npz":
            npz("colour.npz", shape=(3, 8, 8))
        case "images":
            images_with_an_empty_class()
    Path("foreign.json").write_text(
        '{"keep": {}, "precisions": {"blocks.0.conv1": '
        '{"format": "int", "bits": 8, "granularity": "channel", "compute": "int8"}}}'
    )
    Path("half.json").write_text(
        '{"keep": {}, "precisions": {"stem": '
        '{"format": "int", "bits": 4.7, "granularity": "channel", "compute": "int8"}}}'
    )
    Path("export.toml").write_text('max-latancy = "5ms"\n')
    Path("twice.toml").write_text("max-drop = 1.0\nmax_drop = 0.1\n")
    assert_refused(changed, what, fix, capsys)
    assert not Path("executed").exists()


def test_no_permission_to_read_a_checkpoint(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injected, since the superuser may read everything."""
    opened = Path.open

    def deny(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "net.safetensors":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", deny)
    what, fix = refusal(export(checkpoint="net.safetensors"), capsys)
    assert "no permission to read net.safetensors" in what
    assert "chmod u+r net.safetensors" in fix


def test_a_limit_that_nothing_can_meet_is_status_2_and_the_best_that_was_found_is_written(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(export(max_size="10B")) == ExitStatus.BUDGET_MISSED
    assert "Traceback" not in capsys.readouterr().err
    manifest = manifests.read(Path("out"))
    assert manifest.verdict == "fail"
    assert [check.name for check in manifest.checks if check.ok is False] == ["size_bytes"]
    assert manifests.Artifact.of(Path("out/model.onnx")) == manifest.artifact
    assert manifest.measured.size_bytes < manifest.baseline.size_bytes


def test_a_full_disk_keeps_what_is_done_and_another_export_does_not_touch_it(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, journal = export(recipe="compute=int8"), Path("out/run/journal.jsonl")
    write, room = os.write, 6000  # bytes: enough for the journal's first entries, not for the weights

    def until_full(file: int, data: memoryview) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(file, data[:room])
        room -= written
        return written

    monkeypatch.setattr(rundir.os, "write", until_full)
    assert main(arguments) == ExitStatus.USER_ERROR
    monkeypatch.undo()
    os.chdir(here)
    what, fix = capsys.readouterr().err.splitlines()[-2:]
    assert "no space is left on the disk" in what
    assert "--resume" in fix
    done = journal.read_bytes()
    assert b'"step":"predict/' in done

    assert main([*arguments, "--resume"]) == ExitStatus.OK
    assert journal.read_bytes().startswith(done)
    assert journal.read_bytes().count(b'"step":"predict/') == 1

    capsys.readouterr()
    files = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    what, fix = refusal(arguments, capsys)
    assert "out/run already holds a run" in what
    assert "--resume" in fix
    what, fix = refusal([*export(recipe="compute=fp32"), "--resume"], capsys)
    assert "settings.recipe was compute=int8 and is compute=fp32" in what
    assert "another --out" in fix
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == files


# -- what the user's own code does ---------------------------------------------------------------------------

CODE = """
import numpy as np
import torch
from torch import nn

from hirelc_deploy.task import ArraySource, Classification, Task

ids = np.arange(240).reshape(120, 2) % 20
labels = np.arange(120) % 2

def words():
    return nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(8, 2))

def lazy():
    return nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.LazyLinear(2))

def task():
    return Classification(ArraySource(ids, labels), ArraySource(ids, labels))

def beyond():
    late = ids.copy()
    late[100] = 20
    return Classification(ArraySource(late, labels), ArraySource(ids, labels))

class Broken(ArraySource):
    def take(self, indices):
        if 100 in indices:
            raise KeyError("example 100")
        return super().take(indices)

def unreadable():
    return Classification(Broken(ids, labels), ArraySource(ids, labels))

class Own(Classification):
    def loss(self, outputs, target):
        return torch.zeros(len(target), device="nowhere")

def failing():
    return Own(ArraySource(ids, labels), ArraySource(ids, labels))

class Each(Classification):
    def loss(self, outputs, target):
        return nn.functional.cross_entropy(self._logits(outputs), target, reduction="none")

def unreduced():
    return Each(ArraySource(ids, labels), ArraySource(ids, labels))
"""


@pytest.mark.parametrize(
    ("changed", "what", "fix"),
    [
        (
            {"model": "code.py:lazy"},
            "has weights that have no shape before it has run: 2.weight, 2.bias",
            "run it once",
        ),
        (
            {"data": "code.py:beyond"},
            "does not run on the train data, example 100, input of 20 to 20: IndexError: index out of range",
            "vocabulary",
        ),
        ({"data": "code.py:unreadable"}, "the train data cannot be read, examples 0 to 119: KeyError", "take(indices)"),
        ({"data": "code.py:failing"}, "the task's loss fails: RuntimeError", "returns the mean over the batch"),
        ({"data": "code.py:unreduced"}, "the task's loss returns a tensor of shape (8,)", "the mean over the batch"),
    ],
)
def test_what_a_users_code_does_wrong_is_told_before_a_run_begins(
    here: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, str], what: str, fix: str
) -> None:
    Path("code.py").write_text(CODE)
    given = {"model": "code.py:words", "data": "code.py:task", "epochs": "1", "checkpoint": None} | changed
    assert_refused(given, what, fix, capsys)


def test_columns_of_ids_may_have_vocabularies_of_their_own(here: Path) -> None:
    Path("columns.py").write_text(
        "import numpy as np\nimport torch\nfrom torch import nn\n"
        "from hirelc_deploy.task import ArraySource, Classification\n"
        "x = np.stack([np.arange(120) % 90, np.arange(120) % 2], 1)\ny = np.arange(120) % 2\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.a, self.b, self.head = nn.Embedding(90, 4), nn.Embedding(2, 4), nn.Linear(8, 2)\n"
        "    def forward(self, x):\n        return self.head(torch.cat([self.a(x[:, 0]), self.b(x[:, 1])], 1))\n"
        "def task():\n    return Classification(ArraySource(x, y), ArraySource(x, y))\n"
    )
    given = export(model="columns.py:Net", data="columns.py:task", checkpoint=None, recipe="storage=int8")
    assert main(given) == ExitStatus.OK


def test_test_examples_that_the_file_does_not_run_on_are_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("code.py").write_text(
        f"{CODE}\ndef late():\n    bad = ids.copy()\n    bad[5] = 20\n"
        "    return Classification(ArraySource(ids, labels), ArraySource(bad, labels))\n"
    )
    given = export(model="code.py:words", data="code.py:late", checkpoint=None, recipe="storage=int8")
    assert main(given) == ExitStatus.USER_ERROR
    error = capsys.readouterr().err
    assert "does not run the file on some examples" in error
    assert "Traceback" not in error


def test_a_network_that_is_one_layer_is_exported(here: Path) -> None:
    Path("one.py").write_text(
        "import numpy as np\nfrom torch import nn\nfrom hirelc_deploy.task import ArraySource, Classification\n"
        "x = np.random.default_rng(0).normal(size=(120, 16)).astype('float32')\ny = np.arange(120) % 8\n"
        "def net():\n    return nn.Linear(16, 8)\n"
        "def task():\n    return Classification(ArraySource(x, y), ArraySource(x, y))\n"
    )
    given = export(model="one.py:net", data="one.py:task", checkpoint=None, recipe="storage=int4,compute=int8")
    assert main(given) == ExitStatus.OK
    (layer,) = manifests.read(Path("out")).layers
    assert (layer.op, layer.storage, layer.runs_as) == ("Linear", "int4/channel", "int8")
