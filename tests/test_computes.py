"""`compute=fastest`: what is chosen layer by layer from times of the whole network."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest

from hirelc_deploy.policy import Compute
from hirelc_deploy.search.computes import Kind, fastest

FP32, INT8, DYNAMIC = Compute.FP32, Compute.INT8, Compute.INT8_DYNAMIC
ALL = (FP32, INT8, DYNAMIC)


class Network:
    """Layers in a row: each costs what its compute does, and a border between integers and floats costs as well."""

    def __init__(self, ms: Mapping[str, Mapping[Compute, float]], border_ms: float = 0.0) -> None:
        self.ms, self.border_ms = ms, border_ms
        self.asked: list[Mapping[str, Compute]] = []

    def time(self, computes: Mapping[str, Compute]) -> float:
        borders = sum((a is INT8) != (b is INT8) for a, b in pairwise([FP32, *computes.values(), FP32]))
        return sum(self.ms[layer][compute] for layer, compute in computes.items()) + borders * self.border_ms

    def times(self, candidates: Sequence[Mapping[str, Compute]]) -> list[float]:
        self.asked += candidates
        return [self.time(computes) for computes in candidates]


def kinds(*layers: str, offered: tuple[Compute, ...] = ALL) -> list[Kind]:
    return [Kind((layer,), offered) for layer in layers]


def test_each_kind_gets_what_makes_the_network_fastest() -> None:
    network = Network(
        {
            "a": {FP32: 3.0, INT8: 1.0, DYNAMIC: 2.0},
            "b": {FP32: 2.0, INT8: 3.0, DYNAMIC: 1.0},
            "c": {FP32: 1.0, INT8: 2.0, DYNAMIC: 3.0},
        }
    )
    assert fastest(kinds("a", "b", "c"), network.times) == {"a": INT8, "b": DYNAMIC, "c": FP32}


def test_integers_are_found_where_they_pay_only_together() -> None:
    """Any one layer in integers alone has two borders, which cost more than it gains."""
    each = {FP32: 2.0, INT8: 1.0}
    network = Network({"a": each, "b": each, "c": each}, border_ms=0.8)
    assert network.time({"a": INT8, "b": FP32, "c": FP32}) > network.time({"a": FP32, "b": FP32, "c": FP32})
    assert set(fastest(kinds("a", "b", "c", offered=(FP32, INT8)), network.times).values()) == {INT8}


def test_layers_of_one_kind_stay_alike_and_keep_to_what_they_are_offered() -> None:
    network = Network({layer: {FP32: 2.0, INT8: 1.0, DYNAMIC: 0.1} for layer in "abc"})
    found = fastest([Kind(("a", "b"), (FP32, INT8)), Kind(("c",), (FP32,))], network.times)
    assert found == {"a": INT8, "b": INT8, "c": FP32}
    assert all(computes["a"] is computes["b"] and computes["c"] is FP32 for computes in network.asked)


@pytest.mark.parametrize(("gain", "chosen"), [(0.005, FP32), (0.02, INT8)])
def test_a_gain_that_is_noise_changes_nothing(gain: float, chosen: Compute) -> None:
    network = Network({"a": {FP32: 1.0, INT8: 1.0 - gain}})
    assert fastest(kinds("a", offered=(FP32, INT8)), network.times) == {"a": chosen}


def test_where_there_is_no_choice_nothing_is_timed() -> None:
    network = Network({"a": {FP32: 1.0}})
    assert fastest(kinds("a", offered=(FP32,)), network.times) == {"a": FP32}
    assert network.asked == []
