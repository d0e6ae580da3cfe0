"""Latency over channels, drawn from a target's table alone: where the cliffs are."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hirelc_deploy.cost.kernel import Kernel
from hirelc_deploy.cost.prices import kernel_of
from hirelc_deploy.errors import UserError
from hirelc_deploy.policy import Compute
from hirelc_deploy.profiles._table import Row

FEWEST_POINTS = 6
"""Of a line that shows anything."""

MOST_PANELS = 6

Line = list[tuple[int, float]]
"""Output channels and microseconds."""


def lines(rows: Iterable[Row]) -> dict[str, dict[Compute, Line]]:
    """Microseconds over output channels, by shape of layer and compute; input channels are those most often measured.

    The shapes with most points come first; those with fewer than `FEWEST_POINTS` in some compute are left out.
    """
    points: dict[str, dict[Compute, dict[int, Line]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        kernel = kernel_of(row)
        if kernel.weight is not None and kernel.op == "Conv":
            inputs, outputs = kernel.channels
            across = 0 if kernel.is_depthwise else inputs
            points[_shape(kernel)][kernel.compute][across].append((outputs, row.p50_us))
    found: dict[str, dict[Compute, Line]] = {}
    for shape, by_compute in points.items():
        longest = {compute: max(each.values(), key=len) for compute, each in by_compute.items()}
        if len(longest) > 1 and min(map(len, longest.values())) >= FEWEST_POINTS:
            found[shape] = {compute: sorted(line) for compute, line in sorted(longest.items())}
    return dict(sorted(found.items(), key=lambda each: -sum(map(len, each[1].values()))))


def _shape(kernel: Kernel) -> str:
    """Of a convolution without its channels: 3x3, stride 2, at 14x14."""
    assert kernel.weight is not None
    read = kernel.operands[0].shape
    stride = next((p.removeprefix("strides=") for p in kernel.attributes.split() if p.startswith("strides=")), "1")
    kind = "depthwise " if kernel.is_depthwise else ""
    size = "x".join(map(str, kernel.weight[2:]))
    return f"{kind}{size}, stride {stride.split(',')[0]}, at {'x'.join(map(str, read[2:]))}, batch {read[0]}"


def draw(target: str, found: Mapping[str, Mapping[Compute, Line]], path: Path) -> None:
    """Write an image, its kind by the suffix.  Raises UserError where there is nothing to draw, or no matplotlib."""
    if not found:
        raise UserError(
            f"the table of {target} has no convolution with {FEWEST_POINTS} channel counts",
            fix="measure a network first: hirelc-deploy profile --target … --model …",
        )
    shapes = list(found)[:MOST_PANELS]
    with panels(path, len(shapes), f"{target}: latency of convolutions") as drawn:
        for panel, shape in zip(drawn, shapes, strict=True):
            for compute, line in found[shape].items():
                panel.plot(*zip(*line, strict=True), marker=".", label=str(compute))
            panel.set(title=shape, xlabel="output channels", ylabel="p50, us")
            panel.legend()


def require() -> None:
    """Raises UserError where there is no matplotlib: to be asked before the hours whose end is a plot."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("matplotlib is not installed", fix="pip install 'hirelc-deploy[plots]'") from error


@contextmanager
def panels(path: Path, count: int, title: str, *, height: float = 3.2) -> Iterator[list[Any]]:
    """So many panels, two in a row, to be drawn in; the image is written at the end, its kind by the suffix.

    Raises UserError where there is no matplotlib, or no writer for the suffix.
    """
    require()
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = -(-count // 2)
    figure, grid = pyplot.subplots(rows, 2, figsize=(11, height * rows), squeeze=False, layout="constrained")
    try:
        yield list(grid.flat[:count])
        for panel in grid.flat[count:]:
            panel.axis("off")
        figure.suptitle(title)
        figure.savefig(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}", fix="name a file in a folder of yours"
        ) from error
    except ValueError as error:  # a suffix that it has no writer for
        raise UserError(f"{path.name} cannot be drawn: {error}", fix="name a .png, .svg or .pdf") from error
    finally:
        pyplot.close(figure)
