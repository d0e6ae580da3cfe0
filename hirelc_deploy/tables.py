"""Fills the table of a target: which kernels a network needs there, measured once and kept."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from hirelc_deploy import checkpoint, console, datasets, graph, plots
from hirelc_deploy.choices import search_space
from hirelc_deploy.compress.distil import as_tensors
from hirelc_deploy.compress.fold import fold, foldable
from hirelc_deploy.config import HOST_PYTHON, require_at_least
from hirelc_deploy.cost.kernel import Kernel
from hirelc_deploy.cost.needs import Family, families
from hirelc_deploy.cost.network import Network
from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters import load_runtime
from hirelc_deploy.exporters._base import Arrays
from hirelc_deploy.graph.attention import with_plain_attention
from hirelc_deploy.profiles import Target, load_target
from hirelc_deploy.profiles._table import SHARED, read_table
from hirelc_deploy.rundir import disk_errors
from hirelc_deploy.verify import profiling, remote
from hirelc_deploy.verify.machines import Here, Machine, check_flags, check_version

SHAPES_COLUMNS = ("op", "attributes", "operands", "compute")


@dataclass(frozen=True)
class ProfileSettings:
    """What `profile` may be told."""

    target: str
    model: str | None = None
    """What builds the network whose kernels are measured; its weights do not matter."""
    data: str | None = None
    """A task's data, of which the network's inputs are read."""
    input: str | None = None
    """The shape of one example instead: 3x224x224."""
    shapes: Path | None = None
    """A CSV of kernels instead of a network."""
    table: Path | None = None
    """Where to write; None for the target's own place."""
    host: str | None = None
    """A device that `ssh` reaches, instead of this machine."""
    host_python: str = HOST_PYTHON
    """The device's Python that has the runtime."""
    threads: int = 1
    batch: int = 1
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shapes is None):
            raise UserError(
                "what is to be measured is not said" if self.model is None else "both --model and --shapes are given",
                fix="give --model for all that a network's policies need, or --shapes for a list of kernels",
            )
        if self.model is not None and (self.data is None) == (self.input is None):
            raise UserError(
                f"what {self.model} reads is {'not said' if self.data is None else 'said twice'}",
                fix="give --input 3x224x224 (one example) or --data, as for export",
            )
        for name in ("threads", "batch"):
            require_at_least(1, name, getattr(self, name))


@dataclass(frozen=True)
class Profiled:
    """What a profile came to."""

    table: Path
    families: int
    kernels: int
    """Rows that the table has for them."""
    shared: int
    """Of those, measured beside something else on the core."""
    without: dict[str, str]
    """Families that the runtime has no kernel for, with the reason."""

    def __str__(self) -> str:
        """For people."""
        lines = [f"{self.kernels} kernels, {self.families} kinds of them needed here: {self.table}"]
        lines += [f"no kernel, told from others: {reason}" for reason in self.without.values()]
        if self.shared:
            lines.append(
                f"{self.shared} kernels were measured beside something else on the core, and may seem slower by a half "
                "or more: `hirelc-deploy profile` measures those again"
            )
        return "\n".join(lines)


def profile(settings: ProfileSettings) -> Profiled:
    """Measure the kernels that a network, or a list, needs on a target, and write them to its table.

    What the table has is not measured again, unless something else was on the core; a run that was stopped goes on.
    """
    target = load_target(settings.target)
    wanted = _listed(settings.shapes) if settings.shapes is not None else families(_network(settings, target))
    with _machine(settings, target) as machine:
        tables = profiling.tables_at(settings.target, target, machine.where)
        if settings.table is not None:
            tables = replace(tables, own=settings.table)
        with console.progress("measuring kernels", len(wanted)) as advance:
            without = profiling.profile(wanted, tables, machine, seconds=settings.seconds, advance=advance, anew=True)
    kept = {row.key: row for row in read_table(tables.own)}.values()
    shared = sum(row.core == SHARED for row in kept)
    return Profiled(tables.own, len(wanted), len(kept), shared, without)


@contextmanager
def _machine(settings: ProfileSettings, target: Target) -> Iterator[Machine]:
    """What is measured on.  Raises UserError if it is not the target, or its runtime is older than the target's."""
    runtime = load_runtime(target.runtime.name)
    if settings.host is None:
        here = Here(runtime, threads=settings.threads)
        check_flags(target, here.where.flags, "this machine", "give --host user@device")
        yield here
        return
    with remote.connected(settings.host, runtime, threads=settings.threads, python=settings.host_python) as device:
        check_version(target, device.version, settings.host)
        fix = "name the device, or a target of your own for this one"
        check_flags(target, device.where.flags, settings.host, fix)
        yield device


def plot(target: str, path: Path) -> None:
    """Draw latency over channels from a target's table.  Raises UserError where it has too little for that."""
    described = load_target(target)
    here = Here(load_runtime(described.runtime.name), threads=1).where
    plots.draw(target, plots.lines(profiling.tables_at(target, described, here).rows()), path)


def _network(settings: ProfileSettings, target: Target) -> Network:
    """All that policies of the model can make a runtime run."""
    assert settings.model is not None
    # its weights do not matter
    model = checkpoint.of(checkpoint.build(settings.model, with_weights=False), settings.model).model
    if settings.data is not None:
        example = datasets.load_task(settings.data).example
    else:
        example = {"input": np.zeros((2, *_shape(settings.input or "")), np.float32)}
    return network_of(with_plain_attention(model, example), example, target, batch=settings.batch)


def network_of(model: nn.Module, example: Arrays, target: Target, *, batch: int) -> Network:
    """All that policies of a model in eval mode can make the target's runtime run; its norms are folded in place."""
    traced = graph.trace(model, example)
    space = search_space(traced, target)
    runtime = load_runtime(target.runtime.name)
    folded = fold(model, foldable(model, as_tensors(example))).eval()
    floats = runtime.float_graph(folded, example, opset=target.runtime.opset)
    return runtime.network(floats, traced, space.computes, space.groups, batch=batch)


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise UserError(f"the input's shape is {text!r}", fix="write the sizes of one example: 3x224x224")
    return tuple(map(int, sizes))


def _listed(path: Path) -> list[Family]:
    """The kernels of a file, one a line.  Raises UserError for a line that is no kernel, by its number."""
    if not path.exists():
        raise UserError(f"there is no file {path}", fix=f"--shapes takes a CSV with {','.join(SHAPES_COLUMNS)}")
    with disk_errors(path), path.open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file)
        if not set(SHAPES_COLUMNS) <= set(lines.fieldnames or ()):
            raise UserError(
                f"{path.name}, line 1: the columns are {', '.join(lines.fieldnames or ()) or 'none'}",
                fix=f"it begins with {','.join(SHAPES_COLUMNS)}; a table of another target will do",
            )
        return [_family(path, number, line) for number, line in enumerate(lines, start=2)]


def _family(path: Path, number: int, line: dict[str, str]) -> Family:
    try:
        kernel = Kernel.parse(*(line[name] or "" for name in SHAPES_COLUMNS))
        if not kernel.operands or any(0 in operand.shape for operand in kernel.operands):
            raise ValueError("a kernel reads something, and no size is 0")
    except ValueError as error:
        raise UserError(f"{path.name}, line {number}: {error}", fix="mend or delete the line") from error
    inputs, outputs = kernel.channels
    return Family(kernel, (inputs,), (outputs,))
