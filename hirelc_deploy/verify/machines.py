"""Where kernels are measured: this machine, or a device that is reached over ssh (`remote`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hirelc_deploy.cpu import relevant_flags
from hirelc_deploy.exporters._base import KernelFile, NoKernelError, Request, Runtime
from hirelc_deploy.verify import timing
from hirelc_deploy.verify.environment import power_mode

WARMUP_RUNS = 3


@dataclass(frozen=True)
class Where:
    """What a row says of where it was measured."""

    runtime: str
    """Its name and version."""
    flags: tuple[str, ...]
    """The CPU's, as far as they decide which kernels run, sorted."""
    power_mode: str
    threads: int


class Machine(Protocol):
    """Something that kernels can be timed on."""

    runtime: Runtime
    where: Where

    def answers(self, requests: Sequence[Request]) -> list[Any]:
        """An answer to each, or the NoKernelError that it came to."""
        ...

    def timed(self, files: Sequence[KernelFile], rounds: int) -> list[timing.Timing]:
        """Side by side, in so many rounds."""
        ...


class Here:
    """This machine."""

    def __init__(self, runtime: Runtime, *, threads: int) -> None:
        self.runtime = runtime
        self.where = Where(f"{runtime.name} {runtime.version()}", relevant_flags(), power_mode() or "", threads)

    def answers(self, requests: Sequence[Request]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Any:
        try:
            return self.runtime.answer(request)
        except NoKernelError as error:
            return error

    def timed(self, files: Sequence[KernelFile], rounds: int) -> list[timing.Timing]:
        threads = self.where.threads
        sessions = {str(i): self.runtime.kernel_session(file, threads=threads) for i, file in enumerate(files)}
        return list(timing.interleave(sessions, {}, threads=threads, warmup=WARMUP_RUNS, rounds=rounds).values())
