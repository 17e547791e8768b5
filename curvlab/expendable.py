"""Inputs that a model may write over: it is handed a copy where it does, and the data stay.

A model that begins with ``x.sub_(mean)``, or with a ReLU in place, meets each minibatch of a loader
once, and so does no harm in a loop of torch's own. Here a minibatch is looked at several times, and
a data set is evaluated again and again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from curvlab.errors import CurvlabError
from curvlab.nests import copied, times_written


class Expendable:
    """What is known of a model's writing over its inputs: first looks have a copy to write on."""

    def __init__(self) -> None:
        self._known: dict[Hashable, bool] = {}

    @property
    def writes(self) -> bool:
        """Whether it has ever written over its inputs."""
        return any(self._known.values())

    @contextmanager
    def handed(self, x: Any, training: bool) -> Iterator[Any]:
        """Give what the model is to be called on inside: the inputs, or a copy of them.

        Raises:
            CurvlabError: it wrote over inputs that were no copy, as it had not done before.
        """
        key = training, torch.is_grad_enabled()
        known = self._known.get(key)
        given = x if known is False else copied(x)
        before = times_written(given)
        yield given
        wrote = times_written(given) != before
        if not wrote:
            self._known.setdefault(key, False)
            return
        self._known[key] = True
        if known is False:
            raise CurvlabError(
                "the model wrote over its inputs, which it had not done before, so that this"
                " minibatch is another one now: write x = x - 1 instead of x.sub_(1), or let its"
                " forward begin with x = x.clone()"
            )
