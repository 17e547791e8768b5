"""Memory that runs out is said in one line, and leads to no slow way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import problem
from torch import Tensor, nn

import curvlab as cl
from curvlab import autograd, divergence
from curvlab.errors import CurvlabError, OutOfMemory, lacks_memory
from curvlab.exact import second_order, transforms
from curvlab.exact.batches import Kind

ERRORS = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has …"),
    "CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory:"
        " you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 B"),
    "library": RuntimeError("CUDA error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `create`"),
}
each = pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)


def raising(error: Exception) -> Callable[..., Any]:
    def function(*args: object, **kwargs: object) -> None:
        raise error

    return function


class Filled:
    """Memory that is full where several vectors go back at once, and not for one of them."""

    def __init__(self, error: Exception) -> None:
        self.error, self.usual, self.singly = error, torch.autograd.grad, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("is_grads_batched"):
            raise self.error
        self.singly += 1
        return self.usual(*args, **kwargs)


@each
def test_which_errors_they_are(error: Exception) -> None:
    assert lacks_memory(error)
    assert lacks_memory(MemoryError())
    assert not divergence.of_numbers(error), "a larger damping is no remedy"


def test_which_errors_they_are_not() -> None:
    for error in (RuntimeError("no batching rule"), ValueError("memory format"), OSError(28, "")):
        assert not lacks_memory(error)


def test_torch_s_own_error_of_a_cpu() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 55, dtype=torch.float64)
    assert lacks_memory(raised.value)


@each
def test_a_mapped_function(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "vmap", lambda f: raising(error))
    with pytest.raises(OutOfMemory, match=r"not enough memory .*: give fewer examples at a time"):
        transforms.mapped(lambda x: x)(torch.ones(3))


@each
def test_vectors_sent_back(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, requires_grad=True)
    z = x.square()
    filled = Filled(error)
    monkeypatch.setattr(torch.autograd, "grad", filled)
    with pytest.raises(OutOfMemory, match="fewer examples at a time"):
        autograd.send_back(z, [x], torch.eye(2))
    with pytest.raises(OutOfMemory, match="fewer examples at a time"):
        second_order._send_back(z, x, torch.eye(2))
    assert not filled.singly
    monkeypatch.setattr(torch.autograd, "grad", raising(error))
    with pytest.raises(OutOfMemory, match="fewer examples at a time"):
        autograd.sent_together(z, [x], torch.eye(2)[:1])


@each
@pytest.mark.parametrize("kind", ["ggn", "hessian", "ef"])
def test_exact_matrices_by_torch_func(
    error: Exception, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither `Plain` nor any other way takes over."""
    p = problem()
    cl.exact.matrix(p.objective(), p.x, p.y, kind, "1", route="func")
    for name in ("vmap", "jvp", "vjp"):
        monkeypatch.setattr(transforms, name, raising(error))
    with pytest.raises(OutOfMemory, match="fewer examples at a time"):
        cl.exact.matrix(p.objective(), p.x, p.y, kind, "1", route="func")


def test_the_check_of_torch_func_does_not_take_it_for_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p = problem()
    objective = p.objective()
    monkeypatch.setattr(transforms, "jvp", raising(ERRORS["GPU"]))
    with pytest.raises(OutOfMemory):
        cl.exact.product(objective, p.x, p.y, "ggn").dense()
    monkeypatch.undo()
    assert not objective.functional, "nothing was learnt of the model"


@each
def test_a_second_derivative_of_plain_autograd(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem()
    monkeypatch.setattr(torch.autograd, "grad", Filled(error))
    with pytest.raises(OutOfMemory):
        cl.exact.matrix(p.objective(), p.x, p.y, "hessian", "1")


@each
def test_a_forward_pass_is_no_fault_of_the_data(error: Exception) -> None:
    """Torch's error says "size" and "input", as those of data do that do not fit."""

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise type(error)(f"{error} (of the input's size)")

    p = problem()
    objective = cl.Objective(Net(p.x.shape[1], 3), cl.likelihoods.Categorical())
    with pytest.raises(type(error)) as raised:
        objective.closure(p.x, p.y).observe()
    assert not isinstance(raised.value, CurvlabError)
