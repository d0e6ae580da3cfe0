"""What nvidia-modelopt chooses: its auto_quantize, at as many effective bits as there are evaluations."""

from hirelc_deploy.search.problem import Evaluations, Problem


def search(problem: Problem, evaluations: Evaluations, *, seed: int) -> None:
    """Evaluates them from the most bits to the fewest.  Every seed gives the same.  Raises Spent."""
    policies = problem.advisers["modelopt"](evaluations.limit)
    problem.prepare([policy for policy in policies if policy not in evaluations][: evaluations.left])
    for policy in policies:
        evaluations.of(policy)
