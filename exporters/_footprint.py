"""What a file takes of a machine when a fresh process loads and runs it: memory and time.

In this process neither can be told: torch has long taken the memory that a session would have to ask for.
"""

import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters._base import Arrays, Footprint

STATUS = Path("/proc/self/status")
"""Where Linux tells a process its peak."""

INPUTS = "inputs.npz"
SECONDS = 600.0
"""After which a load has failed."""

SCRIPT = """
import json, sys, time
import numpy, onnxruntime

def kilobytes(line):
    return int(dict(each.split(":", 1) for each in open("/proc/self/status"))[line].split()[0])

inputs = {key.split(":", 1)[1]: array for key, array in numpy.load(sys.argv[2]).items()}
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = int(sys.argv[3]), 1
options.log_severity_level = 3
try:
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is that of the imports
except OSError:
    pass
before = kilobytes("VmRSS")
began = time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[1], options, ["CPUExecutionProvider"])
load_ms = 1000 * (time.perf_counter() - began)
for _ in range(3):
    session.run(None, inputs)
print(json.dumps({"memory_bytes": 1024 * (kilobytes("VmHWM") - before), "load_ms": load_ms}))
"""
"""Imports nothing but the runtime, and runs thrice, since the first run plans the memory of the second."""


def packed(inputs: Arrays) -> bytes:
    """As np.load reads them, with a mark before each name: numpy's own parameters are names that an input may have."""
    file = io.BytesIO()
    marked: dict[str, Any] = {f"x:{name}": array for name, array in inputs.items()}
    np.savez(file, **marked)
    return file.getvalue()


def footprint(path: Path, inputs: Arrays, *, threads: int) -> Footprint | None:
    """Of one file; None where the system does not tell a process its peak.  Raises UserError if the process fails."""
    if not STATUS.exists():
        return None
    with tempfile.TemporaryDirectory(prefix="hirelc-deploy-") as folder:
        (Path(folder) / INPUTS).write_bytes(packed(inputs))
        command = [sys.executable, "-c", SCRIPT, str(path.resolve()), INPUTS, str(threads)]
        try:
            # its folder comes first on the path of what is imported: an empty one, and not the user's
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=True)
        except subprocess.SubprocessError as error:
            said = str(getattr(error, "stderr", None) or "").strip().splitlines()
            raise UserError(
                f"a process of its own could not load and run {path.name}: {said[-1] if said else error}",
                fix="is there memory left? the file itself is written",
            ) from error
    return Footprint(**json.loads(done.stdout))
