"""nvidia-modelopt as an opponent: what is sent, what comes back; a stand-in for it, and the real one where it is."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exporting import digits, export, hasten
from test_posing import posed_under
from torch import Tensor, nn
from toy_search import toy

from hirelc_deploy import modelopt
from hirelc_deploy.budget import Budget
from hirelc_deploy.cli import main
from hirelc_deploy.compress import smooth
from hirelc_deploy.errors import ExitStatus, UserError
from hirelc_deploy.policy import FP32, INT8, Policy, Precision
from hirelc_deploy.posing import Posing
from hirelc_deploy.search.modelopt import search
from hirelc_deploy.search.problem import Evaluations, LayerVariable

hasten()

REAL = Path(__file__).parents[1] / ".venv-modelopt" / "bin" / "python"

STAND_IN = '''
import torch

INT8_SMOOTHQUANT_CFG, INT4_AWQ_CFG = 1.0, 0.0

class Quantizer(torch.nn.Module):
    pre_quant_scale = None

def quantize(model, config, forward_loop):
    """Every input of a layer is scaled by the place of its channel to the power of the configuration."""
    forward_loop(model)
    for module in list(model.modules()):
        module.input_quantizer = Quantizer()
        if isinstance(module, torch.nn.Linear):
            module.input_quantizer.pre_quant_scale = torch.arange(1.0, module.in_features + 1)[None] ** config
    return model

def auto_quantize(model, constraints, quantization_formats, data_loader, forward_step, loss_func, **steps):
    """Not modelopt: calls what it is given as modelopt does, and remembers which layers there are."""
    assert steps == {"num_calib_steps": len(data_loader), "num_score_steps": len(data_loader)}
    for batch in data_loader:
        loss = loss_func(forward_step(model, batch), batch)
        assert loss.shape == () and torch.isfinite(loss)
        loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    widths = [f["quant_cfg"][1]["cfg"]["num_bits"] for f in quantization_formats]
    layers = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    return model, {"widths": widths, "layers": layers}

def get_auto_quantize_config(state, constraints):
    """The first layer stays as it is, all others get the most bits that are not above what is asked for."""
    bits = max(width for width in state["widths"] if width <= constraints["effective_bits"])
    entries = [{"quantizer_name": "*", "enable": False}]
    for layer in state["layers"][1:]:
        entries.append({"quantizer_name": layer + ".weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}})
        entries.append({"quantizer_name": layer + ".input_quantizer", "cfg": {"num_bits": 8}})
    return {"quant_cfg": entries}
'''


def program(folder: Path, script: str) -> str:
    """A stand-in for an environment's Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "modelopt" / "torch" / "quantization"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN, encoding="utf-8")
    (package / "algorithms.py").write_text("from modelopt.torch.quantization import *\n", encoding="utf-8")
    command = program(tmp_path, f'PYTHONPATH={tmp_path} exec {sys.executable} "$@"')
    monkeypatch.setenv(modelopt.VARIABLE, command)


@pytest.fixture(scope="module")
def posing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Posing]:
    with posed_under("convolutions", Budget(drop=1.0), tmp_path_factory.mktemp("run")) as posing:
        yield posing


def asked(posing: Posing, count: int) -> list[Policy]:
    return modelopt.policies(posing._bench, posing._offers.variables, count)


@pytest.mark.usefixtures("stand_in")
def test_bits_become_policies_of_the_target(posing: Posing) -> None:
    most, fewest = asked(posing, 2)
    layers = [layer.name for layer in posing._bench.graph.layers]
    assert set(most.precisions) == set(layers[1:]), "the first stays as it was"
    assert all(precision == INT8 for precision in most.precisions.values())
    assert {str(precision) for precision in fewest.precisions.values()} == {"int2/channel->int8"}
    assert not most.keep


@pytest.mark.usefixtures("stand_in")
def test_what_was_answered_is_not_asked_again(posing: Posing, monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(posing, 3)
    monkeypatch.setenv(modelopt.VARIABLE, "there is no such program")
    assert asked(posing, 3) == found


def layer(name: str, *options: str, together: tuple[str, ...] = ()) -> LayerVariable:
    return LayerVariable(name, (FP32, *map(Precision.parse, options)), ("block",), together)


def test_a_layer_without_so_many_bits_takes_the_next_that_it_has() -> None:
    one = layer("a", "int3/channel->int8", "int6/channel->int8", "int6/channel->fp32", "int4/tensor->int8")
    offered = {"a": modelopt._by_bits(one)}
    for bits, expected in ((2, 3), (3, 3), (4, 6), (6, 6)):
        assert str(modelopt._policy([one], offered, {"a": bits}).precisions["a"]) == f"int{expected}/channel->int8"
    assert not modelopt._policy([one], offered, {"a": 8}).precisions
    assert not modelopt._policy([one], offered, {}).precisions


def test_layers_that_share_a_weight_take_the_most_bits_of_any() -> None:
    options = ("int4/channel->int8", "int8/channel->int8")
    pair = [layer("a", *options, together=("b",)), layer("b", *options, together=("a",))]
    offered = {each.name: modelopt._by_bits(each) for each in pair}
    found = modelopt._policy(pair, offered, {"a": 4, "b": 8}).precisions
    assert {str(precision) for precision in found.values()} == {"int8/channel->int8"}
    assert not modelopt._policy(pair, offered, {"a": 4}).precisions, "one of them has to stay as it was"


def test_the_method_evaluates_what_is_advised_and_no_more() -> None:
    problem = toy().problem
    rows = [problem.legal(row[None])[0] for row in problem.as_trained[None].repeat(4, 0)]
    for i, row in enumerate(rows):
        row[0] = i % problem.sizes[0]
    advised = [problem.policy(row) for row in rows]
    seen = Evaluations(replace(problem, advisers={"modelopt": lambda count: advised[:count]}), 3)
    search(seen.problem, seen, seed=0)
    assert [each.policy for each in seen.seen] == list({policy.digest(): policy for policy in advised[:3]}.values())


# -- factors -------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """Some channels of its norm are many times as wide as the others: inputs (N, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 10)
        with torch.no_grad():
            self.norm.weight.copy_(1 / torch.arange(1.0, 65.0) ** 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.norm(input.flatten(1)))


@pytest.fixture
def normed() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Normed().eval()


def images(examples: int) -> list[dict[str, Tensor]]:
    return [{"input": torch.randn(examples, 1, 8, 8, generator=torch.Generator().manual_seed(seed))} for seed in (0, 1)]


@pytest.mark.usefixtures("stand_in")
def test_factors_of_activations_come_back_by_algorithm_and_layer(normed: nn.Module) -> None:
    found = modelopt.factors(normed, images(4))
    places = torch.arange(1.0, 65.0)
    assert found.keys() == {"modelopt's SmoothQuant", "modelopt's AWQ"}
    assert found["modelopt's SmoothQuant"].keys() == {"head"}
    assert torch.equal(found["modelopt's SmoothQuant"]["head"], places)
    assert torch.equal(found["modelopt's AWQ"]["head"], torch.ones(64))


@pytest.mark.usefixtures("stand_in")
def test_an_export_takes_what_is_proposed_where_nothing_errs_less_and_says_so(
    normed: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half way between even activations and even weights, as the stand-in's first factors are."""
    monkeypatch.setattr(smooth, "STRENGTHS", ())
    settings = {"post_training": ("smooth", "modelopt"), "recipe": "storage=int8,compute=int8"}
    notes = export(tmp_path / "out", normed, digits(), **settings).manifest.notes
    assert "channels were scaled by modelopt's SmoothQuant: norm" in notes


# -- what can go wrong ---------------------------------------------------------------------------------------


def test_without_modelopt_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(modelopt.VARIABLE, raising=False)
    out = tmp_path / "out"
    settings = ["--target", "host", "--model", "nowhere.py:net", "--data", "digits", "--out", str(out)]
    for command in (["compare", "--methods", "recipe,modelopt"], ["export", "--search", "modelopt"]):
        assert main([*command, *settings]) == ExitStatus.USER_ERROR
        assert "nvidia-modelopt is not installed" in capsys.readouterr().err
    assert not out.exists()


def test_a_python_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(modelopt.VARIABLE, "/no/python")
    with pytest.raises(UserError, match="HIRELC_DEPLOY_MODELOPT names /no/python"):
        modelopt.python()


def test_modelopts_own_words_are_passed_on(posing: Posing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        modelopt.VARIABLE, program(tmp_path, "echo first >&2; echo ValueError: no such format >&2; exit 1")
    )
    with pytest.raises(UserError, match="ValueError: no such format"):
        asked(posing, 4)
    monkeypatch.setenv(modelopt.VARIABLE, sys.executable)
    with pytest.raises(UserError, match="No module named 'modelopt'") as caught:
        asked(posing, 4)
    assert caught.value.fix == modelopt.INSTALL


def test_a_network_that_cannot_be_written_is_named(posing: Posing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(modelopt.VARIABLE, sys.executable)
    monkeypatch.setattr(posing._bench.model, "made_here", lambda x: x, raising=False)
    with pytest.raises(UserError, match="cannot be written to a file for modelopt"):
        asked(posing, 5)


def test_a_task_without_labels_is_refused(posing: Posing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(modelopt.VARIABLE, sys.executable)
    monkeypatch.setattr(posing._bench, "task", object())
    with pytest.raises(UserError, match="one label an example"):
        asked(posing, 6)


# -- the real one --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.exists(), reason="`make modelopt` makes its environment")
def test_the_real_modelopt_gives_fewer_bits_where_fewer_are_asked_for(
    posing: Posing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(modelopt.VARIABLE, str(REAL))
    monkeypatch.setattr(posing._bench.run, "step", lambda name, make: make())
    found = asked(posing, 4)
    elements = {name: posing._bench.model.get_submodule(name).weight.numel() for name in posing._bench.space.layers}

    def bits(policy: Policy) -> int:
        kept = {name: precision.storage.bits for name, precision in policy.precisions.items()}
        return sum(size * kept.get(name, 16) for name, size in elements.items())

    assert [bits(policy) for policy in found] == sorted((bits(policy) for policy in found), reverse=True)
    assert bits(found[-1]) < bits(found[0]) / 3
    sizes = [posing._bench.files.predicted_bytes(policy) for policy in found]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.skipif(not REAL.exists(), reason="`make modelopt` makes its environment")
def test_the_real_modelopt_scales_wide_channels_down(normed: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(modelopt.VARIABLE, str(REAL))
    found = modelopt.factors(normed, images(64))
    assert found.keys() == {"modelopt's SmoothQuant", "modelopt's AWQ"}
    smooth, aware = (by_layer["head"] for by_layer in found.values())
    assert smooth.shape == aware.shape == (64,)
    assert smooth[-1] > 100 * smooth[0], "the first channel is the widest by far"
    assert aware[-1] >= aware[0]
