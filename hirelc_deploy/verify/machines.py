"""Where kernels are measured: this machine, or a device that is reached over ssh (`remote`)."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hirelc_deploy.cpu import RELEVANT_FLAGS, relevant_flags, stands_for
from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters._base import KernelFile, NoKernelError, Request, Runtime
from hirelc_deploy.profiles import Target
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


def check_version(target: Target, version: str, name: str) -> None:
    """Raises UserError if what a device has of a target's runtime is older than the target."""
    if numbers_of(version) < numbers_of(target.runtime.min_version):
        raise UserError(
            f"{name} has {target.runtime.name} {version}, and {target.name} begins with {target.runtime.min_version}",
            fix="install a newer one there, or lower runtime.min_version in a target of your own",
        )


def check_flags(target: Target, flags: Iterable[str], name: str, fix: str) -> None:
    """Times that one CPU takes are no times of another.  Raises UserError if instruction sets differ."""
    has = frozenset(flags)
    wanted = target.flags(has) & RELEVANT_FLAGS
    if not stands_for(has, wanted):
        raise UserError(
            f"{name} has {', '.join(sorted(has)) or 'no instruction sets that are known'}, and {target.name} "
            f"{', '.join(sorted(wanted))}: its kernels take other times",
            fix=fix,
        )


def numbers_of(version: str) -> tuple[int, ...]:
    """A version, as it is compared with another."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


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
