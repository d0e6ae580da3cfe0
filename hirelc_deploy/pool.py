"""Policies made real side by side, in processes of this machine.

`Engine` is the seam: whatever takes a function and policies and yields what the function says of each, in their order.
`in_turn` does so in this process, `Pool` in several; a cluster would be a third.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Protocol

import torch

from hirelc_deploy.errors import UserError
from hirelc_deploy.policy import Policy

Work = Callable[[Policy], float]


class Engine(Protocol):
    """Where policies are made real."""

    @property
    def at_once(self) -> int:
        """Policies that are made real side by side."""

    def __call__(self, work: Work, policies: Sequence[Policy]) -> Iterator[float]: ...


class InTurn:
    """In this process, with all threads that torch has."""

    at_once = 1

    def __call__(self, work: Work, policies: Sequence[Policy]) -> Iterator[float]:
        return map(work, policies)


in_turn = InTurn()


class Pool:
    """Processes that are copies of this one as it was when a function was first called, with one thread each.

    Models and tasks of users need not be made for being sent: they are there already.  For another function than
    before they are ended and made anew.  Use it in a `with`; the processes end with the block, and also if this
    process is killed.
    """

    def __init__(self, workers: int) -> None:
        self.at_once = workers
        self._work: Work | None = None
        self._executor: ProcessPoolExecutor | None = None

    def __call__(self, work: Work, policies: Sequence[Policy]) -> Iterator[float]:
        """Raises UserError if a process died, and what `work` raises."""
        if self._executor is None or work != self._work:
            self._end()
            context = multiprocessing.get_context("fork")
            self._work, self._executor = work, ProcessPoolExecutor(self.at_once, context, _begin, (work,))
        try:
            yield from self._executor.map(_do, policies)
        except BrokenProcessPool as error:
            raise UserError(
                "a process that evaluated a policy was ended from outside",
                fix="is there memory for all of them? Go on with --resume and fewer --workers",
            ) from error

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        self._executor = None


_work: Work


def _begin(work: Work) -> None:
    """In a new process."""
    global _work  # the one way in which a function that cannot be pickled gets into a pool
    _work = work
    torch.set_num_threads(1)  # the processes share the cores; and threads do not outlive a fork
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupted run ends at once, with one message
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed run leaves no process behind, and its folder free."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(policy: Policy) -> float:
    return _work(policy)
