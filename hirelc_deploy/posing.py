"""A network on its target as a problem for a search: what can be chosen, what it costs, what it does to the outputs."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from hirelc_deploy import modelopt
from hirelc_deploy.budget import Budget, Figures
from hirelc_deploy.compress.ordering import Strengths
from hirelc_deploy.costing import Costing
from hirelc_deploy.effects import Effects
from hirelc_deploy.offers import Offers
from hirelc_deploy.policy import PRUNE_FIRST, QUANTIZE_FIRST, Policy, Step
from hirelc_deploy.search.problem import LayerFacts, Problem
from hirelc_deploy.search.space import Evaluation

if TYPE_CHECKING:
    from hirelc_deploy.cost.predictor import Predictor
    from hirelc_deploy.workbench import Workbench


class Posing:
    """The problem that one workbench's network is."""

    def __init__(self, bench: "Workbench", budget: Budget, *, order: str = "prune-first") -> None:
        """`order` is one of `config.ORDERS`."""
        self._bench = bench
        self._order = order
        self._budget = budget
        self._effects = Effects(bench)
        self._offers = Offers(bench, self._effects)
        self._costing = Costing(bench, self._offers, limits_memory=budget.memory_bytes is not None)

    def problem(self) -> Problem:
        """Measures what is not known yet."""
        bench, graph, variables = self._bench, self._bench.graph, self._offers.variables
        # of the scores that are held against the limit
        error = partial(bench.scoring.error, drop=self._budget.drop or 0.0)
        return Problem(
            variables=variables,
            blocks={block.name: block.layers for block in graph.blocks},
            budget=self._budget,
            before=self._costing.before,
            costs=self._costing.costs,
            sensitivity=self._effects.sensitivity(variables),
            layers={layer.name: LayerFacts(layer.macs, layer.parameters) for layer in graph.layers},
            evaluate=self.evaluate,
            evaluate_anew=self.evaluate_anew,
            prepare=self.prepare,
            # a run that goes on with another number of processes chooses as it did before
            at_once=bench.run.step("search/at once", lambda: bench.engine.at_once),
            recipes=self._offers.recipes(self.predictor),
            advisers={"modelopt": partial(modelopt.policies, bench, variables)},
            score_error=error(bench.task.search.examples),
            test_error=error(bench.task.test.examples),
            score_spread=error(1),
        )

    @property
    def predictor(self) -> "Predictor":
        """Latencies of all policies."""
        return self._costing.predictor

    # -- what was learned of latencies -----------------------------------------------------------------------

    def timed(self, problem: Problem, policies: Sequence[Policy]) -> Problem:
        """The problem with latencies as the files of these policies correct them, which are timed now.

        A search goes where the tables are too hopeful, so that what it finds has to be timed; `repriced` tells its
        evaluations anew, those that were timed as they were seen.  Where the target is another machine nothing can be
        learned, and the problem is the same.
        """
        corrected = self._costing.corrected_by(policies)
        if corrected is self._costing:
            return problem
        self._costing = corrected
        return replace(problem, before=corrected.before, costs=corrected.costs)

    def repriced(self, evaluation: Evaluation) -> Evaluation:
        """The same evaluation with its latency as it is told by now."""
        ms, speedup = self._latency(evaluation.policy)
        return replace(evaluation, figures=replace(evaluation.figures, latency_ms=ms, speedup=speedup))

    def _latency(self, policy: Policy) -> tuple[float, float]:
        """Milliseconds, and the speed-up."""
        ms, before = self._costing.latency_ms(policy), self._costing.before.latency_ms
        assert before is not None
        return ms, before / ms

    # -- the order of a policy's steps -----------------------------------------------------------------------

    def ordered(self, policy: Policy) -> Policy:
        """The policy with its steps in the order that was asked for."""
        if self._order != "auto":
            return replace(policy, order=QUANTIZE_FIRST if self._order == "quantize-first" else PRUNE_FIRST)
        return replace(policy, order=self._weaker_first(policy)) if policy.keep and policy.precisions else policy

    def _weaker_first(self, policy: Policy) -> tuple[Step, ...]:
        """The order in which the step that moves the network less comes first."""
        key = f"order/{replace(policy, order=PRUNE_FIRST).digest()}"
        found: list[Step] = self._bench.run.step(key, lambda: list(self.strengths(policy).weaker_first))
        return tuple(found)

    def strengths(self, policy: Policy) -> Strengths:
        """How far pruning alone and formats alone move the network that was trained."""
        return self._effects.strengths(policy)

    # -- the expensive step ----------------------------------------------------------------------------------

    def prepare(self, policies: Sequence[Policy]) -> None:
        """Scores of what is evaluated next, side by side if there are processes for it."""
        self._bench.recovered_scores([self.ordered(policy) for policy in policies])

    def evaluate(self, policy: Policy) -> Evaluation:
        """Made real on a copy, shortly trained and scored on the search split (`Workbench.recovered_scores`)."""
        policy = self.ordered(policy)
        (score,) = self._bench.recovered_scores([policy])
        return self._evaluation(policy, score)

    def evaluate_anew(self, policy: Policy) -> Evaluation:
        """The same of a network whose weights are drawn anew."""
        policy = self.ordered(policy)
        return self._evaluation(policy, self._bench.score_anew(policy))

    def _evaluation(self, policy: Policy, score: float) -> Evaluation:
        bench = self._bench
        ms, speedup = self._latency(policy)
        figures = Figures(
            latency_ms=ms,
            speedup=speedup,
            size_bytes=bench.files.predicted_bytes(policy),
            memory_bytes=self._costing.memory_bytes(policy),
            drop=bench.scoring.drop(score),
        )
        return Evaluation(policy, figures, score)
