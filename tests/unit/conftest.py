"""Unit tests: one thread and few collections of garbage a process, since there is a process for each core.

Threads of torch and BLAS wait by spinning, and a full collection walks all of torch's and scikit-learn's objects: on
two cores these two took a tenth of all the time. Properties have no deadline: the machine is shared.
"""

import gc
import os

from hypothesis import settings

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
os.environ["OMP_NUM_THREADS"] = "1"  # read when torch and numpy are imported, which is later
gc.disable()


def pytest_collection_finish():
    """What is imported by now stays: it need not be walked again."""
    gc.freeze()
    gc.enable()
