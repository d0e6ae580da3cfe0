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

from hirelc_deploy import __version__
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

INPUT, LIMITS, CHOICE, TUNING, RUN = "What to export", "Limits", "How to choose", "Effort", "Run"

MaxLatency = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Median time of one inference, such as 5ms or 800us.", rich_help_panel=LIMITS),
]
MinSpeedup = Annotated[
    float | None,
    typer.Option(metavar="RATIO", help="How much faster than the model's own fp32 file.", rich_help_panel=LIMITS),
]
MaxSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Bytes of the file, such as 400KB or 2MiB.", rich_help_panel=LIMITS),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory of an inference, such as 8MB.", rich_help_panel=LIMITS),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        metavar="POINTS",
        help="What the score may lose, in its own unit: percentage points for a classifier.",
        rich_help_panel=LIMITS,
    ),
]
AllowEstimates = Annotated[
    bool | None,
    typer.Option(
        "--allow-estimates",
        help="Judge a limit on an estimate where nothing can be measured, instead of status 3.",
        rich_help_panel=LIMITS,
    ),
]
TargetName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="The device: a name from `targets`, or FILE.toml. Required.", rich_help_panel=INPUT
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="What builds the network: FILE.py:callable, package.module:callable, timm:NAME, torchvision:NAME or "
        "hf:FOLDER. Required.",
        rich_help_panel=INPUT,
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Its trained weights: .safetensors, .pt or .pth. Left out, the network is taken as it is built.",
        rich_help_panel=INPUT,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Training and test data: digits, FILE.npz, a folder of images, or FILE.py:callable that returns a "
        "Task. Required.",
        rich_help_panel=INPUT,
    ),
]
Kernels = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Number formats of your own, one file a format.", rich_help_panel=CHOICE),
]
Order = Annotated[
    str | None,
    typer.Option(
        metavar="ORDER",
        help="prune-first (default): channels go, then formats are trained. quantize-first: formats are trained on the "
        "whole network, then channels go, by its quantised weights. auto: the weaker perturbation first.",
        rich_help_panel=CHOICE,
    ),
]
Importance = Annotated[
    str | None,
    typer.Option(
        metavar="MEASURE",
        help="Which channels go first: those that others tell best, obs (default), those with the smallest weights, "
        "l2, or the smallest effect on the loss, taylor.",
        rich_help_panel=CHOICE,
    ),
]
Tensorboard = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Write what the search does for TensorBoard: evaluations, rewards and losses of agents.",
        rich_help_panel=RUN,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Processes, one thread each, that fine-tune policies side by side, and make evaluations for hierarchical, "
        "random and modelopt; the others choose each by the last. 1 (default) has all threads.",
        rich_help_panel=TUNING,
    ),
]
EvaluationCount = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Try at most N candidates. Default: 32 in a search, as many as needed for recipe.",
        rich_help_panel=TUNING,
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(metavar="N", help="Epochs of fine-tuning (default 4); 0 trains nothing.", rich_help_panel=TUNING),
]
Seed = Annotated[
    int | None,
    typer.Option(metavar="N", help="Of everything that is drawn at random (default 0).", rich_help_panel=TUNING),
]
Threads = Annotated[
    int | None,
    typer.Option(metavar="N", help="Threads of the measured inference (default 1).", rich_help_panel=RUN),
]
Batch = Annotated[
    int | None,
    typer.Option(metavar="N", help="Examples of the measured inference (default 1).", rich_help_panel=RUN),
]
Host = Annotated[
    str | None,
    typer.Option(
        metavar="USER@DEVICE",
        help="Measure on this device, over ssh. For TensorRT the engine is built there; for ONNX Runtime it needs "
        "Python, numpy and onnxruntime.",
        rich_help_panel=RUN,
    ),
]
ProviderName = Annotated[
    str | None,
    typer.Option(
        "--provider",
        metavar="NAME",
        help="Measure by this execution provider of ONNX Runtime, on the host or here: cuda, tensorrt, tensorrt-rtx or "
        "openvino.",
        rich_help_panel=RUN,
    ),
]
HostPython = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="The Python that has ONNX Runtime, on the host (default python3), or here for a provider (default this "
        "one).",
        rich_help_panel=RUN,
    ),
]
HostTrtexec = Annotated[
    str | None,
    typer.Option(
        metavar="COMMAND",
        help="The device's trtexec, if it is not found by itself (default trtexec).",
        rich_help_panel=RUN,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where to write the artifact (default out/export).", rich_help_panel=RUN),
]
Resume = Annotated[
    bool | None,
    typer.Option("--resume", help="Go on with the run in DIR that was interrupted.", rich_help_panel=RUN),
]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.toml",
        help="Read these options from a file, by the same names; the command line wins.",
        rich_help_panel=RUN,
    ),
]
Artifact = Annotated[Path, typer.Argument(metavar="DIR", help="An artifact folder, as `export` writes it.")]


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
    target: TargetName = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    data: Data = None,
    max_latency: MaxLatency = None,
    min_speedup: MinSpeedup = None,
    max_size: MaxSize = None,
    max_memory: MaxMemory = None,
    max_drop: MaxDrop = None,
    allow_estimates: AllowEstimates = None,
    search: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="What chooses channels and formats: hierarchical, greedy, knapsack, evolution and random search layer "
            "by layer; recipe and greedy-order try uniform recipes. Default: hierarchical; recipe where nothing is "
            "limited or nothing is fine-tuned.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Build one uniform recipe, without a search: keep=50%,storage=int4,compute=int8. Storage is int2 to "
            "int8, log3, float4, codebook3, vector1 and so on, with /tensor, /channel or /group32; compute is int8, "
            "int8_dynamic, fp32 or fastest, which is measured layer by layer.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Build the policy of a policy.json, without a search.", rich_help_panel=CHOICE
        ),
    ] = None,
    kernels: Kernels = None,
    order: Order = None,
    importance: Importance = None,
    evaluations: EvaluationCount = None,
    epochs: Epochs = None,
    augment: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Change train images at random in fine-tuning: flip (left and right), shift (up to a twelfth), or "
            "flip,shift. Default: none. A few epochs can mend less with it.",
            rich_help_panel=TUNING,
        ),
    ] = None,
    post_training: Annotated[
        str | None,
        typer.Option(
            metavar="STEPS",
            help="How weights are corrected where nothing is fine-tuned: "
            "statistics,equalise,smooth,feed-back,biases (default: all of them) or none. With modelopt as well, smooth "
            "tries what nvidia-modelopt's SmoothQuant and AWQ propose.",
            rich_help_panel=TUNING,
        ),
    ] = None,
    fp16_check: Annotated[
        str | None,
        typer.Option(
            metavar="BY",
            help="Who says which layers and operators stay in fp32 where fp16 would ruin them (TensorRT): measured "
            "(default; by their values on train examples), or autocast (nvidia-modelopt's).",
            rich_help_panel=TUNING,
        ),
    ] = None,
    workers: Workers = None,
    seed: Seed = None,
    threads: Threads = None,
    batch: Batch = None,
    host: Host = None,
    provider: ProviderName = None,
    host_python: HostPython = None,
    host_trtexec: HostTrtexec = None,
    tensorboard: Tensorboard = None,
    out: Out = None,
    resume: Resume = None,
    config: Config = None,
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
    folder: Artifact,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Where the data of the export lies by now: digits, FILE.npz, a folder of images, or FILE.py:callable. "
            "Default: where it lay then. Other data is refused.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    allow_estimates: AllowEstimates = None,
    host: Host = None,
    provider: ProviderName = None,
    host_python: HostPython = None,
    host_trtexec: HostTrtexec = None,
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
    folder: Artifact,
    max_latency: MaxLatency = None,
    min_speedup: MinSpeedup = None,
    max_size: MaxSize = None,
    max_memory: MaxMemory = None,
    max_drop: MaxDrop = None,
    allow_estimates: AllowEstimates = None,
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
    target: TargetName = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    data: Data = None,
    max_latency: MaxLatency = None,
    min_speedup: MinSpeedup = None,
    max_size: MaxSize = None,
    max_drop: MaxDrop = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="METHODS", help="Whatever is to be compared, with commas between.", rich_help_panel=CHOICE
        ),
    ] = "hierarchical,recipe,greedy,knapsack,evolution,random,scratch",
    seeds: Annotated[int, typer.Option(metavar="N", help="Runs of each method.", rich_help_panel=TUNING)] = 1,
    kernels: Kernels = None,
    order: Order = None,
    importance: Importance = None,
    evaluations: EvaluationCount = None,
    epochs: Epochs = None,
    workers: Workers = None,
    seed: Seed = None,
    threads: Threads = None,
    batch: Batch = None,
    tensorboard: Tensorboard = None,
    out: Out = None,
    resume: Resume = None,
    config: Config = None,
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
def report(folder: Artifact) -> ExitStatus:
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
    """Run one command, by default that of `sys.argv`, and return its exit status (DESIGN: the command line)."""
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
