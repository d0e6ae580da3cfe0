"""What a table knows of kernels that were not measured, and what it says where it knows nothing."""

import numpy as np
import pytest

from hirelc_deploy.cost.correction import Artifact, Correction, fit
from hirelc_deploy.cost.kernel import Kernel, kind_of
from hirelc_deploy.cost.needs import GOOD_ENOUGH, Family, families, neglect
from hirelc_deploy.cost.network import Channels, Network, Term
from hirelc_deploy.cost.prices import MeasuredPrices

CONV = Kernel.parse("Conv", "pads=1,1,1,1 strides=2,2", "x:1x64x28x28 w:128x64x3x3 w:128", "int8")
DEPTHWISE = Kernel.parse("Conv", "group=32 pads=1,1,1,1", "x:1x32x14x14 w:32x1x3x3 w:32", "fp32")
GROUPED = Kernel.parse("Conv", "group=4", "x:1x64x7x7 w:32x16x1x1", "fp32")
SIGNAL = Kernel.parse("Conv", "pads=1,1 strides=2,", "x:1x16x32 w:24x16x3 w:24", "fp32")
TRANSPOSED = Kernel.parse("ConvTranspose", "strides=2,2", "x:1x16x8x8 w:16x8x2x2 w:8", "fp32")
SPREAD = Kernel.parse("ConvTranspose", "group=4 output_padding=1, strides=2,", "x:1x16x8 w:16x2x3", "fp32")
GEMM = Kernel.parse("Gemm", "transB=1", "x:8x256 w:10x256 w:10", "int8_dynamic")
MATMUL = Kernel.parse("MatMul", "", "x:1x49x128 w:128x384", "fp32")
SOFTMAX = Kernel.parse("Softmax", "axis=-1", "x:1x4x49x49", "fp32")
RESHAPE = Kernel.parse("Reshape", "", "x:1x49x384 [1,49,3,4,32]", "fp32")
POOL = Kernel.parse("GlobalAveragePool", "", "x:1x64x7x7", "int8")

EVERY = (CONV, DEPTHWISE, GROUPED, SIGNAL, TRANSPOSED, SPREAD, GEMM, MATMUL, SOFTMAX, RESHAPE, POOL)


@pytest.mark.parametrize("kernel", EVERY, ids=str)
def test_a_kernel_reads_back_as_it_was_written(kernel: Kernel) -> None:
    assert Kernel.parse(kernel.op, kernel.attributes, kernel.operands_text, str(kernel.compute)) == kernel
    assert kernel.with_channels(*kernel.channels) == kernel


@pytest.mark.parametrize(
    ("kernel", "channels", "macs"),
    [
        (CONV, (64, 128), 64 * 128 * 9 * 14 * 14),
        (DEPTHWISE, (32, 32), 32 * 9 * 14 * 14),
        (GROUPED, (64, 32), 16 * 32 * 49),
        (SIGNAL, (16, 24), 16 * 24 * 3 * 16),
        (TRANSPOSED, (16, 8), 16 * 8 * 4 * 64),  # every place that is read is multiplied by the whole weight
        (SPREAD, (16, 8), 16 * 2 * 3 * 8),
        (GEMM, (256, 10), 8 * 256 * 10),
        (MATMUL, (128, 384), 49 * 128 * 384),
        (POOL, (64, 64), 0),
        (RESHAPE, (1, 1), 0),
    ],
    ids=str,
)
def test_channels_and_work_are_read_off_the_shapes(kernel: Kernel, channels: tuple[int, int], macs: int) -> None:
    assert kernel.channels == channels
    assert kernel.macs == macs


def test_other_channels_change_all_shapes_that_have_them() -> None:
    assert str(CONV.with_channels(8, 16)) == "Conv pads=1,1,1,1 strides=2,2 x:1x8x28x28 w:16x8x3x3 w:16 int8"
    assert str(DEPTHWISE.with_channels(8, 8)) == "Conv group=8 pads=1,1,1,1 x:1x8x14x14 w:8x1x3x3 w:8 fp32"
    assert str(GROUPED.with_channels(32, 16)) == "Conv group=4 x:1x32x7x7 w:16x8x1x1 fp32"
    assert str(TRANSPOSED.with_channels(8, 4)) == "ConvTranspose strides=2,2 x:1x8x8x8 w:8x4x2x2 w:4 fp32"
    assert SPREAD.with_channels(8, 8).operands_text == "x:1x8x8 w:8x2x3"
    assert str(GEMM.with_channels(64, 10)) == "Gemm transB=1 x:8x64 w:10x64 w:10 int8_dynamic"
    flatten = Kernel.parse("Reshape", "", "x:1x16x4x4 [1,256]", "fp32")
    assert flatten.channels == (1, 1)  # its sizes would have to change as well
    assert str(MATMUL.with_channels(64, 32)) == "MatMul x:1x49x64 w:64x32 fp32"


def test_what_is_written_counts_as_moved() -> None:
    assert TRANSPOSED.bytes == 4 * (16 * 64 + 16 * 8 * 4 + 8 + 8 * 256)
    assert SPREAD.bytes == 4 * (16 * 8 + 16 * 2 * 3 + 8 * 18)  # (8 - 1) x 2 + (3 - 1) + 1 + 1 places


def test_families_differ_in_channels_alone() -> None:
    assert TRANSPOSED.family == TRANSPOSED.with_channels(8, 32).family
    assert SPREAD.family == SPREAD.with_channels(8, 32).family
    assert CONV.family == CONV.with_channels(8, 8).family
    assert CONV.family != Kernel.parse("Conv", "pads=1,1,1,1", CONV.operands_text, "int8").family
    assert CONV.family != Kernel.parse("Conv", CONV.attributes, CONV.operands_text, "fp32").family
    # what reads an image itself runs other code, and one channel deep is not depthwise
    assert CONV.family != CONV.with_channels(3, 128).family
    dense = Kernel.parse("Conv", "pads=1,1,1,1", "x:1x1x14x14 w:32x1x3x3 w:32", "fp32")
    assert dense.family != DEPTHWISE.family


@pytest.mark.parametrize("text", ["y:1x2", "x:1x-2", "x1x2", "w:1,2", "[a]"])
def test_what_is_no_operand_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"operand|convert|literal"):
        Kernel.parse("Conv", "", text, "fp32")


def table(us: dict[tuple[int, int], float], kernel: Kernel = CONV) -> MeasuredPrices:
    return MeasuredPrices({kernel.with_channels(*channels): each for channels, each in us.items()})


def test_what_was_measured_is_told_as_it_was_measured() -> None:
    prices = table({(64, 128): 100.0, (64, 64): 55.0, (32, 128): 60.0, (32, 64): 40.0})
    found = prices.estimate(CONV.with_channels(32, 64))
    assert (found.us, found.basis, found.error) == (40.0, "measured", 0.0)


def test_between_measured_counts_time_goes_straight_and_steps_stay() -> None:
    """16 channels at once: 24 cost as much as 32, and no curve is laid through that."""
    us = {8 * n: 10.0 * -(-8 * n // 16) for n in range(1, 17)}
    prices = table({(64, outputs): each for outputs, each in us.items()})
    assert [prices(CONV.with_channels(64, outputs)) for outputs in (24, 32, 40)] == [20.0, 20.0, 30.0]
    sparse = table({(64, outputs): us[outputs] for outputs in (16, 32, 64, 128)})
    assert sparse(CONV.with_channels(64, 48)) == pytest.approx(30.0)
    assert sparse.estimate(CONV.with_channels(64, 48)).basis == "interpolated"
    assert not sparse.unknown


def test_off_the_lines_the_two_axes_multiply_and_deviations_count() -> None:
    lines = {(64, 128): 100.0, (64, 32): 30.0, (16, 128): 40.0}
    assert table(lines)(CONV.with_channels(16, 32)) == pytest.approx(40 * 30 / 100)
    bent = table({**lines, (16, 32): 18.0})
    assert bent(CONV.with_channels(16, 32)) == 18.0
    assert 12.0 < bent(CONV.with_channels(16, 40)) / (40 * (30 + 70 * 8 / 96) / 100) * 12.0 < 18.0


def test_a_table_of_square_kernels_does_not_take_inputs_for_outputs() -> None:
    """As one that holds the anchor and nothing else of its family."""
    square = Kernel.parse("Conv", "", "x:1x64x14x14 w:64x64x3x3 w:64", "fp32")
    prices = MeasuredPrices({square: 200.0})
    assert prices(square.with_channels(256, 64)) == pytest.approx(800.0)
    assert prices(square.with_channels(64, 256)) == pytest.approx(800.0)
    assert prices(square.with_channels(256, 256)) == pytest.approx(3200.0)


def test_a_grid_is_what_its_points_are() -> None:
    prices = table({(64, 128): 100.0, (64, 32): 30.0, (16, 128): 40.0, (16, 32): 18.0})
    inputs, outputs = (8, 16, 64), (32, 40, 128, 160)
    each = [[prices(CONV.with_channels(i, o)) for o in outputs] for i in inputs]
    assert prices.grid(CONV, inputs, outputs) == pytest.approx(np.array(each))


def test_an_unknown_family_is_answered_by_a_roofline_and_named() -> None:
    known = {CONV.with_channels(i, o): 5 + i * o / 100 for i in (16, 32, 64) for o in (16, 64, 128)}
    other = Kernel.parse("Conv", "pads=2,2,2,2", "x:1x64x14x14 w:64x64x5x5 w:64", "int8")
    prices = MeasuredPrices(known)
    found = prices.estimate(other)
    assert found.basis == "roofline"
    assert prices.unknown == {other.family}
    per_mac = 1 / 100 / (9 * 14 * 14)
    assert found.us == pytest.approx(5 + other.macs * per_mac, rel=0.5)
    assert found.error < 0.5
    # of another kind, with too few kernels of its own, it is worth less
    assert prices.estimate(SOFTMAX).basis == "roofline"


def test_without_any_row_there_is_no_table() -> None:
    with pytest.raises(ValueError, match="no times"):
        MeasuredPrices({})


# -- what is measured ----------------------------------------------------------------------------------------


def family(counts: tuple[int, ...]) -> Family:
    return Family(CONV, counts, counts)


def measured(wanted: Family, us) -> int:  # type: ignore[no-untyped-def]
    """Carry a family's plan out; how many kernels were measured."""
    for places in wanted.plan():
        for place in places:
            assert place not in wanted.known, "measured twice"
            wanted.known[place] = us(*place)
    return len(wanted.known)


COUNTS = tuple(range(8, 257, 8))


def test_where_lines_are_straight_few_kernels_are_measured() -> None:
    wanted = family(COUNTS)
    count = measured(wanted, lambda inputs, outputs: (20 + inputs) * (10 + outputs) / 100)
    assert count < 20
    assert wanted.told((64, 72)) == pytest.approx([(20 + 64) * (10 + 72) / 100], rel=GOOD_ENOUGH)


def test_where_latency_has_steps_each_count_is_measured() -> None:
    wanted = family(COUNTS)

    def steps(inputs: int, outputs: int) -> float:
        return (10 + inputs) * (5 + 16 * -(-outputs // 16)) * (1.15 if outputs % 16 else 1.0) / 100

    measured(wanted, steps)
    assert {outputs for inputs, outputs in wanted.known if inputs == COUNTS[-1]} == set(COUNTS)
    # inputs are a straight line: a few will do
    assert sum(outputs == COUNTS[-1] for _, outputs in wanted.known) < len(COUNTS) / 2


def test_where_the_axes_do_not_multiply_places_off_the_lines_are_measured() -> None:
    wanted = family(COUNTS)
    measured(wanted, lambda inputs, outputs: 20 + inputs * outputs / 100)
    off = [place for place in wanted.known if COUNTS[-1] not in place]
    assert len(off) >= 5


def test_errors_that_no_policy_would_notice_are_no_reason_to_measure() -> None:
    large, small = family(COUNTS), Family(POOL, COUNTS, COUNTS)
    for each, us in ((large, 10_000.0), (small, 1.0)):
        each.known[each.reference] = us
    neglect([large, small])
    random = np.random.default_rng(0)
    assert measured(small, lambda inputs, outputs: 1.0 + random.uniform()) < 8


def test_the_same_times_lead_to_the_same_measurements() -> None:
    """So a run that was stopped goes on with what its table has, and measures nothing twice."""
    first, again = family(COUNTS), family(COUNTS)
    for each in (first, again):
        measured(each, lambda inputs, outputs: (20 + inputs) * (10 + outputs + 5 * (outputs % 16)) / 100)
    assert list(first.known) == list(again.known)


def test_a_network_needs_each_family_once_over_all_its_channels() -> None:
    groups = Channels(64, {"a": 8}), Channels(128, {"b": 16})
    network = Network(
        computes={},
        totals={"a": 8, "b": 8},
        counts={"a": (4, 8), "b": (0, 4, 8)},
        states=(),
        terms=(
            Term(CONV, *groups),
            Term(CONV, groups[0], Channels(128, {})),
            Term(SOFTMAX, groups[0], groups[0], scales=False),
        ),
    )
    conv, softmax = families(network)
    assert (conv.inputs, conv.outputs) == ((32, 64), (64, 128))
    assert softmax.inputs == softmax.outputs == (4,)


# -- what whole artifacts say --------------------------------------------------------------------------------


def artifacts(count: int, noise: float = 0.0, seed: int = 0) -> list[Artifact]:
    """Integers that take 1.3 and floats that take 0.9 of what they take by themselves, and 20 us of a session."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        parts = {"Conv int8": random.uniform(100, 900), "Conv fp32": random.uniform(100, 900)}
        us = 20 + 1.3 * parts["Conv int8"] + 0.9 * parts["Conv fp32"]
        found.append(Artifact(parts, us * random.normal(1, noise)))
    return found


def told(correction: Correction, artifact: Artifact) -> float:
    weights = correction.weights(tuple(artifact.parts_us))
    return correction.fixed_us + sum(weights[kind] * us for kind, us in artifact.parts_us.items())


def test_factors_are_found_again() -> None:
    correction = fit(artifacts(30, noise=0.01))
    assert correction.artifacts == 30
    assert correction.factors["Conv int8"] == pytest.approx(1.3, abs=0.08)
    assert correction.factors["Conv fp32"] == pytest.approx(0.9, abs=0.08)
    held_out = artifacts(20, seed=1)
    assert max(abs(told(correction, each) / each.measured_us - 1) for each in held_out) < 0.04


def test_one_artifact_moves_all_kinds_alike() -> None:
    """What is left to one of them is not known from a single sum, and a single artifact is not believed whole."""
    correction = fit([Artifact({"Conv int8": 500.0, "Conv fp32": 500.0}, 1200.0)])
    assert correction.factors["Conv int8"] == pytest.approx(correction.factors["Conv fp32"])
    assert told(correction, Artifact({"Conv int8": 500.0, "Conv fp32": 500.0}, 0.0)) == pytest.approx(1200, rel=0.03)


def test_a_kind_that_no_artifact_had_is_corrected_like_all() -> None:
    correction = fit(artifacts(5))
    assert correction.weights(["Linear fp32"])["Linear fp32"] == correction.other


def test_without_artifacts_nothing_is_corrected() -> None:
    assert fit([]).weights(["borders"]) == {"borders": 1.0}


def test_kinds_tell_borders_layers_and_the_rest_apart() -> None:
    border = Kernel.parse("QuantizeLinear", "", "x:1x8x4x4", "fp32")
    kinds = [kind_of(kernel) for kernel in (CONV, DEPTHWISE, GEMM, SOFTMAX, POOL, border)]
    assert kinds == ["Conv int8", "depthwise fp32", "Linear int8_dynamic", "other fp32", "other int8", "borders"]
