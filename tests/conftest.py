"""What every test stands on."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

# before torch is imported: workers that run side by side would wait for each other's threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

from hirelc_deploy.verify import quiet

if TYPE_CHECKING:
    from hirelc_deploy.verification import Outcome

# a shared machine is slow at times; a property is about values, not about time
settings.register_profile("here", deadline=None)
settings.load_profile("here")

# tests run side by side and look at no time: whether their core is shared is nobody's concern
quiet.CORE.loop_ns = lambda: 1


LONG = ("test_package.py", "test_readme.py", "test_resume.py", "test_search_export.py", "test_search_hierarchical.py")
"""Files with tests that take half a minute and more."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: of two workers none then waits for one that the other has begun last."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True, scope="session")
def _own_tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Latencies that tests measure, for a moment and on a busy machine, are no user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hirelc_deploy.profiles.user_cache_path", lambda name: tmp_path_factory.getbasetemp() / name)
        yield


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> "Outcome":
    """A fine-tuned INT8 network with half its channels, judged by limits that it meets; no test may change it."""
    from exporting import digits, export, trained_digit_net

    out = tmp_path_factory.mktemp("artifact") / "artifact"
    limits = {"max_drop": 90.0, "max_size_bytes": 100_000}
    return export(out, trained_digit_net(), digits(), recipe="keep=50%,compute=int8", epochs=1, **limits)
