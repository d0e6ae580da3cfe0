"""A real network as a search problem: options that can be built, prices that hold, harm that is measured."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import hasten
from test_workbench import NETWORKS, silent, task, traced

from hirelc_deploy import costing, effects
from hirelc_deploy.budget import Budget, Figures
from hirelc_deploy.choices import completed
from hirelc_deploy.compress.distil import FineTuning
from hirelc_deploy.compress.posttraining import PostTraining
from hirelc_deploy.config import ORDERS
from hirelc_deploy.policy import PRUNE_FIRST, QUANTIZE_FIRST, Policy
from hirelc_deploy.posing import Posing
from hirelc_deploy.profiles import load_target
from hirelc_deploy.rundir import RunFolder
from hirelc_deploy.search.problem import GroupVariable, LayerVariable, Problem
from hirelc_deploy.search.space import Evaluation
from hirelc_deploy.workbench import Workbench

hasten()

MULTIPLE = {"convolutions": 8, "tied": 2, "volumes": 8}
"""Of channels: every count is measured once."""


@contextmanager
def posed_under(name: str, budget: Budget, folder: Path) -> Iterator[Posing]:
    """A network as a problem under a budget; samples are few."""
    model, graph = traced(name)
    with pytest.MonkeyPatch.context() as patch, RunFolder.open(folder, {}, resume=False) as run:
        patch.setattr(costing, "SIZE_SAMPLES", 80)
        patch.setattr(effects, "COUNTS_TRIED", 3)
        bench = Workbench(
            model,
            task(NETWORKS[name][1]),
            graph,
            load_target("host").model_copy(update={"channel_multiple": MULTIPLE[name]}),
            run,
            importance="obs",
            fine_tuning=FineTuning(epochs=1),
            post_training=PostTraining.of(()),
            threads=1,
            batch=1,
            progress=silent,
        )
        yield Posing(bench, budget)


@pytest.fixture(scope="module", params=["convolutions", "tied", "volumes"])
def posed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Posing, Problem]]:
    with posed_under(str(request.param), Budget(drop=1.0), tmp_path_factory.mktemp("run")) as posing:
        yield posing, posing.problem()


def some_rows(problem: Problem, count: int = 24) -> np.ndarray:
    return problem.legal(np.random.default_rng(3).integers(problem.sizes, size=(count, len(problem.sizes))))


def narrowest(problem: Problem, storage: str) -> Policy:
    """The last recipe that is stored so and computed in floats."""
    return [policy for name, policy in problem.recipes.items() if f"={storage},compute=fp32" in name][-1]


def test_every_row_is_a_policy_that_can_be_built(posed: tuple[Posing, Problem]) -> None:
    posing, problem = posed
    for row in some_rows(problem):
        policy = problem.policy(row)
        bench = posing._bench
        assert completed(policy, bench.graph, bench.target).precisions == policy.precisions
        assert (problem.row(policy) == row).all()


def test_sizes_are_near_those_of_files(posed: tuple[Posing, Problem]) -> None:
    posing, problem = posed
    rows = some_rows(problem)
    exact = np.array([posing._bench.files.predicted_bytes(problem.policy(row)) for row in rows])
    off = problem.costs(rows).size_bytes / exact - 1
    # files of a few kilobytes, most of them names and nodes, and few samples: larger networks are 1 % off
    assert np.abs(off).mean() < 0.08
    assert np.abs(off).max() < 0.3


def test_sizes_are_fitted_to_policies_that_there_are(posed: tuple[Posing, Problem]) -> None:
    posing, problem = posed
    samples = posing._costing._samples
    assert (samples == problem.legal(samples)).all()  # layers that share a weight are stored alike


def test_latencies_are_the_predictors(posed: tuple[Posing, Problem]) -> None:
    posing, problem = posed
    rows = some_rows(problem)
    told = posing.predictor.foretell([problem.policy(row) for row in rows]).ms
    assert problem.costs(rows).latency_ms == pytest.approx(told)


def test_files_that_are_timed_are_told_as_they_were_seen_and_correct_what_is_told_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Narrow networks take twice as long as was told, in an hour when everything takes half as long again."""
    with posed_under("convolutions", Budget(drop=1.0), tmp_path) as posing:
        problem, latencies = posing.problem(), posing._bench.latencies
        policies = [narrowest(problem, storage) for storage in ("int4", "int2", "int3")]
        told_ms = [posing._costing.latency_ms(policy) for policy in policies]
        evaluations = [
            Evaluation(policy, Figures(latency_ms=ms, speedup=1.0, size_bytes=9, drop=1.0), 90.0)
            for policy, ms in zip(policies, told_ms, strict=True)
        ]
        whole_ms = problem.before.latency_ms
        assert whole_ms is not None

        def an_hour_later(policies: Sequence[Policy]) -> list[float]:
            assert policies[0] == Policy({}, {})
            return [1.5 * whole_ms, *(1.5 * 2.0 * ms for ms in told_ms[: len(policies) - 1])]

        monkeypatch.setattr(latencies, "times_ms", an_hour_later)
        corrected = posing.timed(problem, policies[:2])
        assert corrected.before.latency_ms == whole_ms
        *seen, other = map(posing.repriced, evaluations)
        assert [each.figures.latency_ms for each in seen] == pytest.approx([2.0 * ms for ms in told_ms[:2]])
        assert other.figures.latency_ms is not None
        assert 1.1 * told_ms[2] < other.figures.latency_ms < 2.0 * told_ms[2]
        assert other.figures.latency_ms == pytest.approx(corrected.costs(problem.row(policies[2])[None]).latency_ms[0])
        for each in (*seen, other):
            assert each.figures.latency_ms is not None
            assert each.figures.speedup == pytest.approx(whole_ms / each.figures.latency_ms)
            assert (each.figures.size_bytes, each.drop, each.score) == (9, 1.0, 90.0)

        assert posing.timed(corrected, policies[:1]) is corrected, "it is known already"
        monkeypatch.setattr(posing._bench.pricing, "is_device", False)
        assert posing.timed(corrected, [Policy({}, {})]) is corrected, "nothing can be timed of a target elsewhere"


def test_nothing_is_harmed_where_nothing_changes(posed: tuple[Posing, Problem]) -> None:
    _, problem = posed
    assert problem.damage(problem.as_trained[None]).sum() == 0
    assert problem.before.drop == 0
    assert problem.policy(problem.as_trained).keep == {
        v.in_policy: v.options[-1] for v in problem.variables if isinstance(v, GroupVariable)
    }


def test_fewer_bits_and_fewer_units_harm_more(posed: tuple[Posing, Problem]) -> None:
    _, problem = posed
    for variable in problem.variables:
        damage = problem.sensitivity.damage[variable.name]
        assert damage[variable.as_trained] == 0
        if isinstance(variable, GroupVariable):
            assert (np.diff(damage) <= 0).all(), "counts ascend"
        else:
            bits = [option.storage.bits for option in variable.options]
            fewest, most = (damage[bits.index(n)] for n in (min(bits), 8))
            assert fewest > most


def test_errors_of_scores_are_those_of_one_example_over_the_root_of_their_number(posed: tuple[Posing, Problem]) -> None:
    posing, problem = posed
    task, share = posing._bench.task, (posing._bench.scoring.original - 1.0) / 100
    assert problem.score_spread == pytest.approx(100 * (share * (1 - share)) ** 0.5)
    assert problem.score_error == pytest.approx(problem.score_spread / task.search.examples**0.5)
    assert problem.test_error == pytest.approx(problem.score_spread / task.test.examples**0.5)


def test_recipes_are_uniform_and_offered(posed: tuple[Posing, Problem]) -> None:
    _, problem = posed
    assert len(problem.recipes) > 8
    for policy in problem.recipes.values():
        problem.row(policy)  # ValueError for what no variable offers


def test_an_evaluation_has_exact_bytes_and_a_drop(posed: tuple[Posing, Problem], tmp_path: Path) -> None:
    posing, problem = posed
    row = some_rows(problem, 1)[0]
    evaluation = problem.evaluate(problem.policy(row))
    assert evaluation.figures.size_bytes == posing._bench.files.predicted_bytes(evaluation.policy)
    assert evaluation.figures.drop == pytest.approx(posing._bench.scoring.original - evaluation.score)


def test_a_network_from_scratch_costs_the_same_and_starts_from_other_weights(posed: tuple[Posing, Problem]) -> None:
    posing, problem = posed
    trainer, policy = posing._bench.trainer, narrowest(problem, "int8")
    pruned, anew = problem.evaluate(policy), problem.evaluate_anew(policy)
    assert replace(anew.figures, drop=0.0) == replace(pruned.figures, drop=0.0)
    assert anew.figures.drop == pytest.approx(posing._bench.scoring.original - anew.score)
    assert problem.evaluate_anew(policy) == anew, "from the journal"
    kept, drawn = trainer.cut(policy).state_dict(), trainer.anew().cut(policy).state_dict()
    assert {name: tensor.shape for name, tensor in drawn.items()} == {name: each.shape for name, each in kept.items()}
    weights = [name for name, tensor in kept.items() if tensor.dim() > 1]
    assert weights
    assert not any(torch.equal(kept[name], drawn[name]) for name in weights)
    assert all(torch.equal(each, trainer.cut(policy).state_dict()[name]) for name, each in kept.items()), "as it was"


def test_every_layer_has_its_sensitivity_to_gradients(posed: tuple[Posing, Problem]) -> None:
    _, problem = posed
    assert set(problem.sensitivity.fisher) == set(problem.blocks)
    assert all(each >= 0 for each in problem.sensitivity.fisher.values())
    assert any(isinstance(v, LayerVariable) and len(v.options) > 5 for v in problem.variables)


def test_the_weaker_step_is_known(posed: tuple[Posing, Problem]) -> None:
    posing, problem = posed
    mild, harsh = narrowest(problem, "int8"), narrowest(problem, "int2")
    for policy in (mild, harsh):
        found = posing.strengths(policy)
        assert found.prune.weights > 0
        assert found.quantize.weights > 0
    assert posing.strengths(mild).quantize.outputs < posing.strengths(harsh).quantize.outputs
    assert posing.strengths(mild).prune == posing.strengths(harsh).prune
    assert posing.strengths(mild).weaker_first == QUANTIZE_FIRST


@pytest.mark.parametrize("order", ORDERS)
def test_evaluations_take_the_steps_in_the_order_that_was_asked_for(posed: tuple[Posing, Problem], order: str) -> None:
    posing, problem = posed
    policy = narrowest(problem, "int8")
    other = Posing(posing._bench, Budget(drop=1.0), order=order)
    seen = other.evaluate(policy)
    # of this policy rounding is the weaker step
    assert seen.policy.order == (PRUNE_FIRST if order == "prune-first" else QUANTIZE_FIRST)
    assert (seen.policy.precisions, seen.policy.keep) == (policy.precisions, policy.keep)
    assert other.ordered(seen.policy) == seen.policy
