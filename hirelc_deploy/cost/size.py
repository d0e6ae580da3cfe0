"""The size of many files at once: what weights weigh by their formats, and the rest fitted to exact sizes.

A weight's bytes are a function of its shape and storage.  What a file holds besides (nodes, names, biases, scales of
activations) is nearly a sum over its layers and channels: it is fitted once, by least squares, to sizes that a runtime
has told exactly.  The runtime's own answer takes tens of milliseconds, this one microseconds, and it states how far it
was off on files that were held out.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from hirelc_deploy.cost.weights import Positions, judging, kinds_of, mean_error, weights_of
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.policy import Precision


class SizePredictor:
    """Bytes of policies on one network."""

    def __init__(
        self,
        graph: ModelGraph,
        precisions: Mapping[str, Sequence[Precision]],
        counts: Mapping[str, Sequence[int]],
        samples: Positions,
        sizes_bytes: Sequence[int],
    ) -> None:
        """`precisions` and `counts` are the options of each layer and group; counts ascend.

        The sizes are those of the samples, exact.
        """
        self._counts = {name: np.asarray(options) for name, options in counts.items()}
        self._weights = weights_of(graph, precisions, counts)
        self._fixed = 0.0
        self._per_count: dict[str, np.ndarray] = {}
        self.error = self._fit(samples, np.asarray(sizes_bytes, float))
        """Relative, mean of the absolute values, of the samples that were held out; NaN without any."""

    def __call__(self, chosen: Positions) -> np.ndarray:
        """Bytes, (policies,)."""
        found = np.full(len(chosen), self._fixed)
        for weight in self._weights:
            found += weight.bytes_of(chosen)
        for group, each in self._per_count.items():
            found += each[chosen.counts[group]]
        return found

    def _fit(self, chosen: Positions, exact: np.ndarray) -> float:
        payload = np.sum([weight.bytes_of(chosen) for weight in self._weights], axis=0)
        kinds = kinds_of(self._weights)
        of_kinds = np.zeros((len(exact), len(kinds)))
        for weight in self._weights:
            of_kinds += weight.count(kinds, chosen)
        of_groups = [column for name in self._counts for column in self._columns(name, chosen.counts[name])]
        features = np.column_stack([of_kinds, *of_groups, np.ones(len(exact))])
        judged = judging(len(exact))
        # each file's error counts as a part of its size; the shortest solution, where samples leave something open
        relative = features[~judged] / exact[~judged, None]
        solved, *_ = np.linalg.lstsq(relative, ((exact - payload) / exact)[~judged])
        for weight in self._weights:
            weight.overheads({kind: float(solved[i]) for kind, i in kinds.items()})
        for i, (name, counts) in enumerate(self._counts.items()):
            per_unit, gone = solved[len(kinds) + 2 * i : len(kinds) + 2 * i + 2]
            self._per_count[name] = per_unit * counts + gone * (counts == 0)
        self._fixed = float(solved[-1])
        return mean_error(self(chosen)[judged], exact[judged])

    def _columns(self, group: str, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What a group adds: bytes a unit (biases), and nodes that go with its last one."""
        units = self._counts[group][position]
        return units.astype(float), (units == 0).astype(float)
