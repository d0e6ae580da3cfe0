"""Quantities with units, and settings from the command line and from a file."""

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from hirelc_deploy.config import (
    OPTIONS,
    SEARCHES,
    ExportSettings,
    export_settings,
    nearest,
    parse_duration_ms,
    parse_size_bytes,
    read_options,
)
from hirelc_deploy.errors import UserError
from hirelc_deploy.search.methods import FILES, ONLY_COMPARED

REQUIRED = {"model": "net.py:build", "data": "digits", "target": "host"}


@pytest.mark.parametrize(
    ("text", "latency_ms"),
    [("5ms", 5.0), ("800us", 0.8), ("800 µs", 0.8), ("0.1s", 100.0), (".5ms", 0.5), ("2 S", 2000.0)],
)
def test_durations(text, latency_ms):
    assert parse_duration_ms(text) == pytest.approx(latency_ms)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("400KB", 400_000),
        ("400kb", 400_000),
        ("2MiB", 2 * 1024 * 1024),
        ("0.1MB", 100_000),
        ("1.5 KiB", 1536),
        ("17B", 17),
        ("1GB", 10**9),
    ],
)
def test_sizes(text, size_bytes):
    assert parse_size_bytes(text) == size_bytes


@pytest.mark.parametrize("parse", [parse_duration_ms, parse_size_bytes])
@pytest.mark.parametrize("bare", ["5", "400", 5, 0.5, "5.0 "])
def test_a_quantity_without_a_unit_is_refused_and_units_are_named(parse, bare):
    with pytest.raises(UserError, match="without a unit") as refused:
        parse(bare)
    assert "ms" in refused.value.fix or "KB" in refused.value.fix


@pytest.mark.parametrize(
    "text", ["5 minutes", "5KB", "ms", "", "-5ms", "5ms 3", "1e3ms", "nanms", "infs", "0ms", "0.0s"]
)
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(UserError):
        parse_duration_ms(text)


@pytest.mark.parametrize("text", ["5ms", "5KBit", "0KB", "0.2B", "-1KB", True, None])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError):
        parse_size_bytes(text)


@given(st.integers(1, 10**12))
def test_whole_bytes_are_exact(size_bytes):
    assert parse_size_bytes(f"{size_bytes}B") == size_bytes


def test_the_nearest_name_forgives_case_and_always_answers():
    assert nearest("HOTS", ["orin-nano", "host"]) == "host"
    assert nearest("?", ["Host"]) == "Host"


def test_the_command_line_wins_over_the_file_and_both_over_the_defaults(tmp_path):
    file = tmp_path / "export.toml"
    file.write_text('target = "host"\nmax-latency = "5ms"\nmax_size = "400KB"\nepochs = 9\nresume = true\n')
    settings = export_settings({"model": "a:b", "data": "digits", "epochs": 2, "max_latency": None}, file)
    assert settings == ExportSettings(
        model="a:b", data="digits", target="host", max_latency_ms=5.0, max_size_bytes=400_000, epochs=2, resume=True
    )


def test_an_unknown_key_is_refused_with_the_nearest(tmp_path):
    file = tmp_path / "export.toml"
    file.write_text('max-latancy = "5ms"\n')
    with pytest.raises(UserError, match="'max-latancy'") as refused:
        export_settings(REQUIRED, file)
    assert "did you mean max-latency?" in refused.value.fix


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("max-latency = 5", "max-latency: '5'|max-latency: 5"),
        ('epochs = "4"', "epochs: '4'"),
        ("epochs = true", "epochs: True"),
        ("seed = 1.5", "seed: 1.5"),
        ('resume = "yes"', "resume: 'yes'"),
        ("model = 3", "model: 3"),
        ('min-speedup = "3x"', "min-speedup: '3x'"),
        ('post-training = "biases,equalize"', "post-training: 'equalize' is no step"),
        ("post-training = true", "post-training: True"),
        ('augment = "flip,rotate"', "augment: 'rotate' is no augmentation"),
        ("[max-latency]\nms = 5", "max-latency: "),
    ],
)
def test_a_value_of_another_kind_is_refused_with_its_key(tmp_path, line, named):
    file = tmp_path / "export.toml"
    file.write_text(line + "\n")
    with pytest.raises(UserError, match=named):
        export_settings({name: value for name, value in REQUIRED.items() if name not in line}, file)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_required_option_that_is_missing_is_named(name):
    with pytest.raises(UserError, match=f"{name} is missing"):
        export_settings(REQUIRED | {name: None})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"search": "recepi"}, "search is 'recepi'"),
        ({"importance": "l1"}, "importance is 'l1'"),
        ({"epochs": -1}, "epochs is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"evaluations": 0}, "evaluations is 0"),
        ({"post_training": ("biases",)}, "post-training says how .* not fine-tuned, and epochs is 4"),
        ({"post_training": ("modelopt", "biases"), "epochs": 0}, "smooth is not among the steps of post-training"),
        ({"augment": ("flip",), "epochs": 0}, "augment changes what fine-tuning sees, and epochs is 0"),
        ({"recipe": "keep=50%", "policy": Path("policy.json")}, "recipe and policy"),
    ],
)
def test_what_cannot_be_meant_is_refused(setting, message):
    with pytest.raises(UserError, match=message):
        ExportSettings(**REQUIRED, **setting)


@pytest.mark.parametrize(
    ("text", "steps"), [("none", ()), ("biases", ("biases",)), ("equalise, feed-back", ("equalise", "feed-back"))]
)
def test_steps_of_post_training_are_read(text, steps):
    assert export_settings(REQUIRED | {"epochs": 0, "post_training": text}).post_training == steps
    assert export_settings(REQUIRED).post_training is None


def test_what_can_search_is_what_there_is():
    assert set(SEARCHES) == set(FILES) - ONLY_COMPARED


def test_a_method_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(UserError) as refused:
        ExportSettings(**REQUIRED, search="hierarchicall")
    assert "did you mean hierarchical?" in refused.value.fix


def test_a_file_that_is_missing_or_no_toml_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        export_settings(REQUIRED, tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("epochs = \n")
    with pytest.raises(UserError, match="line 1"):
        export_settings(REQUIRED, broken)
    with pytest.raises(UserError, match="cannot be read"):
        export_settings(REQUIRED, tmp_path)


def test_every_setting_can_be_given():
    assert {option.field for option in OPTIONS.values()} == {field.name for field in fields(ExportSettings)}


def test_an_option_that_is_left_out_stays_none():
    assert read_options({"max_latency": "5ms", "max_size": None}) == {"max_latency_ms": 5.0, "max_size_bytes": None}
