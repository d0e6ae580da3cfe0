"""Runs on a device that has Python, numpy and onnxruntime, and nothing of this project.

It is copied there as it is.  `python3 runner.py` in a folder with `job.json` does what that says and writes
`result.json`: what the device is, what its sessions make of files, what values are like, how long files take, what they
give.
"""

import contextlib
import importlib
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

Job = Dict[str, Any]
Visit = Tuple[List[float], float]

ORDERS_SEED = 0


class RefusedError(Exception):
    """This runtime does not do what the job asks; the message is for the one who asked."""


def main() -> None:
    job = json.loads(Path("job.json").read_text())
    try:
        import numpy
        import onnxruntime
    except ImportError as error:
        result = {"missing": error.name or str(error), "python": sys.executable}
    else:
        try:
            result = ACTIONS[job["action"]](job, numpy, onnxruntime)
        except RefusedError as refused:
            result = {"refused": str(refused)}
        except Exception as error:  # of the runtime, on this file and these inputs
            result = {"failed": first_words(error)}
    Path("result.json").write_text(json.dumps(result))


def about(job: Job, numpy: Any, onnxruntime: Any) -> Job:
    """What the device is; refused where it has not the provider that the job names."""
    provider = job.get("provider")
    if provider is not None:
        with heard() as said:
            reason = why_not(onnxruntime, provider)
        if reason:
            raise RefusedError(cause(said) or reason)
    return {
        "runtime": onnxruntime.__version__,
        "plugin": plugin_version(provider) if provider else None,
        "cpuinfo": read("/proc/cpuinfo"),
        "board": read("/proc/device-tree/model").strip("\0 \n"),
        "gpu": gpu() if provider and provider["kind"] == "gpu" else None,
        "cores": os.cpu_count() or 1,
        "system": platform.system(),
        "machine": platform.machine(),
        "power_mode": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip(),
    }


def gpu() -> Optional[Job]:
    """Of the first NVIDIA GPU: name, driver and compute capability as its own tool says them; None without one."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    except OSError:
        return None
    values = said.stdout.splitlines()[0].split(", ") if said.returncode == 0 and said.stdout.strip() else []
    return dict(zip(("name", "driver", "compute_capability"), values)) if len(values) == 3 else None


def read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def options(onnxruntime: Any, threads: int, optimise: bool) -> Any:
    found = onnxruntime.SessionOptions()
    found.intra_op_num_threads = threads
    found.inter_op_num_threads = 1
    found.log_severity_level = 3
    if threads > 1:
        found.add_session_config_entry(*spinning(onnxruntime.__version__))
    levels = onnxruntime.GraphOptimizationLevel
    found.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    return found


def spinning(version: str) -> Tuple[str, str]:
    """As `hirelc_deploy.exporters._sessions` has it: workers do not spin into another file's turn."""
    if tuple(map(int, version.split(".")[:2])) < (1, 26):
        return "session.force_spinning_stop", "1"
    return "session.intra_op.spin_duration_us", "300"


def session(onnxruntime: Any, path: str, chosen: Any, provider: Optional[Job] = None) -> Any:
    """A file, loaded by the CPU's provider or by another one, which then has to take all of it."""
    if provider is None:
        return onnxruntime.InferenceSession(path, chosen, providers=["CPUExecutionProvider"])
    # what the provider leaves would run on the CPU, and the time would be nobody's
    chosen.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    with heard() as said:
        try:
            return made_by(onnxruntime, path, chosen, provider)
        except RefusedError:
            raise
        except Exception as error:
            reason = first_words(error)
    raise RefusedError(cause(said) or reason)


def first_words(error: Exception) -> str:
    """The first line of an error, without what ONNX Runtime puts before it."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^(\[ONNXRuntimeError\] : \d+ : \w+ : )?(.* with error: )?", "", said[0])


def made_by(onnxruntime: Any, path: str, chosen: Any, provider: Job) -> Any:
    name = provider["called"]
    told = {key: value.replace("{file}", Path(path).stem) for key, value in provider["options"].items()}
    if name in onnxruntime.get_available_providers():
        return onnxruntime.InferenceSession(path, chosen, providers=[(name, told)], enable_fallback=0)
    reason = why_not(onnxruntime, provider)
    if reason:
        raise RefusedError(reason)
    chosen.add_provider_for_devices(devices(onnxruntime, name)[:1], told)
    return onnxruntime.InferenceSession(path, chosen)


def why_not(onnxruntime: Any, provider: Job) -> str:
    """Why this runtime has not the provider: built in, or in a package of its own.  Empty where it has."""
    name, package = provider["called"], provider["package"]
    if name in onnxruntime.get_available_providers():
        return ""
    has = "onnxruntime %s has no %s" % (onnxruntime.__version__, name)
    if not hasattr(onnxruntime, "get_ep_devices"):
        return has
    if devices(onnxruntime, name):
        return ""
    if not package:
        return has
    try:
        library = importlib.import_module(package).get_library_path()
        onnxruntime.register_execution_provider_library(name, library)
    except ImportError:
        return has
    except Exception as error:
        return first_words(error)
    return "" if devices(onnxruntime, name) else "%s finds no device that it can use" % name


def devices(onnxruntime: Any, name: str) -> List[Any]:
    return [each for each in onnxruntime.get_ep_devices() if each.ep_name == name]


def plugin_version(provider: Job) -> Optional[str]:
    plugin = sys.modules.get(provider["package"] or "")
    return None if plugin is None else str(getattr(plugin, "__version__", "")) or None


@contextlib.contextmanager
def heard() -> Iterator[List[str]]:
    """The lines that native libraries print meanwhile: why one cannot be loaded is said there alone."""
    lines: List[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def cause(said: List[str]) -> str:
    """The first error among lines of ONNX Runtime's log, without what stands before every one of them."""
    for line in said:
        found = re.search(r"\[E:[^\]]*\] (?:.*with error: )?(.*?)(?:\x1b\[m)?$", line)
        if found and found.group(1).strip():
            return found.group(1).strip()
    return ""


def unpacked(numpy: Any, path: str) -> Job:
    """Arrays by name, as `hirelc_deploy.exporters._footprint.packed` has packed them."""
    with numpy.load(path) as arrays:
        return {key.split(":", 1)[1]: arrays[key] for key in arrays.files}


def answers(job: Job, numpy: Any, onnxruntime: Any) -> Job:
    """One entry a request: the optimised file's name, the shapes of values, or why not."""
    found = []
    for request in job["requests"]:
        try:
            found.append(answer(request, numpy, onnxruntime))
        except Exception as error:
            found.append({"refused": str(error).splitlines()[0] if str(error) else type(error).__name__})
    return {"answers": found}


def answer(request: Job, numpy: Any, onnxruntime: Any) -> Job:
    if "names" not in request:
        chosen = options(onnxruntime, 1, True)
        chosen.optimized_model_filepath = request["file"] + ".optimised"
        session(onnxruntime, request["file"], chosen)
        return {"file": chosen.optimized_model_filepath}
    loaded = session(onnxruntime, request["file"], options(onnxruntime, 1, False))
    present = {each.name for each in loaded.get_inputs()}
    given = {name: array for name, array in unpacked(numpy, request["inputs"]).items() if name in present}
    values = loaded.run(request["names"], given)
    kinds = [[list(value.shape), str(value.dtype)] for value in values]
    return {"shapes": {name: kinds[i] for i, name in enumerate(request["names"])}}


def timed(job: Job, numpy: Any, onnxruntime: Any) -> Job:
    """Each file's visits, round by round; the same protocol as `hirelc_deploy.verify.timing.interleave`."""
    files = []
    for each in job["files"]:
        chosen = options(onnxruntime, job["threads"], job["optimise"])
        loaded = session(onnxruntime, each["file"], chosen, job.get("provider"))
        files.append((loaded, unpacked(numpy, each["inputs"])))
    runs = []
    for loaded, inputs in files:
        fastest = min(visit(loaded, inputs, 1)[0][0] for _ in range(max(2, job["warmup"])))
        runs.append(max(1, -int(-job["visit_ms"] // fastest)))
    rounds: List[List[Visit]] = [[] for _ in files]
    shuffled = random.Random(ORDERS_SEED)
    order = list(range(len(files)))
    deadline = time.perf_counter() + job["seconds"]
    least, most = job["rounds"]
    for done in range(most):
        if done >= least and time.perf_counter() > deadline:
            break
        for number in order:
            if job["pause_s"]:
                settle(*files[number], job["pause_s"])
            rounds[number].append(visit(*files[number], runs[number]))
        last = order[-1]
        shuffled.shuffle(order)
        if order[0] == last and len(order) > 1:
            other = shuffled.randrange(1, len(order))
            order[0], order[other] = order[other], order[0]
    return {"rounds": rounds}


def outputs(job: Job, numpy: Any, onnxruntime: Any) -> Job:
    """What a file gives on any number of examples, batch by batch, in the file `outputs`."""
    chosen = options(onnxruntime, job["threads"], True)
    loaded = session(onnxruntime, job["file"], chosen, job.get("provider"))
    names = [each.name for each in loaded.get_outputs()]
    inputs = unpacked(numpy, job["inputs"])
    examples = len(next(iter(inputs.values())))
    parts = [
        loaded.run(names, {name: array[start : start + job["batch"]] for name, array in inputs.items()})
        for start in range(0, examples, job["batch"])
    ]
    whole = [numpy.concatenate(each) for each in zip(*parts)]
    with Path("outputs").open("wb") as file:
        numpy.savez(file, *whole)
    return {"names": names}


def footprint(job: Job, numpy: Any, onnxruntime: Any) -> Job:
    """Memory and load time of a file in a process of its own, by the script that was sent along; or nothing."""
    if not Path("/proc/self/status").exists():
        return {"footprint": None}
    command = [sys.executable, job["script"], job["file"], job["inputs"], str(job["threads"])]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RefusedError(said[-1] if said else "status %d" % done.returncode)
    return {"footprint": json.loads(done.stdout)}


def settle(loaded: Any, inputs: Job, pause_s: float) -> None:
    """Workers of the file before go to sleep, and this one's wake."""
    time.sleep(pause_s)
    loaded.run(None, inputs)


def visit(loaded: Any, inputs: Job, runs: int) -> Visit:
    """Milliseconds by the wall of each run, and of CPU time of one."""
    ticks = [0] * (runs + 1)
    began = time.thread_time_ns()
    ticks[0] = time.perf_counter_ns()
    for run in range(1, runs + 1):
        loaded.run(None, inputs)
        ticks[run] = time.perf_counter_ns()
    cpu = time.thread_time_ns() - began
    return [(ticks[run + 1] - ticks[run]) / 1e6 for run in range(runs)], cpu / runs / 1e6


ACTIONS = {"about": about, "answers": answers, "timed": timed, "outputs": outputs, "footprint": footprint}

if __name__ == "__main__":
    main()
