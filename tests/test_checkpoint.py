"""Networks and weights: what is understood, what is refused, and that nothing in a file is executed."""

import argparse
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hirelc_deploy.checkpoint import load, weights_sha256
from hirelc_deploy.errors import UserError

NETWORK = """
import torch
from torch import nn

def network():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))

def other():
    return nn.ModuleDict({f"layer{i}": nn.Linear(4, 4) for i in range(5)})

def broken():
    return nn.Linear(2, 3)(torch.zeros(4))

def words():
    return "resnet"
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(NETWORK)
    return f"{tmp_path / 'nets.py'}:network"


def weights(spec: str) -> dict[str, Tensor]:
    """A trained network, as good as: random weights, other than those that a new network has."""
    torch.manual_seed(1)
    return {name: tensor.clone() for name, tensor in load(spec).model.state_dict().items()}


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as raised:
        act()
    assert raised.value.fix
    return str(raised.value)


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


# What is understood


def test_a_checkpoint_is_ready_to_be_traced(spec: str, tmp_path: Path) -> None:
    state = {n: t.double() if t.is_floating_point() else t for n, t in weights(spec).items()}
    loaded = load(spec, save(tmp_path / "c.pt", state))
    assert not any(module.training for module in loaded.model.modules())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.model.parameters())
    for name, tensor in loaded.model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], check_dtype=False)


def test_the_same_weights_have_one_identity_in_every_file(spec: str, tmp_path: Path) -> None:
    state = weights(spec)
    save_file(state, tmp_path / "c.safetensors")
    digests = {
        load(spec, save(tmp_path / "c.pt", state)).sha256,
        load(spec, save(tmp_path / "d.pth", {"state_dict": dict(reversed(state.items()))})).sha256,
        load(spec, tmp_path / "c.safetensors").sha256,
    }
    assert len(digests) == 1
    state["0.bias"][0] += 1e-3
    assert load(spec, save(tmp_path / "e.pt", state)).sha256 not in digests


def test_identity_is_of_names_shapes_and_types_too() -> None:
    zeros = torch.zeros(4)
    states = [{"a": zeros}, {"b": zeros}, {"a": zeros.reshape(2, 2)}, {"a": zeros.to(torch.int32)}, {"a": zeros[0]}]
    assert len({weights_sha256(state) for state in states}) == len(states)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model_state_dict": s, "optimizer": {"lr": 0.1, "momentum": torch.zeros(1)}},
        lambda s: {"checkpoint": 1, "model": {"net": s}},
        lambda s: {"ema": s},
        lambda s: {"model": s, "ema": {name: t * 0 for name, t in s.items()}},
        lambda s: {f"module.{name}": t for name, t in s.items()},
        lambda s: {"state_dict": {f"model.{name}": t for name, t in s.items()}},
        lambda s: {f"module._orig_mod.{name}": t for name, t in s.items()},
        lambda s: {f"backbone.{name}": t for name, t in s.items()},
        lambda s: {name: t for name, t in s.items() if "num_batches" not in name},
    ],
)
def test_wrappers_and_prefixes(spec: str, tmp_path: Path, wrap: Callable[[dict[str, Tensor]], object]) -> None:
    state = weights(spec)
    loaded = load(spec, save(tmp_path / "c.pt", wrap(state)))
    torch.testing.assert_close(loaded.model.state_dict()["3.weight"], state["3.weight"])


def test_a_prefix_that_belongs_to_the_model_stays(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\ndef net():\n    return nn.ModuleDict({'model': nn.Linear(2, 2)})\n"
    )
    spec = f"{tmp_path / 'nets.py'}:net"
    load(spec, save(tmp_path / "c.pt", weights(spec)))


def test_tied_weights_may_be_stored_once(spec: str, tmp_path: Path) -> None:
    tied = spec.replace("network", "Tied")
    state = weights(tied)
    del state["head.weight"]
    model = load(tied, save(tmp_path / "c.pt", state)).model
    torch.testing.assert_close(model.head.weight, state["embed.weight"])  # type: ignore[union-attr, arg-type]


def test_an_installed_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "package_of_mine").mkdir()
    (tmp_path / "package_of_mine" / "nets.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    assert isinstance(load("package_of_mine.nets:network").model, nn.Sequential)


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "vit")
    loaded = load(f"hf:{tmp_path / 'vit'}")
    assert loaded.sha256 == weights_sha256(model.state_dict())
    (tmp_path / "vit" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    assert "transformers cannot load" in refusal(lambda: load(f"hf:{tmp_path / 'vit'}"))
    checkpoint = save(tmp_path / "c.pt", {name: t + 1 for name, t in model.state_dict().items()})
    assert load(f"hf:{tmp_path / 'vit'}", checkpoint).sha256 != loaded.sha256


# What is refused


def test_a_pickle_that_would_run_code_runs_none(spec: str, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    path = save(tmp_path / "c.pt", {"state_dict": weights(spec), "payload": Payload()})
    message = refusal(lambda: load(spec, path))
    assert "could run code" in message
    assert "mkdir" in message
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists(), "the payload would have worked"


def test_a_whole_pickled_network(spec: str, tmp_path: Path) -> None:
    assert "could run code" in refusal(lambda: load(spec, save(tmp_path / "c.pt", nn.Linear(2, 2))))


def test_arguments_saved_beside_the_weights_are_named(spec: str, tmp_path: Path) -> None:
    """What many training scripts do: the file is not read, and the message says which class is in the way."""
    path = save(tmp_path / "c.pt", {"model": weights(spec), "args": argparse.Namespace(lr=0.1)})
    assert "holds argparse.Namespace beside weights" in refusal(lambda: load(spec, path))


@pytest.mark.parametrize("content", [b"an error page", b"", pickle.dumps({"a": 1})])
def test_files_that_torch_did_not_save(spec: str, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.pt").write_bytes(content)
    assert "c.pt is no whole checkpoint" in refusal(lambda: load(spec, tmp_path / "c.pt"))


def test_missing_and_unexpected_names(spec: str, tmp_path: Path) -> None:
    state = weights(spec)
    del state["3.weight"]
    message = refusal(lambda: load(spec, save(tmp_path / "c.pt", {**state, "extra.weight": torch.zeros(1)})))
    assert "has no weights for 3.weight" in message
    assert "the model lacks: extra.weight" in message


def test_many_names_are_counted(spec: str, tmp_path: Path) -> None:
    more = {f"extra{i}": torch.zeros(1) for i in range(9)}
    message = refusal(lambda: load(spec, save(tmp_path / "c.pt", {**weights(spec), **more})))
    assert "extra0, extra1, extra2 and 6 more" in message


def test_a_checkpoint_of_another_network(spec: str, tmp_path: Path) -> None:
    other = weights(spec.replace("network", "other"))
    message = refusal(lambda: load(spec, save(tmp_path / "c.pt", other)))
    assert "of another network" in message
    assert "layer0.weight" in message
    assert "0.weight, 0.bias" in message


def test_other_shapes(spec: str, tmp_path: Path) -> None:
    state = {**weights(spec), "3.weight": torch.zeros(7, 16), "3.bias": torch.zeros(7)}
    message = refusal(lambda: load(spec, save(tmp_path / "c.pt", state)))
    assert "3.weight is [7, 16], not [3, 16]" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["3.weight", "1.running_var"])
def test_weights_that_are_not_finite(spec: str, tmp_path: Path, name: str, value: float) -> None:
    state = weights(spec)
    state[name].view(-1)[1] = value
    assert f"NaN or infinity in {name}" in refusal(lambda: load(spec, save(tmp_path / "c.pt", state)))


@pytest.mark.parametrize("name", ["c.pt", "c.safetensors"])
def test_a_file_without_weights(name: str, spec: str, tmp_path: Path) -> None:
    path = tmp_path / name
    save_file({}, path) if path.suffix == ".safetensors" else torch.save({}, path)
    with pytest.raises(UserError, match="holds no weights"):
        load(spec, path)


@pytest.mark.parametrize("name", ["c.pt", "c.pth", "c.safetensors"])
def test_files_that_break_off(spec: str, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_file(weights(spec), path) if path.suffix == ".safetensors" else save(path, weights(spec))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert name in refusal(lambda: load(spec, path))


@pytest.mark.parametrize("name", ["c.pt", "c.safetensors"])
def test_missing_files(spec: str, tmp_path: Path, name: str) -> None:
    assert f"{name} does not exist" in refusal(lambda: load(spec, tmp_path / name))


def test_a_folder_for_a_file(spec: str, tmp_path: Path) -> None:
    (tmp_path / "c.pt").mkdir()
    assert "cannot be read" in refusal(lambda: load(spec, tmp_path / "c.pt"))


def test_an_unknown_suffix(spec: str, tmp_path: Path) -> None:
    (tmp_path / "c.h5").touch()
    assert ".h5" in refusal(lambda: load(spec, tmp_path / "c.h5"))


@pytest.mark.parametrize("content", [{"epoch": 3, "args": {"lr": 0.1}}, 7, {}])
def test_a_checkpoint_without_weights(spec: str, tmp_path: Path, content: object) -> None:
    assert "holds no weights" in refusal(lambda: load(spec, save(tmp_path / "c.pt", content)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken", "line 20: return nn.Linear(2, 3)(torch.zeros(4))"),
        ("words", "returned a str, not a torch.nn.Module"),
        ("netwerk", "its own are: Tied, broken, network, other, words"),
    ],
)
def test_factories_that_make_no_network(spec: str, name: str, said: str) -> None:
    assert said in refusal(lambda: load(spec.replace(":network", f":{name}")))


@pytest.mark.parametrize("spec", ["resnet18", "onnx:model", "nets.py", "nets.py:"])
def test_specs_of_no_known_form(spec: str) -> None:
    assert refusal(lambda: load(spec))


@pytest.mark.parametrize("spec", ["timm:resnet18", "torchvision:resnet18"])
def test_a_library_network_without_weights_is_not_compressed(spec: str) -> None:
    assert "random weights" in refusal(lambda: load(spec))


def in_a_new_process(tmp_path: Path, code: str) -> str:
    """stdout of Python with `tmp_path` first on the import path; fake packages go there."""
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    ).stdout


def test_a_library_that_is_not_installed_is_named_with_its_extra(tmp_path: Path) -> None:
    said = in_a_new_process(
        tmp_path,
        """
        import sys
        sys.modules["timm"] = sys.modules["torchvision"] = None  # what `import` takes for not installed
        from hirelc_deploy.checkpoint import build
        from hirelc_deploy.errors import UserError
        for spec in ("timm:resnet18", "torchvision:resnet18"):
            try:
                build(spec, with_weights=False)
            except UserError as error:
                print(error)
        """,
    )
    assert "pip install 'hirelc-deploy[timm]'" in said
    assert "pip install 'hirelc-deploy[torchvision]'" in said


def test_a_torchvision_whose_operators_do_not_load_is_imported_all_the_same(tmp_path: Path) -> None:
    """A stand-in for torchvision built for another torch: registering the shape of a missing operator raises."""
    package = tmp_path / "torchvision"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("from torchvision import shapes\nfrom torchvision import models\n")
    (package / "shapes.py").write_text(
        "import torch\n@torch.library.register_fake('torchvision::nms')\ndef nms(dets, scores, iou):\n    return dets\n"
    )
    (package / "models" / "__init__.py").write_text(
        "from torch import nn\ndef list_models():\n    return ['resnet18']\n"
        "def get_model(name, weights):\n    return nn.Linear(2, 2)\n"
    )
    said = in_a_new_process(
        tmp_path,
        """
        from hirelc_deploy.checkpoint import build
        print(build("torchvision:resnet18", with_weights=False))
        """,
    )
    assert "Linear" in said
