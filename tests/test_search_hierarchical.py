"""The hierarchical search: legal moves, votes, what it finds on a problem that is solved."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import ndtr
from toy_search import BEST_COST, COUNTS, DROP_MAX, MENDED, TIED, chosen, toy

from hirelc_deploy.budget import Budget, excess
from hirelc_deploy.search import hierarchical
from hirelc_deploy.search.additive import DropModel, recipe_ladder
from hirelc_deploy.search.agents import OwnGame
from hirelc_deploy.search.board import DAMAGE, LATENCY, MODE, MODES, SIZE, Board, Goals
from hirelc_deploy.search.council import Council, count
from hirelc_deploy.search.front import most_added
from hirelc_deploy.search.goal import Goal
from hirelc_deploy.search.hierarchical import HARD, LEAST_DEVIATION, RECIPES, Parts, search
from hirelc_deploy.search.problem import Evaluations, GroupVariable, LayerVariable, Prices, prices_of
from hirelc_deploy.search.proposals import refined
from hirelc_deploy.search.space import Evaluation
from hirelc_deploy.search.surrogate import Surrogate

EVALUATIONS = 28


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for four blocks."""
    monkeypatch.setattr(hierarchical, "HIGH_STEPS", 1024)
    monkeypatch.setattr(hierarchical, "LOW_STEPS", 4096)
    monkeypatch.setattr(hierarchical, "PROPOSALS", 96)
    monkeypatch.setattr("hirelc_deploy.search.surrogate.STEPS", 100)


def goals(count: int) -> Goals:
    return Goals(np.full(count, DROP_MAX), np.full(count, 0.5))


def random_moves(lengths: list[int], games: int, random: np.random.Generator) -> np.ndarray:
    return random.integers(lengths, size=(games, len(lengths)))


# -- moves ---------------------------------------------------------------------------------------------------


def test_every_move_leads_to_a_legal_policy() -> None:
    problem, random = toy().problem, np.random.default_rng(0)
    board = Board(problem)
    games = board.begin(goals(500))
    for block in range(len(board.blocks)):
        board.play_high(games, block, random_moves(board.high_move, len(games), random))
    for block in range(len(board.blocks)):
        board.play_low(games, block, random_moves(board.low_move, len(games), random))
    assert (games.rows >= 0).all()
    assert (games.rows < problem.sizes).all()
    first, second = (games.rows[:, problem.position[name]] for name in TIED)
    assert (first == second).all()
    assert len(np.unique(games.rows, axis=0)) > 400, "different moves are different policies"


def test_a_move_that_names_a_precision_gets_it() -> None:
    problem = toy().problem
    board = Board(problem)
    variable = problem.variables[problem.position["l0"]]
    assert isinstance(variable, LayerVariable)
    reached = set()
    random = np.random.default_rng(0)
    for _ in range(200):
        games = board.begin(goals(1))
        board.play_low(games, 0, random_moves(board.low_move, 1, random))
        reached.add(int(games.rows[0, problem.position["l0"]]))
    assert reached == set(range(len(variable.options)))


def test_a_mode_holds_what_it_says() -> None:
    problem, random = toy().problem, np.random.default_rng(0)
    board = Board(problem)
    inner = problem.position["g1"]
    layer = problem.variables[problem.position["l2"]]
    group = problem.variables[inner]
    assert isinstance(layer, LayerVariable)
    assert isinstance(group, GroupVariable)
    for mode in MODES:
        games = board.begin(goals(200))
        games.allotted[:, :, MODE] = MODES.index(mode)
        board.play_low(games, 1, random_moves(board.low_move, 200, random))
        kept = np.array(group.options)[games.rows[:, inner]] / group.options[-1]
        bits = np.array([o.storage.bits for o in layer.options])[games.rows[:, problem.position["l2"]]]
        assert (kept.min() >= 0.5) == (mode == "quantise")
        assert (bits.min() >= 4) == (mode == "prune")


def test_groups_that_span_blocks_are_the_upper_levels() -> None:
    problem = toy().problem
    board = Board(problem)
    games = board.begin(goals(1))
    widest = np.zeros((1, len(board.high_move)), int)
    board.play_high(games, 0, widest)  # the narrowest level
    assert games.rows[0, problem.position["g0"]] == 0
    for block in range(len(board.blocks)):
        board.play_low(games, block, np.full((1, len(board.low_move)), 0))
    assert games.rows[0, problem.position["g0"]] == 0, "blocks' agents leave it as it is"


def test_a_sensitive_block_is_allotted_more_and_may_be_damaged_less() -> None:
    plain = toy().problem
    sensitivity = replace(plain.sensitivity, fisher=dict(zip(plain.blocks, (1.0, 1.0, 50.0, 1.0), strict=True)))
    problem = replace(plain, sensitivity=sensitivity)
    natural = Board(problem)._natural - Board(problem, corrected_by_fisher=False)._natural
    block = list(plain.blocks).index("b2")
    others = [i for i in range(len(plain.blocks)) if i != block]
    assert natural[block, SIZE] > natural[others, SIZE].max()
    assert natural[block, LATENCY] > natural[others, LATENCY].max()
    assert natural[block, DAMAGE] < natural[others, DAMAGE].min()


# -- votes ---------------------------------------------------------------------------------------------------


def test_votes_are_counted_by_category() -> None:
    votes = [np.array([[0, 2]]), np.array([[4, 2]]), np.array([[4, 0]])]
    assert count(votes, [1.0, 1.0, 1.0], [5, 3]).tolist() == [[4, 2]]
    assert count(votes, [3.0, 1.0, 1.0], [5, 3]).tolist() == [[0, 2]], "the mean of 0 and 4 is nobody's"


def test_of_equals_the_first_agents_vote_counts() -> None:
    votes = [np.array([[1]]), np.array([[0]])]
    assert count(votes, [0.5, 0.5], [2]).tolist() == [[1]]


def test_an_agent_that_earned_more_weighs_more() -> None:
    council = Council(Board(toy().problem), [None, None, None])  # type: ignore[list-item]  # none of them moves
    assert council.weights == pytest.approx([1 / 3] * 3)
    council.earned(0, -1.0)
    council.earned(1, 0.0)
    low, high, unknown = council.weights
    assert high / low == pytest.approx(np.e)
    assert low < unknown < high, "an agent without evaluations is taken for a middling one"


# -- the surrogate and what is proposed ----------------------------------------------------------------------


def test_the_surrogate_orders_policies_that_it_has_not_seen() -> None:
    problem = toy().problem
    random = np.random.default_rng(0)
    rows = problem.legal(random.integers(problem.sizes, size=(160, len(problem.sizes))))
    evaluations = [problem.evaluate(problem.policy(row)) for row in rows]
    surrogate = Surrogate(problem, seed=0)
    surrogate.fit(evaluations[:60])
    told = surrogate(rows[60:]).mean
    assert surrogate.judge(told[:7], evaluations[60:67]) is None, "too few to be ranked"
    correlation = surrogate.judge(told[7:], evaluations[67:])
    assert correlation is not None
    assert correlation > 0.85


def test_refinement_never_loses_reward_and_stays_legal() -> None:
    toyed = toy()
    problem, random = toyed.problem, np.random.default_rng(0)
    rows = problem.legal(random.integers(problem.sizes, size=(32, len(problem.sizes))))

    before = rows.copy()
    most = np.where(np.arange(32) < 16, DROP_MAX, 2 * DROP_MAX)

    def worth(tried: np.ndarray, games: np.ndarray) -> np.ndarray:
        return -toyed.cost(tried) - 5 * np.maximum(0.0, toyed.drop(tried) - most[games])

    better = refined(problem, rows, worth, random)
    assert (rows == before).all()
    games = np.arange(32)
    assert (worth(better, games) >= worth(rows, games)).all()
    assert (problem.legal(better) == better).all()
    assert worth(better, games)[:16].max() == pytest.approx(-BEST_COST, abs=0.02)
    assert worth(better, games)[16:].max() > -BEST_COST + 0.1, "who is allowed twice the drop gets further"


def test_what_adds_most_to_the_front_is_next() -> None:
    reference = np.array([1.0, 0.0, 0.0])
    seen = np.array([[0.5, -1.0, -1.0]])
    beaten, mild, cheap, beyond = [0.6, -0.9, -0.9], [0.2, -0.8, -0.8], [0.9, -2.0, -2.0], [1.5, -9.0, -9.0]
    found = most_added(np.array([beaten, mild, cheap, beyond]), seen, reference)
    assert found is not None
    # of 0.5 x 1 x 1 seen: 0.8 x 0.64 with 0.3 x 0.64 new, and 0.1 x 4 with 0.1 x 3 new
    assert found == (2, pytest.approx(0.3)), "the mild one adds 0.192"
    assert most_added(np.array([beyond]), seen, reference) is None


def test_what_may_turn_out_better_is_worth_more_than_what_is_known_to_add_little() -> None:
    """Of two that are told to lose as much as what was seen, the one that is uncertain."""
    reference, seen = np.array([1.0, 0.0, 0.0]), np.array([[0.5, -1.0, -1.0]])
    known, uncertain = [0.5, -1.01, -0.99], [0.5, -0.99, -1.01]
    for deviations, best in (([0.0, 0.0], 0), ([0.0, 0.5], 1), ([0.5, 0.0], 0)):
        found = most_added(np.array([known, uncertain]), seen, reference, np.array(deviations))
        assert found is not None
        assert found[0] == best
    halved = np.exp(0.5 * np.array([-1.28, -0.52, 0.0, 0.52, 1.28]))
    alone = most_added(np.array([[0.5, -1.0, -1.0]]), seen, reference, np.array([0.5]))
    assert alone == (0, pytest.approx(0.5 * np.maximum(0.0, 1 - halved).mean()))


def test_networks_count_once_they_tell_what_is_new_better_than_the_formula() -> None:
    """Drops are what the formula tells, times noise; what depends on one width as well is for networks to learn."""
    problem = toy().problem
    random = np.random.default_rng(0)
    rows = problem.legal(random.integers(problem.sizes, size=(72, len(problem.sizes))))
    width = rows[:, problem.position["g0"]] / (len(COUNTS) - 1)

    def evaluations(drops: np.ndarray) -> list[Evaluation]:
        return [
            replace(each, figures=replace(each.figures, drop=float(drop)))
            for each, drop in zip((problem.evaluate(problem.policy(row)) for row in rows), drops, strict=True)
        ]

    formula = DropModel(2.0, 1.0, 1.0).drop(problem, rows) * np.exp(0.3 * random.normal(size=len(rows)))
    for drops, helps in ((formula * np.exp(3 * np.sin(5 * width)), True), (formula, False)):
        surrogate, seen = Surrogate(problem, seed=0), evaluations(drops)
        surrogate.fit(seen[:48])
        assert not surrogate.networks_count, "nothing was told yet"
        surrogate.fit(seen)
        assert surrogate.networks_count == helps


# -- the search ----------------------------------------------------------------------------------------------


def found(seed: int, many: int = EVALUATIONS) -> tuple[float, Evaluations]:
    """How far from the optimum, in logarithms of bytes times milliseconds, and what was evaluated."""
    toyed = toy()
    evaluations = Evaluations(toyed.problem, many)
    search(toyed.problem, evaluations, seed=seed)
    best = chosen(toyed.problem, evaluations.seen)
    return float(toyed.cost(toyed.problem.row(best.policy)[None])[0]) - BEST_COST, evaluations


def test_it_comes_near_the_best_policy_there_is() -> None:
    gap, evaluations = found(0)
    assert gap < 0.15
    assert len(evaluations.seen) <= EVALUATIONS


def test_it_uses_what_fine_tuning_mends() -> None:
    """The optimum of drops as they are evaluated is 1.33 away."""
    problem = MENDED.problem()
    evaluations = Evaluations(problem, EVALUATIONS)
    search(problem, evaluations, seed=0)
    assert MENDED.gap(evaluations.seen) < 0.15


def test_the_same_seed_gives_the_same_policies() -> None:
    first, second = (found(3, 12)[1].seen for _ in range(2))
    assert [each.policy.digest() for each in first] == [each.policy.digest() for each in second]


def test_it_leaves_no_folders_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, of_torch = tmp_path / "ours", tmp_path / "torch"
    ours.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(ours))
    # torch makes one for its compiler where a process first comes near it
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(of_torch))
    found(0, 8)
    assert list(ours.iterdir()) == []


def test_hand_recipes_are_evaluated_first() -> None:
    toyed = toy()
    evaluations = Evaluations(toyed.problem, 12)
    search(toyed.problem, evaluations, seed=0)
    by_hand = {policy.digest() for policy in toyed.problem.recipes.values()}
    assert [each.policy.digest() in by_hand for each in evaluations.seen[:2]] == [True] * 2
    assert not all(each.policy.digest() in by_hand for each in evaluations.seen)
    ladder = [toyed.problem.row(policy) for policy in recipe_ladder(toyed.problem)]
    assert (np.diff(toyed.cost(np.stack(ladder))) < 0).all()


def test_hard_budgets_of_size_and_latency_are_held() -> None:
    toyed = toy()
    before = toyed.problem.before
    assert before.size_bytes
    assert before.latency_ms
    budget = Budget(size_bytes=before.size_bytes // 8, latency_ms=before.latency_ms / 3)
    limited = toy(budget)
    evaluations = Evaluations(limited.problem, EVALUATIONS)
    search(limited.problem, evaluations, seed=0)
    held = [
        each.figures.drop
        for each in evaluations.seen
        if (each.figures.size_bytes or 0) <= (budget.size_bytes or 0)
        and (each.figures.latency_ms or 0) <= (budget.latency_ms or 0)
    ]
    assert min(drop for drop in held if drop is not None) < 2.2


def test_where_limits_clash_those_of_size_and_latency_are_held() -> None:
    """Nothing holds all three; what holds one by missing another by a little is of no use to anyone."""
    before = toy().problem.before
    assert before.size_bytes
    assert before.latency_ms
    budget = Budget(drop=DROP_MAX, size_bytes=before.size_bytes // 16, latency_ms=before.latency_ms / 5)
    clashing = toy(budget).problem
    evaluations = Evaluations(clashing, EVALUATIONS)
    search(clashing, evaluations, seed=0)
    searched = evaluations.seen[RECIPES:]
    held = [each.drop for each in searched if not excess(budget, each.figures)]
    assert len(held) > len(searched) / 2
    assert DROP_MAX < min(held) < 2.3 * DROP_MAX


def test_a_limit_that_nothing_meets_is_approached_as_long_as_something_new_is_proposed() -> None:
    """There is no front then, and no volume that a cycle could add to."""
    limited, notes = toy(Budget(drop=DROP_MAX, size_bytes=1000)).problem, list[str]()
    evaluations = Evaluations(limited, EVALUATIONS, note=notes.append)
    search(limited, evaluations, seed=0)
    assert len(evaluations.seen) == EVALUATIONS or "evaluated already" in notes[-1]
    sizes = prices_of(evaluations.seen).size_bytes
    assert sizes[RECIPES:].max() < sizes[:RECIPES].min() / 5


def test_every_block_can_have_an_agent_of_its_own() -> None:
    toyed = toy()
    evaluations = Evaluations(toyed.problem, 10)
    search(toyed.problem, evaluations, seed=0, parts=Parts(shared=False))
    assert len(evaluations.seen) == 10
    seen: list[int] = []
    board = Board(toyed.problem)
    others = lambda _, block: seen.append(block)  # noqa: E731
    game = OwnGame(board, 2, lambda games: np.zeros(len(games)), goals, lambda _: None, others)
    observed = game.reset()
    assert (observed == board.see_low(game.games, 2)).all()
    assert seen == [0, 1], "blocks before it have chosen"
    game.step_async(np.zeros((len(game.games), len(board.low_move)), int))
    _, _, done, _ = game.step_wait()
    assert done.all(), "one move, one game"
    assert seen == [0, 1, 3, 0, 1], "those behind it choose, and the next game begins"


def test_a_search_for_another_target_finds_another_policy_that_is_faster_there() -> None:
    """One computes integers quickly, the other slowly."""
    found = {}
    for name, per_ms in (("integers", 20e6), ("floats", 1e6)):
        target = toy(Budget(drop=DROP_MAX), int8_macs_per_ms=per_ms)
        evaluations = Evaluations(target.problem, 16)
        search(target.problem, evaluations, seed=0)
        found[name] = target, target.problem.row(chosen(target.problem, evaluations.seen).policy)
    (integers, for_integers), (floats, for_floats) = found["integers"], found["floats"]
    assert (for_integers != for_floats).any()
    for mine, other, target in ((for_integers, for_floats, integers), (for_floats, for_integers, floats)):
        assert target.cost(mine[None]) < target.cost(other[None])
        mine_ms, other_ms = target.problem.costs(np.stack([mine, other])).latency_ms
        assert mine_ms < other_ms


def test_a_pick_for_the_goal_is_what_is_expected_to_be_cheaper_than_the_cheapest_that_holds() -> None:
    """The reward would take the first, which loses nothing; the second is surer than the third and gains enough."""
    problem = toy().problem
    evaluations = Evaluations(problem, 9)
    held = evaluations.of(problem.policy(problem.as_trained))
    one = hierarchical._Search(problem, evaluations, seed=0, parts=Parts())
    size_bytes, latency_ms = held.figures.size_bytes, held.figures.latency_ms
    assert size_bytes is not None
    assert latency_ms is not None
    prices = Prices(size_bytes * np.array([0.9, 0.5, 0.4, 1.1]), np.full(4, latency_ms))
    drops = DROP_MAX * np.array([0.0, 0.8, 1.6, 0.0])
    promise = one._promise(drops, np.full(4, LEAST_DEVIATION), prices)
    assert promise.argmax() == 1
    assert promise[3] == 0, "it is dearer"
    assert promise[0] == pytest.approx(-np.log(0.9)), "what it gains, for sure"
    assert promise[1] == pytest.approx(-np.log(0.5) * ndtr(np.log(1 / 0.8) / LEAST_DEVIATION))
    unsure = one._promise(drops, np.full(4, 1.0), prices)
    assert unsure[1] < promise[1]
    assert unsure[2] > promise[2]

    free = replace(problem, budget=Budget(size_bytes=10**9))
    two = hierarchical._Search(free, Evaluations(free, 9), seed=0, parts=Parts())
    rewards = two._promise(drops, np.full(4, LEAST_DEVIATION), prices)
    assert rewards == pytest.approx(Goal.of_problem(free).reward(drops, prices, HARD)), "without a limit on the drop"
