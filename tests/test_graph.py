"""What `trace` sees of a network: layers, blocks, inputs and outputs, and that it leaves the network alone."""

import copy
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import networks
import pytest
import torch
from torch import Tensor, nn

from hirelc_deploy.errors import UserError
from hirelc_deploy.graph import forward, pruning, trace
from hirelc_deploy.graph.idle import CONSTANT, UNREACHED
from hirelc_deploy.graph.model_graph import ModelGraph

transformers = pytest.importorskip("transformers")


def traced(name: str) -> ModelGraph:
    case = networks.build(name)
    return trace(case.model, case.example)


def fashion_mnist() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "fashion_mnist" / "networks.py"
    spec = importlib.util.spec_from_file_location("fashion_mnist_networks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_layers_come_in_the_order_of_the_forward_pass_with_their_shapes() -> None:
    graph = traced("two_inputs")

    assert [layer.name for layer in graph.layers] == ["see", "look", "hear1", "hear2", "classes", "box"]
    see = graph.layer["see"]
    assert (see.op, see.weight_shape, see.kernel, see.stride) == ("Conv2d", (8, 3, 3, 3), (3, 3), (1, 1))
    assert (see.input_shape, see.output_shape) == ((3, 8, 8), (8, 8, 8))
    assert see.parameters == 8 * 3 * 9 + 8
    assert [(s.name, s.shape, s.dtype) for s in graph.inputs] == [
        ("sound", (4,), "float32"),
        ("x", (3, 8, 8), "float32"),
    ]


@pytest.mark.parametrize(
    ("module", "example", "macs"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.zeros(2, 4, 8, 8), 4 * 4 * 6 * 2 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), torch.zeros(2, 4, 8, 8), 8 * 8 * 4 * 6 * 4),
        (nn.Linear(5, 7), torch.zeros(2, 3, 5), 3 * 5 * 7),
        (nn.Conv1d(4, 6, 3), torch.zeros(2, 4, 10), 8 * 4 * 6 * 3),
    ],
)
def test_multiply_accumulates_are_those_of_one_example(module: nn.Module, example: Tensor, macs: int) -> None:
    assert trace(nn.Sequential(module), {"input": example}).layers[0].macs == macs


def test_shared_weights_repeated_calls_and_layers_never_called_are_named() -> None:
    assert traced("tied_twice").layer["other"].shares_weight_with == ("one",)
    again = traced("called_twice").layer["again"]
    assert (again.calls, again.macs) == (2, 2 * 8 * 8)

    model = networks.Plain()
    model.spare = nn.Linear(3, 3)
    graph = trace(model, networks.image())
    assert "spare" not in graph.layer
    assert any(left.name == "spare" and "never calls" in left.reason for left in graph.left_out)


def test_an_operator_that_is_not_ours_is_left_out_by_name() -> None:
    class Odd(networks.Plain):
        def __init__(self) -> None:
            super().__init__()
            self.head = transformers.pytorch_utils.Conv1D(5, 96)

    graph = trace(Odd(), networks.image())
    assert "head" not in graph.layer
    assert any(left.name == "head" and "Conv1D" in left.reason for left in graph.left_out)


def test_a_large_parameter_that_is_no_layers_weight_is_left_out_by_name() -> None:
    """Prototypes that outputs are compared with, half of all parameters; a small one is not worth a word."""

    class Prototypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.utils.parametrizations.orthogonal(nn.Linear(16, 16))
            self.prototypes = nn.Parameter(torch.randn(20, 16))
            self.scale = nn.Parameter(torch.ones(1, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale.sum() * self.body(x) @ self.prototypes.T

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(16, 16), Prototypes()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x))

    left = {entry.name: entry.reason for entry in trace(Inner(), {"x": torch.randn(2, 16)}).left_out}
    assert "head.prototypes" in left
    assert "no layer's weight" in left["head.prototypes"]
    assert "other parameters" in left["head.body"]
    assert not [name for name in left if "scale" in name or "parametrizations" in name]


class Standardised(nn.Conv2d):
    """As BiT's: what is multiplied by is made of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Transposed(nn.Linear):
    """Another way to write a Linear: a view of the weight is multiplied by."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T


def test_a_layer_that_computes_its_weight_is_left_out_by_name() -> None:
    model = nn.Sequential(Standardised(3, 4, 3), nn.Flatten(), Transposed(4 * 36, 5))
    graph = trace(model, {"input": torch.randn(2, 3, 8, 8)})
    assert [layer.name for layer in graph.layers] == ["2"]
    assert any(left.name == "0" and "Standardised" in left.reason for left in graph.left_out)


class Idle(nn.Module):
    """Layers that are called for nothing, beside some that look so: inputs (N, 4), and which of 3 each example is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.arange(6.0).reshape(6, 1))
        self.kinds = nn.Embedding(3, 6)
        self.read = nn.Linear(4, 6)
        self.table = nn.Linear(1, 8)
        self.bias = nn.Linear(8, 1)
        self.silent = nn.Linear(6, 6)
        self.behind = nn.Linear(6, 6)
        self.choice = nn.Linear(6, 2)
        self.auxiliary = nn.Linear(6, 5)
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            self.silent.weight.zero_()
            self.silent.bias.fill_(-1.0)

    def forward(self, x: Tensor, kind: Tensor) -> dict[str, Tensor]:
        x = self.read(x) + self.kinds(kind)
        x = x + self.bias(torch.relu(self.table(self.places))).flatten()
        x = x + self.behind(torch.relu(self.silent(x)))
        self.auxiliary(x)
        return {"logits": self.head(x), "choice": self.choice(x).argmax(1)}


@pytest.mark.parametrize("same", [False, True])
def test_layers_that_are_called_for_nothing_are_left_out_by_name(same: bool) -> None:
    """Not those of a branch that is silent as trained, nor one that only decides."""
    inputs = {"x": torch.zeros(2, 4) if same else torch.randn(2, 4), "kind": torch.tensor([1, 1] if same else [0, 2])}
    graph = trace(Idle(), inputs)

    assert {layer.name for layer in graph.layers} == {"read", "kinds", "silent", "behind", "choice", "head"}
    reasons = {(left.name, left.reason) for left in graph.left_out}
    assert {("auxiliary", UNREACHED), ("table", CONSTANT), ("bias", CONSTANT)} <= reasons
    assert [group.name for group in graph.groups] == ["silent"]


class Words(nn.Module):
    """A text classifier to which the order of words is all the same, and an item that has one number an example."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.words, self.items = nn.Embedding(20, 8), nn.Embedding(9, 8)
        self.tower, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, words: Tensor, item: Tensor) -> Tensor:
        read = self.words(words)
        pooled = read.mean(1) if self.pool == "mean" else read.amax(1)
        return self.head(torch.relu(pooled)) + self.tower(self.items(item)).sum(1, keepdim=True)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_layers_that_do_not_mind_the_order_of_their_inputs_are_no_constants(pool: str) -> None:
    graph = trace(Words(pool), {"words": torch.randint(0, 20, (2, 7)), "item": torch.tensor([4, 4])})
    assert {"tower", "head"} <= {layer.name for layer in graph.layers}


def test_a_shuffle_of_channels_into_places_is_refused_and_the_rest_found() -> None:
    """torch-pruning gives the layer behind it positions that it does not have."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 32, 3, padding=1),
        nn.PixelShuffle(2),
        nn.ReLU(),
        nn.Conv2d(8, 1, 3, padding=1),
    )
    graph = trace(model, {"x": torch.randn(2, 1, 8, 8)})
    assert [group.name for group in graph.groups] == ["0"]


def test_inputs_that_may_not_be_exchanged_say_nothing_of_constants() -> None:
    class Strict(Idle):
        def forward(self, x: Tensor, kind: Tensor) -> dict[str, Tensor]:
            if kind.tolist() != [0, 2][: len(kind)]:
                raise ValueError("no such kinds")
            return super().forward(x, kind)

    graph = trace(Strict(), {"x": torch.randn(2, 4), "kind": torch.tensor([0, 2])})
    assert {"table", "bias"} <= {layer.name for layer in graph.layers}
    assert "auxiliary" not in graph.layer


def test_an_untraceable_network_still_has_its_layers() -> None:
    graph = trace(networks.Untraceable(), networks.image())

    assert [layer.name for layer in graph.layers] == ["conv", "head"]
    assert graph.groups == ()
    assert [left.name for left in graph.left_out] == ["model"]
    assert "differentiated" in graph.left_out[0].reason


def spins() -> None:
    while True:
        pass


@pytest.mark.parametrize("step", [lambda: time.sleep(0.01), spins], ids=["waits", "computes"])
def test_a_listing_that_never_ends_is_ended(step: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "_groups", lambda model, inputs: list(iter(step, 0)))
    monkeypatch.setattr(pruning, "WAITS", 1e6 if step is spins else 1)  # what computes is ended by its CPU time alone
    case = networks.build("plain")
    graph = trace(case.model, case.example, limit_s=0.3)

    assert graph.groups == ()
    assert "longer than 0.3 s" in graph.left_out[0].reason


def test_a_listing_that_takes_all_memory_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "_groups", lambda model, inputs: [bytearray(1 << 30)])
    case = networks.build("plain")
    graph = trace(case.model, case.example, limit_bytes=1 << 28)

    assert graph.groups == ()
    assert "memory" in graph.left_out[0].reason


def test_a_layer_whose_listing_takes_all_memory_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no layer that cannot be followed, and those after it are not tried in turn."""
    monkeypatch.setattr("torch_pruning.DependencyGraph.get_pruning_group", lambda *_: bytearray(1 << 30))
    case = networks.build("plain")
    graph = trace(case.model, case.example, limit_bytes=1 << 28)

    assert graph.groups == ()
    (left,) = graph.left_out
    assert left.name == "model"
    assert "memory" in left.reason


def test_the_model_and_the_random_state_are_left_as_they_were() -> None:
    case = networks.build("residual")
    case.model.train()
    frozen, head = (case.model.get_parameter(name) for name in ("stem.weight", "head.weight"))
    frozen.requires_grad_(False)
    head.grad = torch.ones_like(head)
    before = copy.deepcopy(case.model.state_dict())
    random = torch.get_rng_state()
    trace(case.model, case.example)

    assert all(torch.equal(tensor, before[name]) for name, tensor in case.model.state_dict().items())
    assert all(module.training for module in case.model.modules())
    assert not frozen.requires_grad
    assert head.grad is not None
    assert torch.equal(head.grad, torch.ones_like(head))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_two_traces_are_equal() -> None:
    assert traced("residual") == traced("residual")


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("wide", "BasicBlock", 6), ("depthwise", "SeparableConv", 6), ("vit", "TransformerBlock", 4)],
)
def test_the_blocks_of_the_example_networks(name: str, kind: str, count: int) -> None:
    model = fashion_mnist().NETWORKS[name]()
    graph = trace(model, {"x": torch.zeros(2, 1, 28, 28)})
    found = [block.name for block in graph.blocks if type(model.get_submodule(block.name)).__name__ == kind]

    assert found == [f"blocks.{i}" for i in range(count)]
    assert [block.name for block in graph.blocks if block.name not in found] in (
        ["stem.0", "head"],
        ["patches", "head"],
    )
    assert sorted(graph.block_of) == sorted(graph.layer)


TRANSFORMERS = {
    "ResNetBasicLayer": lambda t: t.ResNetForImageClassification(
        t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[2, 2], layer_type="basic")
    ),
    "ViTLayer": lambda t: t.ViTForImageClassification(
        t.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=32,
            patch_size=8,
        )
    ),
    "MobileNetV2InvertedResidual": lambda t: t.MobileNetV2ForImageClassification(
        t.MobileNetV2Config(image_size=32, depth_multiplier=0.25)
    ),
    "ConvNextLayer": lambda t: t.ConvNextForImageClassification(
        t.ConvNextConfig(depths=[2, 2], hidden_sizes=[8, 12], num_stages=2)
    ),
    "SwinLayer": lambda t: t.SwinForImageClassification(
        t.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4)
    ),
}


ATTENTIVE = ("ViTLayer", "SwinLayer")


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_the_blocks_of_networks_never_seen(kind: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TRANSFORMERS[kind](transformers)
    expected = [name for name, module in model.named_modules() if type(module).__name__ == kind]
    graph = trace(model, {"pixel_values": torch.randn(2, 3, 32, 32)})

    assert expected
    assert [block.name for block in graph.blocks if block.name in expected] == expected
    assert any(group.legal[0] == 0 for group in graph.groups)
    heads = [group for group in graph.groups if group.kind == "heads"]
    assert {block for group in heads for block in group.blocks} == ({*expected} if kind in ATTENTIVE else set())
    of_channels = " ".join(group.name for group in graph.groups if group.kind == "channels")
    assert not any(projection in of_channels for projection in ("q_proj", "k_proj", "v_proj", "query", "key", "value"))


def test_outputs_have_names_whatever_a_network_returns() -> None:
    class Returns(nn.Module):
        def __init__(self, result: object) -> None:
            super().__init__()
            self.result = result

        def forward(self, x: Tensor) -> object:
            return self.result

    def names(result: object) -> list[str]:
        return list(forward(Returns(result), {"x": torch.zeros(1)}))

    t = torch.zeros(1)
    assert names(t) == ["output"]
    assert names((t, None, [t, t])) == ["output_0", "output_2.0", "output_2.1"]
    assert names({"logits": t, "more": {"box": t, "none": None}}) == ["logits", "more.box"]
    with pytest.raises(UserError, match=r"returned a str in b"):
        names({"a": t, "b": "text"})
    with pytest.raises(UserError, match="no tensor"):
        names(None)


class Subtract(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b


def test_inputs_go_by_name_where_forward_has_them_and_by_position_otherwise() -> None:
    one, three = torch.tensor(1.0), torch.tensor(3.0)
    assert forward(Subtract(), {"b": one, "a": three})["output"] == 2
    assert forward(Subtract(), {"first": one, "second": three})["output"] == -2


class Together(nn.Module):
    """Hands on whatever it is given, as nn.DataParallel does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        return self.inner(*inputs, **named)


def test_a_wrapper_takes_inputs_by_the_names_of_what_it_wraps() -> None:
    class ByNameAlone(nn.Module):
        def forward(self, **named: Tensor) -> Tensor:
            return named["a"] - named["b"] if "b" in named else named["a"]

    one, three = torch.tensor(1.0), torch.tensor(3.0)
    assert forward(Together(Subtract()), {"b": one, "a": three})["output"] == 2
    assert forward(ByNameAlone(), {"b": one, "a": three})["output"] == 2
    assert forward(ByNameAlone(), {"a": three})["output"] == 3
    assert forward(Together(nn.ReLU()), {"image": three})["output"] == 3, "one input goes by position"


def test_a_network_may_work_on_its_input_in_place() -> None:
    """Inputs are used again: for the original, the compressed one and every trial."""

    class Normalised(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sub_(0.5).div_(0.25)

    inputs = {"x": torch.ones(2, 3)}
    for _ in range(2):
        assert torch.equal(forward(Normalised(), inputs)["output"], torch.full((2, 3), 2.0))
    assert torch.equal(inputs["x"], torch.ones(2, 3))


def test_a_model_that_does_not_take_the_example_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="does not run on the task's example: RuntimeError"):
        trace(networks.Plain(), {"x": torch.zeros(1, 4, 8, 8)})
    with pytest.raises(UserError, match="holds no example"):
        trace(networks.Plain(), {"x": torch.zeros(0, 3, 8, 8)})
