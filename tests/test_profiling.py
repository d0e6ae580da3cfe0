"""What fills a table: kernels by themselves, measured once, and what a killed run leaves."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from neighbour import beside_a_neighbour

from hirelc_deploy.cost.correction import Artifact
from hirelc_deploy.cost.kernel import Kernel
from hirelc_deploy.cost.needs import Family
from hirelc_deploy.cost.predictor import add_artifact, read_artifacts
from hirelc_deploy.cost.prices import MeasuredPrices, kernel_of
from hirelc_deploy.exporters._base import NoKernelError
from hirelc_deploy.exporters.onnxruntime import RUNTIME
from hirelc_deploy.profiles import Tables, tables_of
from hirelc_deploy.profiles._table import ALONE, SHARED, Row, read_table
from hirelc_deploy.verify import profiling
from hirelc_deploy.verify.machines import Here
from hirelc_deploy.verify.profiling import ANCHOR, makers, measure, profile

KERNELS = [
    ("Conv", "pads=1,1,1,1", "x:1x8x6x6 w:16x8x3x3 w:16"),
    ("Conv", "pads=1,1,1,1 strides=2,2", "x:2x16x6x6 w:8x16x3x3"),
    ("Conv", "group=16 pads=1,1,1,1", "x:1x16x6x6 w:16x1x3x3 w:16"),
    ("Conv", "", "x:1x3x6x6 w:8x3x1x1 w:8"),
    ("Gemm", "transB=1", "x:1x32 w:10x32 w:10"),
    ("MatMul", "", "x:1x9x32 w:32x64"),
    ("MaxPool", "kernel_shape=2,2 strides=2,2", "x:1x16x6x6"),
    ("GlobalAveragePool", "", "x:1x16x6x6"),
    ("AveragePool", "kernel_shape=2,2 strides=2,2", "x:1x16x6x6"),
    ("Add", "", "x:1x16x6x6 x:1x16x6x6"),
    ("Transpose", "perm=0,2,1", "x:1x9x32"),
    ("Flatten", "axis=1", "x:1x16x6x6"),
]
FLOATS_ALONE = [
    ("LayerNormalization", "axis=-1 epsilon=1e-05", "x:1x9x32 w:32 w:32"),
    ("Softmax", "axis=-1", "x:1x2x9x9"),
    ("MatMul", "", "x:1x2x9x16 x:1x2x16x9"),
    ("Reshape", "", "x:1x9x32 [1,9,2,16]"),
    ("Mul", "", "x:1x9x32 [0.5]"),
    ("Add", "", "x:1x9x32 [1.0]"),
    ("Split", "axis=2 num_outputs=2", "x:1x9x32"),
    ("Gather", "", "w:20x8 x:2x7"),
    ("Where", "", "x:1x1x9x9 x:1x2x9x9 [-1000.0]"),
    ("Resize", "mode=linear", "x:1x8x4x4 [] [1.0,1.0,2.0,2.0]"),
    ("QuantizeLinear", "", "x:1x16x6x6"),
    ("DequantizeLinear", "", "x:1x9x32"),
    ("ReorderInput", "", "x:1x16x6x6"),
    ("ReorderOutput", "", "x:1x16x6x6"),
]
EVERY = [
    *(Kernel.parse(*kernel, compute) for kernel in KERNELS for compute in ("fp32", "int8")),
    *(Kernel.parse(*kernel, "int8_dynamic") for kernel in KERNELS if kernel[0] in ("Gemm", "MatMul")),
    *(Kernel.parse(*kernel, "fp32") for kernel in FLOATS_ALONE),
]
NO_KERNEL = Kernel.parse("Erf", "", "x:1x2x9x9", "int8")


@pytest.mark.parametrize("kernel", EVERY, ids=str)
def test_a_kernel_runs_by_itself_and_several_times_over(kernel: Kernel) -> None:
    maker = makers([kernel], Here(RUNTIME, threads=1))[kernel]
    assert not isinstance(maker, NoKernelError), maker
    file = maker.file(3)
    RUNTIME.kernel_session(file, threads=1).run({})
    assert file.copies == 3
    nodes = onnx.load_from_string(file.data).graph.node
    operators = {node.op_type for node in nodes}
    # one operator, and for an image in integers what turns it round
    assert len(nodes) == 3 * len(operators)
    assert len(operators - {"Transpose"}) == (kernel.op != "Transpose")
    if kernel.compute.value == "int8":
        assert any(array.dtype == np.uint8 for array in file.inputs.values())
    if kernel.op == "Conv" and kernel.compute.value == "fp32" and kernel.channels[0] >= 8:
        assert all(node.domain == "com.microsoft.nchwc" for node in nodes)


def test_what_the_runtime_has_no_kernel_for_is_said() -> None:
    refusal = makers([NO_KERNEL], Here(RUNTIME, threads=1))[NO_KERNEL]
    assert isinstance(refusal, NoKernelError)
    assert str(refusal) == "Erf x:1x2x9x9 int8 stays in float"
    samples, refused = measure([NO_KERNEL], None, Here(RUNTIME, threads=1))
    assert NO_KERNEL in refused
    assert [sample.kernel for sample in samples] == [ANCHOR]


def conv(counts: tuple[int, ...]) -> Family:
    return Family(Kernel.parse("Conv", "", "x:1x16x4x4 w:16x16x1x1 w:16", "fp32"), counts, counts)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "ROUNDS", 3)
    monkeypatch.setattr(profiling, "MORE_ROUNDS", 3)
    monkeypatch.setattr(profiling, "RUN_US", 20.0)


@pytest.mark.usefixtures("hasty")
def test_a_profile_is_written_goes_on_and_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = Tables(tmp_path / "shipped.csv", tmp_path / "cache" / "own.csv")
    machine = Here(RUNTIME, threads=1)
    assert profile([conv((8, 16))], tables, machine) == {}
    rows = read_table(tables.own)
    assert len(rows) == 4 + 1  # and the anchor
    assert {row.runtime for row in rows} == {f"onnxruntime {RUNTIME.version()}"}
    assert all(row.p50_us > 0 and row.runs > 0 and row.flags == "+".join(machine.where.flags) for row in rows)
    assert {row.core for row in rows} == {ALONE}
    wanted = conv((8, 16))
    monkeypatch.setattr(profiling, "measure", None)
    assert profile([wanted], tables, machine) == {}
    assert wanted.known == {kernel.channels: us for kernel, us in _times(rows).items() if kernel.family in _names()}


@pytest.mark.usefixtures("hasty")
def test_what_was_measured_beside_a_neighbour_is_measured_again_where_that_is_asked_for(tmp_path: Path) -> None:
    tables = Tables(tmp_path / "own.csv", tmp_path / "own.csv")
    machine = Here(RUNTIME, threads=1)
    profile([conv((8,))], tables, machine)
    with beside_a_neighbour():
        profile([conv((8, 16))], tables, machine)
    before = read_table(tables.own)
    assert [row.core for row in before].count(SHARED) == 3
    profile([conv((8, 16))], tables, machine)
    assert read_table(tables.own) == before, "a search goes on with what there is"
    profile([conv((8, 16))], tables, machine, anew=True)
    after = read_table(tables.own)
    assert [row.key for row in after] == [row.key for row in before]
    assert {row.core for row in after} == {ALONE}
    assert set(after) >= {row for row in before if row.core == ALONE}


@pytest.mark.usefixtures("hasty")
def test_where_the_unit_was_measured_beside_a_neighbour_nothing_is_kept(tmp_path: Path) -> None:
    tables = Tables(tmp_path / "own.csv", tmp_path / "own.csv")
    machine = Here(RUNTIME, threads=1)
    with beside_a_neighbour():
        profile([conv((8,))], tables, machine)
    add_artifact(tables.own, Artifact({"Conv": 1.0}, 2.0))
    profile([conv((16,))], tables, machine, anew=True)
    assert {kernel_of(row).channels for row in read_table(tables.own)} == {(16, 16), ANCHOR.channels}
    assert {row.core for row in read_table(tables.own)} == {ALONE}
    assert read_artifacts(tables.own) == []


@pytest.mark.usefixtures("hasty")
def test_a_killed_profile_has_kept_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = Tables(tmp_path / "own.csv", tmp_path / "own.csv")
    whole = profiling.measure
    calls = []

    def second_is_killed(*args: object, **settings: object) -> object:
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return whole(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(profiling, "measure", second_is_killed)
    with pytest.raises(KeyboardInterrupt):
        profile([conv((8, 16, 24, 32))], tables, Here(RUNTIME, threads=1))
    kept = read_table(tables.own)
    assert len(kept) == 1 + 3  # the anchor, and the three corners that a family begins with


@pytest.mark.usefixtures("hasty")
def test_a_profile_ends_when_its_time_is_up(tmp_path: Path) -> None:
    tables = Tables(tmp_path / "own.csv", tmp_path / "own.csv")
    profile([conv(tuple(range(8, 65, 8)))], tables, Here(RUNTIME, threads=1), seconds=0.0)
    rows = read_table(tables.own)
    assert len(rows) == 1 + 3
    # and what it has is enough to tell the rest
    assert MeasuredPrices.of(rows)(conv((8, 16)).at((24, 40))) > 0


@pytest.mark.usefixtures("hasty")
def test_what_there_is_no_kernel_for_is_reported_and_the_rest_measured(tmp_path: Path) -> None:
    tables = Tables(tmp_path / "own.csv", tmp_path / "own.csv")
    none = Family(NO_KERNEL, (2,), (2,))
    refused = profile([none, conv((8,))], tables, Here(RUNTIME, threads=1))
    assert refused.keys() == {NO_KERNEL.family}
    assert [row.op for row in read_table(tables.own)] == ["Conv", "Conv"]


def test_times_are_in_units_of_the_tables_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is twice as slow now gives the same rows."""
    kernel = Kernel.parse("Conv", "", "x:1x64x14x14 w:64x64x1x1", "fp32")
    quiet, _ = measure([kernel], 100.0, Here(RUNTIME, threads=1))
    slow, _ = measure([kernel], 200.0, Here(RUNTIME, threads=1))
    one, two = (next(each.p50_us for each in found if each.kernel == kernel) for found in (quiet, slow))
    assert 1.3 < two / one < 3.0  # 2, on a core of its own


def test_tables_are_apart_for_runtimes_and_cpus_and_a_users_target_has_its_own(tmp_path: Path) -> None:
    here_, other_cpu, other_version = (
        tables_of("host", runtime=runtime, flags=flags).own
        for runtime, flags in (
            ("onnxruntime 1.32.0", ("avx2",)),
            ("onnxruntime 1.32.0", ("avx512_vnni",)),
            ("onnxruntime 1.31.0", ("avx2",)),
        )
    )
    assert len({here_, other_cpu, other_version}) == 3
    own = tables_of(str(tmp_path / "my-board.toml"), runtime="onnxruntime 1.32.0", flags=())
    assert own.shipped == own.own == tmp_path / "my-board.csv"


def _times(rows: list[Row]) -> dict[Kernel, float]:
    return {kernel_of(row): row.p50_us for row in rows}


def _names() -> set[str]:
    return {conv((8, 16)).kernel.family}
