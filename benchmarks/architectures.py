"""Networks that the pass was not written for: which are cut, written and computed in integers.

    python benchmarks/architectures.py              all, some ten minutes; then writes docs/architectures.md
    python benchmarks/architectures.py swin bert    these anew
    python benchmarks/architectures.py page         the page alone

Small networks of transformers' architectures with random weights: half of every prune group's units are removed, and
every layer that has an integer kernel computes in int8.  Nothing is trained or scored; files are held against what
PyTorch computes.  The record is benchmarks/results/architectures.json.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers as t
from _architectures import NETWORKS, Inputs
from _bench import RESULTS, ROOT, machine, markdown, save
from torch import nn

from hirelc_deploy import graph
from hirelc_deploy.compress.distil import as_tensors
from hirelc_deploy.compress.fold import fold, foldable
from hirelc_deploy.compress.grids import fitted
from hirelc_deploy.compress.importance import scores
from hirelc_deploy.compress.prune import prune
from hirelc_deploy.cpu import cpu_flags
from hirelc_deploy.errors import UserError
from hirelc_deploy.exporters import load_runtime
from hirelc_deploy.graph.shapes import parameters_after
from hirelc_deploy.graph.trial import relative_error
from hirelc_deploy.policy import INT8, Policy, Precision
from hirelc_deploy.profiles import load_target

RESULT, PAGE = RESULTS / "architectures.json", ROOT / "docs" / "architectures.md"
OPSET = 18
INTEGER = ("Conv1d", "Conv2d", "Linear")
"""Layers that have an integer kernel."""
SPREAD = 1.4
"""Of random weights, times fan_in ** -0.5: with transformers' own 0.02 deep networks compute nothing but biases."""


def build(name: str) -> tuple[nn.Module, Inputs]:
    """In eval mode, with weights that let every layer say something."""
    kind, configuration, settings, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = kind(configuration(num_labels=4, **settings)).eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                layer.weight.normal_(std=SPREAD * layer.weight[0].numel() ** -0.5)
    return model, inputs


def row_of(name: str) -> dict[str, Any]:
    """What became of one network."""
    model, inputs = build(name)
    began = time.perf_counter()
    try:
        row = _row(model, inputs)
    except UserError as error:
        row = {"refused": str(error)}
    return {"network": name, **row, "seconds": round(time.perf_counter() - began, 1)}


def _row(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    traced = graph.trace(model, inputs)
    keep = {group.name: min(group.legal, key=lambda count: abs(count - group.total / 2)) for group in traced.groups}
    pruned = prune(model, traced, Policy({}, keep), scores(model, traced, "l2")).model
    return {
        "layers": len(traced.layers),
        "groups": len(traced.groups),
        "groups_of_heads": sum(group.kind == "heads" for group in traced.groups),
        "left_out": [f"{each.name}: {each.reason}" for each in traced.left_out],
        "parameters": parameters_after(traced, {}),
        "parameters_halved": parameters_after(traced, keep),
        "fp32": _written(model, inputs, {}),
        "halved_fp32": _written(pruned, inputs, {}),
        "halved_int8": _written(pruned, inputs, {layer.name: INT8 for layer in traced.layers if layer.op in INTEGER}),
    }


def _written(model: nn.Module, inputs: Inputs, precisions: Mapping[str, Precision]) -> dict[str, Any]:
    """A file, and how far it is from the network: |found - wanted| / |wanted| over all outputs."""
    folded = fold(model, foldable(model, as_tensors(inputs)))
    with torch.no_grad():
        wanted = graph.forward(model, as_tensors(inputs))
    runtime, largest = load_runtime("onnxruntime"), load_target("host").largest_code(cpu_flags())
    written = runtime.float_graph(folded, inputs, opset=OPSET)
    exported = runtime.write(
        written,
        precisions,
        fitted(folded, precisions, {}, largest=largest),
        seen=runtime.observe(written, precisions, [inputs]),
        largest=largest,
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(exported.data)
        found = runtime.load(path, threads=1).run(inputs)
        runs_as = runtime.runs_as(path, exported.tensors, threads=1)
    return {
        "bytes": len(exported.data),
        "error": relative_error(as_tensors(found), wanted),
        "in_integers": sum(runs_as.get(layer) == "int8" for layer in precisions),
        "asked": len(precisions),
    }


def measure(names: Sequence[str]) -> None:
    """These networks; what is known of the others is kept."""
    record = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"rows": []}
    known = {row["network"]: row for row in record["rows"]}
    for name in names:
        known[name] = row_of(name)
        print(known[name], flush=True)
        rows = [known[each] for each in NETWORKS if each in known]
        save({"machine": machine(), "transformers": t.__version__, "rows": rows}, RESULT)


def page() -> None:
    """What the record says, for docs/."""
    record = json.loads(RESULT.read_text(encoding="utf-8"))
    head = (
        "network",
        "layers",
        "in int8",
        "groups",
        "of heads",
        "left out",
        "parameters",
        "halved",
        "fp32",
        "halved, fp32",
        "int8",
    )
    rows = [
        [
            f"`{row['network']}`",
            str(row["layers"]),
            f"{row['halved_int8']['in_integers']} of {row['halved_int8']['asked']}",
            str(row["groups"]),
            str(row["groups_of_heads"]),
            str(len(row["left_out"])),
            f"{row['parameters'] / 1e3:,.0f} k",
            f"{100 * row['parameters_halved'] / row['parameters']:.0f} %",
            *(f"{row[kind]['error']:.1e}" for kind in ("fp32", "halved_fp32")),
            f"{row['halved_int8']['error']:.3f}",
        ]
        for row in record["rows"]
        if "refused" not in row
    ]
    refused = [f"- `{row['network']}`: {row['refused']}" for row in record["rows"] if "refused" in row]
    text = TEXT.format(transformers=record["transformers"], table=markdown(head, rows), count=len(rows))
    PAGE.write_text(text + "\n".join(["", "Refused:", "", *refused, ""] if refused else []), encoding="utf-8")


TEXT = """# Networks that the pass was not written for

Written by `python benchmarks/architectures.py page` from `benchmarks/results/architectures.json`; the head of that
script says what is done. {count} architectures of transformers {transformers}, small and with random weights, so
nothing is said of accuracy: it is seen that networks are cut, written, and computed in integers as they should be.

- *in int8*: layers that ONNX Runtime really computes in int8, of those that were asked to.
- *groups*: what channels can be removed from, each proved; *of heads*: those of them whose units are whole heads of an
  attention (with the columns of its table of position biases, where it has one; of grouped queries, heads of keys with
  the queries that read them); *left out*: what could not be offered, as an export says too, or is called for nothing
  (an auxiliary head).
- *halved*: parameters that stay where half of every group goes.
- *fp32*, *halved, fp32*: how far the file's outputs are from PyTorch's, relative to their size; *int8*: the same of the
  halved network, next to itself in floats. Random weights make noise larger, layer by layer, where trained ones do not;
  the outputs of `efficientnet` are so small that rounding is all there is.

{table}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="page: the page alone")
    names = parser.parse_args().networks
    if names != ["page"]:
        measure(names or list(NETWORKS))
    page()


if __name__ == "__main__":
    main()
