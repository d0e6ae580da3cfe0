"""A core that is never this program's alone."""

import pytest

from hirelc_deploy.verify import quiet


def beside_a_neighbour(patch: pytest.MonkeyPatch) -> None:
    """From now on every loop takes twice as long as the core can do, and nobody waits for better."""
    for name, value in {"loop_ns": lambda: 2, "_fastest_ns": [1] * (quiet.FLUKES + 1), "left_s": 0.0}.items():
        patch.setattr(quiet.CORE, name, value)
