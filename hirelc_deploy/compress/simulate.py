"""The arithmetic of the file while PyTorch trains: weights on the grid that is stored, activations on theirs.

A `Simulation` is put on a model and taken off again; what stays is the float weights that were trained under
it.  Rounding passes gradients straight through (Bengio et al., 2013).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from hirelc_deploy.compress.fold import Pairs, along_channels, channel_factor
from hirelc_deploy.compress.grids import integer_bounds, output_axis
from hirelc_deploy.graph import forward
from hirelc_deploy.kernels import fp8, load_format
from hirelc_deploy.kernels._base import Grid, floored, from_rows, rows_of
from hirelc_deploy.layout import laid_like
from hirelc_deploy.policy import CALIBRATED, Compute, Precision, Storage

LEVELS = 255  # steps of a uint8 grid
SIGNED_STEPS = 127  # of a symmetric int8 grid, on either side of zero
RANGE_MOMENTUM = 0.05  # of a range's running mean while training: it follows weights that move by small steps


class StoredWeight(nn.Module):
    """A weight as the file will hold it, or the float one while `passing`.

    The grid is that of the weight with its BatchNorm folded in, since that is what is stored.  What training may
    move of it are parameters of this module: scales as ratios to the fitted ones, so that one rate of learning
    suits all of them (learned step sizes: LSQ, arXiv 1902.08153).
    """

    def __init__(
        self, storage: Storage, grid: Grid, *, axis: int, largest: int, factor: Callable[[], Tensor] | None = None
    ) -> None:
        """`factor` gives what folding multiplies the weight by, in a shape that does so."""
        super().__init__()
        self.storage = storage
        self.axis = axis
        self.largest = largest
        self.passing = False
        self.format = load_format(storage.format)
        self._factor = factor
        self._roles = tuple(grid)
        for role, values in grid.items():
            self.register_buffer(role, values.detach().clone())
            if role in self.format.trained:
                start = torch.ones_like(values) if role == "scale" else values.detach().clone()
                self.register_parameter(f"trained_{role}", nn.Parameter(start))

    def grid(self) -> dict[str, Tensor]:
        """As it stands now; gradients reach what is trained."""
        grid = {role: self.get_parameter(f"trained_{role}") for role in self._roles if role in self.format.trained}
        fixed = {role: self.get_buffer(role) for role in self._roles if role not in grid}
        return {**fixed, **grid, "scale": floored(self.get_buffer("scale") * grid["scale"])}

    def forward(self, weight: Tensor) -> Tensor:
        if self.passing:
            return weight
        if self._factor is None:
            return self._rounded(weight)
        factor = self._factor()
        return self._rounded(weight * factor) / torch.where(factor == 0, 1.0, factor)

    def _rounded(self, weight: Tensor) -> Tensor:
        rows = rows_of(weight, self.axis)
        on_grid = self.format.quantise(rows, self.grid(), self.storage, largest=self.largest)
        return laid_like(from_rows(on_grid, tuple(weight.shape), self.axis), weight)


class _Rounding(torch.autograd.Function):
    """The nearest multiple of a step between two of them; gradients pass where the bounds do not cut off.

    The numbers of `torch.fake_quantize_per_tensor_affine` in a quarter of its time: on a CPU that goes entry by entry.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, least: float, most: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = ((least - 0.5) * step).item(), ((most + 0.5) * step).item()  # what is rounded to a bound
        return (x * (1 / step)).round_().clamp_(least, most).mul_(step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, x, *ctx.bounds), None, None, None


class ActivationGrid:
    """The uint8 grid of one tensor: it spans the tensor's range, zero included; or one of int8 about zero."""

    def __init__(self, low: Tensor, high: Tensor, *, is_symmetric: bool = False) -> None:
        """The range, two scalars."""
        self.low = low
        self.high = high
        self.is_symmetric = is_symmetric

    def round(self, x: Tensor) -> Tensor:
        """The nearest values on the grid; no gradient where the range cuts off."""
        tiny = torch.finfo(torch.float32).tiny  # its inverse is finite
        if self.is_symmetric:
            step = (torch.maximum(-self.low, self.high) / SIGNED_STEPS).clamp(min=tiny)
            return _Rounding.apply(x, step, -SIGNED_STEPS - 1, SIGNED_STEPS)
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        step = ((high - low) / LEVELS).clamp(min=tiny)
        zero_point = (-low / step).round().clamp(0, LEVELS).item()
        return _Rounding.apply(x, step, -zero_point, LEVELS - zero_point)

    def widen(self, x: Tensor) -> None:
        """Let the range hold all of x."""
        self.low, self.high = torch.minimum(self.low, x.amin()), torch.maximum(self.high, x.amax())

    def follow(self, x: Tensor) -> None:
        """Move the range a small step towards that of x."""
        self.low = self.low.lerp(x.amin(), RANGE_MOMENTUM)
        self.high = self.high.lerp(x.amax(), RANGE_MOMENTUM)


class Fp8Grid(ActivationGrid):
    """The numbers of FP8 whose largest is the tensor's."""

    def round(self, x: Tensor) -> Tensor:
        step = torch.maximum(-self.low, self.high).clamp(min=torch.finfo(torch.float32).tiny) / fp8.LARGEST
        return fp8.rounded(x / step) * step


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

    def __init__(
        self,
        model: nn.Module,
        precisions: Mapping[str, Precision],
        grids: Mapping[str, Grid],
        *,
        largest: int,
        norms: Pairs | None = None,
        is_symmetric: bool = False,
    ) -> None:
        """`largest` bounds the integers of int8 layers, as in the file; `norms` are the BatchNorms to be folded;
        `is_symmetric` says that integer grids of activations are int8 about zero, and not uint8.

        A layer without a grid keeps its weight: it is on its grid already, or is not to be rounded.  Layers that the
        model no longer has are passed over.
        """
        self.grids = {}
        self._kinds: dict[str, Callable[[Tensor, Tensor], ActivationGrid]] = {}
        self._of_integers = partial(ActivationGrid, is_symmetric=is_symmetric)
        self._model = model
        self._ranges = Ranges.HOLD
        self._weights: dict[nn.Module, StoredWeight] = {}
        self._names: dict[nn.Module, str] = {}
        self._calls: Counter[str] = Counter()
        self._hooks: list[RemovableHandle] = [model.register_forward_pre_hook(lambda *_: self._calls.clear())]
        modules = dict(model.named_modules())
        stored: dict[int, StoredWeight] = {}
        common: dict[tuple[Storage, int, str], nn.Parameter] = {}
        held = {name: precision for name, precision in precisions.items() if name in grids and name in modules}
        bounds = integer_bounds(modules, held, largest=largest)
        for name, precision in precisions.items():
            layer = modules.get(name)
            if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
                continue
            if name in grids:
                norm = modules[norms[name]] if norms and name in norms else None
                factor = None if norm is None else partial(_folding, norm, layer)
                key = id(layer.weight)
                if key not in stored:  # layers that share a weight share what it is stored as
                    stored[key] = StoredWeight(
                        precision.storage,
                        grids[name],
                        axis=output_axis(layer),
                        largest=bounds[name],
                        factor=factor,
                    )
                    for role in stored[key].format.shared:  # trained for all layers at once
                        of_all = (precision.storage, stored[key].largest, f"trained_{role}")
                        common.setdefault(of_all, stored[key].get_parameter(of_all[-1]))
                        stored[key].register_parameter(of_all[-1], common[of_all])
                self._weights[layer] = stored[key]
                self._names[layer] = name
                parametrize.register_parametrization(layer, "weight", stored[key], unsafe=True)
            rounded = {
                **dict.fromkeys(CALIBRATED, self._rounding(name)),
                Compute.INT8_DYNAMIC: self._by_itself,
            }.get(precision.compute)
            if rounded is not None:
                self._kinds[name] = Fp8Grid if precision.compute is Compute.FP8 else self._of_integers
                self._hooks.append(layer.register_forward_pre_hook(_on_input(rounded), with_kwargs=True))

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

    def weight_grids(self) -> dict[str, Grid]:
        """By layer, as training has left them."""
        return {
            self._names[layer]: {role: values.detach().clone() for role, values in weight.grid().items()}
            for layer, weight in self._weights.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The ranges, for a checkpoint; weights are the model's."""
        return {f"{name}.{end}": getattr(grid, end) for name, grid in self.grids.items() for end in ("low", "high")}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        names = {key.rpartition(".")[0] for key in state}
        self.grids = {name: self._grid(name, state[f"{name}.low"], state[f"{name}.high"]) for name in names}

    def remove(self) -> None:
        """Take the formats off; the weights are the float ones that were trained."""
        for layer in self._weights:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        for hook in self._hooks:
            hook.remove()
        self._weights, self._hooks = {}, []

    def _by_itself(self, x: Tensor) -> Tensor:
        """x on the grid that it spans itself, as a kernel rounds it that quantises at every run."""
        if self._ranges is Ranges.CALIBRATE:
            return x
        seen = x.detach()
        return ActivationGrid(seen.amin(), seen.amax()).round(x)

    def _grid(self, name: str, low: Tensor, high: Tensor) -> ActivationGrid:
        return self._kinds[name.partition("#")[0]](low, high)

    def _rounding(self, name: str) -> Callable[[Tensor], Tensor]:
        def rounded(x: Tensor) -> Tensor:
            self._calls[name] += 1
            return self._rounded(name if self._calls[name] == 1 else f"{name}#{self._calls[name]}", x)

        return rounded

    def _rounded(self, name: str, x: Tensor) -> Tensor:
        """x as a layer reads it.  Raises ValueError if its range is to be held and was never seen."""
        seen = x.detach()
        if name not in self.grids:
            if self._ranges is Ranges.HOLD:
                raise ValueError(f"the input of {name} has no range: calibrate first")
            self.grids[name] = self._grid(name, seen.amin(), seen.amax())
        grid = self.grids[name]
        if self._ranges is Ranges.CALIBRATE:
            grid.widen(seen)
            return x
        if self._ranges is Ranges.FOLLOW:
            grid.follow(seen)
        return grid.round(x)


def _on_input(rounded: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A hook that rounds what a layer is called with."""

    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (rounded(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": rounded(kwargs["input"])}  # its name in every layer of torch

    return on_input


def _folding(norm: nn.Module, layer: nn.Module) -> Tensor:
    return along_channels(channel_factor(norm), layer)


def put_on_unfolded(
    model: nn.Module, precisions: Mapping[str, Precision], grids: Mapping[str, Grid], *, largest: int, norms: Pairs
) -> None:
    """Replace each weight by the value on its grid, of a model whose norms are not folded yet.

    Once they are, the weight is what is stored.
    """
    modules = dict(model.named_modules())
    with simulated(model, precisions, grids, largest=largest, norms=norms), torch.no_grad():
        on_grid = {name: modules[name].weight.detach().clone() for name in grids if name in modules}
    with torch.no_grad():
        for name, weight in on_grid.items():
            modules[name].get_parameter("weight").copy_(weight)


@contextmanager
def simulated(
    model: nn.Module,
    precisions: Mapping[str, Precision],
    grids: Mapping[str, Grid],
    *,
    largest: int,
    norms: Pairs | None = None,
    is_symmetric: bool = False,
) -> Iterator[Simulation]:
    """A `Simulation` that is taken off at the end, whatever happens."""
    simulation = Simulation(model, precisions, grids, largest=largest, norms=norms, is_symmetric=is_symmetric)
    try:
        yield simulation
    finally:
        simulation.remove()
