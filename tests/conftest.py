"""One thread: the tests' tensors are tiny, and results then do not depend on the machine's number of cores."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it, and for the commands that tests start

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests import `problems`
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Regenerated data sets go to a folder of the tests' own, unless CURVLAB_CACHE names one."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("CURVLAB_CACHE"):
            patch.setenv("CURVLAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _memory_of_one_test() -> Iterator[None]:
    """What a test has freed goes back to the system where it was much.

    Commands that run inside this process tell glibc to keep freed memory (`keep_freed_memory`), for good.
    """
    yield
    if sys.platform == "linux" and _resident() > _MUCH:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


_MUCH = 900 << 20  # bytes


def _resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
