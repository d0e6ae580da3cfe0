"""What every test stands on."""

import os

# before torch is imported: workers that run side by side would wait for each other's threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# a shared machine is slow at times; a property is about values, not about time
settings.register_profile("here", deadline=None)
settings.load_profile("here")
