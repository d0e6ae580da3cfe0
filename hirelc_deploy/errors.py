"""What can go wrong, and the exit status that says so."""

from enum import IntEnum
from functools import partial
from typing import Any


class ExitStatus(IntEnum):
    """The exit statuses of the command line."""

    OK = 0
    USER_ERROR = 1
    BUDGET_MISSED = 2
    UNVERIFIED = 3
    INTERNAL = 70


class UserError(Exception):
    """The user's mistake: what happened and why, and what to do about it."""

    def __init__(self, what: str, *, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.fix}"

    def __reduce__(self) -> tuple[Any, ...]:
        # as it comes back from another process
        return partial(UserError, self.what, fix=self.fix), ()
