"""Targets as data, and the processor that they ask about."""

import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

from hirelc_deploy.cpu import cpu_flags, has_dot_product
from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters import runtime_names
from hirelc_deploy.policy import Compute
from hirelc_deploy.profiles import FOLDER, load_target, target_names

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
