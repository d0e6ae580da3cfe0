"""`profile` and `targets --plot`: what fills a target's table, and what it shows."""

from pathlib import Path

import pytest
from neighbour import beside_a_neighbour
from torch import nn

from hirelc_deploy import cli, tables
from hirelc_deploy.cost.kernel import Kernel
from hirelc_deploy.cost.needs import families
from hirelc_deploy.cost.prices import kernel_of
from hirelc_deploy.cpu import cpu_flags
from hirelc_deploy.errors import ExitStatus, UserError
from hirelc_deploy.policy import Compute
from hirelc_deploy.profiles import FOLDER, load_target
from hirelc_deploy.profiles._table import Row, read_table, write_table
from hirelc_deploy.verify import profiling

NETWORK = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(256, 5))
"""


HERE = cpu_flags()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(profiling, "ROUNDS", 3)
    monkeypatch.setattr(profiling, "MORE_ROUNDS", 3)
    monkeypatch.setattr(profiling, "RUN_US", 20.0)
    path = tmp_path / "net.py"
    path.write_text(NETWORK)
    return f"{path}:build"


def profile(*arguments: object) -> int:
    return cli.main(["profile", "--target", "host", *map(str, arguments)])


def test_a_networks_kernels_are_measured_once(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "host.csv"
    arguments = ("--model", model, "--input", "3x8x8", "--batch", 2, "--table", table)
    assert profile(*arguments) == ExitStatus.OK
    kernels = [kernel_of(row) for row in read_table(table)]
    convolutions = {(kernel.compute, kernel.channels) for kernel in kernels if kernel.op == "Conv"}
    assert convolutions >= {(c, channels) for c in (Compute.FP32, Compute.INT8) for channels in ((3, 8), (8, 16))}
    assert {kernel.compute for kernel in kernels if kernel.op == "Gemm"} == {"fp32", "int8", "int8_dynamic"}
    assert {kernel.operands[0].shape[0] for kernel in kernels if kernel != profiling.ANCHOR} == {2}
    assert "host.csv" in capsys.readouterr().out.replace("\n", "")
    before = table.read_bytes()
    monkeypatch.setattr(profiling, "measure", None)
    assert profile(*arguments) == ExitStatus.OK
    assert table.read_bytes() == before


def test_weights_of_a_network_that_is_profiled_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of a library has none, and is refused for that where it is compressed."""
    monkeypatch.setattr("hirelc_deploy.checkpoint._from_torchvision", lambda name: nn.Sequential(nn.Linear(4, 2)))
    settings = tables.ProfileSettings(target="host", model="torchvision:tiny", input="4")
    network = tables._network(settings, load_target("host"))
    assert "Gemm" in {family.kernel.op for family in families(network)}


def test_a_list_of_kernels_is_measured(model: str, tmp_path: Path) -> None:
    shapes = tmp_path / "shapes.csv"
    shapes.write_text("op,attributes,operands,compute\nConv,,x:1x16x4x4 w:8x16x1x1,fp32\nAdd,,x:1x9 x:1x9,fp32\n")
    assert profile("--shapes", shapes, "--table", tmp_path / "own.csv") == ExitStatus.OK
    assert {row.operands for row in read_table(tmp_path / "own.csv")} >= {"x:1x16x4x4 w:8x16x1x1", "x:1x9 x:1x9"}


def test_what_had_to_be_measured_beside_a_neighbour_is_told_until_it_is_measured_again(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", model, "--input", "3x8x8", "--table", tmp_path / "own.csv")
    with beside_a_neighbour():
        assert profile(*arguments) == ExitStatus.OK
    kernels = len(read_table(tmp_path / "own.csv"))
    assert f"{kernels} kernels were measured beside something else on the core" in capsys.readouterr().out
    assert profile(*arguments) == ExitStatus.OK
    assert "beside" not in capsys.readouterr().out


def test_a_target_of_ones_own_keeps_its_table_beside_it(model: str, tmp_path: Path) -> None:
    own = tmp_path / "my-board.toml"
    own.write_text((FOLDER / "host.toml").read_text().replace('name = "host"', 'name = "my-board"'))
    assert cli.main(["profile", "--target", str(own), "--model", model, "--input", "3x8x8"]) == ExitStatus.OK
    assert read_table(tmp_path / "my-board.csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "what is to be measured is not said"),
        (("--model", "{model}", "--shapes", "a.csv"), "both --model and --shapes are given"),
        (("--model", "{model}"), "reads is not said"),
        (("--model", "{model}", "--input", "3x8x8", "--data", "digits"), "reads is said twice"),
        (("--model", "{model}", "--input", "3x8by8"), "the input's shape is '3x8by8'"),
        (("--model", "{model}", "--input", "3x8x8", "--threads", 0), "threads is 0"),
        (("--model", "{model}", "--input", "3x8x8", "--max-time", "5"), "is a time without a unit"),
        (("--shapes", "{folder}/none.csv"), "there is no file"),
        (("--shapes", "{folder}/wrong.csv"), "wrong.csv, line 1: the columns are operator"),
        (
            ("--shapes", "{folder}/short.csv"),
            "short.csv, line 2: '' is no Compute|short.csv, line 2: '' is not a valid",
        ),
        (("--shapes", "{folder}/empty.csv"), "empty.csv, line 2: a kernel reads something, and no size is 0"),
        (("--shapes", "{folder}/broken.csv"), "broken.csv, line 3: 'x:' is no operand|broken.csv, line 3: 'eight'"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_message(
    arguments: tuple[object, ...], message: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.csv").write_text("operator\n")
    (tmp_path / "short.csv").write_text("op,attributes,operands,compute\nAdd,,x:1x9\n")
    (tmp_path / "empty.csv").write_text("op,attributes,operands,compute\nAdd,,x:0x9 x:0x9,fp32\n")
    (tmp_path / "broken.csv").write_text("op,attributes,operands,compute\nAdd,,x:1x9 x:1x9,fp32\nAdd,,eight,fp32\n")
    filled = [str(each).format(model=model, folder=tmp_path) for each in arguments]
    assert profile(*filled) == ExitStatus.USER_ERROR
    error = capsys.readouterr().err
    assert any(part in error for part in message.split("|"))
    assert "Traceback" not in error


def test_times_of_this_machine_are_no_times_of_another(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    others = (name for name in ("raspberry-pi-5", "x86-avx2") if not load_target(name).flags(HERE) <= HERE)
    arguments = ["profile", "--target", next(others), "--model", model, "--input", "3x8x8"]
    assert cli.main(arguments) == ExitStatus.USER_ERROR
    error = capsys.readouterr().err
    assert "its kernels take other times" in error
    assert "--host" in error


def test_a_table_that_cannot_be_kept_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        write_table(tmp_path / "file" / "table.csv", [])
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no table: it is not text"):
        read_table(tmp_path / "bytes.csv")


# -- cliffs --------------------------------------------------------------------------------------------------


def rows() -> list[Row]:
    found = []
    for compute, us in (("fp32", 2.0), ("int8", 1.0)):
        for outputs in range(8, 81, 8):
            kernel = Kernel.parse("Conv", "pads=1,1,1,1", f"x:1x64x14x14 w:{outputs}x64x3x3 w:{outputs}", compute)
            texts = (kernel.op, kernel.attributes, kernel.operands_text, compute, 1)
            found.append(
                Row(*texts, us * outputs, us * outputs, 1.0, 9, "2026-11-27", "onnxruntime 1.32.0", "avx2", "")
            )
    return found


def test_latency_over_channels_is_drawn_from_the_table_alone(tmp_path: Path) -> None:
    own = tmp_path / "my-board.toml"
    own.write_text((FOLDER / "host.toml").read_text().replace('name = "host"', 'name = "my-board"'))
    write_table(own.with_suffix(".csv"), rows())
    image = tmp_path / "cliffs.svg"
    assert cli.main(["targets", "--plot", str(image), "--target", str(own)]) == ExitStatus.OK
    text = image.read_text()
    assert all(word in text for word in ("<svg", "output channels", "int8", "fp32"))


@pytest.mark.parametrize(("file", "message"), [("a.png", "has no convolution with 6"), ("a.csv", "cannot be drawn")])
def test_what_cannot_be_drawn_is_told(
    file: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "my-board.toml"
    own.write_text((FOLDER / "host.toml").read_text().replace('name = "host"', 'name = "my-board"'))
    write_table(own.with_suffix(".csv"), rows() if file.endswith("csv") else rows()[:4])
    assert cli.main(["targets", "--plot", str(tmp_path / file), "--target", str(own)]) == ExitStatus.USER_ERROR
    assert message in capsys.readouterr().err
