"""A small trained network and its data, inside the package: `hirelc-deploy demo` needs no download."""

from pathlib import Path

MODEL = "hirelc_deploy.demo.network:network"
CHECKPOINT = Path(__file__).parent / "digits.safetensors"
DATA = "digits"

EVALUATIONS = 16
EPOCHS = 20
MAX_DROP = 1.5
"""In points: five of the 359 images of the test split."""
