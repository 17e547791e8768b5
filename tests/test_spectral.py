"""Spectra of single-precision matrices on which LAPACK does not converge."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from problems import assert_near, normal
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # not exported by name

import curvlab
from curvlab.curvature.shampoo import shampoo_forward
from curvlab.linalg.operators import Dense
from curvlab.linalg.roots import root_eigh
from curvlab.linalg.spectral import eigh, eigvalsh, symmetric_eigh, thin_svd
from curvlab.probes.bounds import ends


def singular(order: int = 500, exponent: float = -22.0) -> Tensor:
    """A second moment of 10 examples in float32, the squares of most of whose entries underflow.

    `torch.linalg.eigh` fails on it at order 500 with an exponent of −22 (torch 2.13, MKL);
    `torch.linalg.eigvalsh` too at order 1000.
    """
    rows = normal(10, order, seed=3, dtype=torch.float32)
    rows[:, order // 3 :] *= 10**exponent
    return rows.T @ rows / 10


def fails_in_single(function: Callable[..., object]) -> Callable[..., object]:
    def call(matrix: Tensor, *args: object, **kwargs: object) -> object:
        if matrix.dtype == torch.float32:
            raise LinAlgError("linalg.eigh: The algorithm failed to converge")
        return function(matrix, *args, **kwargs)

    return call


def test_roots_of_a_singular_second_moment() -> None:
    M = singular()
    root = root_eigh(M, 2)
    assert_near(root @ root, M, 1e-5)


def test_shampoo_s_matrix_of_a_singular_second_moment() -> None:
    M = singular()
    left, right = shampoo_forward((M, M), 0.0)
    assert torch.equal(left, right)
    assert_near(left @ left, M, 1e-5)


def test_eigenvalues_of_a_singular_second_moment() -> None:
    M = singular(1000)
    values = torch.linalg.eigvalsh(M.double())
    for found in (eigvalsh(M), Dense(M).eigvalsh(), eigh(M)[0], symmetric_eigh(M)[0]):
        assert_near(found.double(), values, 1e-5)
    assert ends(M)[1] == pytest.approx(float(values[-1]), rel=1e-5)


@pytest.mark.parametrize("which", [eigh, symmetric_eigh])
def test_double_precision_where_single_fails(
    which: Callable[[Tensor], tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever LAPACK this is; of several matrices at once, too."""
    M = normal(4, 4, dtype=torch.float32)
    M = M @ M.T
    for name in ("eigh", "eigvalsh", "svd"):
        monkeypatch.setattr(torch.linalg, name, fails_in_single(getattr(torch.linalg, name)))
    e, q = which(M)
    assert e.dtype == q.dtype == torch.float32
    assert_near((q * e) @ q.mT, M, 1e-5)
    assert_near(eigvalsh(torch.stack([M, 2 * M])), torch.stack([e, 2 * e]), 1e-5)
    u, s, v = thin_svd(M[:, :2])
    assert_near((u * s) @ v, M[:, :2], 1e-5)


def test_what_no_precision_helps_is_still_an_error() -> None:
    bad = torch.full((3, 3), torch.nan)
    for function in (eigh, eigvalsh, symmetric_eigh, thin_svd):
        with pytest.raises(LinAlgError):
            function(bad)


def test_memory_is_no_matter_of_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.linalg, "eigh", full)
    with pytest.raises(torch.OutOfMemoryError):
        eigh(torch.eye(3))


def test_nobody_else_calls_lapack_s_eigensolvers() -> None:
    plain = re.compile(r"\blinalg\.(eigh|eigvalsh|eig|eigvals|svd|svdvals|cond|pinv)\(")
    root = Path(curvlab.__file__).parent
    found = [
        f"{path.relative_to(root)}:{number}"
        for path in sorted(root.rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if plain.search(line) and path.name != "spectral.py"
    ]
    assert not found
