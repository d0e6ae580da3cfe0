"""The arithmetic of the file while PyTorch trains: weights on the grid that is stored, activations on uint8.

A `Simulation` is put on a model and taken off again; what stays is the float weights that were trained under
it.  Rounding passes gradients straight through (Bengio et al., 2013).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

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
    """A weight as the file will hold it."""

    def __init__(self, storage: Storage, *, axis: int, largest: int) -> None:
        super().__init__()
        self.storage = storage
        self.axis = axis
        self.largest = largest
        self.format = load_format(storage.format)

    def forward(self, weight: Tensor) -> Tensor:
        return self.format.quantise(weight, self.storage, axis=self.axis, largest=self.largest)


class ActivationGrid(nn.Module):
    """A tensor on the uint8 grid that spans its range, zero included.

    In training mode the range is a running mean of each batch's extremes; in eval mode it is fixed.  While
    `recording` it is the widest seen and nothing is rounded: that is calibration, as the exporter does it.
    """

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(torch.inf))
        self.register_buffer("high", torch.tensor(-torch.inf))
        self.recording = False

    def forward(self, x: Tensor) -> Tensor:
        if self.recording or self.training:
            self._observe(x.detach())
        if self.recording:
            return x
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        scale = (high - low).clamp(min=torch.finfo(torch.float32).tiny) / LEVELS
        zero_point = (-low / scale).round().clamp(0, LEVELS).to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, LEVELS)

    def _observe(self, x: Tensor) -> None:
        low, high = x.amin(), x.amax()
        if self.recording or torch.isinf(self.low):
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        else:
            self.low.lerp_(low, RANGE_MOMENTUM)
            self.high.lerp_(high, RANGE_MOMENTUM)


class Simulation:
    """The number formats of a policy on one model, until `remove` takes them off."""

    def __init__(self, model: nn.Module, precisions: Mapping[str, Precision], *, largest: int) -> None:
        """`largest` bounds int8 codes, as in the file.  Layers that the model no longer has are passed over."""
        self._model = model
        self._weights: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []
        self.grids: dict[str, ActivationGrid] = {}
        modules = dict(model.named_modules())
        for name, precision in precisions.items():
            layer = modules.get(name)
            if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
                continue
            if precision.storage.format != "fp32":
                axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
                stored = StoredWeight(precision.storage, axis=axis, largest=largest)
                parametrize.register_parametrization(layer, "weight", stored, unsafe=True)
                self._weights.append(layer)
            if precision.compute is Compute.INT8:
                self.grids[name] = ActivationGrid()
                self._hooks.append(layer.register_forward_pre_hook(_on(self.grids[name])))

    def train(self, mode: bool) -> None:
        """Let the ranges follow the batches, or hold them."""
        for grid in self.grids.values():
            grid.train(mode)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Set each range to the extremes of these inputs, anew."""
        self._model.eval()
        for grid in self.grids.values():
            grid.low.fill_(torch.inf)
            grid.high.fill_(-torch.inf)
            grid.recording = True
        for inputs in batches:
            forward(self._model, inputs)
        for grid in self.grids.values():
            grid.recording = False
            grid.eval()

    def state_dict(self) -> dict[str, Tensor]:
        """The ranges, for a checkpoint; weights are the model's."""
        return {f"{name}.{key}": value for name, grid in self.grids.items() for key, value in grid.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, grid in self.grids.items():
            grid.load_state_dict({key: state[f"{name}.{key}"] for key in ("low", "high")})

    def remove(self) -> None:
        """Take the formats off; the weights are the float ones that were trained."""
        for layer in self._weights:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        for hook in self._hooks:
            hook.remove()
        self._weights, self._hooks = [], []


@contextmanager
def simulated(model: nn.Module, precisions: Mapping[str, Precision], *, largest: int) -> Iterator[Simulation]:
    """A `Simulation` that is taken off at the end, whatever happens."""
    simulation = Simulation(model, precisions, largest=largest)
    try:
        yield simulation
    finally:
        simulation.remove()


def _on(grid: ActivationGrid):  # type: ignore[no-untyped-def]  # the hook's own types are torch's
    def on_first_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (grid(inputs[0]), *inputs[1:])

    return on_first_input
