"""Evaluations in processes: the same answers in the same order, and nothing left behind whatever happens."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hirelc_deploy.errors import UserError
from hirelc_deploy.policy import Policy
from hirelc_deploy.pool import Pool, in_turn

POLICIES = [Policy({}, {"units": count}) for count in range(8, 0, -1)]


def units(policy: Policy) -> float:
    return float(policy.keep["units"])


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(2) as found:
        yield found


def test_answers_come_in_the_order_of_the_questions(pool: Pool) -> None:
    def late(policy: Policy) -> float:
        time.sleep(0.02 * policy.keep["units"])
        return units(policy)

    assert list(pool(late, POLICIES)) == list(in_turn(units, POLICIES))
    assert list(pool(late, POLICIES[:1])) == [8.0]


def test_what_cannot_be_pickled_is_there_all_the_same_and_trains_with_one_thread(pool: Pool) -> None:
    network = torch.nn.Linear(4, 1)
    network(torch.ones(1, 4)).sum().backward()  # a training before the fork must not hinder those behind it

    def gradient(policy: Policy) -> float:
        assert torch.get_num_threads() == 1
        network.zero_grad()
        network(torch.full((1, 4), units(policy))).sum().backward()
        assert network.weight.grad is not None
        return network.weight.grad.sum().item()

    assert list(pool(gradient, POLICIES)) == [4.0 * units(each) for each in POLICIES]


def test_another_function_finds_what_was_there_when_it_was_first_called(pool: Pool) -> None:
    known = {"seven": 7.0}

    def look(policy: Policy) -> float:
        return known.get("eight", known["seven"])

    def look_again(policy: Policy) -> float:
        return look(policy)

    assert list(pool(look, POLICIES[:2])) == [7.0, 7.0]
    known["eight"] = 8.0
    assert list(pool(look, POLICIES[:2])) == [7.0, 7.0], "the same processes"
    assert list(pool(look_again, POLICIES[:2])) == [8.0, 8.0]
    assert list(pool(look, POLICIES[:2])) == [8.0, 8.0]


def test_a_users_mistake_in_a_process_arrives_whole(pool: Pool) -> None:
    def refuse(policy: Policy) -> float:
        raise UserError("the loss is nan", fix="mend the data")

    with pytest.raises(UserError, match="the loss is nan") as caught:
        list(pool(refuse, POLICIES))
    assert caught.value.fix == "mend the data"


def test_a_process_that_dies_is_named_instead_of_waited_for(pool: Pool) -> None:
    def die(policy: Policy) -> float:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0.0

    with pytest.raises(UserError, match="ended from outside") as caught:
        list(pool(die, POLICIES))
    assert "--workers" in caught.value.fix


FOR_EVER = """
import os, sys, time
from hirelc_deploy.policy import Policy
from hirelc_deploy.pool import Pool

def work(policy):
    with open(sys.argv[1], "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(600)
    return 0.0

with Pool(2) as pool:
    list(pool(work, [Policy({}, {"units": 1}), Policy({}, {"units": 2})]))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_leaves_no_process(end: signal.Signals, tmp_path: Path) -> None:
    written = tmp_path / "processes"
    run = subprocess.Popen(
        [sys.executable, "-c", FOR_EVER, str(written)], start_new_session=True, stderr=subprocess.DEVNULL
    )
    _eventually(lambda: written.exists() and len(written.read_text().split()) >= 2)
    working = written.read_text().split()
    if end is signal.SIGINT:
        os.killpg(run.pid, end)  # as a terminal sends it: to all of them
    else:
        run.send_signal(end)
    run.wait(60)
    assert len(working) == 2
    _eventually(lambda: not any(map(_runs, working)))


def _eventually(holds: Callable[[], bool]) -> None:
    """Returns once it does; the test ends as failed after a minute."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if holds():
            return
        time.sleep(0.05)
    pytest.fail("a minute has passed")


def _runs(pid: str) -> bool:
    """Whether a process is there and no zombie."""
    status = Path(f"/proc/{pid}/status")
    if not Path("/proc").exists():
        return subprocess.run(["ps", "-p", pid], capture_output=True, check=False).returncode == 0
    try:
        return "State:\tZ" not in status.read_text()
    except OSError:
        return False
