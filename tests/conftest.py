"""What holds for all tests."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

from hypothesis import settings

# Before torch is first imported, and for every process that a test starts: with several processes on few cores, one
# thread each is the fastest, and sums of floats do not depend on the machine's number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Programs that this run captures serve all its tests and processes, and nobody else.
os.environ["PARTWAY_CACHE"] = tempfile.mkdtemp(prefix="partway-programs-")
atexit.register(shutil.rmtree, os.environ["PARTWAY_CACHE"], ignore_errors=True)

# How long an example takes says more about a busy machine than about the code.
settings.register_profile("partway", deadline=None)
settings.load_profile("partway")
