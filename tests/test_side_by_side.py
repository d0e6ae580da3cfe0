"""Policies that are fine-tuned in full in processes side by side."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_search_finish import BEFORE, as_trained, evaluation
from test_workbench import opened, small_policy
from torch import Tensor
from toy_search import toy

from hirelc_deploy import trainer, workbench
from hirelc_deploy.budget import Budget
from hirelc_deploy.policy import INT8, Policy
from hirelc_deploy.pool import Pool
from hirelc_deploy.search.finish import Finishing
from hirelc_deploy.search.problem import Problem
from hirelc_deploy.search.space import Evaluation
from hirelc_deploy.workbench import Workbench

LADDER = [evaluation(i, drop=float(i), size_bytes=1000 - 10 * i) for i in range(1, 9)]
"""Each smaller than the one before, and worse by a point."""

ONE_POINT = Budget(drop=1.0)


def weights(bench: Workbench, policy: Policy) -> dict[str, Tensor]:
    return bench.compressed(policy).model.state_dict()


def test_they_come_to_what_they_come_to_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what keeps its channels: what corrects that is journalled, which one process alone may do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with opened("convolutions", tmp_path / "in turn", epochs=1) as bench:
            half = small_policy(bench)
            policies = [
                half,
                replace(half, keep={**half.keep, "inner": 8}),
                Policy(dict.fromkeys(bench.graph.layer, INT8), {}),
            ]
            in_turn = [weights(bench, policy) for policy in policies]
        here: list[str] = []
        train = trainer.Trainer.trained
        monkeypatch.setattr(
            trainer.Trainer, "trained", lambda self, policy, name: here.append(name) or train(self, policy, name)
        )
        with opened("convolutions", tmp_path / "side by side", epochs=1) as bench, Pool(2) as engine:
            bench.engine = engine
            bench.compress_ahead(policies[:1])
            assert not list(bench.run.path.glob("states/*")), "one alone is made by who asks for it"
            bench.compress_ahead(policies)
            assert here == [], "nothing in this process"
            bench.run.drop_state(workbench._ahead(policies[1].digest()))
            bench.compress_ahead(policies)
            assert here == [], "neither is the one that an interruption left"
            found = [weights(bench, policy) for policy in policies]
            bench.compress_ahead(policies)
            assert not list(bench.run.path.glob("states/*")), "what is known is not made again"
    finally:
        torch.set_num_threads(threads)
    assert here == [policies[2].digest()]
    for one, other in zip(in_turn, found, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(other[key], tensor) for key, tensor in one.items())


def side_by_side(at_once: int, left: dict[int, float], budget: Budget = ONE_POINT) -> tuple[Finishing, list[list[int]]]:
    """A search whose policies are finished so many at once, and which they were."""
    problem: Problem = replace(toy().problem, budget=budget, before=BEFORE, costs=as_trained, at_once=at_once)
    together: list[list[int]] = []

    def complete(policy: Policy) -> Evaluation:
        number = policy.keep["g"]
        return replace(LADDER[number - 1], figures=replace(LADDER[number - 1].figures, drop=left[number]))

    def prepare(policies: Sequence[Policy]) -> None:
        together.append([policy.keep["g"] for policy in policies])

    return Finishing(problem, complete, prepare=prepare), together


def test_beside_the_most_promising_a_milder_one_is_finished_in_case_it_fails() -> None:
    finishing, together = side_by_side(2, {i: 0.1 if i <= 4 else 3.0 for i in range(1, 9)})
    assert finishing.some(LADDER[:2])
    assert together == [[2, 1]], "as far as was hoped for, and half way to the limit"
    choice = finishing.choice(LADDER)
    assert all(len(each) <= 2 for each in together)
    assert sum(map(len, together)) <= 5
    assert choice.best.policy.keep["g"] == 4


def test_half_of_what_may_be_finished_is_left_for_the_end() -> None:
    finishing, together = side_by_side(8, dict.fromkeys(range(1, 9), 0.5))
    finishing.some(LADDER)
    assert len(together[0]) <= 2
    finishing.choice(LADDER)
    assert sum(map(len, together)) <= 5


def test_without_a_limit_on_the_drop_those_with_the_best_reward_are_finished_together() -> None:
    finishing, together = side_by_side(3, dict.fromkeys(range(1, 9), 0.5), Budget(size_bytes=2000))
    finishing.choice(LADDER)
    assert [len(each) for each in together] == [3, 2]
