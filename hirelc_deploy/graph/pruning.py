"""What torch-pruning's dependency graph knows about a network, as plain data: the only file that imports it.

It is asked once and only to find which channels belong together.  Cutting is done by `slicing.py`, and nothing
found here is believed before `proof.py` has tried it.
"""

import math
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hirelc_deploy.graph.calling import Inputs, forward
from hirelc_deploy.graph.model_graph import LeftOut

LIMIT_S = 60.0
"""Of CPU time.  DenseNet-121 with its 120 groups takes 12 s; torchvision's Swin never ends."""

WAITS = 8
"""Times as long by the clock: what is offered must not depend on how busy the machine is."""

LIMIT_BYTES = 4 << 30
"""Beyond what the process held before: the Swin that never ends takes gigabytes on the way."""


@dataclass(frozen=True)
class Touch:
    """One module (or bare parameter) that a group of channels touches."""

    name: str
    """Dotted path of the module or the parameter."""
    role: Literal["out", "in"]
    entries: tuple[tuple[int, int], ...]
    """(channel of the root, entry of this module's axis)."""
    axis: int | None = None
    """Of a bare parameter; a module's axes follow from its type."""


class UntraceableError(Exception):
    """torch-pruning could not list the groups; the message says why."""


Found = tuple[list[tuple[Touch, ...]], list[LeftOut]]
"""Sets of channels, and layers whose set torch-pruning fails to find."""


def list_groups(model: nn.Module, inputs: Inputs, *, limit_s: float, limit_bytes: int) -> Found:
    """Every set of channels that can only be removed together; the first touch is the root, with all its channels.

    Raises UntraceableError with the first line of torch-pruning's own error, or when a limit is reached.

    Runs in a forked child, which can be ended at any moment and takes its memory with it; a signal would need
    the main thread, a thread cannot be stopped, and a spawned process could not unpickle a model whose class
    lives in a script.  The child runs one thread and no GPU work: what forking does not carry over is not used.
    """
    too_long = f"listing its groups takes longer than {limit_s:g} s"
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sender, model, inputs, limit_s, limit_bytes), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(limit_s * WAITS):
            raise UntraceableError(too_long)
        answer = receiver.recv()
    except EOFError as error:
        child.join()
        if child.exitcode == -signal.SIGXCPU:
            raise UntraceableError(too_long) from error
        raise UntraceableError(f"listing its groups ended with exit code {child.exitcode}") from error
    finally:
        child.kill()
        child.join()
        receiver.close()
    if isinstance(answer, str):
        raise UntraceableError(answer)
    found: Found = answer
    return found


def _answer(sender: Connection, model: nn.Module, inputs: Inputs, limit_s: float, limit_bytes: int) -> None:
    """In the child: send the groups, or in one line why there are none."""
    torch.set_num_threads(1)
    _limit_memory(limit_bytes)
    _limit_time(limit_s)
    try:
        answer: Found | str = _groups(model, inputs)
    except MemoryError:
        answer = f"listing its groups takes more than {limit_bytes >> 30} GiB of memory"
    except Exception as error:  # whatever it is, it crosses to the parent as the reason that the user reads
        answer = _unfollowed(error)
    sender.send(answer)


def _limit_memory(limit_bytes: int) -> None:
    """Bound this process where the system says how much it holds (Linux); elsewhere the time limit stands alone."""
    import resource

    usage = Path("/proc/self/statm")
    if usage.exists():
        held = int(usage.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + limit_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _limit_time(limit_s: float) -> None:
    """End this process by itself: its CPU time is its own, and nobody else ends it where its parent was killed."""
    import resource

    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seconds = math.ceil(limit_s)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def _unfollowed(error: Exception) -> str:
    return f"torch-pruning cannot follow it: {first_line(error)}"


def _groups(model: nn.Module, inputs: Inputs) -> Found:
    """One root after the other.

    As `DependencyGraph.get_all_groups` does, which ends where one of them fails, such as the Linear before a GRU.
    """
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(model, inputs, forward_fn=_differentiable, verbose=False)
    seen: set[nn.Module] = set()
    groups, failed = [], []
    for root in list(graph.module2node):
        if not isinstance(root, (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR, tp.ops.TORCH_EMBED)) or root in seen:
            continue
        pruner = graph.get_pruner_of_module(root)
        try:
            group = graph.get_pruning_group(root, pruner.prune_out_channels, list(range(pruner.get_out_channels(root))))
            groups.append(tuple(_touches(graph, group)))
        except MemoryError:  # the limit is that of all, and was reached
            raise
        except Exception as error:  # whatever it is, it is the reason that the user reads
            failed.append(LeftOut(graph._module2name[root], _unfollowed(error)))
            continue
        seen |= {item.dep.target.module for item in group if graph.is_out_channel_pruning_fn(item.dep.handler)}
    return groups, failed


def _differentiable(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    outputs = [output for output in forward(model, inputs).values() if output.grad_fn is not None]
    if not outputs:
        raise ValueError("no output depends on the weights in a way that can be differentiated")
    return outputs


def _touches(graph: Any, group: Any) -> Iterator[Touch]:
    for item in group:
        node, module = item.dep.target, item.dep.target.module
        role: Literal["out", "in"] = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        entries = tuple(zip(item.root_idxs, item.idxs, strict=True))
        if isinstance(module, nn.Parameter):
            yield Touch(graph._param_to_name[module], role, entries, node.pruning_dim)
        elif module in graph._module2name:  # all others stand for additions, reshapes and the like
            yield Touch(graph._module2name[module], role, entries)


def first_line(error: BaseException) -> str:
    """An error in one line: its type and the first line of its own words."""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0]}" if words else type(error).__name__
