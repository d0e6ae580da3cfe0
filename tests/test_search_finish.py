"""Which policy is taken in the end, and what is finished on the way to it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from toy_search import toy

from hirelc_deploy.budget import Budget, Figures
from hirelc_deploy.policy import FP32, INT8, Compute, PerChannel, Policy, Precision, Storage
from hirelc_deploy.search.additive import recipe_ladder
from hirelc_deploy.search.finish import (
    FINALISTS,
    FIRST_HARDNESS,
    LATENCY_MARGIN,
    MOST_TIMES,
    RECIPES,
    Finishing,
    Mending,
)
from hirelc_deploy.search.problem import Evaluations, GroupVariable, LayerVariable, Prices, Problem, Rows
from hirelc_deploy.search.space import Choice, Evaluation

BEFORE = Figures(latency_ms=10.0, speedup=1.0, size_bytes=1000, drop=0.0)


def as_trained(rows: Rows) -> Prices:
    """Of the network that is compressed here, whatever the rows say."""
    return Prices(np.full(len(rows), 1000.0), np.full(len(rows), 10.0))


def posed(limit: float = 1.0, **changed: Any) -> Problem:
    """The toy's problem, about that network, with a limit on the drop."""
    return replace(toy().problem, budget=Budget(drop=limit), before=BEFORE, costs=as_trained, **changed)


def evaluation(number: int, drop: float, size_bytes: int, latency_ms: float = 10.0) -> Evaluation:
    """Told apart by what they keep; as fast as the original."""
    figures = Figures(latency_ms=latency_ms, speedup=10.0 / latency_ms, size_bytes=size_bytes, drop=drop)
    return Evaluation(Policy({}, {"g": number}), figures, 90.0 - drop)


def finished(
    budget: Budget, seen: Sequence[Evaluation], gain: float, *, score_error: float = 0.0
) -> tuple[Choice, list[int]]:
    """The choice where fine-tuning leaves such a part of every drop, and what was finished, in order."""
    problem: Problem = replace(toy().problem, budget=budget, before=BEFORE, costs=as_trained, score_error=score_error)
    order: list[int] = []
    by_policy = {each.policy.digest(): each for each in seen}

    def complete(policy: Policy) -> Evaluation:
        order.append(policy.keep["g"])
        before = by_policy[policy.digest()]
        assert before.figures.drop is not None
        return replace(before, figures=replace(before.figures, drop=gain * before.figures.drop))

    return Finishing(problem, complete).choice(seen), order


LADDER = [evaluation(i, drop=0.5 * i, size_bytes=1000 - 100 * i) for i in range(1, 9)]
"""Each smaller than the one before, and worse by half a point."""


def test_the_cheapest_that_holds_the_drop_is_taken() -> None:
    choice, order = finished(Budget(drop=1.0), LADDER, gain=0.5)
    assert choice.best.policy.keep["g"] == 4, "half of two points"
    assert order[0] == 4


def test_a_gain_may_be_asked_for() -> None:
    """A limit below nought: nothing is known of how a gain grows, so the least harmed are finished."""
    ladder = [evaluation(i, drop=0.2 * i - 1.0, size_bytes=1000 - 50 * i) for i in range(1, 7)]
    choice, order = finished(Budget(drop=-0.5), ladder, gain=0.9)
    assert choice.best.policy.keep["g"] == 2
    assert len(order) <= FINALISTS


@pytest.mark.parametrize(("gain", "best"), [(0.25, 8), (1.0, 2)])
def test_what_is_finished_corrects_what_is_expected(gain: float, best: int) -> None:
    ladder = [evaluation(i, drop=0.5 * i, size_bytes=1000 - 20 * i) for i in range(1, 9)]
    choice, order = finished(Budget(drop=1.0), ladder, gain)
    assert choice.best.policy.keep["g"] == best
    assert len(order) <= FINALISTS
    assert len(set(order)) == len(order)


def test_what_may_be_relied_on_is_never_less_than_a_quarter_of_the_limit() -> None:
    """Splits that can tell nothing ask for no better than that; a limit that is small for them is relied on less."""
    mild, harsh = evaluation(1, drop=0.2, size_bytes=900), evaluation(2, drop=0.3, size_bytes=600)
    for score_error, best in ((9.0, 1), (0.5, 2)):
        choice, _ = finished(Budget(drop=1.0), [mild, harsh], gain=1.0, score_error=score_error)
        assert choice.best.policy.keep["g"] == best


def test_one_that_holds_the_limit_by_a_margin_comes_before_one_that_just_does() -> None:
    choice, _ = finished(Budget(drop=1.0), LADDER, gain=0.5, score_error=0.25)
    assert choice.best.policy.keep["g"] == 3, "0.75 holds a limit of 1.0 by 0.25, 1.0 just holds it"
    only = [LADDER[3]]
    assert finished(Budget(drop=1.0), only, gain=0.5, score_error=0.25)[0].best.policy.keep["g"] == 4


def test_between_what_held_and_what_did_not_all_that_is_cheaper_is_tried() -> None:
    """Splits that can tell nothing: what holds counts as holding just so, which tells of nothing beyond it."""
    drops = {1: (5.0, 0.0), 2: (6.0, 0.1), 3: (6.5, 0.3), 4: (7.0, 0.4)}
    seen = [evaluation(i, drop=before, size_bytes=1000 - 10 * i) for i, (before, _) in drops.items()]

    def complete(policy: Policy) -> Evaluation:
        number = policy.keep["g"]
        return evaluation(number, drops[number][1], 1000 - 10 * number)

    problem = posed(limit=0.5, score_error=9.0)
    finishing = Finishing(problem, complete)
    finishing.some(seen[:1])
    finishing.some(seen[3:])
    choice = finishing.choice(seen)
    assert choice.best.policy.keep["g"] == 2
    assert len(choice.finished) == 4


def test_between_what_held_and_what_did_not_the_most_is_expected_of_the_middle() -> None:
    """The smallest of those is nearly as hard as what failed, by far, and the mildest hardly smaller than what held."""
    drops = {100: 0.0, 110: 0.1, 140: 0.2, 190: 8.0, 200: 9.0}
    sizes = {100: 1000, 110: 960, 140: 800, 190: 640, 200: 600}
    by_root = {number: number / (1000 / size) ** 0.5 for number, size in sizes.items()}
    seen = [evaluation(number, by_root[number], size) for number, size in sizes.items()]
    order: list[int] = []

    def complete(policy: Policy) -> Evaluation:
        order.append(number := policy.keep["g"])
        return evaluation(number, drops[number], sizes[number])

    problem = posed(score_error=9.0)
    finishing = Finishing(problem, complete, most=4)
    finishing.some(seen[:1])
    finishing.some(seen[4:])
    choice = finishing.choice(seen)
    assert order == [100, 200, 140, 190]
    assert choice.best.policy.keep["g"] == 140


def test_a_drop_within_its_limit_is_not_traded_for_bytes() -> None:
    """Half the drop, at nearly twice the bytes: worth nothing to who allowed that drop."""
    mild, small = evaluation(1, drop=0.1, size_bytes=900), evaluation(2, drop=0.9, size_bytes=600)
    choice, _ = finished(Budget(drop=1.0), [mild, small], gain=1.0)
    assert choice.best.policy.keep["g"] == 2


def test_files_that_were_timed_at_different_times_are_compared_by_their_speed_up() -> None:
    """The same files, the second timed when the machine was half as fast: milliseconds would choose the first."""
    first, second = evaluation(1, drop=0.5, size_bytes=600), evaluation(2, drop=0.5, size_bytes=500)
    slow = replace(second, figures=replace(second.figures, latency_ms=20.0, speedup=1.0))
    choice = Finishing(
        posed(),
        lambda policy: {1: first, 2: slow}[policy.keep["g"]],
        most=2,
    )
    choice.some([second])
    choice.some([first])
    assert choice.choice([]).best is slow


def test_while_nothing_has_failed_the_mildest_of_what_is_cheaper_is_tried() -> None:
    """Seen on a network: one recipe was finished, lost nothing of two points, and all else was three times as hard."""
    seen = [evaluation(1, 16.0, 900), evaluation(2, 60.0, 700), evaluation(3, 90.0, 600)]
    drops = {1: 0.0, 2: 0.3, 3: 1.4}
    order: list[int] = []

    def complete(policy: Policy) -> Evaluation:
        order.append(number := policy.keep["g"])
        return replace(seen[number - 1], figures=replace(seen[number - 1].figures, drop=drops[number]))

    finishing = Finishing(posed(limit=1.0), complete)
    finishing.some(seen[:1])
    choice = finishing.choice(seen)
    assert order == [1, 2, 3]
    assert choice.best.policy.keep["g"] == 2


def test_a_latency_that_holds_by_a_hair_is_not_relied_on() -> None:
    """Measured again it may miss its limit; of drops the second has twice as much, and both are safe."""
    near, apart = evaluation(1, 0.1, 500, latency_ms=4.99), evaluation(2, 0.2, 500, latency_ms=4.8)
    for limits in (Budget(drop=1.0, latency_ms=5.0), Budget(drop=1.0, speedup=2.0), Budget(speedup=2.0)):
        choice, _ = finished(limits, [near, apart], gain=1.0)
        assert choice.best.policy.keep["g"] == 2
        choice, _ = finished(limits, [near], gain=1.0)
        assert choice.best.policy.keep["g"] == 1, "it holds all the same"


def test_a_search_aims_where_a_latency_is_relied_on() -> None:
    problem = replace(posed(), budget=Budget(drop=1.0, latency_ms=5.0, speedup=2.0, size_bytes=700))
    aimed = Finishing(problem, lambda _: evaluation(1, 0.0, 500)).aim.budget
    assert aimed.latency_ms == pytest.approx((1 - LATENCY_MARGIN) * 5.0)
    assert aimed.speedup == pytest.approx(2.0 / (1 - LATENCY_MARGIN))
    assert replace(aimed, latency_ms=5.0, speedup=2.0) == problem.budget, "other limits are as they were"


def test_what_has_a_limit_is_not_made_smaller_than_that() -> None:
    """With a limit on the size, milliseconds count alone; with limits on all, the drop does."""
    fast = evaluation(1, drop=0.9, size_bytes=900, latency_ms=1.0)
    tiny = evaluation(2, drop=0.9, size_bytes=100, latency_ms=1.2)
    exact = evaluation(3, drop=0.1, size_bytes=900, latency_ms=2.0)
    for budget, best in ((Budget(drop=1.0, size_bytes=950), 1), (Budget(drop=1.0), 2)):
        assert finished(budget, [fast, tiny, exact], gain=1.0)[0].best.policy.keep["g"] == best
    everything = Budget(drop=1.0, size_bytes=950, latency_ms=3.0)
    assert finished(everything, [fast, tiny, exact], gain=1.0)[0].best.policy.keep["g"] == 3


def test_where_nothing_holds_the_mildest_is_taken() -> None:
    choice, _ = finished(Budget(drop=0.1), LADDER, gain=1.0)
    assert choice.best.policy.keep["g"] == 1


def test_other_limits_come_first() -> None:
    slow = evaluation(9, drop=0.1, size_bytes=50, latency_ms=90.0)
    choice, _ = finished(Budget(drop=1.0, latency_ms=20.0), [*LADDER, slow], gain=0.5)
    assert choice.best.policy.keep["g"] == 4


@pytest.mark.parametrize(("size_bytes", "expected"), [(550, [5, 6, 7, 8]), (580, [4, 5, 6, 7, 8])])
def test_what_misses_another_limit_is_not_finished_where_others_hold_it(size_bytes: int, expected: list[int]) -> None:
    """Neither as the milder one beside another, nor for want of anything better; but what may hold it after all is."""
    problem = replace(posed(), budget=Budget(drop=1.0, size_bytes=size_bytes), at_once=2)
    finishing = Finishing(problem, lambda policy: LADDER[policy.keep["g"] - 1])
    assert sorted(each.policy.keep["g"] for each in finishing.choice(LADDER).finished) == expected


def test_without_a_limit_on_the_drop_the_best_score_under_the_others_is_taken() -> None:
    choice, order = finished(Budget(size_bytes=600), LADDER, gain=0.5)
    assert choice.best.policy.keep["g"] == 4, "the first that is small enough"
    assert len(order) == FINALISTS


@pytest.mark.parametrize("count", [1, 2])
def test_few_evaluations_are_enough(count: int) -> None:
    choice, order = finished(Budget(drop=1.0), LADDER[:count], gain=0.5)
    assert choice.best.policy.keep["g"] in range(1, count + 1)
    assert choice.evaluations == tuple(LADDER[:count])
    assert len(order) <= count


def allowed(problem: Problem) -> float | None:
    """The drop that an evaluation of a file like the original's may have."""
    limit = problem.budget.drop
    if limit is None or problem.part_left is None:
        return limit
    return limit / float(problem.part_left(problem.costs(problem.as_trained[None]))[0])


def aim(
    budget: Budget, before: float, after: float, *, score_error: float = 0.0, most: int = FINALISTS
) -> tuple[float | None, int]:
    """The drop that evaluations may have, where the first recipe's file is as large as the original's and its drop is
    seen to shrink so; how many were finished."""
    problem = replace(
        toy().problem,
        budget=budget,
        before=BEFORE,
        costs=as_trained,
        score_error=score_error,
        evaluate=lambda policy: evaluation(0, before, 1000),
    )
    order: list[Policy] = []

    def complete(policy: Policy) -> Evaluation:
        order.append(policy)
        return evaluation(0, after, 1000)

    finishing = Finishing(problem, complete, most=most)
    evaluations = Evaluations(problem, 3)
    finishing.recipe(evaluations)
    return allowed(finishing.aim), len(order)


def test_evaluations_may_drop_by_what_fine_tuning_mends() -> None:
    found, _ = aim(Budget(drop=1.0), before=4.0, after=0.25)
    assert found == pytest.approx(4.0 * 4 ** (1 / 1.5)), "0.25 grows to 1.0 with the power of 1.5 of hardness"


def test_the_smaller_and_faster_the_file_the_less_an_evaluation_may_drop() -> None:
    """By the square root of both, and never less than the limit itself."""
    small, fast = evaluation(0, 4.0, 250), evaluation(0, 4.0, 1000, latency_ms=2.5)
    for recipe in (small, fast):
        problem = posed(evaluate=lambda _, r=recipe: r)
        finishing = Finishing(problem, lambda _, r=recipe: replace(r, figures=replace(r.figures, drop=0.25)), most=2)
        finishing.recipe(Evaluations(problem, 3))
        part_left = finishing.aim.part_left
        assert part_left is not None
        prices = Prices(np.array([1000.0, 250.0, 90.0, 1.0, 250.0]), np.array([10.0, 10.0, 10.0, 10.0, 2.5]))
        as_large = 4.0 * 4 ** (1 / 1.5)
        allowed_drops = [as_large * 2, as_large, as_large * (90 / 250) ** 0.5, 1.0, as_large / 2]
        assert 1.0 / part_left(prices) == pytest.approx(allowed_drops)
        left = finishing.aim.left_of([replace(recipe, figures=replace(recipe.figures, drop=10.0))])
        assert left == pytest.approx([10.0 / as_large])
        another = replace(evaluation(1, 3.0, 1), figures=replace(recipe.figures, drop=3.0))
        assert finishing.choice([another]).hardness[another.policy.digest()] == pytest.approx(6.0)


def test_what_a_policy_lacks_is_recorded_with_it() -> None:
    """Layers that are gone or have one bit count nothing, of two bits a half."""
    signs, steps = (Precision(Storage(*each, PerChannel()), Compute.FP32) for each in (("vector", 1), ("int", 2)))
    variables = (
        *(LayerVariable(name, (FP32, INT8, steps, signs), (name,)) for name in ("a", "b", "c", "d")),
        GroupVariable("g", (0, 8), ("b",), gone_at_zero=("a", "b")),
    )
    problem: Problem = replace(toy().problem, budget=Budget(drop=1.0), before=BEFORE, variables=variables)
    rows = np.array([[0, 1, 0, 0, 1], [3, 0, 1, 0, 1], [0, 0, 0, 0, 0], [3, 0, 1, 2, 0], [3, 3, 3, 3, 0]])
    whole = [1.0, 0.75, 0.5, 0.375, 0.0]
    found = [problem.whole(problem.policy(row)) for row in rows]
    assert found == pytest.approx(whole), "what is gone has no bits besides"

    seen = [Evaluation(problem.policy(row), evaluation(0, 1.0, 1000).figures, 89.0) for row in rows]
    choice = Finishing(problem, lambda _: seen[0]).choice(seen)
    assert [choice.whole[each.policy.digest()] for each in seen] == pytest.approx(whole)


def test_how_fast_a_file_is_goes_by_its_speed_up_if_that_was_seen() -> None:
    """Milliseconds of two hours are those of two machines."""
    measured = evaluation(1, 3.0, 1000, latency_ms=5.0)
    slow = replace(measured, figures=replace(measured.figures, latency_ms=7.0, speedup=4.0))
    problem = posed()
    hardness = Finishing(problem, lambda _: measured).choice([slow]).hardness
    assert hardness[slow.policy.digest()] == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (5.0, 5.0, 1.71),
        (0.5, 2.0, 1.0),
        (4.0, -0.3, 29.47),
        (30.0, -0.3, MOST_TIMES),
        (100.0, 0.2, 150.0),
        (100.0, -0.3, 200.0),
    ],
)
def test_the_aim_is_never_stricter_than_the_limit_and_never_far_beyond_it_or_what_was_mended(
    before: float, after: float, expected: float
) -> None:
    found, _ = aim(Budget(drop=1.0), before, after)
    assert found == pytest.approx(expected, abs=0.01)


def test_beyond_what_was_seen_drops_that_a_score_cannot_tell_count_as_half_of_what_it_can() -> None:
    before, well, exactly = evaluation(1, 4.0, 500), evaluation(1, -0.3, 500), evaluation(1, 0.25, 500)
    for after, error in ((well, 0.5), (exactly, 0.0)):
        told = Mending.seen_in([(before, after)], limit=1.0, score_error=error, hardness=lambda each: each.drop)
        assert told is not None
        assert told.hardest(1.0) == pytest.approx(4.0 * 4 ** (1 / 1.5))


def test_between_what_held_and_what_did_not_what_is_left_is_told_by_a_straight_line() -> None:
    """Seen on a network: the recipe gained half a point, 282 lost 0.68 and 280, tried later, 0.17."""
    pairs = [(evaluation(1, 34.0, 900), evaluation(1, -0.55, 900)), (evaluation(2, 282.0, 90), evaluation(2, 0.68, 90))]
    mending = Mending.seen_in(pairs, limit=0.5, score_error=0.3, hardness=lambda each: each.drop)
    assert mending is not None
    assert mending.hardest(0.125) == pytest.approx(34 + 248 * 0.675 / 1.23)


def test_where_mending_ends_abruptly_what_was_nearly_seen_tells() -> None:
    """Seen on a network: 7.9 points all but gone, 8.7 not.  A straight line through both would hope for 8.8."""
    pairs = [(evaluation(1, 7.88, 500), evaluation(1, 0.03, 500)), (evaluation(2, 8.65, 400), evaluation(2, 0.82, 400))]
    mending = Mending.seen_in(pairs, limit=1.0, score_error=0.345, hardness=lambda each: each.drop)
    assert mending is not None
    assert 7.88 < mending.hardest(0.58) < 8.65 < mending.hardest(1.0) < 9.2
    assert mending.hardest(0.82) == pytest.approx(8.65)


def test_what_was_seen_to_hold_is_aimed_at_however_coarse_the_score_is() -> None:
    found, _ = aim(Budget(drop=1.0), 4.0, 0.2, score_error=2.0)
    assert found is not None
    assert found >= 4.0


def test_a_recipe_that_loses_nothing_teaches_nothing() -> None:
    assert aim(Budget(drop=1.0), 0.1, 0.0, score_error=1.0) == (1.0, 1)


def test_the_first_recipe_is_one_that_is_hard_enough_to_teach_something() -> None:
    """Found by halving, with evaluations that count."""
    problem = toy().problem
    ladder = {policy.digest(): problem.evaluate(policy) for policy in recipe_ladder(problem)}
    for most, spent in ((12, RECIPES), (3, 1)):
        evaluations, order = Evaluations(problem, most), list[Policy]()

        def complete(policy: Policy, order: list[Policy] = order) -> Evaluation:
            order.append(policy)
            return problem.evaluate(policy)

        finishing = Finishing(problem, complete)
        finishing.recipe(evaluations)
        assert len(evaluations.seen) == spent
        assert {each.policy.digest() for each in evaluations.seen} <= {*ladder}
        (finished,) = order
        if most == 12:
            hardness = finishing.choice(evaluations.seen).hardness
            wanted = FIRST_HARDNESS * 1.0
            far = {digest: abs(np.log(max(hard, 1e-6) / wanted)) for digest, hard in hardness.items()}
            assert far[finished.digest()] < np.log(2), "of some thirty, from nothing to eighty"
        else:
            assert finished.digest() == [*ladder][(len(ladder) - 1) // 2], "one alone is the middle"


def test_the_first_recipe_keeps_the_other_limits_where_any_does() -> None:
    """A milder one takes longer to train, and what it leaves says little of those that may be taken in the end."""
    free = toy().problem
    ladder = recipe_ladder(free)
    sizes = free.costs(np.array([free.row(policy) for policy in ladder])).size_bytes
    for kept in (3, 0):
        most = round(sorted(sizes)[kept]) if kept else 1
        problem = replace(free, budget=replace(free.budget, size_bytes=most))
        evaluations, order = Evaluations(problem, 12), list[Policy]()

        def complete(policy: Policy, order: list[Policy] = order) -> Evaluation:
            order.append(policy)
            return free.evaluate(policy)

        Finishing(problem, complete).recipe(evaluations)
        able = [policy for policy, size in zip(ladder, sizes, strict=True) if size <= most]
        assert bool(able) == bool(kept)
        assert {each.policy.digest() for each in evaluations.seen} <= {each.digest() for each in able or ladder}
        assert not kept or order[0].digest() == able[0].digest(), "all are harder than is wanted: the mildest"
        assert kept or len(evaluations.seen) == RECIPES


def test_without_a_limit_on_the_drop_nothing_is_finished_before() -> None:
    assert aim(Budget(size_bytes=500), 4.0, 1.0) == (None, 0)
    assert aim(Budget(drop=0.0), 4.0, 1.0) == (0.0, 0)


def test_what_is_finished_in_the_middle_of_a_search_moves_its_aim() -> None:
    """Of the recipe little was mended; of the first that the search found, nearly all."""
    problem = posed(evaluate=lambda policy: evaluation(99, 4.0, 900))
    left = {99: 2.0, 5: 0.1}
    order: list[int] = []

    def complete(policy: Policy) -> Evaluation:
        order.append(policy.keep["g"])
        return evaluation(policy.keep["g"], left[policy.keep["g"]], 500)

    finishing = Finishing(problem, complete)
    finishing.recipe(Evaluations(problem, 3))
    before = allowed(finishing.aim)
    assert before == pytest.approx(4.0 / 0.9**0.5 * 0.5 ** (1 / 1.5))
    assert finishing.some([evaluation(i, drop=0.5 * i, size_bytes=1000 - 20 * i) for i in range(1, 6)])
    assert order == [99, 5], "2.5 is the most that is told to be mended, and the cheapest"
    after = allowed(finishing.aim)
    assert before is not None
    assert after is not None
    assert after > before


def test_nothing_is_finished_that_drops_by_far_more_than_the_limit() -> None:
    """However well the recipe was mended: what nobody has seen yet is not believed."""
    hopeless, good = evaluation(1, drop=20.0, size_bytes=100), evaluation(2, drop=9.0, size_bytes=300)
    problem = posed(evaluate=lambda policy: evaluation(99, 8.0, 900))
    order: list[int] = []

    def complete(policy: Policy) -> Evaluation:
        order.append(policy.keep["g"])
        return evaluation(policy.keep["g"], 0.0, 500)

    finishing = Finishing(problem, complete)
    finishing.recipe(Evaluations(problem, 3))
    assert finishing.some([hopeless, good])
    assert order == [99, 2]


@pytest.mark.parametrize(
    ("left", "expected"), [(0.1, [99, 170, 250, 370, 540, 460]), (0.0, [99, 230, 440, 850, 540, 460])]
)
def test_what_is_mended_to_the_last_lets_more_be_hoped_for_each_time(left: float, expected: list[int]) -> None:
    """Seen on a network: ten times the limit lost nothing, three times, and the search ended with its limit unspent."""
    drops = [170.0, 230.0, 250.0, 370.0, 440.0, 460.0, 540.0, 850.0]
    recipe, ladder = evaluation(99, 120.0, 900), [evaluation(round(d), d, 900 - round(d / 10)) for d in drops]
    problem = posed(evaluate=lambda _: recipe)
    by_policy = {each.policy.digest(): each for each in (recipe, *ladder)}
    order: list[int] = []

    def complete(policy: Policy) -> Evaluation:
        """Next to nothing is left of 480 points, and all of more."""
        order.append(policy.keep["g"])
        before = by_policy[policy.digest()]
        return replace(before, figures=replace(before.figures, drop=left if before.drop <= 480.0 else before.drop))

    finishing = Finishing(problem, complete, most=6)
    finishing.recipe(Evaluations(problem, 3))
    choice = finishing.choice(ladder)
    assert order == expected, "half as much again each time, or twice as much, until it was too far"
    assert choice.best.policy.keep["g"] == 460


def test_what_may_be_tried_does_not_shrink_with_a_limit_that_is_small_for_one_example() -> None:
    """Fine-tuning mends as much whatever was allowed; where nothing is known of one example, the limit tells."""
    for spread, unit in ((0.0, 0.5), (15.0, 0.5), (24.0, 0.8)):
        recipe = evaluation(99, 20.0, 1000)
        problem = posed(
            limit=0.5,
            score_spread=spread,
            evaluate=lambda _, recipe=recipe: recipe,
        )
        mended = replace(recipe, figures=replace(recipe.figures, drop=0.0))
        finishing = Finishing(problem, lambda _, mended=mended: mended)
        finishing.recipe(Evaluations(problem, 3))
        assert allowed(finishing.aim) == pytest.approx(MOST_TIMES * unit)


def begun(*, most: int) -> tuple[Finishing, list[int]]:
    """A recipe that drops by 12 points is finished, and at most so many are; what was, in order.  As much is left of
    everything as is safe, so that more is told to leave too much."""
    recipe = evaluation(99, 12.0, 900)
    problem = posed(
        score_error=9.0,
        evaluate=lambda _: recipe,
    )
    order: list[int] = []

    def complete(policy: Policy) -> Evaluation:
        order.append(policy.keep["g"])
        return evaluation(policy.keep["g"], 0.2, 900)

    finishing = Finishing(problem, complete, most=most)
    finishing.recipe(Evaluations(problem, 3))
    return finishing, order


def test_a_step_further_is_taken_only_while_another_may_follow_it() -> None:
    seen = [evaluation(11, 11.0, 880), evaluation(17, 17.0, 850)]
    for most, finished_next, drop in ((2, 11, 12.0 / 0.9**0.5), (3, 17, 18.0 / 0.9**0.5)):
        finishing, order = begun(most=most)
        assert allowed(finishing.aim) == pytest.approx(drop), "what was mended, or half as much again"
        assert finishing.some(seen)
        assert order == [99, finished_next]


@pytest.mark.parametrize(("drop", "expected"), [(17.0, [99, 1]), (30.0, [99])])
def test_the_last_is_spent_on_a_step_further_where_nothing_surer_is_left(drop: float, expected: list[int]) -> None:
    """It costs time alone, since another holds; but no more than a step."""
    finishing, order = begun(most=2)
    finishing.choice([evaluation(1, drop, 850)])
    assert order == expected


@pytest.mark.parametrize(
    ("mild_left", "is_recipe", "most"), [(0.02, True, 2.0 * 62), (0.08, True, 1.5 * 62), (0.02, False, None)]
)
def test_a_recipe_that_fails_is_no_example_of_what_was_searched(
    mild_left: float, is_recipe: bool, most: float | None
) -> None:
    """Seen on `wide`: 0.23 of 0.5 points were left of a recipe as hard as 104, and so a search that had lost nothing at
    62 and 76 tried nothing harder, where another had lost nothing at 183.  What a score cannot tell is no loss."""
    harsh, mild = evaluation(99, 104.0, 1000), evaluation(62, 62.0, 1000)
    left = {99: 0.23, 62: mild_left}
    problem = posed(
        limit=0.5,
        score_error=0.33,
        recipes={"keep=25%": harsh.policy} if is_recipe else {},
        evaluate=lambda _: harsh,
    )
    finishing = Finishing(problem, lambda policy: evaluation(policy.keep["g"], left[policy.keep["g"]], 1000))
    assert finishing.some([harsh])
    assert finishing.some([mild])
    if most is None:
        assert 62 < allowed(finishing.aim) < 104, "between what held and what failed"
    else:
        assert allowed(finishing.aim) == pytest.approx(most)


def test_prices_that_were_told_anew_decide_what_is_finished_next() -> None:
    """Of two small files the first was told to be the faster one; its file was timed, and is not."""
    problem = posed()
    first, second = evaluation(1, 0.5, 500, latency_ms=2.0), evaluation(2, 0.5, 500, latency_ms=3.0)
    finishing = Finishing(problem, lambda policy: {1: first, 2: second}[policy.keep["g"]])
    assert finishing.promising([first, second], 9) == [first, second]
    assert finishing.promising([first, second], 1) == [first]

    def told(each: Evaluation) -> Evaluation:
        slower = 2.0 if each.policy == first.policy else 1.0
        ms = slower * (each.figures.latency_ms or 0)
        return replace(each, figures=replace(each.figures, latency_ms=ms, speedup=10.0 / ms))

    seen = Evaluations(replace(problem, evaluate=lambda policy: {1: first, 2: second}[policy.keep["g"]]), 2)
    for each in (first, second):
        seen.of(each.policy)
    seen.reprice(told)
    assert [each.figures.latency_ms for each in seen.seen] == [4.0, 3.0]
    assert seen.of(first.policy) is seen.seen[0], "and it costs nothing"
    finishing.reprice(problem, told)
    assert finishing.promising(seen.seen, 1) == [seen.seen[1]]
    assert finishing.some(seen.seen)
    finishing.reprice(problem, told)
    known = finishing.choice([told(each) for each in seen.seen]).evaluations
    assert len(known) == 2, "what was finished is told anew as well, and is not taken for another"


def test_search_and_finishing_take_turns_only_where_there_is_a_drop_to_learn_about() -> None:
    assert Finishing(replace(toy().problem, budget=Budget(drop=1.0)), lambda policy: LADDER[0]).parts == (2 / 3, 1.0)
    assert Finishing(replace(toy().problem, budget=Budget(size_bytes=9)), lambda policy: LADDER[0]).parts == (1.0,)


def test_what_was_finished_before_is_a_finalist_that_costs_nothing() -> None:
    problem = posed(evaluate=lambda _: LADDER[4])
    ends = {5: replace(LADDER[4], figures=replace(LADDER[4].figures, drop=0.9))}
    order: list[int] = []

    def complete(policy: Policy) -> Evaluation:
        order.append(policy.keep["g"])
        return ends.get(policy.keep["g"], LADDER[policy.keep["g"] - 1])  # nothing is mended of the others

    finishing = Finishing(problem, complete)
    finishing.recipe(Evaluations(problem, 3))
    choice = finishing.choice(LADDER[:4])
    assert choice.best is ends[5]
    assert LADDER[4] in choice.evaluations
    assert order == [5], "all others are dearer"
