"""What nvidia-modelopt chooses: its auto_quantize, at as many effective bits as evaluations are left."""

from hirelc_deploy.search.problem import Evaluations, Problem


def search(problem: Problem, evaluations: Evaluations, *, seed: int) -> None:
    """Evaluates them from the most bits to the fewest.  Every seed gives the same.  Raises Spent."""
    policies = problem.advisers["modelopt"](evaluations.left)
    problem.prepare([policy for policy in policies if policy not in evaluations])
    for policy in policies:
        evaluations.of(policy)
