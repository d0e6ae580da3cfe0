"""Memory told from shapes and formats, against hands, files, and processes that were watched."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from exporting import hasten, needs_linux
from onnx import TensorProto, helper, numpy_helper
from test_posing import posed_under, some_rows

from hirelc_deploy.budget import Budget
from hirelc_deploy.cost.latency import Decisions, decisions_of
from hirelc_deploy.cost.load import LoadLaw
from hirelc_deploy.cost.memory import Activations, MemoryLaw
from hirelc_deploy.cost.network import Channels, Condition, Held, Network
from hirelc_deploy.exporters._memory import LAW, LOAD_LAW, decoded_bytes, nodes
from hirelc_deploy.policy import INT8, Compute, Policy

hasten()

IN_INT8 = Condition("l", frozenset({Compute.INT8}))
IN_FLOATS = Condition("l", frozenset({Compute.FP32}))


def network(*held: Held) -> Network:
    """Of one layer that computes in either way, and a group of four units of which two or four stay."""
    return Network({"l": (Compute.FP32, Compute.INT8)}, {"g": 4}, {"g": (2, 4)}, (), (), held=held)


def test_the_peak_is_the_larger_of_loading_and_running() -> None:
    law = MemoryLaw(100.0, 3.0, 1.0, 5.0, len)
    file, decoded, activations = np.array([10.0, 10.0]), np.array([7.0, 7.0]), np.array([1.0, 20.0])
    assert law(file, decoded, activations).tolist() == [100 + 37, 100 + 100]


def test_a_device_loads_as_much_slower_as_it_computes() -> None:
    law = LoadLaw(per_node=1.0, per_file_byte=0.5, per_decoded_byte=0.25, decoded_bytes=lambda _: 8, nodes=lambda _: 3)
    assert law(b"four", anchor_us=1000.0) == 3 + 2 + 2
    assert law(b"four", anchor_us=3000.0) == 3 * (3 + 2 + 2)


def test_tensors_that_live_at_once_are_added() -> None:
    whole, cut = Channels(8, {}), Channels(8, {"g": 1})
    live = Activations(
        network(
            Held(100, whole, 4, first=0, last=1),
            Held(80, cut, 4, first=1, last=2),
            Held(40, whole, 1, first=2, last=3, when=(IN_INT8,)),
        )
    )
    decisions = Decisions(np.array([[0], [0], [1], [1]]), np.array([[1], [0], [1], [0]]))
    # floats of four bytes; with two of four units six channels of eight stay
    both, narrow = 4 * (100 + 80), 4 * (100 + 60)
    assert live(decisions).tolist() == [both, narrow, both, narrow]


def test_an_element_in_integers_is_a_byte() -> None:
    either = Held(100, Channels(1, {}), 1, 0, 0, (IN_INT8,)), Held(100, Channels(1, {}), 4, 0, 0, (IN_FLOATS,))
    live = Activations(network(*either))
    policies = [Policy({}, {}), Policy({"l": INT8}, {})]
    assert live(decisions_of(network(), policies)).tolist() == [400, 100]


def test_a_branch_that_is_gone_takes_nothing() -> None:
    gone = Network({}, {"g": 4}, {"g": (0, 4)}, (), (), held=(Held(100, Channels(4, {"g": 1}), 4, 0, 0),))
    assert Activations(gone)(decisions_of(gone, [Policy({}, {"g": 0}), Policy({}, {})])).tolist() == [0, 400]


def test_all_steps_of_decoding_are_counted_and_nothing_else() -> None:
    """Bytes to integers, to floats, times a scale; a weight that a kernel decodes itself is not."""
    values: Mapping[str, np.ndarray] = {
        "codes": np.zeros((4, 6), np.uint8),
        "scale": np.ones((4, 1), np.float32),
        "integers": np.zeros((6, 2), np.int8),
        "step": np.float32(0.5),
    }
    decoding = [
        helper.make_node("Cast", ["codes"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "scale"], ["weight"]),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
        helper.make_node("DequantizeLinear", ["integers", "step"], ["other"]),
        helper.make_node("MatMul", ["y", "other"], ["z"]),
    ]
    graph = helper.make_graph(
        decoding,
        "decoding",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    file = model.SerializeToString()
    assert (decoded_bytes(file), nodes(file)) == (4 * 24 + 4 * 24, 5)


def test_the_laws_are_those_that_were_fitted() -> None:
    record = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "memory_prediction.json").read_text())
    numbers = (LAW.runtime_bytes, LAW.per_file_byte, LAW.per_decoded_byte, LAW.per_activation_byte)
    assert numbers == pytest.approx(record["law"], rel=0.005)
    numbers = (LOAD_LAW.per_node, LOAD_LAW.per_file_byte, LOAD_LAW.per_decoded_byte)
    assert numbers == pytest.approx(record["load"]["law"], rel=0.005)


@needs_linux
def test_a_search_is_told_what_files_need(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of many policies at once as of each alone; and of one that is run, near what its process took."""
    with posed_under("convolutions", Budget(drop=1.0, memory_bytes=10**9), tmp_path_factory.mktemp("run")) as posing:
        problem = posing.problem()
        rows = some_rows(problem)
        told = problem.costs(rows).memory
        each = np.array([posing._costing.memory_bytes(problem.policy(row)) for row in rows], float)
        assert np.abs(told / each - 1).max() < 0.05
        assert problem.before.memory_bytes is not None
        policy = problem.policy(rows[0])
        seen = posing._bench.latencies.seen_memory_bytes(policy)
        assert seen is not None
        assert each[0] == pytest.approx(seen, rel=0.3)


def test_without_a_limit_nothing_is_run_for_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    with posed_under("convolutions", Budget(drop=1.0), tmp_path_factory.mktemp("run")) as posing:
        problem = posing.problem()
        assert problem.before.memory_bytes is None
        assert problem.costs(some_rows(problem, 2)).memory_bytes is None
