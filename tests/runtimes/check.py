"""Does the ONNX Runtime that is installed decode weights once, when a file is loaded, and to the right values?

    python tests/runtimes/check.py FOLDER      as `write.py` has made it

Needs numpy and onnxruntime and nothing else, since old versions come with little else.  A file of codes is compared
with its twin of plain weights in the same runtime, bit for bit: the kernels of two versions may well differ.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime

# Of the largest output.  Kernels of two versions may add up in other orders, and a uint8 output be a step off by that.
TOLERANCE = 2 / 255

Outputs = dict[str, np.ndarray]


def main(folder: Path) -> int:
    """0, or 1 with a line on the first file that is not as it should be."""
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    inputs = dict(np.load(folder / "inputs.npz"))
    runtime = f"onnxruntime {onnxruntime.__version__}"
    for name, computes in expected["files"].items():
        try:
            wrong = difference(folder / name, inputs, computes, expected["compute_of"], expected["decoding"])
        except Exception as error:  # whatever a runtime raises at what it cannot load
            wrong = f"cannot be run: {str(error).splitlines()[0]}"
        if wrong:
            print(f"{runtime}: {name} {wrong}")
            return 1
    print(f"{runtime}: {len(expected['files'])} files decode to the right values and run as asked")
    return 0


def difference(
    folder: Path, inputs: Outputs, computes: dict[str, int], compute_of: dict[str, str], decoding: list[str]
) -> str | None:
    """The first thing that is wrong, in words."""
    outputs, operators = run(folder / "codes.onnx", inputs)
    plain, plain_operators = run(folder / "plain.onnx", inputs)
    if left := sorted(set(decoding) & set(operators)):
        return f"decodes weights at every run, with {', '.join(left)}"
    if operators != plain_operators:
        return f"runs {dict(operators)}, and with plain weights {dict(plain_operators)}"
    found = Counter(compute_of[operator] for operator in operators.elements() if operator in compute_of)
    if found != computes:
        return f"computes so many layers in {dict(found)} and not in {computes}"
    written = np.load(folder / "outputs.npz")
    for layer, output in outputs.items():
        if not np.array_equal(output, plain[layer]):
            return f"gives another output for {layer} than with plain weights"
        if np.abs(output - written[layer]).max() > TOLERANCE * np.abs(written[layer]).max():
            return f"gives another output for {layer} than where it was written"
    return None


def run(path: Path, inputs: Outputs) -> tuple[Outputs, Counter[str]]:
    """Outputs, and how often each operator ran, from the runtime's own profile."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_suffix(""))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, inputs), strict=True))
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return outputs, Counter(e["args"]["op_name"] for e in events if e["name"].endswith("_kernel_time"))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
