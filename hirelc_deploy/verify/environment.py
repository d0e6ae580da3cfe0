"""Where a figure was taken: this machine and this installation, without names of hosts, users or folders."""

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from hirelc_deploy.cpu import CPUINFO, relevant_flags
from hirelc_deploy.verify.manifest import Environment

PACKAGES = ("hirelc-deploy", "numpy", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx", "torch", "torch-pruning")
"""Whose versions can change a figure."""

GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
BOARD = Path("/proc/device-tree/model")


def environment(*, threads: int, batch: int, clock: str) -> Environment:
    """What goes into the manifest.  `clock` is the one that ratios are taken on."""
    return Environment(
        cpu=cpu_model(),
        flags=relevant_flags(),
        cores=os.cpu_count() or 1,
        threads=threads,
        batch=batch,
        clock=clock,
        power_mode=power_mode(),
        packages={"python": platform.python_version(), **_versions(PACKAGES)},
    )


def cpu_model() -> str:
    """The CPU's own name for itself; the board's where the CPU has none (Arm), the architecture where neither has."""
    match platform.system():
        case "Linux":
            name = model_name(CPUINFO.read_text(encoding="utf-8", errors="replace")) or _content(BOARD)
        case "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        case _:
            name = platform.processor()
    return name or platform.machine()


def model_name(cpuinfo: str) -> str | None:
    """The `model name` of the first processor in /proc/cpuinfo."""
    pairs = (line.partition(":") for line in cpuinfo.splitlines())
    return next((value.strip() for key, _, value in pairs if key.strip() == "model name"), None)


def power_mode() -> str | None:
    """The frequency governor of the first core; None where the system does not tell, as in virtual machines."""
    return _content(GOVERNOR)


def _content(path: Path) -> str | None:
    return path.read_text().strip("\0 \n") if path.exists() else None


def _versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
