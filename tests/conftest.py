"""What every test stands on."""

import os
from collections.abc import Iterator

import pytest

# before torch is imported: workers that run side by side would wait for each other's threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# a shared machine is slow at times; a property is about values, not about time
settings.register_profile("here", deadline=None)
settings.load_profile("here")


@pytest.fixture(autouse=True, scope="session")
def _own_tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Latencies that tests measure, for a moment and on a busy machine, are no user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hirelc_deploy.profiles.user_cache_path", lambda name: tmp_path_factory.getbasetemp() / name)
        yield
