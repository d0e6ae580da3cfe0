"""Times of kernels on a device that nobody has measured: a roofline with a floor, from its TOML."""

from collections.abc import Sequence
from math import ceil

import numpy as np

from hirelc_deploy.cost.kernel import FEW, Kernel
from hirelc_deploy.policy import Compute
from hirelc_deploy.profiles import Estimate

US_PER_S = 1e6


class EstimatedPrices:
    """The `Prices` of a device that is only estimated."""

    def __init__(self, device: Estimate) -> None:
        self._device = device
        self.unknown: set[str] = set()  # all of it is estimated, and the basis says so

    def __call__(self, kernel: Kernel) -> float:
        """Microseconds."""
        device = self._device
        rate = device.gmacs_per_s.get(kernel.compute, device.gmacs_per_s[Compute.FP32])
        work_us = US_PER_S * kernel.macs * self._filled_up(kernel) / (rate * 1e9)
        moved_us = US_PER_S * kernel.bytes / (device.gb_per_s * 1e9)
        return device.floor_us + max(work_us, moved_us)

    def grid(self, kernel: Kernel, inputs: Sequence[int], outputs: Sequence[int]) -> np.ndarray:
        return np.array([[self(kernel.with_channels(i, o)) for o in outputs] for i in inputs])

    def errors(self, kernel: Kernel, inputs: Sequence[int], outputs: Sequence[int]) -> np.ndarray:
        return np.full((len(inputs), len(outputs)), self._device.error_pct / 100)

    def _filled_up(self, kernel: Kernel) -> float:
        """How many times its work a kernel does, since channels are worked on a tile at a time."""
        if kernel.weight is None:
            return 1.0
        device = self._device
        read, written = kernel.channels
        is_image = read < FEW and device.image_tile is not None
        tiles = [(read, device.image_tile if is_image else device.channel_tile), (written, device.channel_tile)]
        if kernel.is_depthwise:
            tiles = tiles[:1]
        return float(np.prod([ceil(size / tile) * tile / size for size, tile in tiles if tile is not None]))
