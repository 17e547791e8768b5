"""`torch.set_default_device`: a model lies where it lies, and what is made for it lies there too.

Meta tensors have no numbers: whatever is made on the default device by mistake shows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import batches, problem
from torch import Tensor

import curvlab as cl
from curvlab.algorithms import ALGORITHMS
from curvlab.datasets import Dataset

pytestmark = pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")

DEVICES: tuple[Callable[[], AbstractContextManager[Any]], ...] = (
    nullcontext,
    lambda: torch.device("meta"),
)


def both(work: Callable[[], list[Tensor]]) -> None:
    """The same to the bit."""
    found = []
    for device in DEVICES:
        with device():
            found.append(work())
    assert len(found[0]) == len(found[1])
    assert all(map(torch.equal, *found))


MODELS = ("tanh", "conv-norm", "tokens", "embedding")


@pytest.mark.thinned(4)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_method(name: str, model: str) -> None:
    def steps() -> list[Tensor]:
        with torch.device("cpu"):  # the user's own
            p = problem(model)
            objective, data = p.objective(), batches(p, 4)
        optimizer = cl.optimizer(name, objective, lr=1e-3, update_every=2, refresh_every=2)
        optimizer.warm_start(data[:1])
        for x, y in data[1:]:
            optimizer.step(objective.closure(x, y))
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
        return [q.detach().clone() for q in objective.parameters.values()]

    both(steps)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["ggn", "hessian", "fisher-mc", "ef"])
def test_exact_matrices(kind: Any, model: str) -> None:
    def matrices() -> list[Tensor]:
        with torch.device("cpu"):
            p = problem(model)
            objective = p.objective()
        if model == "conv-norm":
            objective.model.eval()
        found = [m.dense() for m in cl.exact.matrices(objective, p.x, p.y, kind).values()]
        found.append(cl.exact.matrix(objective, p.x, p.y, kind, None).dense())
        A = cl.exact.product(objective, p.x, p.y, kind)
        found += [A @ torch.ones(A.shape[1], dtype=A.dtype, device="cpu"), A.dense()]
        found += cl.exact.gradients(objective, p.x, p.y).values()
        return found

    both(matrices)


def test_runs(tmp_path: Path) -> None:
    logs = []
    for i, device in enumerate(DEVICES):
        p = problem("tanh")
        objective, data = p.objective(), batches(p, 4)
        examples = Dataset("mine", p.x, p.y, "mine")
        with device():
            compared = cl.compare(
                objective,
                data[1:],
                reference="block-fisher",
                algorithms=["kfac", "k-bfgs", "tnt", "skqn-b2", "hf"],
                probes=[
                    "damping",
                    "bounds",
                    "error",
                    "alignment",
                    "condition",
                    "noise",
                    "reduction",
                ],
                warm=data[:1],
                progress=False,
            ).dataset
            trained = cl.train(
                objective,
                examples.batches(len(p.x) // 2, seed=0),
                examples,
                algorithm="k-bfgs",
                epochs=2,
                folder=tmp_path / str(i),
                probes=["damping", "noise"],
                progress=False,
            ).dataset
            spectrum = cl.spectrum(objective, p.x, p.y, method="lanczos", steps=5, progress=False)
        logs.append((compared, trained, spectrum))
    for name in ("gram", "loss"):
        np.testing.assert_array_equal(logs[0][0][name], logs[1][0][name])
    for name in map(str, logs[0][2].data_vars):
        np.testing.assert_array_equal(logs[0][2][name], logs[1][2][name])
    np.testing.assert_array_equal(logs[0][1]["train_loss"], logs[1][1]["train_loss"])
