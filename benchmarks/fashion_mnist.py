"""Export the Fashion-MNIST networks by search: python benchmarks/fashion_mnist.py wide small

With --search recipe the best uniform recipe is looked for instead, with as many evaluations and the same fine-tuning.
Artifacts go to out/benchmarks/NAME, the manifest of each to benchmarks/results/export_NAME.json.  Run it on a
quiet machine: the search may share the cores, the figures are taken at the end.
"""

import argparse
import shutil
from pathlib import Path

from hirelc_deploy.config import ExportSettings
from hirelc_deploy.pipeline import Outcome, export

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = Path("examples/fashion_mnist")
RESULTS = ROOT / "benchmarks" / "results"

MAX_DROP = {"wide": 0.5, "small": 1.0, "depthwise": 1.0, "vit": 1.0}
"""In points: those that the project has set itself."""

EPOCHS = 6
"""Of each policy that is finished."""


def run(name: str, search: str, out: Path) -> Outcome:
    """The network as a search finds it, judged by its drop."""
    return export(
        ExportSettings(
            target="host",
            model=f"{EXAMPLE}/networks.py:{name}",
            checkpoint=EXAMPLE / "checkpoints" / f"{name}.safetensors",
            data=f"{EXAMPLE}/task.py:task",
            search=search,
            epochs=EPOCHS,
            max_drop=MAX_DROP[name],
            out=out,
            resume=True,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("networks", nargs="+", choices=MAX_DROP)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    parser.add_argument("--search", choices=("hierarchical", "recipe"), default="hierarchical")
    options = parser.parse_args()
    for network in options.networks:
        name = network if options.search == "hierarchical" else f"{network}_{options.search}"
        outcome = run(network, options.search, options.out / name)
        shutil.copy(outcome.folder / "manifest.json", RESULTS / f"export_{name}.json")
        print(f"{name}: {outcome.manifest.verdict}, {outcome.folder}")


if __name__ == "__main__":
    main()
