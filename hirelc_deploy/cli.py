"""The command line: one function a verb, and no logic.

Whatever takes long to import is imported by the verb that needs it: `--help` and `targets` answer at once.
"""

import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hirelc_deploy import __version__, options
from hirelc_deploy.errors import ExitStatus, UserError

if TYPE_CHECKING:
    from hirelc_deploy.verification import Outcome

NAME = "hirelc-deploy"
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

EXIT_STATUSES = (
    "Exit status: 0 every limit is met; 1 a mistake in what was asked; 2 a limit is missed or a file was changed; "
    "3 the figure cannot be verified here; 70 an error of this program."
)

app = typer.Typer(
    help="From a trained PyTorch checkpoint to a small, fast file, measured on the device it is for.",
    epilog=EXIT_STATUSES,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # `main` prints what went wrong
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog=EXIT_STATUSES)
def export(
    context: typer.Context,
    target: options.TargetName = None,
    model: options.Model = None,
    checkpoint: options.Checkpoint = None,
    data: options.Data = None,
    max_latency: options.MaxLatency = None,
    min_speedup: options.MinSpeedup = None,
    max_size: options.MaxSize = None,
    max_memory: options.MaxMemory = None,
    max_drop: options.MaxDrop = None,
    allow_estimates: options.AllowEstimates = None,
    search: options.Method = None,
    recipe: options.RecipeText = None,
    policy: options.PolicyFile = None,
    kernels: options.Kernels = None,
    order: options.Order = None,
    importance: options.Importance = None,
    evaluations: options.EvaluationCount = None,
    epochs: options.Epochs = None,
    augment: options.Augment = None,
    post_training: options.PostTrainingSteps = None,
    fp16_check: options.Fp16Check = None,
    workers: options.Workers = None,
    seed: options.Seed = None,
    threads: options.Threads = None,
    batch: options.Batch = None,
    host: options.Host = None,
    provider: options.ProviderName = None,
    host_python: options.HostPython = None,
    host_trtexec: options.HostTrtexec = None,
    tensorboard: options.Tensorboard = None,
    out: options.Out = None,
    resume: options.Resume = None,
    config: options.Config = None,
) -> ExitStatus:
    """Compress a trained network for a device, write the file, and measure it."""
    from hirelc_deploy.config import export_settings

    # the parameters are declared for the command line; they are read together, by name
    given = {name: value for name, value in context.params.items() if name != "config"}
    settings = export_settings(given, config)

    from hirelc_deploy import pipeline

    return _close(pipeline.export(settings))


@app.command(epilog=EXIT_STATUSES)
def verify(
    folder: options.Artifact,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Where the data of the export lies by now: digits, FILE.npz, a folder of images, or FILE.py:callable. "
            "Default: where it lay then. Other data is refused.",
            rich_help_panel=options.INPUT,
        ),
    ] = None,
    allow_estimates: options.AllowEstimates = None,
    host: options.Host = None,
    provider: options.ProviderName = None,
    host_python: options.HostPython = None,
    host_trtexec: options.HostTrtexec = None,
) -> ExitStatus:
    """Measure an artifact again, on this machine or on its device, and judge it by the limits it was exported with."""
    from hirelc_deploy import verification
    from hirelc_deploy.config import Elsewhere

    elsewhere = Elsewhere(host, provider, host_python, host_trtexec)
    if elsewhere:
        return _close(
            verification.verify_elsewhere(folder, elsewhere, allow_estimates=bool(allow_estimates), data=data)
        )
    return _close(verification.verify(folder, allow_estimates=bool(allow_estimates), data=data))


@app.command(epilog=EXIT_STATUSES)
def gate(
    folder: options.Artifact,
    max_latency: options.MaxLatency = None,
    min_speedup: options.MinSpeedup = None,
    max_size: options.MaxSize = None,
    max_memory: options.MaxMemory = None,
    max_drop: options.MaxDrop = None,
    allow_estimates: options.AllowEstimates = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the verdict as JUnit XML.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the verdict as Markdown.")] = None,
) -> ExitStatus:
    """Judge an artifact by its recorded figures, and check that its files are unchanged; nothing is run.

    The limits that it was exported with hold; one that is given takes the place of its own.
    """
    from hirelc_deploy import console
    from hirelc_deploy.budget import Budget
    from hirelc_deploy.config import read_options
    from hirelc_deploy.rundir import write_atomic
    from hirelc_deploy.verify import judge, junit as formats, manifest as manifests

    given = read_options({"max_latency": max_latency, "max_size": max_size, "max_memory": max_memory})
    budget = Budget(
        latency_ms=given["max_latency_ms"],
        speedup=min_speedup,
        size_bytes=given["max_size_bytes"],
        memory_bytes=given["max_memory_bytes"],
        drop=max_drop,
    )
    verdict = judge.gate(folder, budget, bool(allow_estimates))
    name, unit = folder.resolve().name, manifests.read(folder).task.unit
    summary = formats.markdown(verdict, title=name, unit=unit)
    console.show(summary)
    if markdown is not None:
        write_atomic(markdown, summary.encode())
    if junit is not None:
        write_atomic(junit, formats.junit(verdict, suite=name, unit=unit).encode())
    return verdict.status


@app.command()
def compare(
    context: typer.Context,
    target: options.TargetName = None,
    model: options.Model = None,
    checkpoint: options.Checkpoint = None,
    data: options.Data = None,
    max_latency: options.MaxLatency = None,
    min_speedup: options.MinSpeedup = None,
    max_size: options.MaxSize = None,
    max_drop: options.MaxDrop = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="METHODS", help="Whatever is to be compared, with commas between.", rich_help_panel=options.CHOICE
        ),
    ] = "hierarchical,recipe,greedy,knapsack,evolution,random,scratch",
    seeds: Annotated[int, typer.Option(metavar="N", help="Runs of each method.", rich_help_panel=options.TUNING)] = 1,
    kernels: options.Kernels = None,
    order: options.Order = None,
    importance: options.Importance = None,
    evaluations: options.EvaluationCount = None,
    epochs: options.Epochs = None,
    workers: options.Workers = None,
    seed: options.Seed = None,
    threads: options.Threads = None,
    batch: options.Batch = None,
    tensorboard: options.Tensorboard = None,
    out: options.Out = None,
    resume: options.Resume = None,
    config: options.Config = None,
) -> ExitStatus:
    """Let methods search side by side, with the same evaluations, and write one table and one plot into DIR."""
    from hirelc_deploy.config import export_settings

    given = {name: value for name, value in context.params.items() if name not in ("config", "methods", "seeds")}
    settings = export_settings(given, config)

    from hirelc_deploy import compare as comparing, console

    names = [name.strip() for name in methods.split(",")]
    console.show(comparing.rich_table(comparing.compare(settings, names, seeds)))
    return ExitStatus.OK


@app.command()
def report(folder: options.Artifact) -> ExitStatus:
    """Show an artifact's figures and write its report.html again."""
    from hirelc_deploy import console, report as reports
    from hirelc_deploy.verify import manifest as manifests

    manifest = manifests.read(folder)
    reports.write(manifest, folder)
    console.show(reports.closing_table(manifest))
    return ExitStatus.OK


@app.command(epilog=EXIT_STATUSES)
def profile(
    target: Annotated[str, typer.Option(metavar="NAME", help="The device: a name from `targets`, or FILE.toml.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Measure all that policies of this network need; its weights do not matter."),
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="SPEC", help="What the network reads, as for export.")] = None,
    input: Annotated[
        str | None, typer.Option(metavar="SHAPE", help="The shape of one example instead of --data: 3x224x224.")
    ] = None,
    shapes: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="Measure these kernels instead: op,attributes,operands,compute."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv",
            help="Where to write. Default: the user's cache, or beside FILE.toml for a target of your own.",
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(metavar="USER@DEVICE", help="Measure there, over ssh; it needs Python, numpy and onnxruntime."),
    ] = None,
    host_python: Annotated[
        str, typer.Option(metavar="PATH", help="The device's Python that has the runtime.")
    ] = "python3",
    threads: Annotated[int, typer.Option(metavar="N", help="Threads of the runtime.")] = 1,
    batch: Annotated[int, typer.Option(metavar="N", help="Examples an inference.")] = 1,
    max_time: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Stop after so long: 300s, 5min. Kernels are measured from coarse to fine."),
    ] = None,
) -> ExitStatus:
    """Measure how long the kernels of a network take on a target, and keep it in the target's table.

    What the table has is not measured again; a profile that was stopped goes on.
    """
    from hirelc_deploy import console, tables
    from hirelc_deploy.config import parse_duration_ms

    settings = tables.ProfileSettings(
        target=target,
        model=model,
        data=data,
        input=input,
        shapes=shapes,
        table=table,
        host=host,
        host_python=host_python,
        threads=threads,
        batch=batch,
        seconds=None if max_time is None else parse_duration_ms(max_time) / 1e3,
    )
    console.show(str(tables.profile(settings)))
    return ExitStatus.OK


@app.command()
def targets(
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw latency over channels from the table of --target instead."),
    ] = None,
    target: Annotated[str, typer.Option(metavar="NAME", help="Whose table is drawn.")] = "host",
) -> ExitStatus:
    """List the devices, and what each can run."""
    from hirelc_deploy import console
    from hirelc_deploy.profiles import load_target, target_names

    if plot is not None:
        from hirelc_deploy import tables

        tables.plot(target, plot)
        return ExitStatus.OK
    console.show(console.targets_table(load_target(name) for name in target_names()))
    return ExitStatus.OK


@app.command(epilog=EXIT_STATUSES)
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the artifact.")] = Path("out/demo"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that was interrupted.")] = False,
) -> ExitStatus:
    """Export a small trained network on data that is installed with this program: no download, a few minutes."""
    from hirelc_deploy import pipeline

    return _close(pipeline.demo(out, resume=resume))


def _close(outcome: "Outcome") -> ExitStatus:
    from hirelc_deploy import console
    from hirelc_deploy.report import closing_table

    console.show(closing_table(outcome.manifest))
    return outcome.status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, by default that of `sys.argv`, and return its exit status."""
    # torch's threads spin while they wait for one another: beside other work that makes training four times as long
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):  # a terminal without some sign is no reason to end
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        status = app(arguments, prog_name=NAME, standalone_mode=False)
    except UserError as error:
        return _complain(error)
    except typer.TyperException as error:  # a mistyped option or the like; the library would make it status 2
        if not error.format_message():  # no verb at all: the library has printed the help
            return ExitStatus.USER_ERROR
        command = getattr(getattr(error, "ctx", None), "command_path", NAME)
        return _complain(UserError(error.format_message(), fix=f"{command} --help lists what can be given"))
    except Exception:  # ours, whatever it is: shown whole, with a status that no other outcome has
        traceback.print_exc()
        print(f"{NAME} {__version__}: this is an error of the program, not yours; please report it.", file=sys.stderr)
        return ExitStatus.INTERNAL
    if status == INTERRUPTED:  # the library turns KeyboardInterrupt into this status
        print(f"{NAME}: interrupted; a search or an export goes on with --resume, a profile as it is.", file=sys.stderr)
    return status


def _complain(error: UserError) -> ExitStatus:
    from hirelc_deploy import console

    console.complain(error)
    return ExitStatus.USER_ERROR
