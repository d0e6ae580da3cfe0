"""Weights put on their grids with as little change of the outputs as a few hundred examples can tell: no training.

Four steps, each of which can be left out.  Channels are scaled so that layers have even ranges (`equalise`), and
between a norm and what reads it (`smooth`); the error of each weight that is rounded is made up for by those that are
not yet (GPTQ, arXiv 2210.17323); what is left of it in the mean of the outputs goes into the biases (Data-Free
Quantization, arXiv 1906.04721).
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hirelc_deploy.compress.equalise import Kept, equalise
from hirelc_deploy.compress.grids import fitted, put_on
from hirelc_deploy.compress.inputs import MOST_PLACES, SEED, Batches, can_unfold, columns_at, energies, watch
from hirelc_deploy.compress.smooth import Propose, smooth
from hirelc_deploy.copying import copied
from hirelc_deploy.graph import PROOF_EXAMPLES, forward
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.kernels import load_format
from hirelc_deploy.kernels._base import Format, Grid, largest_integer
from hirelc_deploy.policy import Precision, Storage

DAMPING = 0.01
"""Of the mean energy of a layer's inputs, added to each: directions that the examples show nothing of stay put."""

MOST_COLUMNS = 8192
"""Of a layer whose errors are fed back: a matrix of their square is 512 MB in float64."""

BLOCK_COLUMNS = 64
"""Columns whose errors reach the rest in one product."""


Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[[], Any]]]
"""`progress(what, steps)` gives a context manager that yields what is called after each step."""


@contextlib.contextmanager
def _unseen(what: str, steps: int) -> Iterator[Callable[[], None]]:
    yield lambda: None


@dataclass(frozen=True)
class PostTraining:
    """The steps that are taken; without any, weights are rounded to nearest."""

    statistics: bool = True
    """BatchNorm's, estimated again where channels are gone: before norms are folded, and so not in `post_train`."""
    equalise: bool = True
    smooth: bool = True
    feed_back: bool = True
    correct_biases: bool = True
    propose: Propose | None = None
    """What else to try in `smooth`."""

    @classmethod
    def of(cls, names: Iterable[str], propose: Propose | None = None) -> "PostTraining":
        """The steps with these names, as POST_TRAINING_STEPS of the settings has them."""
        chosen = set(names)
        return cls(
            statistics="statistics" in chosen,
            equalise="equalise" in chosen,
            smooth="smooth" in chosen,
            feed_back="feed-back" in chosen,
            correct_biases="biases" in chosen,
            propose=propose,
        )


@dataclass(frozen=True)
class Corrected:
    """What was done to a model."""

    grids: dict[str, Grid]
    """By layer."""
    smoothed: dict[str, str]
    """By norm, what the factors were made by that `smooth` took."""


def post_train(
    model: nn.Module,
    precisions: Mapping[str, Precision],
    steps: PostTraining,
    batches: Batches,
    *,
    largest: int,
    is_symmetric: bool = False,
    graph: ModelGraph,
    kept: Kept | None = None,
    progress: Progress = _unseen,
) -> Corrected:
    """Put the weights of a model that has its norms folded on grids that are fitted to it, in place.

    `is_symmetric` says whether the runtime has activations around nought; `graph` and `kept` say which channels belong
    together, as `equalise` takes them; feeding back errors is what takes
    long, and so what `progress` is told of.
    """
    if all(precision.storage.is_float for precision in precisions.values()):
        return Corrected({}, {})
    smoothed = {}
    if steps.equalise:
        example = {name: tensor[:PROOF_EXAMPLES] for name, tensor in next(iter(batches())).items()}
        equalise(model, graph, example, kept=kept)
    if steps.smooth:
        smoothed = smooth(model, precisions, batches, largest=largest, is_symmetric=is_symmetric, propose=steps.propose)
    original = copied(model)
    grids = fitted(model, precisions, energies(model, precisions, batches()), largest=largest)
    if steps.feed_back:
        feed_back_errors(model, precisions, grids, batches, largest=largest, progress=progress)
    else:
        put_on(model, precisions, grids, largest=largest)
    if steps.correct_biases:
        correct_biases(model, original, grids, batches)
    return Corrected(grids, smoothed)


@torch.no_grad()
def feed_back_errors(
    model: nn.Module,
    precisions: Mapping[str, Precision],
    grids: Mapping[str, Grid],
    batches: Batches,
    *,
    largest: int,
    progress: Progress = _unseen,
) -> None:
    """Put the weights of a model that has its norms folded on these grids, layer by layer in the order of calls.

    A layer's weight and bias are chosen for what it reads behind the layers that are on their grids already, and for
    what it wrote in the original.  Layers that are neither Conv1d, Conv2d nor Linear, that share a weight, are never
    called or have very many columns are rounded to nearest.
    """
    original = copied(model)
    calls = _calls(model, grids, batches)
    put_on(model, precisions, {name: grid for name, grid in grids.items() if name not in calls}, largest=largest)
    with progress("correcting weights", len(calls)) as advance:
        for name, times in calls.items():
            precision = precisions[name]
            own, cross = _moments(model, original, name, times, batches)
            put = _OnGrid(
                load_format(precision.storage.format),
                precision.storage,
                grids[name],
                largest_integer(precision.compute, largest),
            )
            _feed_back(model.get_submodule(name), own, cross, put)
            advance()


@torch.no_grad()
def correct_biases(model: nn.Module, original: nn.Module, layers: Iterable[str], batches: Batches) -> None:
    """Give each of these layers the mean output, channel by channel, that it has in the original.

    In one pass of the compressed network over all examples at once: a layer is corrected as soon as it has been called,
    so that those behind it read what it will write.  Layers without a bias, or called more than once, are left.
    """
    modules = dict(model.named_modules())
    able = [name for name in layers if getattr(modules.get(name), "bias", None) is not None]
    calls: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    sums: dict[str, Tensor] = {}
    held: list[Mapping[str, Tensor]] = []

    def add(name: str, layer: nn.Module, output: Tensor) -> None:
        calls[name] += 1
        counts[name] += output.numel()
        sums[name] = sums.get(name, torch.zeros(())) + output.numel() * _means(layer, output)

    def correct(name: str, layer: nn.Module, output: Tensor) -> Tensor:
        off = (sums[name] / counts[name] - _means(layer, output)).to(output.dtype)
        layer.get_parameter("bias").add_(off)
        return output + (off if isinstance(layer, nn.Linear) else off.reshape(-1, *[1] * (output.dim() - 2)))

    with _after(original, able, add):
        for inputs in batches():
            held.append(inputs)
            forward(original.eval(), inputs)
    once = [name for name in able if calls[name] == len(held)]
    with _after(model, once, correct):
        forward(model.eval(), {name: torch.cat([inputs[name] for inputs in held]) for name in held[0]})


# -- error feedback ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OnGrid:
    """Puts columns of one weight on its grid."""

    format: Format
    storage: Storage
    grid: Grid
    largest: int

    def __call__(self, rows: Tensor, part: slice) -> Tensor:
        """`rows` are the columns `part` of the matrix."""
        return self.format.quantise(rows, self.format.part(self.grid, part), self.storage, largest=self.largest)


class _EnoughError(Exception):
    """Ends a forward pass whose rest is of no interest."""


def _calls(model: nn.Module, layers: Iterable[str], batches: Batches) -> dict[str, int]:
    """How often a forward pass calls those layers whose errors can be fed back, in the order of their first calls."""
    calls: Counter[str] = Counter()
    unfit: set[str] = set()

    def read(name: str, layer: nn.Module, x: Tensor) -> None:
        calls[name] += 1
        if not can_unfold(layer) or layer.get_parameter("weight").flatten(1).shape[1] > MOST_COLUMNS:
            unfit.add(name)

    watch(model, layers, [next(iter(batches()))], read)
    modules = dict(model.named_modules())
    holders = Counter(id(getattr(module, "weight", None)) for module in modules.values())
    return {
        name: times
        for name, times in calls.items()
        if name not in unfit and holders[id(modules[name].get_parameter("weight"))] == 1
    }


def _moments(model: nn.Module, original: nn.Module, name: str, times: int, batches: Batches) -> tuple[Tensor, Tensor]:
    """Sums over places of x x^T for a layer's inputs x, and of y x^T for the original's inputs y there.

    Each is (groups, columns, columns) in float64.  A bias is one more weight, the last one, whose input is 1.
    """
    layer = model.get_submodule(name)
    own = cross = torch.zeros(())
    for inputs in batches():
        pairs = zip(*(_inputs(network, name, times, inputs) for network in (model, original)), strict=True)
        for pair in pairs:
            x, y = (
                columns_at(layer, each, MOST_PLACES * len(each), torch.Generator().manual_seed(SEED)) for each in pair
            )
            if layer.bias is not None:
                x, y = F.pad(x, (0, 1), value=1.0), F.pad(y, (0, 1), value=1.0)
            own = own + (x.mT @ x).double()
            cross = cross + (y.mT @ x).double()
    return own, cross


def _inputs(model: nn.Module, name: str, times: int, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """What a layer is called with, so many times; nothing behind the last call is run."""
    seen: list[Tensor] = []

    def read(_name: str, _layer: nn.Module, x: Tensor) -> None:
        seen.append(x)
        if len(seen) == times:
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        watch(model, [name], [inputs], read)
    return seen


def _feed_back(layer: nn.Module, own: Tensor, cross: Tensor, put: _OnGrid) -> None:
    """Put a layer's weight on its grid and choose its bias, given the moments of its inputs."""
    weight = layer.get_parameter("weight")
    bias = None if layer.bias is None else layer.get_parameter("bias")
    rows = weight.flatten(1)
    wide = rows.shape[1]
    units = _units(own, wide, put)
    # columns as they are worked on, the bias behind them
    order = torch.cat([torch.arange(own.shape[1])[unit] for unit in (*units, slice(wide, None))])
    own, cross = (moments[:, order][:, :, order] for moments in (own, cross))
    upper, root = _roots(own, wide)

    now = rows if bias is None else torch.cat([rows, bias[:, None]], 1)
    now = now[:, order].unflatten(0, (len(own), -1))  # (groups, channels a group, columns)
    # least squares: what must multiply these inputs to give what the weights gave with the original's
    wanted = now + (now.double() @ (cross - own) @ root.mT @ root).to(now.dtype)
    fed = _fed_back(wanted, units, upper.to(now.dtype), root.to(now.dtype), put)
    nearest = now.clone()
    nearest[..., :wide] = put(rows, slice(0, wide))[:, order[:wide]].view_as(nearest[..., :wide])

    # channel by channel whichever gives outputs nearer to the original's: never worse than rounding to nearest
    errors = torch.stack([_squared_error(each - wanted, own) for each in (fed, nearest)])
    if len(units) == 1:  # a code may reach from one channel into the next: all or none
        errors = errors.sum((1, 2), keepdim=True).expand_as(errors)
    better = errors[0] < errors[1]
    best = torch.where(better[..., None], fed, nearest).flatten(0, 1)[:, order.argsort()]
    weight.copy_(put(best[:, :wide], slice(0, wide)).view_as(weight))
    if bias is not None:
        bias.copy_(best[:, wide])


def _units(own: Tensor, wide: int, put: _OnGrid) -> list[slice]:
    """Columns that one code decides, those with most energy first, while many are left to make up for them."""
    together = put.format.codes_together(wide, put.storage)
    units = [slice(start, min(start + together, wide)) for start in range(0, wide, together)]
    energy = own.diagonal(dim1=1, dim2=2).sum(0)
    return sorted(units, key=lambda unit: float(energy[unit].sum()), reverse=True)


def _roots(own: Tensor, wide: int) -> tuple[Tensor, Tensor]:
    """R and its inverse U, both upper triangular, where R R^T are the moments, damped; so U^T U is their inverse."""
    energy = own.diagonal(dim1=1, dim2=2)[:, :wide].mean(1)
    damping = (DAMPING * energy).clamp(min=torch.finfo(torch.float32).tiny)
    unit = torch.eye(own.shape[1], dtype=own.dtype)
    # Cholesky's factor of the matrix turned by 180 degrees, turned back
    upper = torch.linalg.cholesky((own + damping[:, None, None] * unit).flip(1, 2)).flip(1, 2)
    return upper, torch.linalg.solve_triangular(upper, unit.expand_as(upper), upper=True)


def _fed_back(
    wanted: Tensor, units: Sequence[slice], upper: Tensor, root: Tensor, put: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """The weights on the grid, column by column: each takes its error out of those behind it.

    All are (groups, …, columns) in the order of `units`; a bias behind the columns takes what is left.
    """
    weights = wanted.clone()
    begin = 0
    for block in _blocks(units):
        end = begin + sum(_width(unit) for unit in block)
        errors = torch.zeros_like(weights[..., begin:end])
        at = begin
        for unit in block:
            here, behind = slice(at, at + _width(unit)), slice(at + _width(unit), end)
            on_grid = put(weights[..., here].flatten(0, 1), unit).view_as(weights[..., here])
            # in units of the root: the inverse of its part of these columns is that part of `upper`
            error = (weights[..., here] - on_grid) @ upper[:, here, here]
            weights[..., here] = on_grid
            weights[..., behind] -= error @ root[:, here, behind]
            errors[..., here.start - begin : here.stop - begin] = error
            at = here.stop
        weights[..., end:] -= errors @ root[:, begin:end, end:]
        begin = end
    return weights


def _blocks(units: Sequence[slice]) -> Iterator[list[slice]]:
    """The units in order, in lists of BLOCK_COLUMNS columns or a few more."""
    block: list[slice] = []
    for unit in units:
        block.append(unit)
        if sum(map(_width, block)) >= BLOCK_COLUMNS:
            yield block
            block = []
    if block:
        yield block


def _width(unit: slice) -> int:
    return int(unit.stop - unit.start)


def _squared_error(off: Tensor, own: Tensor) -> Tensor:
    """Of the outputs, summed over places, for weights that are `off`: (groups, channels)."""
    wide = off.double()
    return ((wide @ own) * wide).sum(2)


# -- biases --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _after(
    model: nn.Module, layers: Iterable[str], act: Callable[[str, nn.Module, Tensor], Tensor | None]
) -> Iterator[None]:
    """While this lasts, `act` is called with what these layers write, and may write something else instead."""

    def hook_for(name: str) -> Callable[..., Any]:
        return lambda layer, _args, output: act(name, layer, output)

    hooks = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _means(layer: nn.Module, output: Tensor) -> Tensor:
    """By channel, over examples and places, in float64."""
    return output.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1).double().mean(1)
