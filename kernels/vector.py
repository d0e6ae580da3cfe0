"""Product quantisation: a code stands for 4 or 8 neighbouring weights at once (2 bits or 1 bit a weight).

"And the Bit Goes Down" (arXiv 1907.05686): code words are found by k-means on the weights of a layer, each weight's
error counted by the energy of the input that it meets, and are trained on with the network.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from hirelc_deploy.kernels._base import Format, Grid, Layout, Nodes, Packed, scale_shape, spread
from hirelc_deploy.kernels._planes import plane_bytes
from hirelc_deploy.policy import PerChannel, PerTensor, Storage

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

ROUNDS = 20
"""Of k-means."""

SAMPLE = 1 << 16
"""Vectors that k-means looks at, at most: 256 for each code word."""

SEED = 0
"""Of the weights that k-means begins with: a fit is the same each time."""

MAX_WORD = 3.0
"""Entries of code words reach so many standard deviations of the weights; beyond are few, and those are cut off."""

LEAST_CODE_BITS = 2

CHUNK = 1 << 15
"""Vectors that are compared with all code words at once: 32 MB of distances."""


class Vector(Format):
    """weight = book[code][place] * scale.  `book` is in units of the largest integer, (words, length)."""

    name = "vector"
    bits = (1, 2)
    granularities = (PerChannel, PerTensor)
    native = None
    trained = ("scale", "book")

    def fit(self, rows: "Tensor", storage: Storage, *, largest: int, energy: "Tensor | None" = None) -> Grid:
        rows = rows.detach()
        unit, cost = unit_and_cost(rows, storage, energy)
        vectors, costs = (as_vectors(x, word_length(storage)) for x in (rows / unit, cost))
        book = book_for(vectors, costs, 2 ** self.code_bits(rows.numel(), storage))
        return {"scale": scale_for(unit, largest), "book": book}

    def integers(self, rows: "Tensor", grid: Grid, storage: Storage, *, largest: int) -> "Tensor":
        book = self._book(grid, largest)
        steps = rows / grid["scale"]
        decoded = book[self._nearest(steps.detach(), book.detach())]
        on_book = decoded.flatten()[: rows.numel()].reshape(rows.shape)
        passing = steps.clamp(-largest, largest)
        return on_book + (passing - passing.detach())

    def layout(self, channels: int, columns: int, storage: Storage) -> Layout:
        length = word_length(storage)
        weights = channels * columns
        bits = self.code_bits(weights, storage)
        return Layout(
            -(-weights // length), bits, scale_shape(channels, storage.granularity), {"book": (2**bits, length)}
        )

    def pack(self, rows: "Tensor", grid: Grid, storage: Storage, *, largest: int) -> Packed:
        rows = rows.detach()
        book = self._book(grid, largest).detach()
        return Packed(
            codes=self._nearest(rows / grid["scale"], book).numpy().astype(np.uint8),
            code_bits=self.code_bits(rows.numel(), storage),
            tables={"book": book.numpy().astype(np.int8)},
            scale=grid["scale"].detach().numpy().reshape(scale_shape(len(rows), storage.granularity)),
            integers=self.integers(rows, grid, storage, largest=largest).detach().numpy().astype(np.int8),
        )

    def unpack(
        self,
        codes: "ir.Value",
        tables: Mapping[str, "ir.Value"],
        shape: tuple[int, int],
        storage: Storage,
        nodes: Nodes,
    ) -> "ir.Value":
        words = nodes.op("Gather", tables["book"], codes)
        weights = shape[0] * shape[1]
        if weights % word_length(storage) == 0:
            return words
        flat = nodes.op("Reshape", words, nodes.constant(np.array([-1], np.int64)))
        ends = [nodes.constant(np.array([end], np.int64)) for end in (0, weights)]
        return nodes.op("Slice", flat, *ends)

    def codes_together(self, columns: int, storage: Storage) -> int:
        """A row at a time where code words run on into the next row."""
        length = word_length(storage)
        return length if columns % length == 0 else columns

    def code_bits(self, weights: int, storage: Storage) -> int:
        """8 for large layers; fewer where the book would be larger than the codes."""
        length = word_length(storage)
        vectors = -(-weights // length)
        fitting = (bits for bits in range(8, LEAST_CODE_BITS, -1) if 2**bits * length <= plane_bytes(vectors, bits))
        return next(fitting, LEAST_CODE_BITS)

    def _book(self, grid: Grid, largest: int) -> "Tensor":
        book = (grid["book"] * largest).clamp(-largest, largest)
        return book + (book.round() - book).detach()

    def _nearest(self, steps: "Tensor", book: "Tensor") -> "Tensor":
        """The code word with the least squared distance for each vector: int64, (vectors,)."""
        import torch

        length = book.shape[1]
        flat = steps.flatten()
        whole = len(flat) // length * length
        # |v - b|^2 without |v|^2, which is the same for every word
        size = book.square().sum(1)
        codes = [(size - 2 * chunk @ book.T).argmin(1) for chunk in flat[:whole].reshape(-1, length).split(CHUNK)]
        if whole < len(flat):  # the last vector is judged by the places that it has
            head = book[:, : len(flat) - whole]
            codes.append((head.square().sum(1) - 2 * head @ flat[whole:]).argmin(0, keepdim=True))
        return torch.cat(codes)


def word_length(storage: Storage) -> int:
    """Weights a code word."""
    return 8 // storage.bits


def as_vectors(rows: "Tensor", length: int) -> "Tensor":
    """(vectors, length): row behind row, the last one filled up with zeros."""
    import torch.nn.functional as F

    flat = rows.flatten()
    return F.pad(flat, (0, -len(flat) % length)).reshape(-1, length)


def unit_and_cost(rows: "Tensor", storage: Storage, energy: "Tensor | None") -> tuple["Tensor", "Tensor"]:
    """What weights are measured in, and what a squared error in those units costs, as `rows`."""
    unit = spread(rows, storage.granularity)
    return unit, ((rows.new_ones(()) if energy is None else energy) * unit.square()).broadcast_to(rows.shape)


def scale_for(unit: "Tensor", largest: int) -> "Tensor":
    """What an integer of the book is worth."""
    return unit * (MAX_WORD / largest)


def book_for(vectors: "Tensor", cost: "Tensor", words: int) -> "Tensor":
    """(words, length), in units of the largest integer."""
    return (_k_means(vectors, cost, words) / MAX_WORD).clamp(-1, 1)


def _k_means(vectors: "Tensor", cost: "Tensor", words: int) -> "Tensor":
    """Centres (words, length) by Lloyd's algorithm; a centre that nothing is near to takes the worst vector's place."""
    import torch

    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(SEED))
    vectors, cost = vectors[order[:SAMPLE]], cost[order[:SAMPLE]]
    centres = vectors[:words].clone()
    if len(centres) < words:
        centres = torch.cat([centres, centres.new_zeros(words - len(centres), vectors.shape[1])])
    for _ in range(ROUNDS):
        least, code = _closest(vectors, cost, centres)
        mass = torch.zeros_like(centres).index_add_(0, code, cost)
        moment = torch.zeros_like(centres).index_add_(0, code, cost * vectors)
        centres = torch.where(mass > 0, moment / mass.clamp(min=1e-30), centres)
        unused = torch.bincount(code, minlength=words) == 0
        if unused.any() and words < len(vectors):
            error = least + (cost * vectors.square()).sum(1)
            centres[unused] = vectors[error.topk(int(unused.sum())).indices]
    return centres


def _closest(vectors: "Tensor", cost: "Tensor", centres: "Tensor") -> tuple["Tensor", "Tensor"]:
    """The least distance of each vector, less what is the same for every centre, and the number of that centre."""
    import torch

    found = [
        (c @ centres.square().T - 2 * (c * v) @ centres.T).min(1)
        for v, c in zip(vectors.split(CHUNK), cost.split(CHUNK), strict=True)
    ]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


FORMAT = Vector()
