"""Sizes told before anything is built, against files: python benchmarks/size_prediction.py

Random policies of each network: every layer any storage and compute, every group any count.  The file is written with
untrained weights, since no size depends on values.  Writes benchmarks/results/size_prediction.json; some 15 minutes.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _bench import RESULTS, save, workbench

from hirelc_deploy.policy import Policy
from hirelc_deploy.search.space import SearchSpace

RESULT = RESULTS / "size_prediction.json"
NETWORKS = ("wide", "depthwise", "vit")


def random_policy(space: SearchSpace, random: np.random.Generator) -> Policy:
    """Any choice of every layer and group, all as likely; of the counts those above zero."""
    precisions = {layer: choices[random.integers(len(choices))] for layer, choices in space.layers.items()}
    keep = {group: int(random.choice([count for count in counts if count])) for group, counts in space.groups.items()}
    return Policy(precisions, keep)


def errors(network: str, policies: int, out: Path) -> list[dict[str, float]]:
    """Predicted and real bytes of every policy."""
    random = np.random.default_rng(0)
    found = []
    with workbench(network, out / network) as bench:
        for number in range(policies):
            policy = random_policy(bench.space, random)
            predicted, real = bench.files.predicted_bytes(policy), len(bench.files.draft(policy).data)
            found.append({"predicted": predicted, "bytes": real, "error_pct": 100 * (predicted - real) / real})
            print(f"{network} {number + 1}/{policies}: {predicted} predicted, {real} written", flush=True)
    return found


def summary(record: Mapping[str, Any]) -> str:
    """For the page of number formats."""
    worst = ", ".join(f"{error:.2g} % on `{network}`" for network, error in record["worst_error_pct"].items())
    return (
        "## Sizes told before anything is built\n\n"
        f"{record['policies']} random policies of each network, every layer any storage and compute, every group any "
        "count, told from shapes\nalone and then written (`python benchmarks/size_prediction.py`).  The worst errors: "
        f"{worst}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--policies", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/size_prediction"))
    options = parser.parse_args()
    found = {network: errors(network, options.policies, options.out) for network in NETWORKS}
    worst = {network: max((abs(each["error_pct"]) for each in seen), default=0.0) for network, seen in found.items()}
    record = {"policies": options.policies, "worst_error_pct": worst, "networks": found}
    save(record, RESULT)
    print(json.dumps(worst, indent=2))


if __name__ == "__main__":
    main()
