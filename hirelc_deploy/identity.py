"""What makes one run of an export another than the next: whatever decides its results."""

import hashlib
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch

from hirelc_deploy import __version__, usercode
from hirelc_deploy.config import ExportSettings
from hirelc_deploy.cpu import cpu_flags
from hirelc_deploy.exporters import load_runtime
from hirelc_deploy.policy import Policy
from hirelc_deploy.profiles import Target

if TYPE_CHECKING:
    from hirelc_deploy.checkpoint import Checkpoint
    from hirelc_deploy.task import Task

DECIDES_NOTHING = frozenset(
    {
        "out",
        "resume",
        "workers",
        "tensorboard",
        "model",
        "data",
        "checkpoint",
        "target",
        "policy",
        "kernels",
        "host",
        "provider",
        "host_python",
        "host_trtexec",
    }
)
"""Settings that are no part of a run's identity, or that are part of it by their contents."""


def fingerprint(
    settings: ExportSettings, target: Target, task: "Task", trained: "Checkpoint", given: Policy | None
) -> dict[str, str]:
    """Whatever decides a run's results: to go on with a run under other ones would mix two runs."""
    chosen = {name: str(value) for name, value in asdict(settings).items() if name not in DECIDES_NOTHING}
    return {
        "model": trained.sha256,
        "data": task.fingerprint(),
        "code": usercode.digest(settings.model, settings.data),
        "target": hashlib.sha256(target.model_dump_json().encode()).hexdigest(),
        "policy": given.digest() if given else "none",
        "kernels": _digest_of(settings.kernels),
        **{f"settings.{name}": value for name, value in sorted(chosen.items())},
        "environment.cpu": " ".join(sorted(cpu_flags())),
        "environment.torch threads": str(torch.get_num_threads()),
        "environment.runtime": load_runtime(target.runtime.name).version(),
        "environment.python": platform.python_version(),
        "environment.torch": torch.__version__,
        "environment.numpy": numpy.__version__,
        "environment.hirelc-deploy": __version__,
    }


def _digest_of(folder: Path | None) -> str:
    """Of the files with a user's own number formats."""
    if folder is None:
        return "none"
    digest = hashlib.sha256()
    for file in sorted(folder.expanduser().glob("*.py")):
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()
