"""Random search, as strong as it can be made without looking at what it found in any detail.

Were every option as likely as any other, nearly all policies would ruin the network, and in the same way.  So each
policy draws how far its layers and how far its groups go (`additive.draw`).  Advantages it was given: prices and
sensitivities are known before anything is paid for, so of each pool of thousands only policies that keep the limits on
prices, and that none of the pool beats in damage, bytes and milliseconds at once, can be taken; and what the drops
seen so far say will be many times the drop that is allowed is left out.  Among the others, chance decides.
"""

import numpy as np

from hirelc_deploy.search.additive import affordable, draw, efficient, fit, unseen
from hirelc_deploy.search.goal import REFERENCE_DROPS, Goal
from hirelc_deploy.search.problem import Evaluations, Problem

POOL = 4000
"""Policies drawn and priced for one batch."""

BATCH = 4
"""Policies of one pool that are paid for."""

EMPTY_POOLS = 20
"""In a row: there is nothing new in the space."""


def search(problem: Problem, evaluations: Evaluations, *, seed: int) -> None:
    """Evaluates unbeaten policies of random pools.  Raises Spent."""
    generator = np.random.default_rng(seed)
    limit, empty = Goal.of_problem(problem).drop_max, 0
    while empty < EMPTY_POOLS:
        model = fit(problem, evaluations.seen)
        pool = efficient(problem, affordable(problem, draw(problem, POOL, generator)), model)
        if evaluations.seen:
            left = problem.left(model.drop(problem, pool), problem.costs(pool))
            hopeful = left <= REFERENCE_DROPS * limit
            pool = pool[hopeful] if hopeful.any() else pool
        pool = unseen(evaluations, pool)
        empty = 0 if len(pool) else empty + 1
        drawn = generator.permutation(pool)[:BATCH]
        for begin in range(0, len(drawn), problem.at_once):
            evaluations.of_rows(drawn[begin : begin + problem.at_once])
