"""What surrounds a call: modes of autograd, the default dtype, warnings as errors, checks of torch
and numpy. No method's numbers are others, to the bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from problems import batches, problem
from torch import Tensor

import curvlab as cl
from curvlab.algorithms import ALGORITHMS
from curvlab.errors import CurvlabWarning

pytestmark = pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning")


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def strict() -> Iterator[None]:
    """Warnings are errors, but our own; numpy's floating-point signs are too."""
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", CurvlabWarning)
        yield


@contextmanager
def watched() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            yield


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64": lambda: default(torch.float64),
    "float16": lambda: default(torch.float16),
    "bfloat16": lambda: default(torch.bfloat16),
    "deterministic": deterministic,
    "strict": strict,
    "detect_anomaly": watched,
}

MODELS = ("tanh", "conv-norm", "embedding")


def made(model: str, dtype: torch.dtype = torch.float32) -> tuple[cl.Objective, list[Any]]:
    """The objective and minibatches in a dtype; they are made outside."""
    p = problem(model)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    p.model.to(dtype)
    return p.objective(), [(cast(x), cast(y)) for x, y in batches(p, 4)]


def steps(
    name: str, model: str, around: Callable[[], AbstractContextManager[Any]], outside: bool = False
) -> list[Tensor]:
    """Weights after a warm start and three steps, between which the state is saved and read.

    Args:
        outside: of every second call.
    """
    objective, data = made(model)
    with around():
        optimizer = cl.optimizer(name, objective, lr=1e-3, update_every=2, refresh_every=2)
        optimizer.warm_start(data[:1])
    for i, (x, y) in enumerate(data[1:]):
        with nullcontext() if outside and i % 2 else around():
            loss = optimizer.step(objective.closure(x, y))
            assert not loss.is_inference()
            assert not loss.requires_grad
            optimizer.load_state_dict(optimizer.state_dict())
    return [q.detach().clone() for q in objective.parameters.values()]


@pytest.mark.thinned(20)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("around", sorted(AROUND))
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_method(name: str, around: str, model: str) -> None:
    wanted = steps(name, model, nullcontext)
    assert all(map(torch.equal, steps(name, model, AROUND[around]), wanted))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_now_inside_now_outside(name: str) -> None:
    """A state of inference mode could not be written to outside."""
    wanted = steps(name, "tanh", nullcontext)
    assert all(map(torch.equal, steps(name, "tanh", torch.inference_mode, True), wanted))


def company(around: Callable[[], AbstractContextManager[Any]], names: list[str]) -> Any:
    objective, data = made("tanh", torch.float64)
    with around():
        return cl.compare(
            objective,
            data[1:],
            reference="block-fisher",
            algorithms=names,
            probes=[
                "damping",
                "bounds",
                "error",
                "alignment",
                "condition",
                "noise",
                "reduction",
                "spectrum",
            ],
            warm=data[:1],
            progress=False,
        ).dataset


@pytest.mark.thinned(4)
@pytest.mark.parametrize("around", sorted(AROUND))
@pytest.mark.parametrize("first", range(5))
def test_comparisons(around: str, first: int) -> None:
    names = sorted(ALGORITHMS)[first::5]
    wanted, found = company(nullcontext, names), company(AROUND[around], names)
    assert set(found.data_vars) == set(wanted.data_vars)
    for name in map(str, wanted.data_vars):
        if "seconds" not in name:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("around", sorted(AROUND))
@pytest.mark.parametrize("kind", ["ggn", "hessian", "fisher-mc", "ef"])
@pytest.mark.parametrize("model", MODELS)
def test_exact_matrices(model: str, kind: Any, around: str) -> None:
    def matrices(around: Callable[[], AbstractContextManager[Any]]) -> list[Tensor]:
        objective, ((x, y), *_) = made(model)
        objective.model.eval()
        with around():
            found = [m.dense() for m in cl.exact.matrices(objective, x, y, kind).values()]
            A = cl.exact.product(objective, x, y, kind)
            found += [A @ torch.ones(A.shape[1], dtype=A.dtype), A.dense()]
            found += cl.exact.gradients(objective, x, y).values()
        assert not any(t.requires_grad for t in found)
        return found

    assert all(map(torch.equal, matrices(AROUND[around]), matrices(nullcontext)))
