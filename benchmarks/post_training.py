"""What each correction without training gains: python benchmarks/post_training.py

Scores on the search split of the Fashion-MNIST networks in PyTorch, under their number formats, before anything is
fine-tuned: with no step of `--post-training`, with each alone, with all of them, and with what nvidia-modelopt
proposes as well where HIRELC_DEPLOY_MODELOPT names a Python that has it.  Writes benchmarks/results/post_training.json;
`python benchmarks/number_formats.py write` puts the table on its page.
"""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _bench import RESULTS, machine, markdown, save, workbench

from hirelc_deploy import modelopt
from hirelc_deploy.config import MODELOPT, POST_TRAINING_STEPS
from hirelc_deploy.search.recipe import Recipe

RESULT = RESULTS / "post_training.json"
OUT = Path("out/benchmarks/post_training")

RECIPES = {
    "depthwise": (
        "storage=int4/tensor,compute=fp32",
        "storage=int4,compute=fp32",
        "storage=int3,compute=fp32",
        "storage=int8/tensor,compute=int8",
        "keep=75%,storage=int4,compute=fp32",
    ),
    "vit": ("storage=int3,compute=fp32", "storage=int2,compute=fp32"),
    "wide": ("storage=int3,compute=fp32",),
}

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    **{f"only {step}": (step,) for step in POST_TRAINING_STEPS},
    "all": POST_TRAINING_STEPS,
    "all, modelopt": (*POST_TRAINING_STEPS, MODELOPT),
}


def scores(network: str, out: Path) -> dict[str, dict[str, float]]:
    """By recipe and variant, in percent; `fp32` is the original's."""
    found: dict[str, dict[str, float]] = {recipe: {} for recipe in RECIPES[network]}
    for name, steps in VARIANTS.items():
        if MODELOPT in steps and modelopt.VARIABLE not in os.environ:
            continue
        with workbench(network, out / network / name.replace(" ", "-"), post_training=steps) as bench:
            for recipe in RECIPES[network]:
                if "statistics" in name and "keep" not in recipe:
                    continue  # they are estimated again only where channels are gone
                found[recipe]["fp32"] = bench.scoring.original
                found[recipe][name] = bench.compressed(Recipe.parse(recipe).policy(bench.space)).simulated_score
                print(f"{network} {recipe}, {name}: {found[recipe][name]:.2f}", flush=True)
    return found


def table(networks: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """In Markdown."""
    rows = (
        (f"`{network}`", f"`{recipe}`", *(f"{found[v]:.2f}" if v in found else "-" for v in ("fp32", *VARIANTS)))
        for network, recipes in networks.items()
        for recipe, found in recipes.items()
    )
    return markdown(("network", "recipe", "fp32", *VARIANTS), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    record: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"networks": {}}
    record |= {"machine": machine(), "split": "search"}
    for network in options.networks:
        record["networks"][network] = scores(network, options.out)
        save(record, RESULT)
    print(table(record["networks"]))


if __name__ == "__main__":
    main()
