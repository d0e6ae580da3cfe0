"""Hand recipes: what the words mean on a network, which are tried, and that the best of what was tried is taken."""

import math
from collections.abc import Callable
from dataclasses import replace
from zlib import crc32

import pytest
from hypothesis import given, strategies as st

from hirelc_deploy.budget import Budget, Figures, judge, met
from hirelc_deploy.errors import UserError
from hirelc_deploy.policy import FP32, INT8, Compute, PerChannel, PerTensor, Policy, Precision, Storage
from hirelc_deploy.search.recipe import LADDER_KEEP_PERCENT, Recipe, ladder, search
from hirelc_deploy.search.space import Evaluation, SearchSpace

INT8_TENSOR = Precision(Storage("int", 8, PerTensor()), Compute.INT8)
INT8_IN_FLOATS = Precision(Storage("int", 8, PerChannel()), Compute.FP32)
INT4_IN_FLOATS = Precision(Storage("int", 4, PerChannel()), Compute.FP32)
INT4 = Precision(Storage("int", 4, PerChannel()), Compute.INT8)


def space(*, total: int = 16, able: bool = True) -> SearchSpace:
    """A convolution, an embedding without an integer kernel, a group that can vanish."""
    return SearchSpace(
        layers={"conv": (FP32, INT8) if able else (FP32,), "words": (FP32,)},
        groups={"conv": (0, *range(1, total + 1))},
        totals={"conv": total},
        blocks={"all": ("conv", "words")},
    )


# -- words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("keep=50%,compute=int8", Recipe(50, Compute.INT8)),
        (" compute = int8 , keep = 37.5% ", Recipe(37.5, Compute.INT8)),
        ("keep=25%", Recipe(25, Compute.FP32)),
        ("compute=fp32", Recipe(100, Compute.FP32)),
        ("storage=int8", Recipe(100, Compute.INT8, "int8")),
        ("storage=int8/tensor,compute=fp32", Recipe(100, Compute.FP32, "int8/tensor")),
        ("storage=int4/group32", Recipe(100, Compute.INT8, "int4/group32")),
        ("keep=75%,storage=codebook3,compute=fp32", Recipe(75, Compute.FP32, "codebook3")),
        ("storage=vector1/channel", Recipe(100, Compute.INT8, "vector1/channel")),
        ("storage=fp32,compute=fp32", Recipe(100, Compute.FP32, "fp32")),
        ("storage=int4,compute=fastest", Recipe(100, None, "int4")),
    ],
)
def test_a_recipe_is_read_in_any_order(text: str, recipe: Recipe) -> None:
    assert Recipe.parse(text) == recipe
    assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("kepp=50%", "'kepp=50%' is no part", "did you mean keep"),
        ("50%", "'50%' is no part", "keep=50%"),
        ("", "'' is no part", "keep=50%"),
        ("keep=50%,", "'' is no part", "keep=50%"),
        ("keep=", "'keep=' is no part", "keep=50%"),
        ("keep=0.5", "keep is '0.5'", "keep=50%"),
        ("keep=half", "keep is 'half'", "keep=50%"),
        ("keep=0%", "keep is '0%'", "above 0 %"),
        ("keep=101%", "keep is '101%'", "up to 100 %"),
        ("keep=-5%", "keep is '-5%'", "above 0 %"),
        ("keep=nan%", "keep is 'nan%'", "keep=50%"),
        ("compute=int9", "compute is 'int9'", "did you mean int8"),
        ("compute=INT8", "compute is 'INT8'", "did you mean int8"),
        ("keep=50%,compute=int8,keep=25%", "says keep twice", "keep=50%"),
        ("storage=int9", "storage is 'int9'", "did you mean int"),
        ("storage=codebok3", "storage is 'codebok3'", "did you mean codebook3"),
        ("storage=int4/chanel", "storage is 'int4/chanel'", "did you mean int4/channel"),
        ("storage=log3/group32", "storage is 'log3/group32'", "There is codebook2, codebook3, codebook4, float4"),
    ],
)
def test_a_recipe_that_cannot_be_read_says_how_to_write_it(text: str, what: str, fix: str) -> None:
    with pytest.raises(UserError) as raised:
        Recipe.parse(text)
    assert what in raised.value.what
    assert fix in raised.value.fix


# -- on a network --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("percent", "counts", "total", "kept"),
    [
        (50, (0, 8, 16), 16, 8),
        (100, (0, 8, 16), 16, 16),
        (40, (0, 8, 16), 16, 8),  # 6.4
        (75, (0, 8, 16), 16, 16),  # 12 is as near to both: the larger
        (1, (0, 8, 16), 16, 8),  # never none
        (37.5, (8, 16, 24, 32), 32, 16),  # 12 is as near to both
        (12.5, (1, 2, 3), 3, 1),
    ],
)
def test_the_nearest_count_is_kept(percent: float, counts: tuple[int, ...], total: int, kept: int) -> None:
    some = replace(space(total=total), groups={"conv": counts})
    assert Recipe(percent, Compute.FP32).policy(some).keep == {"conv": kept}


def test_a_layer_that_cannot_stays_as_it_was_trained() -> None:
    policy = Recipe(50, Compute.INT8).policy(space())
    assert policy == Policy({"conv": INT8, "words": FP32}, {"conv": 8})


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe(100, Compute.INT8), INT8_IN_FLOATS),
        (Recipe(100, Compute.INT8, "int8"), INT8_IN_FLOATS),
        (Recipe(100, Compute.INT8, "int4"), INT4_IN_FLOATS),
        (Recipe(100, Compute.INT8, "int8/tensor"), FP32),
        (Recipe(100, Compute.FP32, "int4"), INT4_IN_FLOATS),
        (Recipe(100, Compute.FP32), FP32),
    ],
    ids=str,
)
def test_a_layer_that_cannot_compute_so_is_stored_so_all_the_same(recipe: Recipe, words: Precision) -> None:
    every = (FP32, INT8_IN_FLOATS, INT4_IN_FLOATS)
    some = replace(space(), layers={"conv": (*every, INT8, INT4, INT8_TENSOR), "words": every})
    assert recipe.policy(some).precisions["words"] == words


@pytest.mark.parametrize(
    ("storage", "chosen"),
    [
        (None, INT8),
        ("int8", INT8),
        ("int8/channel", INT8),
        ("int8/tensor", INT8_TENSOR),
        ("int4", INT4),
    ],
)
def test_a_storage_is_named_with_or_without_its_granularity(storage: str | None, chosen: Precision) -> None:
    some = replace(space(), layers={"conv": (FP32, INT8, INT4_IN_FLOATS, INT4, INT8_TENSOR)})
    assert Recipe(100, Compute.INT8, storage).policy(some).precisions == {"conv": chosen}


def test_what_is_fastest_is_measured_before_it_is_a_policy() -> None:
    recipe = Recipe.parse("keep=50%,compute=fastest")
    with pytest.raises(ValueError, match="measured"):
        recipe.policy(space())
    floats, integers = (recipe.policy(space(), {"conv": compute}) for compute in (Compute.FP32, Compute.INT8))
    assert floats == Recipe(50, Compute.FP32).policy(space())
    assert integers == Recipe(50, Compute.INT8).policy(space())


@pytest.mark.parametrize(
    ("recipe", "network", "fix"),
    [
        (Recipe(50, Compute.INT8), space(able=False), "compute=fp32 with storage=fp32"),
        (Recipe(50, Compute.INT8, "int4"), space(), "compute=fp32 or int8 with storage=fp32, int8/channel"),
        (Recipe(50, Compute.INT8, "int8/group32"), space(), "compute=fp32 or int8 with storage=fp32, int8/channel"),
        (Recipe(50, Compute.FP16), space(), "compute=fp32 or int8 with storage=fp32, int8/channel"),
    ],
)
def test_a_recipe_that_fits_no_layer_is_refused_with_what_there_is(
    recipe: Recipe, network: SearchSpace, fix: str
) -> None:
    with pytest.raises(UserError, match="no layer of this network") as raised:
        recipe.policy(network)
    assert str(recipe) in raised.value.what
    assert fix in raised.value.fix


# -- the ladder ----------------------------------------------------------------------------------------------


def test_every_width_is_tried_in_both_arithmetics() -> None:
    rungs = ladder(space())
    assert len(rungs) == 2 * len(LADDER_KEEP_PERCENT)
    assert [policy.keep["conv"] for policy in rungs.values()] == [16, 16, 12, 12, 8, 8, 6, 6, 4, 4, 2, 2]
    for name, policy in rungs.items():
        assert Recipe.parse(name).policy(space()) == policy


@pytest.mark.parametrize(
    ("counts", "able", "rungs"),
    [((16,), True, 2), ((8, 16), True, 4), ((8, 16), False, 2), ((16,), False, 1)],
)
def test_what_comes_out_the_same_is_tried_once(counts: tuple[int, ...], able: bool, rungs: int) -> None:
    found = list(ladder(replace(space(able=able), groups={"conv": counts})).values())
    assert len(found) == rungs
    assert all(policy not in found[:index] for index, policy in enumerate(found))


# -- the search ----------------------------------------------------------------------------------------------


def figures(policy: Policy) -> Figures:
    """Bytes and time grow with width; int8 is a quarter of the bytes and half of the time."""
    width = policy.keep["conv"]
    int8 = policy.precisions["conv"] == INT8
    latency_ms = width / 16 * (1.0 if int8 else 2.0)
    return Figures(size_bytes=width * (100 if int8 else 400), latency_ms=latency_ms, speedup=2.0 / latency_ms)


def drop(policy: Policy) -> float:
    """Narrow networks lose more, int8 a little beside."""
    return (16 - policy.keep["conv"]) / 4 + (0.2 if policy.precisions["conv"] == INT8 else 0.0)


class Bench:
    """`predict` and `evaluate` over made-up figures, and what was asked of them."""

    def __init__(
        self, predict: Callable[[Policy], Figures] = figures, drop_of: Callable[[Policy], float] = drop
    ) -> None:
        self.predict = predict
        self.drop_of = drop_of
        self.asked: list[Policy] = []

    def evaluate(self, policy: Policy) -> Evaluation:
        self.asked.append(policy)
        lost = self.drop_of(policy)
        return Evaluation(policy, replace(self.predict(policy), drop=lost), 90 - lost)


def width_and_compute(policy: Policy) -> tuple[int, str]:
    return policy.keep["conv"], str(policy.precisions["conv"].compute)


def chosen(budget: Budget, bench: Bench, evaluations: int | None = None) -> tuple[int, str]:
    choice = search(space(), budget, bench.predict, bench.evaluate, evaluations=evaluations)
    assert [evaluation.policy for evaluation in choice.evaluations] == bench.asked
    assert choice.best in choice.evaluations
    return width_and_compute(choice.best.policy)


def test_without_a_limit_all_channels_stay_in_int8() -> None:
    bench = Bench()
    assert chosen(Budget(), bench) == (16, "int8")
    assert len(bench.asked) == 1


def test_the_cheapest_that_holds_the_drop_wins_and_no_dearer_one_is_evaluated() -> None:
    bench = Bench()
    assert chosen(Budget(drop=2.3), bench) == (8, "int8")
    assert [width_and_compute(policy) for policy in bench.asked] == [
        (2, "int8"),
        (4, "int8"),
        (2, "fp32"),
        (6, "int8"),
        (8, "int8"),
    ]


def test_with_a_drop_and_other_limits_only_what_keeps_the_others_is_evaluated() -> None:
    bench = Bench()
    assert chosen(Budget(drop=2.1, size_bytes=3200, latency_ms=1.0), bench) == (12, "int8")
    assert all(figures(policy).latency_ms <= 1.0 for policy in bench.asked)  # type: ignore[operator]


def test_without_a_limit_on_the_drop_the_best_score_among_those_that_fit_wins() -> None:
    bench = Bench()
    assert chosen(Budget(size_bytes=1600), bench) == (16, "int8")
    assert {width_and_compute(policy) for policy in bench.asked} == {
        *((width, "int8") for width in (16, 12, 8, 6, 4, 2)),
        *((width, "fp32") for width in (4, 2)),
    }


def test_if_none_holds_the_drop_the_smallest_drop_is_returned() -> None:
    bench = Bench()
    assert chosen(Budget(drop=0.5, size_bytes=700), bench) == (6, "int8")
    assert len(bench.asked) == 3  # 4 and 2 channels in int8 beside it; 2 in fp32 are too large


def test_if_nothing_fits_the_closest_is_returned() -> None:
    bench = Bench()
    assert chosen(Budget(size_bytes=10), bench) == (2, "int8")
    assert len(bench.asked) == 1
    assert chosen(Budget(size_bytes=10, speedup=20.0, drop=1.0), Bench()) == (2, "int8")
    # below 16 channels int8 is fast enough, and fp32 at 2: the worst ratio decides
    assert chosen(Budget(size_bytes=10, speedup=2.5, drop=1.0), Bench()) == (2, "int8")


@pytest.mark.parametrize("evaluations", [1, 2, 5])
def test_no_more_is_evaluated_than_allowed(evaluations: int) -> None:
    for budget in (Budget(), Budget(drop=0.1), Budget(size_bytes=2000), Budget(size_bytes=1), Budget(drop=-1.0)):
        bench = Bench()
        chosen(budget, bench, evaluations)
        assert 1 <= len(bench.asked) <= evaluations


def test_with_few_evaluations_the_widest_that_fits_is_tried_first() -> None:
    """A better score is the aim, and the dearest is the likeliest to have it."""
    assert chosen(Budget(size_bytes=1600), Bench(), evaluations=2) == (16, "int8")


def test_a_limit_that_cannot_be_predicted_does_not_rule_everything_out() -> None:
    """Not every system tells memory: it is judged when the file is measured, and the others are searched for."""
    bench = Bench()
    assert chosen(Budget(drop=2.3, memory_bytes=1_000_000), bench) == (8, "int8")
    assert chosen(Budget(size_bytes=10, memory_bytes=1_000_000), Bench()) == (2, "int8")


def test_a_limit_on_latency_rules_out_what_is_slower_than_the_original() -> None:
    def int8_is_slow(policy: Policy) -> Figures:
        known = figures(policy)
        return replace(known, speedup=0.9) if policy.precisions["conv"] == INT8 else known

    assert chosen(Budget(latency_ms=5.0, drop=9.0), Bench(int8_is_slow)) == (2, "fp32")


LIMITS = st.builds(
    Budget,
    latency_ms=st.none() | st.floats(0.1, 5),
    speedup=st.none() | st.floats(0.1, 8),
    size_bytes=st.none() | st.integers(1, 8000),
    memory_bytes=st.none() | st.integers(1, 8000),
    drop=st.none() | st.floats(-1, 5),
)


@given(budget=LIMITS, evaluations=st.none() | st.integers(1, 12), seed=st.integers(0, 1000))
def test_nothing_that_misses_a_limit_is_chosen_over_what_was_seen_to_meet_all(
    budget: Budget, evaluations: int | None, seed: int
) -> None:
    """Nor is a worse one where none meets all, whatever the figures are; and a rung that fits is always tried."""

    def noise(policy: Policy, what: str, scale: float) -> float:
        return scale * (crc32(f"{seed} {what} {policy.digest()}".encode()) % 1000 + 1) / 1000

    def made_up(policy: Policy) -> Figures:
        latency_ms = noise(policy, "latency", 5)
        return Figures(latency_ms, 4 / latency_ms, round(noise(policy, "size", 8000)))

    bench = Bench(made_up, lambda policy: noise(policy, "drop", 6) - 1)
    choice = search(space(), budget, bench.predict, bench.evaluate, evaluations=evaluations)
    seen = [evaluation.figures for evaluation in choice.evaluations]
    assert 1 <= len(seen) <= (evaluations or math.inf)
    assert met(budget, choice.best.figures) or not any(met(budget, each) for each in seen)
    if budget.drop is None and met(budget, choice.best.figures):
        assert choice.best.figures.drop == min(each.drop for each in seen)  # type: ignore[type-var]

    without_drop = replace(budget, drop=None)
    able = [p for p in ladder(space()).values() if all(c.ok is not False for c in judge(without_drop, made_up(p)))]
    if able:
        assert all(check.ok is not False for check in judge(without_drop, choice.best.figures))
    if evaluations is None and any(met(budget, bench.evaluate(policy).figures) for policy in able):
        assert met(budget, choice.best.figures)
