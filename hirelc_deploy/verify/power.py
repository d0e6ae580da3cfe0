"""What a Jetson draws while an engine runs: tegrastats, read beside trtexec.

Read from NVIDIA's Jetson Linux developer guide (36.3, rails of Orin modules); nothing here was seen on a device.
"""

import re
from dataclasses import dataclass

import numpy as np

TEGRASTATS = "tegrastats"
INTERVAL_MS = 100
LONGEST_S = 600
"""It ends by itself if the connection breaks."""

MODULE = "VDD_IN"
"""What goes into an Orin Nano or NX, all of it."""
PARTS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
"""An AGX Orin has no sensor for all of it: these add up to it."""

RAIL = re.compile(r"\b(V[A-Z0-9_]+) (\d+)mW")
"""A rail and its milliwatts now, in a line such as `… VDD_IN 5012mW/4980mW …`, where the average follows."""


@dataclass(frozen=True)
class Power:
    """Of a board, the GPU's and all else."""

    watts: float
    rails: tuple[str, ...]


def watched(command: str, log: str) -> str:
    """A shell command that runs another and writes meanwhile what the board draws; its status is the other's."""
    return (
        f"{{ timeout {LONGEST_S} {TEGRASTATS} --interval {INTERVAL_MS} > {log} 2>/dev/null & watching=$!; {command}; "
        "ran=$?; kill $watching 2>/dev/null; wait $watching 2>/dev/null; test $ran = 0; }"
    )


def drawn(log: str, seconds: float) -> Power | None:
    """The median of the last so many seconds; None where the log names none of the rails that are known."""
    lines = [dict(RAIL.findall(line)) for line in log.splitlines()]
    for rails in ((MODULE,), PARTS):
        seen = [sum(int(line[rail]) for rail in rails) for line in lines if all(rail in line for rail in rails)]
        if seen:
            last = seen[-max(1, round(1000 * seconds / INTERVAL_MS)) :]
            return Power(float(np.median(last)) / 1000, rails)
    return None
