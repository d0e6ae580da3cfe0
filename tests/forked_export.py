"""The command line in processes that start at once: what takes seconds to import and warm up is done here, once."""

import exporting
import torch
from torch import nn

from hirelc_deploy import cli
from hirelc_deploy.compress import distil
from hirelc_deploy.exporters import load_runtime


def run(arguments: list[str], checkpoint_seconds: float) -> None:
    """One command, with checkpoints so often that a kill falls between two of them."""
    distil.CHECKPOINT_SECONDS = checkpoint_seconds
    raise SystemExit(int(cli.main(arguments)))


exporting.digits()
load_runtime("onnxruntime").float_graph(nn.Linear(2, 2).eval(), {"x": torch.zeros(2, 2).numpy()}, opset=18)
