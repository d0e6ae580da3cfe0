"""A core that is never this program's alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hirelc_deploy.verify import quiet, timing


@contextmanager
def beside_a_neighbour() -> Iterator[None]:
    """Every loop takes twice as long as the core can do, and nobody waits for better, until the end of the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"loop_ns": lambda: 2, "_fastest_ns": [1] * (quiet.FLUKES + 1), "left_s": 0.0}.items():
            patch.setattr(quiet.CORE, name, value)
        patch.setattr(timing, "PATIENCE_S", 0.0)
        yield
