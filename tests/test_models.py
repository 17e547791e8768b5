"""Models by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import curvlab as cl
from curvlab.datasets import DATASETS
from curvlab.likelihoods import LIKELIHOODS
from curvlab.models import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_its_data_and_fits_its_likelihood(name: str) -> None:
    entry = MODELS[name]
    assert entry.data in DATASETS
    train, _ = cl.datasets.load(entry.data)
    objective = cl.Objective(cl.models.build(name), LIKELIHOODS[entry.likelihood]())
    assert torch.isfinite(objective.closure(train.x[:5], train.y[:5]).observe().loss)


@pytest.mark.parametrize(
    ("name", "widths"), [("mlp-256-20", [256, 20, 20, 20, 20, 20, 10]), ("mlp-256-20-printed", [256, 20, 20, 20, 20, 10])]
)
def test_widths_are_those_of_the_thesis(name: str, widths: list[int]) -> None:
    linear = [m for m in cl.models.build(name) if isinstance(m, nn.Linear)]
    assert [m.in_features for m in linear] + [linear[-1].out_features] == widths


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (cl.models.build("mlp-256-20", seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not any(torch.equal(one[k], other[k]) for k in one)


def test_unknown_model() -> None:
    with pytest.raises(cl.CurvlabError, match=r"unknown model 'mlp-256'; did you mean 'mlp-256-20'\? \(known: mlp-256-20, "):
        cl.models.build("mlp-256")
