"""Targets as data, and the processor that they ask about."""

import json
import shutil
from pathlib import Path

import pytest
from exporting import ESTIMATE
from pydantic import ValidationError

from hirelc_deploy.cost.estimate import EstimatedPrices
from hirelc_deploy.cost.kernel import Kernel
from hirelc_deploy.cpu import cpu_flags, has_dot_product
from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters import runtime_names
from hirelc_deploy.graph import layers
from hirelc_deploy.policy import Compute
from hirelc_deploy.profiles import FOLDER, Estimate, load_target, target_names
from hirelc_deploy.profiles._schema import OPERATORS

VNNI = frozenset({"avx2", "avx512f", "avx512_vnni"})
AVX2 = frozenset({"avx2", "fma"})


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's own target: a copy of host, to be changed."""
    return Path(shutil.copy(FOLDER / "host.toml", tmp_path / "edge.toml"))


def change(file: Path, old: str, new: str) -> str:
    """Change a target's file and give its name as `--target` takes it."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    return str(file)


@pytest.mark.parametrize("name", target_names())
def test_every_target_loads_is_named_after_its_file_and_has_a_runtime(name):
    target = load_target(name)
    assert target.name == name
    assert target.runtime.name in runtime_names()


def test_without_dot_products_int8_weights_are_narrow_enough_not_to_saturate():
    host = load_target("host")
    assert (host.int8_weight_bits(VNNI), host.largest_code(VNNI)) == (8, 127)
    assert (host.int8_weight_bits(AVX2), host.largest_code(AVX2)) == (7, 63)
    # two products of one sign, the largest of each, must fit into 16 bits
    assert 2 * 255 * host.largest_code(AVX2) <= 2**15 - 1 < 2 * 255 * host.largest_code(VNNI)


def test_what_a_target_does_not_name_stays_fp32():
    host = load_target("host")
    assert host.computes_for("Conv2d") == (Compute.FP32, Compute.INT8)
    assert host.computes_for("LSTM") == (Compute.FP32,)
    assert host.ops_by_compute[Compute.INT8] == ("Conv1d", "Conv2d", "Linear")


def test_an_unknown_target_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="no target 'hots'") as refused:
        load_target("hots")
    assert "did you mean host?" in refused.value.fix


def test_a_file_is_a_target(own):
    target = load_target(change(own, 'name = "host"', 'name = "edge"'))
    assert target.name == "edge"
    assert target.channel_multiple == 8


@pytest.mark.parametrize(
    ("old", "new", "key", "meant"),
    [
        ("channel_multiple = 8", "channel_multipel = 8", "channel_multipel", "channel_multiple"),
        ("opset = 18", "opsett = 18", "runtime.opsett", "opset"),
        ("vnni = 8", "vnny = 8", "weights.int8_bits.vnny", "vnni"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(own, old, new, key, meant):
    # the key that is misspelt is missing as well: the misspelling is what the user has to hear of
    with pytest.raises(UserError, match=f"'{key}'") as refused:
        load_target(change(own, old, new))
    assert f"did you mean {meant}?" in refused.value.fix
    assert str(own) in refused.value.what


@pytest.mark.parametrize("table", ["computes", "precisions"])
def test_a_rule_for_an_operator_that_does_not_exist_is_refused_with_the_nearest(own, table):
    own.write_text(own.read_text() + "[precisions]\n" * (table == "precisions"))
    rule = 'Conv2D = ["fp32", "int8"]' if table == "computes" else 'Conv2D = ["int8/channel->int8"]'
    with pytest.raises(UserError, match=rf"unknown operator '{table}\.Conv2D'") as refused:
        load_target(change(own, f"[{table}]\n", f"[{table}]\n{rule}\n"))
    assert "did you mean Conv2d?" in refused.value.fix


def test_targets_know_the_operators_that_layers_are():
    assert tuple(operator.__name__ for operator in layers.OPERATORS) == OPERATORS


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("threads = 1\n", "", "lacks threads"),
        ('Linear = ["fp32", "int8", "int8_dynamic"]', 'Linear = ["int9"]', "computes.Linear.0"),
        ("vnni = 8", "vnni = 9", "weights.int8_bits.vnni"),
        ('kind = "cpu"', 'kind = "tpu"', "kind"),
        ("[timing]", "[timing", "is not TOML"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_place(own, old, new, place):
    with pytest.raises(UserError, match=place):
        load_target(change(own, old, new))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_target(str(tmp_path / "none.toml"))


def test_a_target_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        load_target("host").threads = 4


def test_the_flags_of_this_processor_choose_a_width():
    assert load_target("host").int8_weight_bits(cpu_flags()) == (8 if has_dot_product(cpu_flags()) else 7)


# -- devices that are not at hand ----------------------------------------------------------------------------


def test_an_estimate_needs_its_numbers(own: Path) -> None:
    with pytest.raises(UserError, match=r"needs a table \[estimate\]"):
        load_target(change(own, 'basis = "measured"', 'basis = "estimate"'))
    own.write_text(own.read_text() + ESTIMATE)
    target = load_target(str(own))
    assert target.estimate is not None
    assert target.estimate.floor_us == 5.0
    assert not target.is_here(AVX2)


def test_an_unknown_key_of_an_estimate_is_named_with_the_nearest(own: Path) -> None:
    own.write_text(own.read_text() + ESTIMATE.replace("floor_us", "flor_us"))
    with pytest.raises(UserError, match=r"unknown key 'estimate\.flor_us'") as refused:
        load_target(str(own))
    assert "did you mean floor_us?" in refused.value.fix


def test_a_target_with_a_cpu_of_its_own_is_here_only_on_such_a_cpu() -> None:
    target = load_target("x86-avx2")
    assert target.is_here(AVX2 | {"avx", "f16c"})
    assert not target.is_here(VNNI | {"avx", "f16c", "fma"})  # its kernels are others
    assert not target.is_here(frozenset({"asimd"}))
    # weights are what is safe there, wherever the file is written
    assert target.largest_code(target.flags(VNNI)) == 63
    assert load_target("host").is_here(VNNI)


def test_a_cpu_with_vnni_is_another_target_than_one_without() -> None:
    target = load_target("x86-vnni")
    assert target.is_here(VNNI | {"avx", "f16c", "fma", "avx512bw", "avx512vl", "amx_int8"})
    assert not target.is_here(AVX2 | {"avx", "f16c"})
    assert not target.is_here(AVX2 | {"avx", "f16c", "avx_vnni"})  # 8-bit products at once, by kernels without AVX512
    assert target.largest_code(target.flags(AVX2)) == 127


@pytest.mark.parametrize("name", [name for name in target_names() if load_target(name).basis == "estimate"])
def test_a_shipped_estimate_is_what_the_fit_gave(name: str) -> None:
    record = json.loads((FOLDER.parent / "benchmarks" / "results" / "estimates.json").read_text(encoding="utf-8"))[name]
    estimate = load_target(name).estimate
    assert estimate is not None
    fitted = record["estimate"]
    assert estimate.floor_us == pytest.approx(fitted["floor_us"], rel=0.01)
    assert estimate.error_pct == pytest.approx(fitted["error_pct"], rel=0.05)
    for compute, rate in fitted["gmacs_per_s"].items():
        assert estimate.gmacs_per_s[Compute(compute)] == pytest.approx(rate, rel=0.01)


def test_a_roofline_has_a_floor_and_fills_up_channels() -> None:
    device = Estimate(
        gmacs_per_s={Compute.FP32: 10.0, Compute.INT8: 40.0},
        gb_per_s=10.0,
        floor_us=5.0,
        channel_tile=16,
        error_pct=20.0,
        sources=("a data sheet",),
    )
    prices = EstimatedPrices(device)
    conv = Kernel.parse("Conv", "pads=1,1,1,1", "x:1x64x14x14 w:64x64x3x3 w:64", "fp32")
    in_int8 = Kernel.parse("Conv", "pads=1,1,1,1", "x:1x64x14x14 w:64x64x3x3 w:64", "int8")
    assert prices(conv) == pytest.approx(5 + conv.macs / 10e9 * 1e6)
    assert prices(in_int8) == pytest.approx(5 + conv.macs / 40e9 * 1e6)
    assert prices(conv.with_channels(64, 49)) == pytest.approx(prices(conv))  # 49 are worked on as 64
    tiny = Kernel.parse("Add", "", "x:1x8x2x2 x:1x8x2x2", "fp32")
    assert prices(tiny) == pytest.approx(5 + tiny.bytes / 10e9 * 1e6)
    assert prices.grid(conv, [32, 64], [64]).shape == (2, 1)
    assert (prices.errors(conv, [32, 64], [64]) == 0.2).all()
