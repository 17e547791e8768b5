"""The folder of a training run: claimed, written to, and left tidy.

No part of a run that could not begin stays in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from curvlab.errors import CurvlabError, cause_of, warn
from curvlab.parallel import Ranks
from curvlab.system import paths
from curvlab.system.lock import exclusive_lock
from curvlab.training import checkpoint
from curvlab.training.begun import anew, stepless


class RunFolder:
    """The place where a run writes, and when its last checkpoint was.

    Args:
        folder: gets run.h5 and checkpoint.pt; None: nothing is written.
        checkpoint_seconds: between checkpoints within an epoch.
    """

    def __init__(self, folder: Path | None, checkpoint_seconds: float = 60.0) -> None:
        self.folder, self.checkpoint_seconds = folder, checkpoint_seconds
        self.kept = False
        """Whether there is a checkpoint of this run."""
        self._at = time.monotonic()

    @property
    def log(self) -> Path | None:
        """The log's file; None where nothing is written."""
        return None if self.folder is None else self.folder / "run.h5"

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is long enough ago."""
        return self.folder is not None and time.monotonic() - self._at > self.checkpoint_seconds

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint.

        Raises:
            CurvlabError: it cannot be written; the old one is then whole.
        """
        assert self.folder is not None
        checkpoint.save(self.folder / checkpoint.FILE, state)
        self.kept, self._at = True, time.monotonic()

    def load(self, device: torch.device) -> dict[str, Any]:
        """Return what the checkpoint holds.

        Raises:
            CurvlabError: it is not whole.
        """
        assert self.folder is not None
        return checkpoint.load_state(self.folder / checkpoint.FILE, device)

    def forget(self) -> None:
        """Leave no file of a run that cannot take its first step in the way of the next."""
        if self.folder is not None:
            for name in ("run.h5", checkpoint.FILE):
                (self.folder / name).unlink(missing_ok=True)


@contextmanager
def claimed(folder: Path, resume: bool) -> Iterator[None]:
    """Hold the folder inside: it is there, and no other run writes to it.

    Raises:
        CurvlabError: it cannot be written, another run writes there, or it holds one and is not to
            go on.
    """
    if resume and not folder.is_dir():
        checkpoint.load_state(folder / checkpoint.FILE)  # says that there is none

    def make() -> Path:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CurvlabError(
                f"the folder {folder} cannot be written: {cause_of(error)}"
            ) from error
        return folder

    with paths.made(folder, make), exclusive_lock(folder / "run.h5"):
        if stepless(folder):
            warn(anew(folder))
        elif not resume:
            for name in ("run.h5", checkpoint.FILE):
                if (folder / name).exists():
                    raise CurvlabError(
                        f"{folder} already holds a {name}: choose another folder, or go on with"
                        " resume"
                    )
        yield


@contextmanager
def claimed_by_first(ranks: Ranks, folder: Path | None, resume: bool) -> Iterator[None]:
    """Let rank 0 hold the folder inside, as `claimed`; nothing where there is none.

    Raises:
        CurvlabError: on all ranks, as `claimed`.
    """
    with ExitStack() as held:
        if folder is not None:
            place = folder
            ranks.by_first(lambda: held.enter_context(claimed(place, resume)))
        yield
