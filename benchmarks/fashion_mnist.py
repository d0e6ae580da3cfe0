"""Export the Fashion-MNIST networks by recipe, with budgets: python benchmarks/fashion_mnist.py wide small

Artifacts go to out/benchmarks/NAME, the manifest of each to benchmarks/results/export_NAME.json.  Run it on a
quiet machine: fine-tuning may share the cores, the figures are taken at the end.
"""

import argparse
import shutil
from pathlib import Path

from hirelc_deploy.config import ExportSettings
from hirelc_deploy.pipeline import Outcome, export

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = Path("examples/fashion_mnist")
RESULTS = ROOT / "benchmarks" / "results"

RECIPES = {"wide": "keep=25%,compute=int8", "small": "keep=50%,compute=int8"}

# Size and speed are those that the project has set itself for each network: 25 and 4 times, 9 and 2 times.
BUDGETS = {
    "wide": {"max_size_bytes": 111_000, "min_speedup": 4.0, "max_drop": 1.0},
    "small": {"max_size_bytes": 77_500, "min_speedup": 2.0, "max_drop": 1.0},
}
EPOCHS = {"wide": 12, "small": 6}


def run(name: str, out: Path) -> Outcome:
    """The network by its recipe, judged by its budgets."""
    return export(
        ExportSettings(
            target="host",
            model=f"{EXAMPLE}/networks.py:{name}",
            checkpoint=EXAMPLE / "checkpoints" / f"{name}.safetensors",
            data=f"{EXAMPLE}/task.py:task",
            recipe=RECIPES[name],
            epochs=EPOCHS[name],
            out=out,
            resume=True,
            **BUDGETS[name],  # type: ignore[arg-type]
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("networks", nargs="+", choices=BUDGETS)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    options = parser.parse_args()
    for name in options.networks:
        outcome = run(name, options.out / name)
        shutil.copy(outcome.folder / "manifest.json", RESULTS / f"export_{name}.json")
        print(f"{name}: {outcome.manifest.verdict}, {outcome.folder}")


if __name__ == "__main__":
    main()
