"""One thread: the tests' tensors are tiny, and results then do not depend on the machine's number of cores."""

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
