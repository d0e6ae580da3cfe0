"""What workers that wait for work do to other sessions: python benchmarks/spinning.py

`wide` in fp32 and in int8, several threads, each alone and in turns with eleven other sessions, under what ONNX Runtime
offers for its workers between inferences.  Times are medians of single runs by the wall, in milliseconds.  Wants an
idle machine.  Writes benchmarks/results/spinning.json; a minute.
"""

import argparse
import os
from collections.abc import Mapping
from itertools import product
from pathlib import Path

from _bench import RESULTS, machine, markdown, save, workbench

from hirelc_deploy.exporters import _sessions
from hirelc_deploy.policy import INT8, Policy
from hirelc_deploy.verify import timing
from hirelc_deploy.verify.measure import example

RESULT = RESULTS / "spinning.json"
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "left alone": {},
    f"asleep after {_sessions.SPIN_US} us": {"session.intra_op.spin_duration_us": str(_sessions.SPIN_US)},
    "asleep after each inference": {"session.force_spinning_stop": "1"},
    "never waiting": {"session.intra_op.allow_spinning": "0"},
}
OTHERS, SECONDS = 11, 3.0


def session(path: Path, setting: Mapping[str, str], threads: int) -> _sessions.Loaded:
    options = _sessions.options(threads=1)  # those of several come with the setting that is in use
    options.intra_op_num_threads = threads
    for name, value in setting.items():
        options.add_session_config_entry(name, value)
    return _sessions.Loaded(_sessions.of_file(path, options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/spinning"))
    options = parser.parse_args()
    rows = []
    with workbench("wide", options.out / "wide" / "run", post_training=()) as bench:
        in_8_bits = Policy(dict.fromkeys(bench.space.layers, INT8), {})
        inputs = example(bench.task, 1)
        with bench.files.on_disk({"fp32": bench.files.baseline(), "int8": bench.files.draft(in_8_bits)}) as paths:
            for (setting, entries), name in product(SETTINGS.items(), paths):
                row = {"workers": setting, "file": name}
                for how, others in (("alone_ms", 0), ("in_turns_ms", OTHERS)):
                    files = [paths[name], *([*paths.values()] * others)[:others]]
                    sessions = {str(i): session(path, entries, options.threads) for i, path in enumerate(files)}
                    times = timing.interleave(sessions, inputs, threads=options.threads, seconds=SECONDS)
                    row[how] = times["0"].p50_ms("wall")
                rows.append(row)
                print(row, flush=True)
    save({"machine": machine(threads=options.threads), "others": OTHERS, "rows": rows}, RESULT)
    cells = ([str(each) if isinstance(each, str) else f"{each:.3f}" for each in row.values()] for row in rows)
    print(markdown(("workers", "file", "alone, ms", "in turns, ms"), cells))


if __name__ == "__main__":
    main()
