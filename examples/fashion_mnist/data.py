"""Fashion-MNIST (Xiao et al., 2017; MIT licence) from Debian's package, split in three.

The package's 60,000 training images are cut once, with a fixed seed, into 54,000 that the networks are
trained on and 6,000 that no network has seen: the search split.  Its 10,000 test images stay the test split.
"""

import gzip
import os
from pathlib import Path

import numpy as np

from hirelc_deploy.errors import UserError
from hirelc_deploy.task import stratified_holdout

FOLDER = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
MEAN, DEVIATION = 0.2860, 0.3530  # of the training pixels, after division by 255
SEARCH_FRACTION, SPLIT_SEED = 0.1, 0


def _read(name: str) -> np.ndarray:
    """One file in the IDX format: magic number with the rank in its last byte, the sizes, the bytes."""
    path = FOLDER / f"{name}.gz"
    if not path.exists():
        raise UserError(
            f"Fashion-MNIST is not in {FOLDER}",
            fix="apt-get install dataset-fashion-mnist, or name its folder in FASHION_MNIST",
        )
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, ">i4", rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def images(name: str) -> np.ndarray:
    """(N, 1, 28, 28) float32, normalised as the networks take them."""
    pixels = _read(f"{name}-images-idx3-ubyte")[:, None]
    return (pixels.astype(np.float32) / 255 - MEAN) / DEVIATION


def labels(name: str) -> np.ndarray:
    """(N,) int64, 0 to 9."""
    return _read(f"{name}-labels-idx1-ubyte").astype(np.int64)


def halved(x: np.ndarray) -> np.ndarray:
    """(N, 1, 14, 14): the means of 2x2 pixels."""
    n, channels, height, width = x.shape
    return x.reshape(n, channels, height // 2, 2, width // 2, 2).mean((3, 5), dtype=np.float32)


def splits(pixels: int = 28) -> dict[str, np.ndarray]:
    """x_train, y_train, x_search, y_search, x_test, y_test; images of 28x28 or of 14x14 pixels."""
    prepared = {28: lambda x: x, 14: halved}[pixels]
    x, y = prepared(images("train")), labels("train")
    train, search = stratified_holdout(y, SEARCH_FRACTION, SPLIT_SEED)
    return {
        "x_train": x[train],
        "y_train": y[train],
        "x_search": x[search],
        "y_search": y[search],
        "x_test": prepared(images("t10k")),
        "y_test": labels("t10k"),
    }
