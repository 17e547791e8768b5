"""Several processes that work together, as forks of this one: torch is imported once."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LIMIT = 300.0
"""Seconds after which processes that wait for one another are ended."""


def _as_rank(rank: int, world: int, folder: str, work: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    try:
        found = work()
    except BaseException:
        found = RuntimeError(traceback.format_exc())
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def by_ranks(world: int, work: Callable[[], Any]) -> list[Any]:
    """Return what each of so many ranks has found, in their order; raise where one has failed."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world):
            child = os.fork()
            if not child:
                try:
                    _as_rank(rank, world, folder, work)
                finally:
                    os._exit(0)
            children.append(child)
        end = time.monotonic() + LIMIT
        for child in children:
            while os.waitpid(child, os.WNOHANG) == (0, 0):
                if time.monotonic() > end:
                    for each in children:
                        os.kill(each, 9)
                    raise TimeoutError("processes wait for one another")
                time.sleep(0.01)
        found = [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(world)]
    for each in found:
        if isinstance(each, RuntimeError):
            raise each
    return found
