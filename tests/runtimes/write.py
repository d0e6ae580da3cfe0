"""Write files in every format for `check.py`: weights as codes, however small they are, and a twin of plain weights.

PYTHONPATH=tests python tests/runtimes/write.py FOLDER
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import one_layer

from hirelc_deploy.exporters.onnxruntime import COMPUTE_OF
from hirelc_deploy.kernels import load_format


def main(folder: Path) -> None:
    """A folder a file: codes.onnx, plain.onnx and today's outputs."""
    files = {}
    for name in one_layer.DECODED:
        for bits in load_format(name).bits:
            for turn, _ in enumerate(sorted(load_format(name).computes)):
                file = folder / f"{name}{bits}-{turn}"
                file.mkdir(parents=True)
                files[file.name] = write(file, name, bits, turn)
    np.savez(folder / "inputs.npz", **one_layer.case().inputs)  # type: ignore[arg-type]
    expected = {"files": files, "compute_of": COMPUTE_OF, "decoding": sorted(one_layer.DECODING)}
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


def write(folder: Path, name: str, bits: int, turn: int) -> dict[str, int]:
    """How many layers compute in what.  Each has the next granularity and compute, and in the next turn one further."""
    every = [precision for precision in one_layer.precisions(name) if precision.storage.bits == bits]
    precisions = one_layer.chosen(*every[turn:], *every[:turn])
    with one_layer.encoded(one_layer.CODES):
        written = one_layer.write(precisions)
    (folder / "codes.onnx").write_bytes(written.exported.data)
    (folder / "plain.onnx").write_bytes(written.twin)
    outputs = one_layer.run(written.exported.data, folder).outputs
    np.savez(folder / "outputs.npz", **outputs)  # type: ignore[arg-type]
    return Counter(precision.compute for precision in precisions.values())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
