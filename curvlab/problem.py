"""`Problem`: a model, its data and likelihood, a device and a number type, all by name.

The command line's comparison, training and spectra, and the reproductions of the papers, all
resolve these names here. A user's ``module:function`` is called once for each model that is needed,
and never only to learn its names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import nn

from curvlab import datasets, models
from curvlab.datasets import Dataset
from curvlab.errors import lookup, whole
from curvlab.likelihoods import LIKELIHOODS
from curvlab.machine import DTYPES, device_of
from curvlab.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model on its data, by the names of the tables.

    Nothing is loaded or built before it is asked for.

    Args:
        model: of `models.MODELS`, or ``module:function`` of your own.
        data: of `datasets.DATASETS`; None takes the model's own.
        likelihood: of `likelihoods.LIKELIHOODS`; None takes the model's own.
        l2: μ of the term μ ‖θ‖² in loss and gradient (`Objective`).
        seed: of the weights and of labels drawn from the model, of the first model that is built.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        dtype: "float32" or "float64".
    """

    model: str
    data: str | None = None
    likelihood: str | None = None
    l2: float = 0.0
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"

    @cached_property
    def entry(self) -> models.ModelEntry:
        """What the tables, or the user's function, say of the model.

        Raises:
            CurvlabError: an unknown model; a function of the user's that cannot be imported or
                fails.
        """
        return models.find(self.model, self.seed)

    @property
    def data_name(self) -> str:
        """The data set's name.

        Raises:
            CurvlabError: neither the problem nor the model names one.
        """
        return self.entry.data_name(self.data)

    @cached_property
    def place(self) -> torch.device:
        """The device.

        Raises:
            CurvlabError: this machine lacks it.
        """
        return device_of(self.device)

    def check(self) -> None:
        """Check names and ranges, before anything is loaded.

        Raises:
            CurvlabError: an unknown name or a value out of range.
        """
        lookup(datasets.DATASETS, self.data_name, "data set")
        lookup(DTYPES, self.dtype, "dtype")
        if self.likelihood is not None:
            lookup(LIKELIHOODS, self.likelihood, "likelihood")
        _ = self.place
        whole("the seed", self.seed, 0)

    @cached_property
    def parts(self) -> tuple[Dataset, Dataset]:
        """The (training, test) data, loaded once."""
        return datasets.load(self.data_name)

    def fitted_to(self, parts: tuple[Dataset, Dataset]) -> Self:
        """Return the same problem on data that are loaded already: some of the examples, say."""
        found = replace(self)
        found.__dict__["entry"], found.__dict__["parts"] = self.entry, parts
        return found

    def network(self, seed: int | None = None) -> nn.Module:
        """Return a fresh model on the device.

        Its weights are drawn from `seed` (the problem's own where None).
        """
        seed = self.seed if seed is None else seed
        return self.entry.made(seed, self.parts[0]).to(self.place, DTYPES[self.dtype])

    def objective(self, seed: int | None = None, network: nn.Module | None = None) -> Objective:
        """Return the objective of a model.

        Args:
            seed: as in `network`.
            network: the model; a fresh one where None.

        Raises:
            CurvlabError: as `Objective`, and a function of the user's that fails.
        """
        seed = self.seed if seed is None else seed
        model = self.network(seed) if network is None else network
        kind = lookup(LIKELIHOODS, self.likelihood or self.entry.likelihood, "likelihood")
        return Objective(model, kind(), seed, l2=self.l2)

    def about(self, call: Mapping[str, Any], data: Dataset | None = None) -> dict[str, Any]:
        """Return the attributes of a log that say what it is of.

        Args:
            call: what was typed.
            data: whose description is given; None: the training data's.
        """
        description = (self.parts[0] if data is None else data).description
        return {
            "call": dict(call),
            "model": self.model,
            "data": self.data_name,
            "data_description": description,
        }
