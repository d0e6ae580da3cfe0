"""The arithmetic of the file while PyTorch trains: weights on the grid that is stored, activations on uint8.

A `Simulation` is put on a model and taken off again; what stays is the float weights that were trained under
it.  Rounding passes gradients straight through (Bengio et al., 2013).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from hirelc_deploy.graph import forward
from hirelc_deploy.kernels import load_format
from hirelc_deploy.policy import Compute, Precision, Storage

LEVELS = 255  # steps of a uint8 grid
RANGE_MOMENTUM = 0.05  # of a range's running mean while training: it follows weights that move by small steps


class StoredWeight(nn.Module):
    """A weight as the file will hold it, or the float one while `passing`."""

    def __init__(self, storage: Storage, *, axis: int, largest: int) -> None:
        super().__init__()
        self.storage = storage
        self.axis = axis
        self.largest = largest
        self.passing = False
        self.format = load_format(storage.format)

    def forward(self, weight: Tensor) -> Tensor:
        if self.passing:
            return weight
        return self.format.quantise(weight, self.storage, axis=self.axis, largest=self.largest)


class ActivationGrid:
    """The uint8 grid of one tensor: it spans the tensor's range, zero included."""

    def __init__(self, low: Tensor, high: Tensor) -> None:
        """The range, two scalars."""
        self.low = low
        self.high = high

    def round(self, x: Tensor) -> Tensor:
        """The nearest values on the grid; no gradient where the range cuts off."""
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        scale = (high - low).clamp(min=torch.finfo(torch.float32).tiny) / LEVELS
        zero_point = (-low / scale).round().clamp(0, LEVELS).to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, LEVELS)

    def widen(self, x: Tensor) -> None:
        """Let the range hold all of x."""
        self.low, self.high = torch.minimum(self.low, x.amin()), torch.maximum(self.high, x.amax())

    def follow(self, x: Tensor) -> None:
        """Move the range a small step towards that of x."""
        self.low = self.low.lerp(x.amin(), RANGE_MOMENTUM)
        self.high = self.high.lerp(x.amax(), RANGE_MOMENTUM)


class Ranges(Enum):
    """What a forward pass does with the ranges of activations."""

    HOLD = auto()
    FOLLOW = auto()
    CALIBRATE = auto()
    """They become the widest seen, and nothing is rounded, weights neither: as the exporter calibrates."""


class Simulation:
    """The number formats of a policy on one model, until `remove` takes them off."""

    grids: dict[str, ActivationGrid]
    """By layer.  A second call in the same forward pass is `name#2`: in the file it reads another tensor."""

    def __init__(self, model: nn.Module, precisions: Mapping[str, Precision], *, largest: int) -> None:
        """`largest` bounds int8 codes, as in the file.  Layers that the model no longer has are passed over."""
        self.grids = {}
        self._model = model
        self._ranges = Ranges.HOLD
        self._weights: dict[nn.Module, StoredWeight] = {}
        self._calls: Counter[str] = Counter()
        self._hooks: list[RemovableHandle] = [model.register_forward_pre_hook(lambda *_: self._calls.clear())]
        modules = dict(model.named_modules())
        for name, precision in precisions.items():
            layer = modules.get(name)
            if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
                continue
            if precision.storage.format != "fp32":
                axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
                self._weights[layer] = StoredWeight(precision.storage, axis=axis, largest=largest)
                parametrize.register_parametrization(layer, "weight", self._weights[layer], unsafe=True)
            if precision.compute is Compute.INT8:
                self._hooks.append(layer.register_forward_pre_hook(self._on_input(name), with_kwargs=True))

    def train(self, mode: bool) -> None:
        """Let the ranges follow the batches, or hold them."""
        self._ranges = Ranges.FOLLOW if mode else Ranges.HOLD

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Set each range to the extremes that the float model shows on these inputs, anew; leaves eval mode."""
        self._model.eval()
        self.grids.clear()
        self._ranges = Ranges.CALIBRATE
        for weight in self._weights.values():
            weight.passing = True
        try:
            for inputs in batches:
                forward(self._model, inputs)
        finally:
            self._ranges = Ranges.HOLD
            for weight in self._weights.values():
                weight.passing = False

    def state_dict(self) -> dict[str, Tensor]:
        """The ranges, for a checkpoint; weights are the model's."""
        return {f"{name}.{end}": getattr(grid, end) for name, grid in self.grids.items() for end in ("low", "high")}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        names = {key.rpartition(".")[0] for key in state}
        self.grids = {name: ActivationGrid(state[f"{name}.low"], state[f"{name}.high"]) for name in names}

    def remove(self) -> None:
        """Take the formats off; the weights are the float ones that were trained."""
        for layer in self._weights:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        for hook in self._hooks:
            hook.remove()
        self._weights, self._hooks = {}, []

    def _on_input(self, name: str) -> Callable[..., Any]:
        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            self._calls[name] += 1
            grid = name if self._calls[name] == 1 else f"{name}#{self._calls[name]}"
            if args:
                return (self._rounded(grid, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "input": self._rounded(grid, kwargs["input"])}  # its name in every layer of torch

        return on_input

    def _rounded(self, name: str, x: Tensor) -> Tensor:
        """x as a layer reads it.  Raises ValueError if its range is to be held and was never seen."""
        seen = x.detach()
        if name not in self.grids:
            if self._ranges is Ranges.HOLD:
                raise ValueError(f"the input of {name} has no range: calibrate first")
            self.grids[name] = ActivationGrid(seen.amin(), seen.amax())
        grid = self.grids[name]
        if self._ranges is Ranges.CALIBRATE:
            grid.widen(seen)
            return x
        if self._ranges is Ranges.FOLLOW:
            grid.follow(seen)
        return grid.round(x)


@contextmanager
def simulated(model: nn.Module, precisions: Mapping[str, Precision], *, largest: int) -> Iterator[Simulation]:
    """A `Simulation` that is taken off at the end, whatever happens."""
    simulation = Simulation(model, precisions, largest=largest)
    try:
        yield simulation
    finally:
        simulation.remove()
