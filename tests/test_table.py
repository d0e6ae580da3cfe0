"""Tables of a target: what a reviewer sees in a diff, and what a broken line is told."""

from dataclasses import replace
from pathlib import Path

import pytest

from hirelc_deploy.cost.kernel import Kernel
from hirelc_deploy.cost.prices import MeasuredPrices, kernel_of
from hirelc_deploy.errors import UserError
from hirelc_deploy.profiles._table import COLUMNS, Row, read_table, write_table

KERNEL = Kernel.parse("Conv", "pads=1,1,1,1", "x:1x64x14x14 w:64x64x3x3 w:64", "int8")


def row(channels: int, us: float, threads: int = 1) -> Row:
    kernel = KERNEL.with_channels(channels, channels)
    return Row(
        *(kernel.op, kernel.attributes, kernel.operands_text, str(kernel.compute), threads),
        *(us, 1.1 * us, 1.5, 40, "2026-11-27", "onnxruntime 1.32.0", "avx2+fma", ""),
    )


def test_a_table_reads_back_sorted_by_channels_and_with_the_last_of_each_kernel(tmp_path: Path) -> None:
    path = tmp_path / "new" / "board.csv"
    write_table(path, [row(128, 90.0), row(16, 5.0), row(64, 30.0), row(16, 6.0)])
    found = read_table(path)
    assert [kernel_of(each).channels[0] for each in found] == [16, 64, 128]
    assert found[0] == replace(row(16, 6.0), p90_us=6.6)


def test_the_same_rows_make_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    rows = [row(channels, channels / 3) for channels in (8, 16, 24, 100)]
    write_table(tmp_path / "a.csv", rows)
    write_table(tmp_path / "b.csv", reversed(rows))
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_one_more_row_is_one_more_line(tmp_path: Path) -> None:
    path = tmp_path / "board.csv"
    write_table(path, [row(8, 1.0), row(32, 3.0)])
    before = path.read_text().splitlines()
    write_table(path, [*read_table(path), row(16, 2.0)])
    after = path.read_text().splitlines()
    assert len(after) == len(before) + 1
    assert [line for line in after if line in before] == before


def test_tables_of_other_threads_are_apart(tmp_path: Path) -> None:
    path = tmp_path / "board.csv"
    write_table(path, [row(64, 30.0), row(64, 9.0, threads=4)])
    kernel = KERNEL.with_channels(64, 64)
    assert MeasuredPrices.of(read_table(path))(kernel) == 30.0
    assert MeasuredPrices.of(read_table(path), threads=4)(kernel) == 9.0


def test_a_table_from_before_the_core_was_watched_is_read(tmp_path: Path) -> None:
    path = tmp_path / "board.csv"
    write_table(path, [row(8, 1.0), row(64, 30.0)])
    today = path.read_text()
    path.write_text("".join(f"{line.rpartition(',')[0]}\n" for line in today.splitlines()))
    write_table(path, read_table(path))
    assert path.read_text() == today


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert read_table(tmp_path / "none.csv") == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (("30,", "fast,"), r"board.csv, line 3: p50_us is 'fast'"),
        (("30,", "-30,"), r"board.csv, line 3: p50_us is '-30'"),
        (("30,", "nan,"), r"board.csv, line 3: p50_us is 'nan'"),
        (("30,33", "30"), r"board.csv, line 3 has 13 cells instead of 14"),
        (("op,", "operator,"), r"board.csv, line 1: the columns are operator, "),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, damage: tuple[str, str], message: str) -> None:
    path = tmp_path / "board.csv"
    write_table(path, [row(8, 1.0), row(64, 30.0)])
    text = path.read_text()
    assert damage[0] in text
    path.write_text(text.replace(*damage, 1))
    with pytest.raises(UserError, match=message):
        read_table(path)


def test_a_row_about_no_kernel_is_refused() -> None:
    with pytest.raises(UserError, match=r"a table has a row about Conv .*no operand"):
        kernel_of(replace(row(8, 1.0), operands="x:1x8 sixteen"))


def test_columns_are_what_the_documentation_names() -> None:
    assert COLUMNS[:4] == ("op", "attributes", "operands", "compute")
    assert {"p50_us", "p90_us", "spread_pct", "runs", "date", "runtime", "flags", "power_mode"} < set(COLUMNS)
