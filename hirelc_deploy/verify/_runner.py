"""Runs on a device that has Python, numpy and onnxruntime, and nothing of this project.

It is copied there as it is.  `python3 runner.py` in a folder with `job.json` does what that says and writes
`result.json`: what the device is, what its sessions make of files, what values are like, how long files take.
"""

import json
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple  # noqa: UP035 - devices carry old Pythons

Job = Dict[str, Any]  # noqa: UP006
Visit = Tuple[List[float], float]  # noqa: UP006

ORDERS_SEED = 0


def main() -> None:
    job = json.loads(Path("job.json").read_text())
    try:
        import numpy
        import onnxruntime
    except ImportError as error:
        result = {"missing": error.name or str(error), "python": sys.executable}
    else:
        result = ACTIONS[job["action"]](job, numpy, onnxruntime)
    Path("result.json").write_text(json.dumps(result))


def about(job: Job, numpy: Any, onnxruntime: Any) -> Job:
    return {
        "runtime": onnxruntime.__version__,
        "providers": onnxruntime.get_available_providers(),
        "cpuinfo": read("/proc/cpuinfo"),
        "system": platform.system(),
        "machine": platform.machine(),
        "power_mode": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip(),
    }


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


def spinning(version: str) -> Tuple[str, str]:  # noqa: UP006
    """As `hirelc_deploy.exporters._sessions` has it: workers do not spin into another file's turn."""
    if tuple(map(int, version.split(".")[:2])) < (1, 26):
        return "session.force_spinning_stop", "1"
    return "session.intra_op.spin_duration_us", "300"


def session(onnxruntime: Any, path: str, chosen: Any) -> Any:
    return onnxruntime.InferenceSession(path, chosen, providers=["CPUExecutionProvider"])


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
    arrays = numpy.load(request["inputs"])
    given = {name: arrays[name] for name in arrays.files if name in present}
    values = loaded.run(request["names"], given)
    kinds = [[list(value.shape), str(value.dtype)] for value in values]
    return {"shapes": {name: kinds[i] for i, name in enumerate(request["names"])}}


def timed(job: Job, numpy: Any, onnxruntime: Any) -> Job:
    """Each file's visits, round by round; the same protocol as `hirelc_deploy.verify.timing.interleave`."""
    chosen = options(onnxruntime, job["threads"], False)
    files = []
    for each in job["files"]:
        arrays = numpy.load(each["inputs"])
        files.append((session(onnxruntime, each["file"], chosen), {name: arrays[name] for name in arrays.files}))
    runs = []
    for loaded, inputs in files:
        fastest = min(visit(loaded, inputs, 1)[0][0] for _ in range(max(2, job["warmup"])))
        runs.append(max(1, -int(-job["visit_ms"] // fastest)))
    rounds: List[List[Visit]] = [[] for _ in files]  # noqa: UP006
    shuffled = random.Random(ORDERS_SEED)
    order = list(range(len(files)))
    for _ in range(job["rounds"]):
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


ACTIONS = {"about": about, "answers": answers, "timed": timed}

if __name__ == "__main__":
    main()
