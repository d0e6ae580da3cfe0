"""What workers that wait for work do to other sessions: python benchmarks/spinning.py

`wide` in fp32 and in int8, several threads, each alone and in turns with eleven other sessions, under what ONNX Runtime
offers for its workers between inferences.  Times are medians by the wall, of the runs of a visit but its first, in
milliseconds.  Wants an idle machine.  Writes benchmarks/results/spinning.json; a minute.
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from _bench import RESULTS, machine, markdown, save, workbench

from hirelc_deploy.exporters._sessions import SPIN_US
from hirelc_deploy.policy import INT8, Policy
from hirelc_deploy.verify.measure import example
from hirelc_deploy.verify.timing import SETTLE_S

RESULT = RESULTS / "spinning.json"
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "left alone": {},
    f"asleep after {SPIN_US} us": {"session.intra_op.spin_duration_us": str(SPIN_US)},
    "asleep after each inference": {"session.force_spinning_stop": "1"},
    "never waiting": {"session.intra_op.allow_spinning": "0"},
}
SESSIONS, VISIT, SECONDS = 12, 8, 3.0


def session(data: bytes, setting: Mapping[str, str], threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    for name, value in setting.items():
        options.add_session_config_entry(name, value)
    return onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])


def seen_ms(sessions: Sequence[Any], inputs: Mapping[str, np.ndarray], counted: range) -> float:
    """The median of those that count, all visited in turns."""
    random, times = np.random.default_rng(0), []
    for each in sessions:
        each.run(None, inputs)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for i in random.permutation(len(sessions)):
            time.sleep(SETTLE_S)
            sessions[i].run(None, inputs)
            for _ in range(VISIT - 1):
                began = time.perf_counter()
                sessions[i].run(None, inputs)
                if i in counted:
                    times.append(1000 * (time.perf_counter() - began))
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/spinning"))
    options = parser.parse_args()
    with workbench("wide", options.out / "wide" / "run", post_training=()) as bench:
        in_8_bits = Policy(dict.fromkeys(bench.space.layers, INT8), {})
        files = {"fp32": bench.files.baseline().data, "int8": bench.files.draft(in_8_bits).data}
        inputs = example(bench.task, 1)
    rows = []
    for (setting, entries), name in product(SETTINGS.items(), files):
        alone = [session(files[name], entries, options.threads)]
        row = {"workers": setting, "file": name, "alone_ms": seen_ms(alone, inputs, range(1))}
        del alone
        others = [data for other, data in files.items() if other != name]
        turns = [session(data, entries, options.threads) for data in ([files[name], *others] * SESSIONS)[:SESSIONS]]
        row["in_turns_ms"] = seen_ms(turns, inputs, range(0, SESSIONS, len(files)))
        del turns
        rows.append(row)
        print(row, flush=True)
    save({"machine": machine(threads=options.threads), "sessions": SESSIONS, "rows": rows}, RESULT)
    cells = ([str(each) if isinstance(each, str) else f"{each:.3f}" for each in row.values()] for row in rows)
    print(markdown(("workers", "file", "alone, ms", "in turns, ms"), cells))


if __name__ == "__main__":
    main()
