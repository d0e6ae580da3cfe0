"""Layers as one forward pass meets them: shapes, multiply-accumulates, calls, shared weights."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from hirelc_deploy.graph.calling import Inputs, forward
from hirelc_deploy.graph.model_graph import Layer, LeftOut

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
TransposedConv = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Operator = Conv | nn.Linear | nn.Embedding
OPERATORS: tuple[type[Operator], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.Embedding,
)


PRODUCTS = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "embedding"),
    *("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"),
}
"""What a layer of another library's may call with its weight, by name."""


NOTABLE_PART = 0.01
"""Of all parameters: one that is no layer's weight is told of from so much on."""


@dataclass(frozen=True)
class _Call:
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def observe(model: nn.Module, inputs: Inputs) -> tuple[tuple[Layer, ...], tuple[LeftOut, ...]]:
    """The layers in the order of a forward pass of one example, and the modules that cannot be layers.

    One example, so that whatever a network computes once a batch (a table of position biases) is counted in full,
    and no axis has to be guessed to be the batch.
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, OPERATORS)}
    products = _Products()
    with products:
        calls = _record_calls(model, list(names), inputs)
    shared = _shared_weights(names)
    layers = []
    left_out = [*_unknown_operators(model), *_bare_parameters(model)]
    for module in calls:
        name = names[module]
        if "weight" not in module._parameters:
            left_out.append(
                LeftOut(name, "its weight is computed from other parameters; fold them (remove_parametrizations) first")
            )
        elif not _is_of_torch(module) and not products.read(module.weight):
            left_out.append(
                LeftOut(
                    name, f"a {type(module).__name__} multiplies by what it makes of its weight; it stays as trained"
                )
            )
        else:
            layers.append(_layer(name, module, calls[module], shared[name]))
    left_out.extend(LeftOut(name, "the forward pass never calls it") for m, name in names.items() if m not in calls)
    return tuple(layers), tuple(left_out)


class _Products(TorchFunctionMode):
    """Remembers the tensors that anything was multiplied by, or looked up in, while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in PRODUCTS:
            self._storages |= {storage_of(each) for each in (*args, *kwargs.values()) if isinstance(each, Tensor)}
        return func(*args, **kwargs)

    def read(self, tensor: Tensor) -> bool:
        """Whether the tensor, or a view of it, was one of them."""
        return storage_of(tensor) in self._storages


def storage_of(tensor: Tensor) -> int:
    """Where a tensor lies, and all views of it: for as long as one of them is there."""
    return tensor.untyped_storage().data_ptr()


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _record_calls(model: nn.Module, modules: list[Operator], inputs: Inputs) -> dict[Operator, list[_Call]]:
    calls: dict[Operator, list[_Call]] = {}

    def record(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        read = args[0] if args else next(iter(kwargs.values()))
        calls.setdefault(module, []).append(_Call(tuple(read.shape), tuple(output.shape)))

    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    try:
        forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _layer(name: str, module: Operator, calls: list[_Call], shared: tuple[str, ...]) -> Layer:
    weight_shape = tuple(module.weight.shape)
    inputs, outputs = _widths(module)
    convolution = module if isinstance(module, Conv) else None
    return Layer(
        name=name,
        op=next(operator.__name__ for operator in OPERATORS if isinstance(module, operator)),
        weight_shape=weight_shape,
        in_channels=inputs,
        out_channels=outputs,
        kernel=tuple(convolution.kernel_size) if convolution else (),
        stride=tuple(convolution.stride) if convolution else (),
        conv_groups=convolution.groups if convolution else 1,
        input_shape=_of_one_example(calls[0].input_shape),
        output_shape=_of_one_example(calls[0].output_shape),
        macs=sum(_uses(module, call) for call in calls) * prod(weight_shape),
        parameters=sum(p.numel() for p in module.parameters(recurse=False)),
        calls=len(calls),
        shares_weight_with=shared,
    )


def _widths(module: Operator) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.in_channels, module.out_channels


def _uses(module: Operator, call: _Call) -> int:
    """How often one call multiplies by each weight: once a position of the output (transposed: of the input)."""
    if isinstance(module, nn.Embedding):
        return 0
    if isinstance(module, TransposedConv):
        return prod(call.input_shape) // module.in_channels
    return prod(call.output_shape) // _widths(module)[1]


def _of_one_example(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the batch axis; windows or tokens that were folded into it stay."""
    return shape[1:] if shape and shape[0] == 1 else shape


def _shared_weights(names: Mapping[Operator, str]) -> dict[str, tuple[str, ...]]:
    holders: dict[int, list[str]] = defaultdict(list)
    for module, name in names.items():
        holders[id(module.weight)].append(name)
    return {name: tuple(other for other in held if other != name) for held in holders.values() for name in held}


def _unknown_operators(model: nn.Module) -> Iterator[LeftOut]:
    """Modules with weight matrices of their own that are none of OPERATORS: transformers' Conv1D, an LSTM."""
    for name, module in model.named_modules():
        if not isinstance(module, OPERATORS) and any("weight" in key for key in _matrices(module)):
            yield LeftOut(
                name or "model", f"a {type(module).__name__} is no operator of this pass; it stays as trained"
            )


def _bare_parameters(model: nn.Module) -> Iterator[LeftOut]:
    """Large parameters that are no layer's weight, and are not called one: positions, prototypes, factors.

    Those of parametrizations are told of with the layer whose weight they make.
    """
    least = NOTABLE_PART * sum(parameter.numel() for parameter in model.parameters())
    for name, module in model.named_modules():
        if not isinstance(module, (*OPERATORS, ParametrizationList)):
            for key, parameter in _matrices(module).items():
                if "weight" not in key and parameter.numel() >= least:
                    yield LeftOut(f"{name}.{key}".removeprefix("."), "it is no layer's weight; it stays as trained")


def _matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    return {key: p for key, p in module.named_parameters(recurse=False) if p.ndim > 1}
