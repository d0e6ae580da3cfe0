"""What one run is about: a network and its task on a target."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import nn

from hirelc_deploy.choices import search_space
from hirelc_deploy.cpu import cpu_flags
from hirelc_deploy.exporters import load_runtime

if TYPE_CHECKING:
    from hirelc_deploy.exporters._base import Runtime
    from hirelc_deploy.graph.model_graph import ModelGraph
    from hirelc_deploy.profiles import Target
    from hirelc_deploy.rundir import RunFolder
    from hirelc_deploy.search.space import SearchSpace
    from hirelc_deploy.task import Task


@dataclass(frozen=True)
class Subject:
    """Given once and never changed."""

    model: nn.Module
    """As it was trained."""
    task: "Task"
    graph: "ModelGraph"
    target: "Target"
    run: "RunFolder"
    """Where what is slow is kept."""
    threads: int
    """That files run with."""
    batch: int
    """That they are timed with."""

    @cached_property
    def runtime(self) -> "Runtime":
        """What loads the target's files."""
        return load_runtime(self.target.runtime.name)

    @cached_property
    def space(self) -> "SearchSpace":
        """What may be chosen."""
        return search_space(self.graph, self.target)

    @cached_property
    def largest(self) -> int:
        """The magnitude that an 8-bit weight may have on the target."""
        return self.target.largest_code(self.target.flags(cpu_flags()))
