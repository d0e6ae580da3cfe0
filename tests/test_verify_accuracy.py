"""What a user would lose: a drop that is read off the wrong examples, or an interval that hides it."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from hirelc_deploy.errors import UserError
from hirelc_deploy.task import ArraySource, Classification, Task
from hirelc_deploy.verify.accuracy import compare, outputs, paired_interval, side_by_side, task_score

EXAMPLES, CLASSES = 2000, 4


class Regression(Task):
    """Mean absolute error in millimetres: lower is better, and outputs are no decisions."""

    unit = "mm"
    higher_is_better = False

    def loss(self, outputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
        return (outputs["output"] - target).abs().mean()

    def score(self, outputs: Mapping[str, np.ndarray], targets: np.ndarray) -> float:
        return float(np.abs(outputs["output"] - targets).mean())


def classification() -> Classification:
    random = np.random.default_rng(0)
    source = ArraySource(random.normal(size=(40, 3)).astype(np.float32), np.arange(40) % CLASSES)
    return Classification(source, source, source, batch=16)


def regression() -> Regression:
    source = ArraySource(np.zeros((40, 3), np.float32), np.zeros(40, np.float32))
    return Regression(source, source, source)


def logits(decisions: np.ndarray) -> dict[str, np.ndarray]:
    return {"output": np.eye(CLASSES, dtype=np.float32)[decisions]}


def decisions_with_errors(targets: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    decided = targets.copy()
    decided[wrong] = (decided[wrong] + 1) % CLASSES
    return decided


def test_outputs_of_all_batches_stand_in_the_order_of_the_targets() -> None:
    task = classification()

    class Session:
        def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"twice": 2 * inputs["input"], "sum": inputs["input"].sum(1)}

    found, targets = outputs(Session(), task.test)
    x, y = task.test.take(np.arange(40))
    np.testing.assert_array_equal(found["twice"], 2 * x["input"])
    np.testing.assert_array_equal(found["sum"], x["input"].sum(1))
    np.testing.assert_array_equal(targets, y)
    again, _ = outputs(Session().run, task.test)
    np.testing.assert_array_equal(again["twice"], found["twice"])


def test_an_output_that_is_not_one_row_an_example_is_refused() -> None:
    with pytest.raises(ValueError, match="output mean has 1 rows for 16 examples"):
        outputs(lambda inputs: {"mean": inputs["input"].mean(0, keepdims=True)[:1]}, classification().test)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(UserError, match="no examples"):
        outputs(lambda inputs: dict(inputs), [])


def test_a_comparison_in_percent() -> None:
    targets = np.arange(EXAMPLES) % CLASSES
    before = logits(decisions_with_errors(targets, np.arange(100)))  # 95 %
    after = logits(decisions_with_errors(targets, np.arange(60, 180)))  # 94 %, 40 of the errors the same
    found = compare(classification(), before, after, targets, seed=0)
    assert (found.before, found.after) == (95.0, 94.0)
    assert found.drop == pytest.approx(1.0)
    assert found.agreement == pytest.approx(100 * (1 - 140 / EXAMPLES))
    # 140 of 2000 differ: the standard error of the difference is 0.59 points
    lo, hi = found.drop_ci95
    assert lo == pytest.approx(1.0 - 1.96 * 0.59, abs=0.15)
    assert hi == pytest.approx(1.0 + 1.96 * 0.59, abs=0.15)


def test_errors_in_common_cancel_and_the_seed_decides() -> None:
    targets = np.arange(EXAMPLES) % CLASSES
    same = logits(decisions_with_errors(targets, np.arange(500)))
    task = classification()
    assert paired_interval(task, same, same, targets, seed=0) == (0.0, 0.0)
    other = logits(decisions_with_errors(targets, np.arange(300, 820)))
    first, second = (paired_interval(task, same, other, targets, seed=seed) for seed in (0, 1))
    assert first == paired_interval(task, same, other, targets, seed=0)
    assert first != second


def test_a_score_where_lower_is_better() -> None:
    targets = np.zeros(EXAMPLES, np.float32)
    before, after = ({"output": np.full(EXAMPLES, error, np.float32)} for error in (0.5, 0.75))
    found = compare(regression(), before, after, targets, seed=0)
    assert found.drop == pytest.approx(0.25)  # positive is worse, whatever the direction
    assert found.drop_ci95 == pytest.approx((0.25, 0.25))
    assert found.agreement is None


@pytest.mark.parametrize("answer", ["raises", "is not a number"])
@pytest.mark.parametrize(("needed", "interval"), [(1, (2.0, 2.0)), (9, None)])
def test_an_interval_is_of_the_resamples_that_have_a_score(
    answer: str, needed: int, interval: tuple[float, float] | None
) -> None:
    """A third of them lack the one positive; hardly any has it nine times."""
    labels = np.eye(1, 40)[0]

    class OfBothKinds(Regression):
        def score(self, outputs: Mapping[str, np.ndarray], targets: np.ndarray) -> float:
            if np.array_equal(targets, labels) or targets.sum() >= needed:
                return super().score(outputs, targets)
            if answer == "raises":
                raise ValueError("only one class is present")
            return float("nan")

    source = ArraySource(np.zeros((40, 3), np.float32), labels)
    compared = compare(
        OfBothKinds(source, source, source), {"output": labels + 1.0}, {"output": labels + 3.0}, labels, seed=0
    )
    assert (compared.drop, compared.drop_ci95) == (2.0, interval)


def test_a_score_that_is_no_number_is_not_passed_on() -> None:
    targets = np.zeros(EXAMPLES, np.float32)
    before, after = ({"output": np.full(EXAMPLES, error, np.float32)} for error in (0.5, np.nan))
    with pytest.raises(UserError, match="compressed model's score is nan"):
        compare(regression(), before, after, targets, seed=0)


class Answering(Task):
    """A score that answers whatever it is told to."""

    def __init__(self, answer: object) -> None:
        super().__init__(*(ArraySource({"x": np.zeros((40, 1))}, np.zeros(40)) for _ in range(2)))
        self.answer = answer

    def loss(self, outputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
        return outputs["x"].mean()

    def score(self, outputs: Mapping[str, np.ndarray], targets: np.ndarray) -> float:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]


@pytest.mark.parametrize("answer", [None, "ten", KeyError("output")], ids=str)
def test_a_score_of_the_users_own_that_fails_is_told_in_its_words(answer: object) -> None:
    with pytest.raises(UserError, match=r"the task's score fails: (TypeError|ValueError|KeyError)"):
        task_score(Answering(answer), {"x": np.zeros((4, 1))}, np.zeros(4))


def test_a_score_may_be_any_number() -> None:
    assert type(task_score(Answering(np.float32(0.5)), {"x": np.zeros((4, 1))}, np.zeros(4))) is float


def test_scoring_needs_no_torch_of_its_own() -> None:
    """`verify` runs on devices; what it imports is what has to be installed there."""
    code = "import sys, hirelc_deploy.verify.accuracy, hirelc_deploy.verify.timing; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_sessions_and_outputs_may_have_any_name() -> None:
    class Session:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"head/0": self.factor * inputs["x"], "1": inputs["x"]}

    x, y = np.arange(6.0).reshape(3, 2), np.arange(3)
    apart, targets = side_by_side({"int4/fp32": Session(2.0), "int4": Session(3.0)}, [({"x": x}, y)])
    assert targets.tolist() == y.tolist()
    for name, factor in (("int4/fp32", 2.0), ("int4", 3.0)):
        assert apart[name].keys() == {"head/0", "1"}
        assert np.array_equal(apart[name]["head/0"], factor * x)
