"""The memory of a process that loads a file and runs it, told from shapes and formats alone.

    peak = runtime + max(file x bytes of the file + decoded x bytes that loading decodes,
                         activations x bytes of tensors that live at once)

Loading and running come one after the other, and what the first needed is free for the second.  While a file is loaded
its weights lie there as they are stored, as they are read, and as every step of their decoding leaves them; while it
runs, tensors do that were written and are still to be read.  The four numbers are a runtime's own, fitted to processes
that were watched (benchmarks/memory_prediction.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hirelc_deploy.cost.latency import Deciding, Decisions, values_of
from hirelc_deploy.cost.network import Network
from hirelc_deploy.cost.weights import Positions, judging, kinds_of, mean_error, weights_of
from hirelc_deploy.graph.model_graph import ModelGraph
from hirelc_deploy.policy import Precision


@dataclass(frozen=True)
class MemoryLaw:
    """What a runtime makes of the bytes of a file."""

    runtime_bytes: float
    """Of its own."""
    per_file_byte: float
    per_decoded_byte: float
    per_activation_byte: float
    decoded_bytes: Callable[[bytes], int]
    """Of a file: what loading it computes from constants."""

    def __call__(self, file: np.ndarray, decoded: np.ndarray, activations: np.ndarray) -> np.ndarray:
        """Bytes at the peak, (policies,), of bytes, (policies,) each."""
        loading = self.per_file_byte * file + self.per_decoded_byte * decoded
        found: np.ndarray = self.runtime_bytes + np.maximum(loading, self.per_activation_byte * activations)
        return found


class Activations:
    """The most that a network's tensors take at once."""

    def __init__(self, network: Network) -> None:
        self._deciding = Deciding(network)
        # tensors that come and go by the same decisions are one column of bytes
        columns = {key: i for i, key in enumerate(dict.fromkeys((held.channels, held.when) for held in network.held))}
        whole = np.zeros((1 + max((held.last for held in network.held), default=0), len(columns)))
        for held in network.held:
            whole[held.first : held.last + 1, columns[held.channels, held.when]] += held.elements * held.element_bytes
        self._bytes = _not_less(whole)
        """At each moment that counts, of each column, in the whole network: (moments, columns)."""
        self._columns = [
            (channels, np.array(values_of(network, channels)) / channels.full, when) for channels, when in columns
        ]

    def __call__(self, decisions: Decisions) -> np.ndarray:
        """Bytes, (policies,)."""
        decided = self._deciding.of(decisions)
        left = np.empty((len(decisions), len(self._columns)))
        for i, (channels, parts, when) in enumerate(self._columns):
            left[:, i] = parts[decided.position(channels)]
            for condition in when:
                left[:, i] *= decided.holds(condition.variable, condition.values)
        found: np.ndarray = (left @ self._bytes.T).max(1)
        return found


def _not_less(rows: np.ndarray) -> np.ndarray:
    """The rows that are not below another one everywhere."""
    rows = np.unique(rows, axis=0)
    below = [(row <= rows).all(1).sum() > 1 for row in rows]  # each is below itself
    return rows[~np.array(below)]


class MemoryPredictor:
    """Memory of many policies on one network."""

    def __init__(
        self, law: MemoryLaw, decoded: "DecodedPredictor", activations: Activations, *, factor: float = 1.0
    ) -> None:
        """`factor` is what files of this very network were seen to need, against what the law says."""
        self._law = law
        self._decoded = decoded
        self._activations = activations
        self._factor = factor

    def __call__(self, size_bytes: np.ndarray, chosen: Positions, decisions: Decisions) -> np.ndarray:
        """Bytes at the peak, (policies,), of the same policies said in three ways."""
        return self._factor * self._law(size_bytes, self._decoded(chosen), self._activations(decisions))


class DecodedPredictor:
    """Bytes that a file's weights are decoded into while it is loaded, every step of it counted, for many policies.

    So many a weight's element by what it is stored and computed as, fitted to files that a runtime has told exactly.
    """

    def __init__(
        self,
        graph: ModelGraph,
        precisions: Mapping[str, Sequence[Precision]],
        counts: Mapping[str, Sequence[int]],
        samples: Positions,
        decoded_bytes: Sequence[int],
    ) -> None:
        """As of `SizePredictor`."""
        weights = weights_of(graph, precisions, counts)
        kinds = kinds_of(weights)
        exact = np.asarray(decoded_bytes, float)
        scale = np.maximum(exact, 1.0)  # nothing is decoded of a network in floats
        features = sum(w.elements(samples)[:, None] * w.count(kinds, samples) for w in weights)
        judged = judging(len(exact))
        solved, *_ = np.linalg.lstsq((features / scale[:, None])[~judged], (exact / scale)[~judged])
        per_element = {kind: float(solved[i]) for kind, i in kinds.items()}
        self._weights = [(weight, weight.table(per_element)) for weight in weights]
        self.error = mean_error(self(samples)[judged], scale[judged])
        """Relative, mean of the absolute values, of the samples that were held out; NaN without any."""

    def __call__(self, chosen: Positions) -> np.ndarray:
        """Bytes, (policies,)."""
        each = [weight.elements(chosen) * weight.look_up(table, chosen) for weight, table in self._weights]
        found: np.ndarray = np.maximum(np.sum(each, axis=0), 0.0)
        return found
