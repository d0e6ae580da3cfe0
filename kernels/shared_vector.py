"""As `vector`, with one book for all layers that are stored alike: its bytes are paid once, and small layers gain too.

Weights are in units of each channel's own spread before they are compared, so that one book fits layers of any scale.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hirelc_deploy.kernels._base import Grid
from hirelc_deploy.kernels.vector import Vector, as_vectors, book_for, scale_for, unit_and_cost, word_length
from hirelc_deploy.policy import Storage

if TYPE_CHECKING:
    from torch import Tensor

CODE_BITS = 8


class SharedVector(Vector):
    """weight = book[code][place] * scale, the book common to all layers."""

    name = "shared_vector"
    shared = ("book",)

    def fit(self, rows: "Tensor", storage: Storage, *, largest: int, energy: "Tensor | None" = None) -> Grid:
        return self.fit_all([rows], storage, largest=largest, energies=[energy])[0]

    def fit_all(
        self, weights: "Sequence[Tensor]", storage: Storage, *, largest: int, energies: "Sequence[Tensor | None]"
    ) -> list[Grid]:
        import torch

        units, vectors, costs = [], [], []
        for rows, energy in zip(weights, energies, strict=True):
            unit, cost = unit_and_cost(rows.detach(), storage, energy)
            # what an error costs in one layer says nothing of what it costs in another: each counts by its size alone
            mean = cost.mean()
            units.append(unit)
            vectors.append(as_vectors(rows.detach() / unit, word_length(storage)))
            costs.append(as_vectors(cost / mean if mean > 0 else torch.ones_like(cost), word_length(storage)))
        book = book_for(torch.cat(vectors), torch.cat(costs), 2**CODE_BITS)
        return [{"scale": scale_for(unit, largest), "book": book} for unit in units]

    def code_bits(self, weights: int, storage: Storage) -> int:
        return CODE_BITS


FORMAT = SharedVector()
