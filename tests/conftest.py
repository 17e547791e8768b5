"""One thread: the tests' tensors are tiny, and results then do not depend on the machine's number
of cores.
"""

import ctypes
import functools
import gc
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from zlib import crc32

# before torch reads it, and for the commands that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests import `problems`
_SHAPES_CHECKED = bool(os.environ.get("CURVLAB_CHECK_SHAPES"))
if _SHAPES_CHECKED:  # before anything imports curvlab
    from jaxtyping import install_import_hook

    install_import_hook("curvlab", "shapes.checked")
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave to `-m slow` all but one in k of the cases of a test that is marked `thinned(k)`.

    Which ones is a matter of their names alone: the same in every run and process, and of each
    algorithm, model and kind some. `CURVLAB_ONE_IN=k` leaves one in k of all. While shapes are
    checked, tests that hand over what has another shape (`wrong_shapes`) are left out.
    """
    one_in, shapes = int(os.environ.get("CURVLAB_ONE_IN", "1")), _SHAPES_CHECKED
    kept = [
        item
        for item in items
        if not crc32(item.nodeid.encode()) % one_in
        and not (shapes and item.get_closest_marker("wrong_shapes"))
    ]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
    for item in items:
        mark = item.get_closest_marker("thinned")
        if mark is not None and crc32(item.nodeid.rpartition("/")[2].encode()) % mark.args[0]:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What is there before the first test stays: the collector of garbage does not go through it
    again and again.

    Modules and thousands of cases are a million objects. With it, the tests of curvatures took a
    quarter longer.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Regenerated data sets go to a folder of the tests' own, unless CURVLAB_CACHE names one."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("CURVLAB_CACHE"):
            patch.setenv("CURVLAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _mnist_is_unpacked_once() -> Iterator[None]:
    """Of every command that runs inside this process it took a second, most of what many of them
    take.
    """
    from curvlab.datasets import DATASETS, images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_mnist_images", functools.cache(images._mnist_images))
        patch.setitem(
            DATASETS, "mnist16", replace(DATASETS["mnist16"], load=functools.cache(images.mnist16))
        )
        yield


@pytest.fixture(scope="session", autouse=True)
def _freed_memory_is_given_back() -> Iterator[None]:
    """Commands tell glibc to keep it, for good: within one process of many commands it only grew,
    to 3 GB.
    """
    from curvlab.reproduction import script
    from curvlab.system import memory

    with pytest.MonkeyPatch.context() as patch:
        for module in (memory, script):
            patch.setattr(module, "keep_freed_memory", lambda: None)
        yield


@pytest.fixture
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For commands whose pictures nobody looks at: they are drawn a second long, and here they are
    a word.
    """
    from curvlab.show import drawable

    monkeypatch.setattr(drawable, "picture", lambda figure, form, **options: b"drawn")


@pytest.fixture(autouse=True)
def _memory_of_one_test() -> Iterator[None]:
    """What tests have freed goes back to the system wherever the process has grown by much."""
    yield
    if sys.platform == "linux" and _resident() > _left[0] + _MUCH:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        _left[0] = _resident()


_MUCH = 128 << 20  # bytes
_left = [0]
"""Bytes of this process after the last time."""


def _resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """In reproductions MNIST is 60 digits of random numbers and the network of Figure 4.1."""
    from curvlab import datasets
    from curvlab.reproduction.problems import PROBLEMS, PublishedProblem

    chance = torch.Generator().manual_seed(0)
    parts = tuple(
        datasets.Dataset("mnist16", torch.rand(n, 256, generator=chance), torch.arange(n) % 10, "")
        for n in (60, 30)
    )
    small = PublishedProblem("mlp-256-20", "mnist16", PROBLEMS["MNIST"].small)
    monkeypatch.setitem(PROBLEMS, "MNIST", small)
    monkeypatch.setattr(datasets, "load", lambda name: parts)
