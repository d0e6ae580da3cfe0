"""Networks that are narrow from the start, with weights drawn anew, as an opponent."""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import nn
from toy_search import toy

from hirelc_deploy import trainer
from hirelc_deploy.policy import Policy
from hirelc_deploy.search import scratch
from hirelc_deploy.search.problem import Evaluations, Spent
from hirelc_deploy.search.space import Evaluation


def test_it_evaluates_recipes_whose_weights_are_drawn_anew() -> None:
    """And nothing of the network that was trained."""
    problem = toy().problem
    anew: list[Policy] = []

    def evaluate_anew(policy: Policy) -> Evaluation:
        anew.append(policy)
        found = problem.evaluate(policy)
        return replace(found, figures=replace(found.figures, drop=found.drop + 9.0))

    def never(policy: Policy) -> Evaluation:
        raise AssertionError(f"{policy} was made of the weights that were trained")

    evaluations = Evaluations(replace(problem, evaluate=never, evaluate_anew=evaluate_anew), 8)
    with suppress(Spent):
        scratch.search(evaluations.problem, evaluations, seed=0)
    assert len(evaluations.seen) == 8
    assert all(each.drop >= 9.0 for each in evaluations.seen)
    assert all(policy in problem.recipes.values() for policy in anew)


def test_weights_are_drawn_anew_where_no_layer_draws_them_as_well() -> None:
    """Positions have no layer of their own: as wide as they are, about the same mean; and the same seed draws the
    same."""

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(3.0 + 0.1 * torch.randn(1, 64, 32))
            self.mix = nn.MultiheadAttention(32, 4)
            self.norm = nn.BatchNorm1d(32)
            self.head = nn.Linear(32, 5)

    model = Placed()
    model.norm.running_mean += 7.0
    before = {name: each.clone() for name, each in model.state_dict().items()}
    one, same, other = (trainer.drawn_anew(model, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert all(torch.equal(each, same[name]) for name, each in one.items())
    for name in ("positions", "mix.in_proj_weight", "head.weight"):
        assert not torch.equal(one[name], before[name])
        assert not torch.equal(one[name], other[name])
    assert one["positions"].mean().item() == pytest.approx(3.0, abs=0.02)
    assert one["positions"].std().item() == pytest.approx(0.1, rel=0.1)
    assert (one["norm.running_mean"] == 0).all()
