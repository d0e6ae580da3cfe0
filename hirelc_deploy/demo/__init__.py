"""A small trained network and its data, inside the package: `hirelc-deploy demo` needs no download."""

from pathlib import Path

MODEL = "hirelc_deploy.demo.network:network"
CHECKPOINT = Path(__file__).parent / "digits.safetensors"
DATA = "digits"

RECIPE = "keep=50%,compute=int8"
EPOCHS = 20
MAX_DROP = 1.0
MIN_SPEEDUP = 1.0
MAX_SIZE_BYTES = 75_000
