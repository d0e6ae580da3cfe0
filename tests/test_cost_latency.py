"""What a search would be led by: the sum over kernels for many policies at once, and the exact fastest computes."""

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from hirelc_deploy.cost import fastest as elimination
from hirelc_deploy.cost.fastest import TooEntangledError, fastest
from hirelc_deploy.cost.kernel import Kernel
from hirelc_deploy.cost.latency import CHUNK, Decisions, Latency, values_of
from hirelc_deploy.cost.network import Channels, Condition, Network, State, Term
from hirelc_deploy.policy import FP32, INT8, Compute, Policy

FLOATS, INTEGERS = Compute.FP32, Compute.INT8
BOTH = (FLOATS, INTEGERS)


class Work:
    """A price that is a kernel's channels multiplied, times what its operator is worth."""

    unknown: ClassVar[set[str]] = set()
    worth: ClassVar = {"Conv": 1.0, "Add": 0.5, "QuantizeLinear": 3.0, "DequantizeLinear": 5.0}

    def __call__(self, kernel: Kernel) -> float:
        return self.worth[kernel.op] * prod(kernel.channels) * (0.6 if kernel.compute is INTEGERS else 1.0)

    def grid(self, kernel: Kernel, inputs: Sequence[int], outputs: Sequence[int]) -> np.ndarray:
        return np.array([[self(kernel.with_channels(i, o)) for o in outputs] for i in inputs])

    def errors(self, kernel: Kernel, inputs: Sequence[int], outputs: Sequence[int]) -> np.ndarray:
        return np.full((len(inputs), len(outputs)), 0.1)


def conv(inputs: int, outputs: int, compute: Compute) -> Kernel:
    return Kernel.parse("Conv", "", f"x:1x{inputs}x4x4 w:{outputs}x{inputs}x1x1", str(compute))


def elementwise(op: str, channels: int) -> Kernel:
    return Kernel.parse(op, "", f"x:1x{channels}x4x4", "fp32")


def when(variable: str, *values: Compute | bool) -> Condition:
    return Condition(variable, frozenset(values))


def chain(length: int, units: int = 4) -> Network:
    """Convolutions in a row, each with a prune group behind it and a border where computes differ."""
    image = Channels(3, {})
    groups = [Channels(8, {f"g{i}": 2}) for i in range(length)]
    terms, states = [], []
    for i in range(length):
        read = groups[i - 1] if i else image
        terms += [Term(conv(read.full, 8, c), read, groups[i], (when(f"l{i}", c),)) for c in BOTH]
        if not i:
            continue
        states.append(State(f"up{i}", "all", (when(f"l{i - 1}", FLOATS), when(f"l{i}", INTEGERS))))
        down = (when(f"l{i - 1}", INTEGERS), when(f"l{i}", FLOATS))
        terms += [
            Term(elementwise("QuantizeLinear", 8), read, read, (when(f"up{i}", True),)),
            Term(elementwise("DequantizeLinear", 8), read, read, down),
        ]
    return Network(
        computes={f"l{i}": BOTH for i in range(length)},
        totals={f"g{i}": units for i in range(length)},
        counts={f"g{i}": tuple(range(1, units + 1)) for i in range(length)},
        states=tuple(states),
        terms=tuple(terms),
    )


def naive(network: Network, computes: Mapping[str, Compute], counts: Mapping[str, int]) -> float:
    """The same sum, read off the network term by term."""
    known: dict[str, Compute | bool] = dict(computes)
    for state in network.states:
        each = [known[condition.variable] in condition.values for condition in state.conditions]
        known[state.name] = all(each) if state.of == "all" else any(each)

    def left(channels: Channels) -> int:
        return channels.full - sum(cut * (network.totals[g] - counts[g]) for g, cut in channels.cut_per_unit.items())

    total = 0.0
    for term in network.terms:
        if not all(known[condition.variable] in condition.values for condition in term.when):
            continue
        read, written = left(term.inputs), left(term.outputs)
        if read > 0 and written > 0:
            if term.scales:
                total += term.part * Work()(term.kernel.with_channels(read, written))
            else:
                total += term.part * Work()(term.kernel) * read / term.inputs.full
    return total


def all_us(latency: Latency, policies: Sequence[Policy]) -> np.ndarray:
    return latency.us(latency.decisions(policies), latency.factors(dict.fromkeys(latency.kinds, 1.0)))


def policy(computes: Mapping[str, Compute], counts: Mapping[str, int]) -> Policy:
    return Policy({layer: FP32 if c is FLOATS else INT8 for layer, c in computes.items()}, dict(counts))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_many_policies_at_once_cost_what_each_costs_by_itself(data: st.DataObject) -> None:
    network = chain(data.draw(st.integers(1, 5)))
    drawn = [
        (
            {layer: data.draw(st.sampled_from(BOTH)) for layer in network.computes},
            {group: data.draw(st.sampled_from(counts)) for group, counts in network.counts.items()},
        )
        for _ in range(3)
    ]
    latency = Latency(network, Work())
    found = all_us(latency, [policy(*each) for each in drawn])
    assert found == pytest.approx([naive(network, *each) for each in drawn])
    # by kind of kernel it is the same sum
    parts = latency.parts_us(latency.decisions([policy(*each) for each in drawn]))
    assert parts.sum(axis=1) == pytest.approx(found)


def test_what_a_policy_does_not_name_is_as_it_was_trained() -> None:
    network = chain(3)
    whole = naive(network, dict.fromkeys(network.computes, FLOATS), network.totals)
    assert all_us(Latency(network, Work()), [Policy({}, {})])[0] == pytest.approx(whole)


def test_policies_beyond_one_chunk_are_all_priced() -> None:
    network = chain(2)
    latency = Latency(network, Work())
    one = latency.decisions([Policy({}, {}), Policy({"l0": INT8}, {"g1": 1})])
    many = Decisions(np.tile(one.computes, (CHUNK, 1)), np.tile(one.counts, (CHUNK, 1)))
    factors = latency.factors(dict.fromkeys(latency.kinds, 1.0))
    assert (latency.us(many, factors).reshape(-1, 2) == latency.us(one, factors)).all()


def test_weights_are_by_kind_of_kernel() -> None:
    latency = Latency(chain(2), Work())
    decided = latency.decisions([Policy({"l0": INT8}, {})])
    parts = dict(zip(latency.kinds, latency.parts_us(decided)[0], strict=True))
    assert parts["Conv int8"] > 0
    assert parts["borders"] > 0
    assert latency.us(decided, latency.factors({"Conv int8": 2.0}))[0] == pytest.approx(2 * parts["Conv int8"])


def test_channels_of_several_groups_and_branches_that_are_gone() -> None:
    """A concatenation reads both groups; with no channel left a kernel does not run."""
    both = Channels(16, {"a": 2, "b": 2})
    term = Term(conv(16, 8, FLOATS), both, Channels(8, {"c": 8}))
    network = Network({}, {"a": 4, "b": 4, "c": 1}, {"a": (1, 4), "b": (2, 4), "c": (0, 1)}, (), (term,))
    assert values_of(network, both) == (6, 10, 12, 16)
    latency = Latency(network, Work())
    found = all_us(latency, [Policy({}, {"a": 1}), Policy({}, {"a": 1, "b": 2}), Policy({}, {"c": 0})])
    assert found.tolist() == [10 * 8, 6 * 8, 0]


def test_a_kernel_without_an_axis_of_channels_shrinks_by_its_part() -> None:
    kernel = Kernel.parse("Add", "", "x:1x49x128", "fp32")
    heads = Channels(128, {"heads": 32})
    network = Network({}, {"heads": 4}, {"heads": (1, 2, 4)}, (), (Term(kernel, heads, heads, (), scales=False),))
    found = all_us(Latency(network, Work()), [Policy({}, {"heads": n}) for n in (1, 2, 4)])
    assert found / found[-1] == pytest.approx([0.25, 0.5, 1.0])


@given(st.integers(2, 6), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_fastest_computes_are_those_of_a_full_search(length: int, seed: int) -> None:
    network = chain(length)
    random = np.random.default_rng(seed)
    counts = {group: int(random.choice(each)) for group, each in network.counts.items()}
    latency = Latency(network, Work())
    factors = latency.factors({kind: float(random.uniform(0.1, 3)) for kind in latency.kinds})
    found = fastest(latency, factors, counts, {})

    def us(computes: Sequence[Compute]) -> float:
        given = policy(dict(zip(network.computes, computes, strict=True)), counts)
        return float(latency.us(latency.decisions([given]), factors)[0])

    best = min(us(computes) for computes in product(BOTH, repeat=length))
    assert us(list(found.values())) == pytest.approx(best)


def test_a_layer_keeps_to_what_it_is_allowed() -> None:
    network = chain(4)
    latency = Latency(network, Work())
    factors = latency.factors({"Conv fp32": 1.0, "Conv int8": 0.01})
    assert set(fastest(latency, factors, network.totals, {}).values()) == {INTEGERS}
    found = fastest(latency, factors, network.totals, {"l2": (FLOATS,)})
    assert [found[layer] for layer in network.computes] == [INTEGERS, INTEGERS, FLOATS, INTEGERS]


def test_what_is_less_of_a_chain_than_any_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "LARGEST_TABLE", 4)
    latency = Latency(chain(4), Work())
    with pytest.raises(TooEntangledError, match="decisions meet"):
        fastest(latency, latency.factors(dict.fromkeys(latency.kinds, 1.0)), latency.network.totals, {})
