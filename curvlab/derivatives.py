"""Where derivatives are taken, whatever surrounds the call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def derivatives() -> Iterator[None]:
    """Gradients are recorded inside, also under `torch.no_grad()` and `torch.inference_mode()`; a decorator too."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
