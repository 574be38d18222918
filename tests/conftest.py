"""What holds for all tests."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import PurePath

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Before torch is first imported, and for every process that a test starts: with several processes on few cores, one
# thread each is the fastest, and sums of floats do not depend on the machine's number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Programs that this run captures serve all its tests and processes, and nobody else.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["PARTWAY_CACHE"] = tempfile.mkdtemp(prefix="partway-programs-")
    atexit.register(shutil.rmtree, os.environ["PARTWAY_CACHE"], ignore_errors=True)

# How long an example takes says more about a busy machine than about the code.
settings.register_profile("partway", deadline=None)
settings.load_profile("partway")

FEDERATIONS = ("test_demo", "test_examples", "test_processes", "test_readme")
"""Files that start a server and sites."""


class ByFile(LoadScopeScheduling):
    """Each file goes to one worker; those that start federations to one and the same, for they keep two cores busy."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "federations" if PurePath(file).name.startswith(FEDERATIONS) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.name.startswith(FEDERATIONS))  # first, for they take longest
