"""How long loading a file takes, told from the file alone.

    load = node x nodes + file x bytes of the file + decoded x bytes that loading decodes

The numbers are a runtime's own, in runs of one kernel that every table and estimate knows (`verify.profiling.ANCHOR`),
so that a slower device loads as much slower; they are fitted to files that were loaded
(benchmarks/memory_prediction.py).
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LoadLaw:
    """In runs of the anchor."""

    per_node: float
    per_file_byte: float
    per_decoded_byte: float
    decoded_bytes: Callable[[bytes], int]
    """Of a file: what loading it computes from constants."""
    nodes: Callable[[bytes], int]
    """Of a file."""

    def __call__(self, file: bytes, *, anchor_us: float) -> float:
        """Milliseconds, the anchor taking so long."""
        decoded = self.per_decoded_byte * self.decoded_bytes(file)
        return (self.per_node * self.nodes(file) + self.per_file_byte * len(file) + decoded) * anchor_us / 1000
