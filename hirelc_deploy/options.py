"""Options that several verbs take, and those of `export`, as the command line declares and explains them."""

from pathlib import Path
from typing import Annotated

import typer

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
    typer.Option(
        metavar="SIZE",
        help="Peak memory of loading and running the file, beyond the runtime's own, such as 20MB.",
        rich_help_panel=LIMITS,
    ),
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
Method = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD",
        help="What chooses channels and formats: hierarchical, greedy, knapsack, evolution and random search layer "
        "by layer; recipe and greedy-order try uniform recipes. Default: hierarchical; recipe where nothing is "
        "limited or nothing is fine-tuned.",
        rich_help_panel=CHOICE,
    ),
]
RecipeText = Annotated[
    str | None,
    typer.Option(
        metavar="RECIPE",
        help="Build one uniform recipe, without a search: keep=50%,storage=int4,compute=int8. Storage is int2 to "
        "int8, log3, float4, codebook3, vector1 and so on, with /tensor, /channel or /group32; compute is int8, "
        "int8_dynamic, fp32 or fastest, which is measured layer by layer.",
        rich_help_panel=CHOICE,
    ),
]
PolicyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Build the policy of a policy.json, without a search.", rich_help_panel=CHOICE),
]
Augment = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Change train images at random in fine-tuning: flip (left and right), shift (up to a twelfth), or "
        "flip,shift. Default: none. A few epochs can mend less with it.",
        rich_help_panel=TUNING,
    ),
]
PostTrainingSteps = Annotated[
    str | None,
    typer.Option(
        metavar="STEPS",
        help="How weights are corrected where nothing is fine-tuned: "
        "statistics,equalise,smooth,feed-back,biases (default: all of them) or none. With modelopt as well, smooth "
        "tries what nvidia-modelopt's SmoothQuant and AWQ propose.",
        rich_help_panel=TUNING,
    ),
]
Fp16Check = Annotated[
    str | None,
    typer.Option(
        metavar="BY",
        help="Who says which layers and operators stay in fp32 where fp16 would ruin them (TensorRT): measured "
        "(default; by their values on train examples), or autocast (nvidia-modelopt's).",
        rich_help_panel=TUNING,
    ),
]
Artifact = Annotated[Path, typer.Argument(metavar="DIR", help="An artifact folder, as `export` writes it.")]
