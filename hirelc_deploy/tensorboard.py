"""What a search did, for TensorBoard; only on request."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hirelc_deploy.errors import UserError
from hirelc_deploy.search.problem import Log


@contextmanager
def logged(folder: Path | None) -> Iterator[Log]:
    """Takes values, and writes them into the folder until the end of the block; into nothing without one.

    Raises UserError if TensorBoard is not installed, or the folder cannot be written.
    """
    if folder is None:
        yield lambda name, value, step: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "TensorBoard is not installed", fix="pip install hirelc-deploy[tensorboard], or leave --tensorboard out"
        ) from error
    try:
        writer = SummaryWriter(str(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}", fix="name a folder of yours") from error
    with writer:
        yield writer.add_scalar
