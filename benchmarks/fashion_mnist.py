"""Export the Fashion-MNIST networks: python benchmarks/fashion_mnist.py wide small

    python benchmarks/fashion_mnist.py NETWORK…                          by a recipe that was chosen by hand
    python benchmarks/fashion_mnist.py NETWORK… --search hierarchical    searched, with a limit on the drop alone
    python benchmarks/fashion_mnist.py NETWORK… --search recipe          the best uniform recipe, with as many
                                                                         evaluations and the same fine-tuning
    python benchmarks/fashion_mnist.py NETWORK… --search … --goals       with the size and the speed that the project
                                                                         has set itself as limits as well
    python benchmarks/fashion_mnist.py NETWORK --policy FILE --epochs 30     a policy that was found, trained for longer

Artifacts go to out/benchmarks/NAME, the manifest of each to benchmarks/results/export_NAME_CPU.json, where NAME is the
network's, with _SEARCH and _goals or _policy behind it, and CPU is avx2 or vnni.  Run it on a quiet machine:
fine-tuning may share the cores, the figures are taken at the end.
"""

import argparse
from pathlib import Path
from typing import Any

from _bench import record_export

from hirelc_deploy.config import ExportSettings
from hirelc_deploy.pipeline import export

EXAMPLE = Path("examples/fashion_mnist")

# Limits for what a recipe by hand reaches: 25 times smaller and 4 times faster, 9 and 2 times.
BY_HAND: dict[str, dict[str, Any]] = {
    "wide": {
        "recipe": "keep=25%,compute=int8",
        "epochs": 12,
        "max_size_bytes": 111_000,
        "min_speedup": 4.0,
        "max_drop": 1.0,
    },
    "small": {
        "recipe": "keep=50%,compute=int8",
        "epochs": 6,
        "max_size_bytes": 77_500,
        "min_speedup": 2.0,
        "max_drop": 1.0,
    },
}

MAX_DROP = {"wide": 0.5, "small": 1.0, "depthwise": 1.0, "vit": 1.0, "small14": 1.0}
"""In points, of what is searched."""

GOALS: dict[str, dict[str, Any]] = {
    "wide": {"max_size_bytes": 30_900, "min_speedup": 10.0, "epochs": 12},
    "small": {"max_size_bytes": 19_980, "min_speedup": 5.0},
    "depthwise": {"max_size_bytes": 67_800, "min_speedup": 2.0},
    "vit": {"max_size_bytes": 224_300, "min_speedup": 1.6},
}
"""90, 35, 12 and 12 times smaller than the fp32 files; what is so much smaller and faster needs longer training."""

EPOCHS = {"wide": 6, "small": 12, "depthwise": 6, "vit": 2, "small14": 6}
"""Of each policy that a search finishes: what fits into an hour or so on two cores."""


OUT = Path("out/benchmarks")


def searched(network: str, method: str) -> dict[str, Any]:
    """As a search finds it, with its limit on the drop."""
    return {"search": method, "epochs": EPOCHS[network], "max_drop": MAX_DROP[network]}


def how_of(network: str, options: argparse.Namespace) -> dict[str, Any]:
    """By its recipe, by a policy, or searched, with its limits."""
    if options.policy is not None:
        return {"policy": options.policy, "epochs": options.epochs, "max_drop": MAX_DROP[network]}
    if options.search is None:
        return BY_HAND[network]
    return searched(network, options.search) | (GOALS[network] if options.goals else {})


def name_of(network: str, options: argparse.Namespace) -> str:
    """Of the artifact and its result file."""
    if options.policy is not None:
        return f"{network}_policy"
    return network if options.search is None else f"{network}_{options.search}{'_goals' * options.goals}"


def settings_of(network: str, how: dict[str, Any], *, out: Path, workers: int) -> ExportSettings:
    """The network from its checkpoint."""
    task = "task14" if network.endswith("14") else "task"
    return ExportSettings(
        target="host",
        model=f"{EXAMPLE}/networks.py:{network}",
        checkpoint=EXAMPLE / "checkpoints" / f"{network}.safetensors",
        data=f"{EXAMPLE}/task.py:{task}",
        out=out,
        workers=workers,
        resume=True,
        **how,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("networks", nargs="+", choices=MAX_DROP)
    parser.add_argument("--search", choices=("hierarchical", "recipe"))
    parser.add_argument("--goals", action="store_true")
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--epochs", type=int, help="of --policy")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    for network in options.networks:
        if options.policy is None and options.search is None and network not in BY_HAND:
            parser.error(f"there is no recipe for {network}: give --search")
        if (options.policy is None) != (options.epochs is None) or (options.policy and options.search):
            parser.error("--policy and --epochs go together, and without --search")
        if options.goals and (options.search is None or network not in GOALS):
            parser.error(f"--goals is for a search of {', '.join(GOALS)}")
        name = name_of(network, options)
        settings = settings_of(network, how_of(network, options), out=options.out / name, workers=options.workers)
        outcome = export(settings)
        record_export(outcome.folder, name)
        print(f"{name}: {outcome.manifest.verdict}, {outcome.folder}")


if __name__ == "__main__":
    main()
