"""Latencies told from a target's table, against files: python benchmarks/latency_prediction.py measure NETWORK…

    python benchmarks/latency_prediction.py profile wide resnet18 mobilenetv2 vit   what the table lacks for them, or
                                                                                    was seen beside something else
    python benchmarks/latency_prediction.py measure wide resnet18 mobilenetv2 vit   files of random policies, timed
    python benchmarks/latency_prediction.py price wide resnet18 mobilenetv2 vit     those files again, by a newer table
    python benchmarks/latency_prediction.py budgets resnet18                        tables that less time was spent on
    python benchmarks/latency_prediction.py judge                                   errors, with correction and without

Random policies: every layer any compute and a storage that needs no search for its values, every prune group any
count.  Every second file of a network corrects the sum over kernels, the others are held out; once more a whole network
is held out.  Files are timed side by side with the kernel that the table's times are in units of, and with the
original's, whose median in those units holds for all of them: a machine that is slow for a while is so for all.  The
target is that which this machine can stand for: x86-avx2 or x86-vnni.  Writes profiles/TARGET.csv and
benchmarks/results/latency_prediction_TARGET.json.

--batch N and --threads N, of any step but the last, take other settings than one example on one thread, each with a
result file of its own.  Several threads are timed by the wall clock, which wants an idle machine.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _bench import RESULTS, ROOT, cpu_text, machine, markdown, save
from _networks import NETWORKS, bench_of, random_policies
from scipy.stats import spearmanr

from hirelc_deploy import console
from hirelc_deploy.cost.correction import Artifact, Correction, fit
from hirelc_deploy.cost.latency import Decisions
from hirelc_deploy.cost.needs import families
from hirelc_deploy.cost.predictor import Predictor
from hirelc_deploy.cost.prices import MeasuredPrices, kernel_of
from hirelc_deploy.cpu import cpu_flags
from hirelc_deploy.exporters._base import NoKernelError, Session
from hirelc_deploy.policy import Policy
from hirelc_deploy.profiles import Tables, load_target
from hirelc_deploy.profiles._table import write_table
from hirelc_deploy.verify import profiling, timing
from hirelc_deploy.verify.machines import Here
from hirelc_deploy.verify.measure import example
from hirelc_deploy.workbench import Workbench

TARGETS = ("x86-avx2", "x86-vnni")
OUT = Path("out/benchmarks/latency_prediction")
POLICIES = 36
SIDE_BY_SIDE = 6
SECONDS = 4.0
PATIENCE_S = 600.0
"""Waited for a core that nothing else runs on: beside something, whole networks are 10 % and more off."""
BUDGETS_S = (15.0, 30.0, 60.0, None)
"""For profiling; None is all that interpolation asks for."""


def here() -> str:
    """The target that this machine can stand for."""
    found = [name for name in TARGETS if load_target(name).is_here(cpu_flags())]
    if not found:
        sys.exit(f"this CPU stands for none of {', '.join(TARGETS)}: add a target of its own first")
    return found[0]


@dataclass(frozen=True, order=True)
class Setting:
    """What a latency depends on beside the file."""

    batch: int = 1
    threads: int = 1

    @property
    def suffix(self) -> str:
        """Of result files and steps; none for one example on one thread."""
        told = (("batch", self.batch), ("threads", self.threads))
        return "".join(f"_{name}{number}" for name, number in told if number > 1)

    def bench(self, network: str, out: Path) -> AbstractContextManager[Workbench]:
        """Of the network under this setting, in a run folder of its own."""
        return bench_of(network, out / self.suffix if self.suffix else out, threads=self.threads, batch=self.batch)


def table_of(target: str) -> Path:
    """Its measured times."""
    return ROOT / "profiles" / f"{target}.csv"


def result_of(target: str, setting: Setting) -> Path:
    """What was seen of it."""
    return RESULTS / f"latency_prediction_{target}{setting.suffix}.json"


def results() -> dict[tuple[str, Setting], dict[str, Any]]:
    """All that was seen, by target and setting."""
    found = {}
    for target in TARGETS:
        for path in RESULTS.glob(f"latency_prediction_{target}*.json"):
            record = json.loads(path.read_text(encoding="utf-8"))
            setting = Setting(record["machine"]["batch"], record["machine"]["threads"])
            assert path == result_of(target, setting)
            found[target, setting] = record
    return dict(sorted(found.items()))


def predictor_of(bench: Workbench, table: Path, setting: Setting) -> Predictor:
    """From a table alone: no artifact corrects it, and nothing is measured now."""
    return Predictor.of_table(bench.latencies.network, Tables(table, table).rows(), [], threads=setting.threads)


# -- steps ---------------------------------------------------------------------------------------------------


def profile(networks: Sequence[str], out: Path, setting: Setting, seconds: float | None) -> None:
    """Fill the table."""
    table = table_of(here())
    for name in networks:
        with setting.bench(name, out) as bench:
            wanted = families(bench.latencies.network)
            machine = Here(bench.runtime, threads=setting.threads)
            began = time.monotonic()
            with console.progress(f"{name}: measuring kernels", len(wanted)) as advance:
                tables = Tables(table, table)
                without = profiling.profile(wanted, tables, machine, seconds=seconds, anew=True, advance=advance)
            kernels = sum(len(family.known) for family in wanted)
            print(f"{name}: {len(wanted)} families, {kernels} kernels, {time.monotonic() - began:.0f} s; {without}")


class Reading:
    """A session with its inputs, so that sessions of different inputs run side by side."""

    def __init__(self, session: Session, inputs: Mapping[str, np.ndarray]) -> None:
        self.session, self.inputs = session, inputs

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.session.run(self.inputs)


def measure(network: str, out: Path, setting: Setting, policies: int) -> dict[str, Any]:
    """Time files of random policies, and price the same policies; what was measured before is not again."""
    with setting.bench(network, out) as bench:
        chosen = random_policies(bench.space, policies)
        before_us: list[float] = []
        measured_us: list[float] = []
        for start in range(0, len(chosen), SIDE_BY_SIDE):
            some = chosen[start : start + SIDE_BY_SIDE]
            now_us, *each_us = bench.run.step(
                f"beside the original/{start}", partial(_timed, bench, [Policy({}, {}), *some], setting)
            )
            before_us.append(now_us)
            measured_us += [us / now_us for us in each_us]
            print(f"{network} {len(measured_us)}/{len(chosen)}", flush=True)
        unit_us = float(np.median(before_us))
        return _priced(bench, [unit_us * part for part in measured_us], setting)


def price(network: str, out: Path, setting: Setting, measured_us: Sequence[float]) -> dict[str, Any]:
    """Price the policies of files that were measured before from the table as it is now."""
    with setting.bench(network, out) as bench:
        return _priced(bench, measured_us, setting)


def _priced(bench: Workbench, measured_us: Sequence[float], setting: Setting) -> dict[str, Any]:
    predictor = predictor_of(bench, table_of(here()), setting)
    chosen = random_policies(bench.space, len(measured_us))
    many = Decisions(*(np.repeat(each, 1000, axis=0) for each in _arrays(predictor, chosen)))
    began = time.process_time()
    predictor.of(many)
    return {
        "policies_per_second": len(many) / (time.process_time() - began),
        "families_without_a_row": sorted(predictor.unknown),
        "artifacts": [asdict(artifact) for artifact in _artifacts(predictor, chosen, measured_us)],
    }


def _artifacts(predictor: Predictor, policies: Sequence[Policy], measured_us: Sequence[float]) -> list[Artifact]:
    return [predictor.artifact(policy, us / 1000) for policy, us in zip(policies, measured_us, strict=True)]


def budgets(network: str, out: Path, setting: Setting, measured_us: Sequence[float]) -> list[dict[str, Any]]:
    """Errors on the files that were measured, told from tables that so much time was spent on, each made anew."""
    table = table_of(here())
    rows = Tables(table, table).rows()
    anchor = [row for row in rows if kernel_of(row) == profiling.ANCHOR and row.threads == setting.threads]
    found = []
    with setting.bench(network, out) as bench:
        machine = Here(bench.runtime, threads=setting.threads)
        chosen = random_policies(bench.space, len(measured_us))
        for seconds in BUDGETS_S:
            path = out / network / "table.csv"
            write_table(path, anchor)  # times of all tables are in the same units
            tables = Tables(path, path)
            wanted = families(bench.latencies.network)
            began = time.monotonic()
            with console.progress(f"{network}: {seconds or 'any'} s", len(wanted)) as advance:
                profiling.profile(wanted, tables, machine, seconds=seconds, advance=advance)
            spent_s = time.monotonic() - began
            predictor = predictor_of(bench, path, setting)
            artifacts = _artifacts(predictor, chosen, measured_us)
            found.append(
                {
                    "budget_s": seconds,
                    "spent_s": spent_s,
                    "kernels": len(tables.rows()),
                    "families_without_a_row": len(predictor.unknown),
                    "table alone": errors(Correction(), artifacts[1::2]),
                    "corrected by half": errors(fit(artifacts[::2]), artifacts[1::2]),
                }
            )
            print(found[-1], flush=True)
    return found


def _arrays(predictor: Predictor, policies: Sequence[Policy]) -> tuple[np.ndarray, np.ndarray]:
    decisions = predictor.latency.decisions(policies)
    return decisions.computes, decisions.counts


def _timed(bench: Workbench, policies: Sequence[Policy], setting: Setting) -> list[float]:
    """Microseconds of the policies' files, in units of the table."""
    threads, clock = setting.threads, timing.clock_for(setting.threads)
    files = {str(i): bench.files.draft(policy) for i, policy in enumerate(policies)}
    machine = Here(bench.runtime, threads=threads)
    anchor = profiling.makers([profiling.ANCHOR], machine)[profiling.ANCHOR]
    assert not isinstance(anchor, NoKernelError)
    with bench.files.loaded(files) as loaded:
        sessions: dict[str, Session] = {
            name: Reading(session, example(bench.task, setting.batch)) for name, session in loaded.items()
        }
        sessions["anchor"] = bench.runtime.kernel_session(anchor.file(1), threads=threads)
        sessions["nothing"] = bench.runtime.kernel_session(bench.runtime.nothing().file(1), threads=threads)
        times = timing.interleave(sessions, {}, threads=threads, seconds=SECONDS, patience_s=PATIENCE_S)
        if not times["anchor"].is_quiet:
            sys.exit("the core was hardly ever quiet: go on when it is, what was measured so far is kept")
        seen = {name: each.rounds_ms(clock) for name, each in times.items()}
    table = table_of(here())
    anchor_us = MeasuredPrices.of(Tables(table, table).rows(), threads=threads)(profiling.ANCHOR)
    unit = anchor_us / (seen["anchor"] - seen["nothing"])
    return [float(np.median(seen[name] * unit)) for name in files]


# -- judging -------------------------------------------------------------------------------------------------


def errors(correction: Correction, artifacts: Sequence[Artifact]) -> dict[str, float]:
    told = np.array([correction.us(artifact.parts_us) for artifact in artifacts])
    measured = np.array([artifact.measured_us for artifact in artifacts])
    off = told / measured - 1
    return {
        "files": len(artifacts),
        "mape_pct": 100 * float(np.mean(np.abs(off))),
        "within_5_pct": float(np.mean(np.abs(off) <= 0.05)),
        "within_10_pct": float(np.mean(np.abs(off) <= 0.10)),
        "spearman": float(spearmanr(told, measured).statistic),
        "worst_pct": 100 * float(off[np.argmax(np.abs(off))]),
    }


def judge(record: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Errors by network: of the table alone, corrected by its own files, and by those of other networks."""
    artifacts = {name: [Artifact(**row) for row in each["artifacts"]] for name, each in record["networks"].items()}
    found = {}
    for name, mine in artifacts.items():
        seen, held_out = mine[::2], mine[1::2]
        others = [artifact for other, each in artifacts.items() if other != name for artifact in each]
        found[name] = {
            "table alone": errors(Correction(), held_out),
            "corrected by half": errors(fit(seen), held_out),
            **({"network held out": errors(fit(others), mine)} if others else {}),
        }
    half = [artifact for each in artifacts.values() for artifact in each[::2]]
    rest = [artifact for each in artifacts.values() for artifact in each[1::2]]
    found["all"] = {"table alone": errors(Correction(), rest), "corrected by half": errors(fit(half), rest)}
    return found


PAGE = ROOT / "docs" / "latency.md"

INTRODUCTION = """# Latency before a file is built

Written by `python benchmarks/latency_prediction.py judge` from `benchmarks/results/latency_prediction_*.json`; the head
of that script says what makes those, and the targets' tables in `profiles/`.

Files of random policies, each layer in any compute and each prune group with any count, against what the table of a
target told of them: the sum over their kernels alone; corrected by every second file of the network and judged on the
others; and corrected by the files of the other networks alone.  CPU time of one thread at batch 1, where nothing else
is said, in units of a kernel that is timed in the same rounds; with several threads by the wall clock.  With AVX2 every
file was timed with the core to itself and beside the original's, through which those of different minutes are compared
(2026-12-01, 36 files a network, of `resnet18` 30); with VNNI neither, and the machine's own changes count as errors.
"""


SPENT = """### What profiling for less time costs

Tables of `{network}`'s kernels made anew, each in the time given to `profile --max-time`, the last until
interpolation asks for nothing more; the files are those of above.
"""


def page() -> str:
    """docs/latency.md, from the result files."""
    return "\n".join([INTRODUCTION, *(section(*what, record) for what, record in results().items())])


def section(target: str, setting: Setting, record: Mapping[str, Any]) -> str:
    """What was seen of one target under one setting."""
    told = [f"batch {setting.batch}"] * (setting.batch > 1) + [f"{setting.threads} threads"] * (setting.threads > 1)
    columns = ("mape_pct", "within_5_pct", "within_10_pct", "spearman", "worst_pct")
    rows = (
        (f"`{name}`", how, str(each["files"]), *(f"{each[key]:.3g}" for key in columns))
        for name, by_how in record["errors"].items()
        for how, each in by_how.items()
    )
    head = ("network", "told by", "files", "mean error, %", "within 5 %", "within 10 %", "Spearman", "worst, %")
    speed = markdown(
        ("network", "policies a second, one thread", "kernels without a row"),
        (
            (f"`{name}`", f"{each['policies_per_second']:,.0f}", str(len(each["families_without_a_row"])))
            for name, each in record["networks"].items()
        ),
    )
    taken_on = record["machine"]
    return "\n".join(
        [
            f"## {', '.join([f'`{target}`', *told])}\n",
            f"CPU: {cpu_text(taken_on['cpu'], taken_on['flags'])}, onnxruntime "
            f"{taken_on['packages']['onnxruntime']}.\n",
            markdown(head, rows),
            speed,
            *(_of_less_time(network, tables) for network, tables in record.get("budgets", {}).items()),
        ]
    )


def _of_less_time(network: str, tables: Sequence[Mapping[str, Any]]) -> str:
    head = ("seconds", "kernels", "mean error, %: table alone", "corrected by half", "Spearman")
    rows = (
        (
            f"{each['spent_s']:.0f}",
            str(each["kernels"]),
            f"{each['table alone']['mape_pct']:.3g}",
            f"{each['corrected by half']['mape_pct']:.3g}",
            f"{each['corrected by half']['spearman']:.3g}",
        )
        for each in tables
    )
    return f"{SPENT.format(network=network)}\n{markdown(head, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("profile", "measure", "price", "budgets", "judge"):
        step = steps.add_parser(name)
        if name != "judge":
            step.add_argument("--out", type=Path, default=OUT)
            step.add_argument("--batch", type=int, default=1)
            step.add_argument("--threads", type=int, default=1)
            step.add_argument("networks", nargs="+", choices=NETWORKS)
    steps.choices["profile"].add_argument("--seconds", type=float)
    steps.choices["measure"].add_argument("--policies", type=int, default=POLICIES)
    options = parser.parse_args()
    if options.step == "profile":
        profile(options.networks, options.out, Setting(options.batch, options.threads), options.seconds)
        return
    if options.step != "judge":
        record(options.step, Setting(options.batch, options.threads), options)
    for what, seen in results().items():
        save({**seen, "errors": judge(seen)}, result_of(*what))
    text = page()
    PAGE.write_text(text, encoding="utf-8")
    print(text)


def record(step: str, setting: Setting, options: argparse.Namespace) -> None:
    """Take the step for each of the networks, and keep what was seen after each."""
    result = result_of(here(), setting)
    seen: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {"networks": {}}
    if step == "measure":
        seen["machine"] = machine(threads=setting.threads, batch=setting.batch)
    for network in options.networks:
        if step == "measure":
            seen["networks"][network] = measure(network, options.out, setting, options.policies)
        else:
            measured_us = [row["measured_us"] for row in seen["networks"][network]["artifacts"]]
            if step == "price":
                seen["networks"][network] = price(network, options.out, setting, measured_us)
            else:
                seen.setdefault("budgets", {})[network] = budgets(network, options.out, setting, measured_us)
        save(seen, result)


if __name__ == "__main__":
    main()
