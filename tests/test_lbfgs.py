"""L-BFGS: compact forms, two loops and dense updates agree; base plus refinement and its inverses,
S2QN (12) to (14).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_near, normal, spd
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from curvlab.errors import CurvlabError
from curvlab.linalg import bfgs as qn
from curvlab.linalg import operators as ops
from curvlab.linalg.lbfgs import (
    Memory,
    compact_is_cheaper,
    empty_memory,
    lbfgs,
    lbfgs_inverse,
    multiple_of_identity,
    refined,
    refined_low_rank,
    two_loop,
)
from curvlab.linalg.operators import Compact, Dense, Diagonal, Inverse, Kronecker, LowRank, Operator
from curvlab.linalg.products import placement
from curvlab.linalg.woodbury import Rows

MANY = settings(deadline=None, max_examples=50)
SEEDS = st.integers(0, 9999)
DOUBLE = torch.float64


BASES: dict[str, Callable[[], Operator]] = {  # of order 6
    "identity": lambda: multiple_of_identity(0.7, normal(6)),
    "diagonal": lambda: Diagonal(normal(6).abs() + 0.1),
    "dense": lambda: Dense(spd(6)),
    "inverse": lambda: Inverse(torch.linalg.cholesky(spd(6))),
    "kronecker": lambda: Kronecker((spd(2), spd(3))),
    "low-rank": lambda: LowRank(Rows(normal(4, 2), normal(4, 3, seed=1)), 0.3),
    "woodbury": lambda: LowRank(Rows(normal(2, 6)), 0.3).inv(),
    "compact": lambda: lbfgs(filled(6, 2, seed=50), Diagonal(torch.ones(6, dtype=DOUBLE))),
}
bases = pytest.mark.parametrize("base", BASES)


def filled(order: int, p: int, seed: int = 0, capacity: int | None = None) -> Memory:
    """Pairs of slowly varying positive definite matrices: what damping leaves."""
    memory = empty_memory(capacity or max(p, 1), normal(order))
    for k in range(p):
        s = normal(order, seed=seed + 3 * k)
        memory = memory.append(s, (spd(order, seed) + 0.1 * spd(order, seed + 3 * k + 1)) @ s)
    return memory


def dense_inverse(memory: Memory, base: Tensor) -> Tensor:
    """The same updates one after another: (2.6) with the products written out."""
    H = base
    for s, y in zip(memory.S, memory.Y, strict=True):
        left = torch.eye(len(s), dtype=DOUBLE) - torch.outer(s, y) / (s @ y)
        H = left @ H @ left.T + torch.outer(s, s) / (s @ y)
    return H


# The memory.


def test_memory_keeps_the_last_pairs() -> None:
    memory = empty_memory(3, normal(2))
    assert (len(memory), memory.S.shape, memory.S.dtype) == (0, (0, 2), DOUBLE)
    for k in range(5):
        before = memory
        memory = memory.append(
            torch.full((2,), float(k), dtype=DOUBLE), torch.full((2,), -float(k), dtype=DOUBLE)
        )
        assert len(before) == min(k, 3)  # a value
        assert len(memory) == min(k + 1, 3)
    assert memory.S[:, 0].tolist() == [2, 3, 4]
    assert torch.equal(memory.Y, -memory.S)


@pytest.mark.parametrize(
    "make",
    [
        lambda: empty_memory(0, normal(2)),
        lambda: Memory(2, normal(2, 3), normal(2, 4)),
        lambda: Memory(1, normal(2, 3), normal(2, 3)),
    ],
)
def test_memory_says_what_it_takes(make: Callable[[], Memory]) -> None:
    with pytest.raises(
        CurvlabError, match="it needs at least 1 pair of room, and as many s as y of one length"
    ):
        make()


@pytest.mark.parametrize("make", [lbfgs, lbfgs_inverse])
def test_pairs_without_positive_curvature_are_refused(
    make: Callable[[Memory, Operator], Operator],
) -> None:
    memory = filled(3, 1, capacity=2).append(normal(3), -normal(3))
    with pytest.raises(
        CurvlabError, match=r"pair 2 of 2 has sᵀy = .*, not above 0: damp or skip it"
    ):
        make(memory, Diagonal(torch.ones(3, dtype=DOUBLE)))


def test_no_pairs_leave_the_base() -> None:
    base, memory = Dense(spd(3)), empty_memory(2, normal(3))
    assert lbfgs(memory, base) is lbfgs_inverse(memory, base) is base
    assert refined(base, memory, Diagonal(torch.ones(3))) is base
    assert_near(two_loop(memory, base, normal(3)), spd(3) @ normal(3))


# Compact forms.


@bases
@pytest.mark.parametrize("p", [1, 2, 5, 12])
def test_compact_form_is_the_dense_updates_and_the_two_loops(base: str, p: int) -> None:
    H0, memory = BASES[base](), filled(6, p)
    expected = dense_inverse(memory, H0.dense())
    H = lbfgs_inverse(memory, H0)
    assert isinstance(H, Compact)
    assert_near(H.dense(), expected)
    v, columns = normal(6, seed=70), normal(6, 4, seed=71)
    for w in (v, columns):
        assert_near(H @ w, expected @ w)
        assert_near(two_loop(memory, H0, w), expected @ w)
    assert_near(H.eigvalsh(), torch.linalg.eigvalsh(expected))
    assert_near(H.diag(), expected.diagonal())
    assert_near(H.trace(), expected.trace())


@MANY
@given(st.integers(1, 10), st.integers(1, 12), SEEDS, st.floats(0.05, 20))
def test_compact_form_of_any_size(order: int, p: int, seed: int, scale: float) -> None:
    memory, H0 = filled(order, p, seed), multiple_of_identity(scale, normal(order))
    expected = dense_inverse(memory, H0.dense())
    assert_near(lbfgs_inverse(memory, H0).dense(), expected, 1e-10)
    assert_near(
        two_loop(memory, H0, normal(order, seed=1)), expected @ normal(order, seed=1), 1e-10
    )
    B = expected.new_tensor(1 / scale) * torch.eye(order, dtype=DOUBLE)
    for s, y in zip(memory.S, memory.Y, strict=True):
        B = qn.bfgs(B, s, y)
    assert_near(lbfgs(memory, H0.inv()).dense(), B, 1e-10)


@bases
@pytest.mark.parametrize("p", [1, 3, 9])
def test_both_forms_are_inverse_to_each_other(base: str, p: int) -> None:
    B0, memory = BASES[base](), filled(6, p)
    B, H = lbfgs(memory, B0), lbfgs_inverse(memory, B0.inv())
    matrix = torch.linalg.inv(dense_inverse(memory, torch.linalg.inv(B0.dense())))
    assert_near(B.dense(), matrix, 1e-10)
    inverse = B.inv()
    assert isinstance(inverse, Compact)
    assert isinstance(H, Compact)
    assert_near(inverse.dense(), H.dense(), 1e-10)
    assert_near(inverse.core, H.core, 1e-10)
    assert_near(inverse.rows, H.rows, 1e-10)
    assert_near(H.inv().dense(), matrix, 1e-10)
    v = normal(6, seed=9)
    assert_near(H @ (B @ v), v, 1e-10)


@bases
def test_secant_equations_of_the_last_pair(base: str) -> None:
    memory = filled(6, 4)
    s, y = memory.S[-1], memory.Y[-1]
    assert_near(lbfgs_inverse(memory, BASES[base]()) @ y, s, 1e-11)
    assert_near(lbfgs(memory, BASES[base]()) @ s, y, 1e-11)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_scale_of_a_pair_does_not_matter(scale: float) -> None:
    memory = filled(5, 3)
    factors = torch.tensor([[1.0], [scale], [1.0]], dtype=DOUBLE)
    other = Memory(3, memory.S * factors, memory.Y * factors)
    H0 = Diagonal(torch.ones(5, dtype=DOUBLE))
    assert_near(lbfgs_inverse(other, H0).dense(), lbfgs_inverse(memory, H0).dense(), 1e-12)


@pytest.mark.parametrize("order", [30, 200])
def test_a_hundred_pairs_of_moving_averages(order: int) -> None:
    """K-BFGS(L): p = 100, s and y moving averages, D_P D_LM; with no pair dropped it is K-BFGS
    (practice), in float32 too.
    """
    H0 = multiple_of_identity(1 / 0.3, normal(order))
    H, memory = H0.dense(), empty_memory(100, normal(order))
    G = normal(order, order, seed=1) / order**0.5
    G, s, y = G + G.T, torch.zeros(order, dtype=DOUBLE), torch.zeros(order, dtype=DOUBLE)
    for k in range(100):
        step = 1e-3 * normal(order, seed=2 * k)
        s, y = (
            0.9 * s + 0.1 * step,
            0.9 * y + 0.1 * (G @ step + 1e-4 * normal(order, seed=2 * k + 1)),
        )
        pair = qn.accept(qn.powell_levenberg(s, y, H, 0.2, 0.3))
        H, pair = qn.updated_inverse(H, pair)
        assert not pair.skipped
        memory = memory.append(pair.s, pair.y)
    assert_near(lbfgs_inverse(memory, H0).dense(), H, 1e-12)
    single = Memory(100, memory.S.float(), memory.Y.float())
    v = normal(order, 7)
    assert_near(
        lbfgs_inverse(single, multiple_of_identity(1 / 0.3, single.S[0])) @ v.float(),
        (H @ v).float(),
        2e-6,
    )


def test_float32_stays_float32() -> None:
    memory = filled(5, 3)
    single = Memory(3, memory.S.float(), memory.Y.float())
    H0, v = Diagonal(torch.ones(5)), normal(5).float()
    H, B = lbfgs_inverse(single, H0), refined_low_rank(normal(5, 2).float(), single, 0.4, 0.2)
    results = (
        H @ v,
        H.inv() @ v,
        B @ v,
        B.inv() @ v,
        two_loop(single, H0, v),
        H.dense(),
        H.eigvalsh(),
        H.diag(),
        H.trace(),
    )
    assert {r.dtype for r in results} == {torch.float32}
    assert placement(H) == placement(B.inv()) == (torch.float32, torch.device("cpu"))


def test_h_of_an_operator_damps_pairs_as_the_dense_h_does() -> None:
    memory, H0 = filled(5, 3), Diagonal(torch.ones(5, dtype=DOUBLE))
    s, y = normal(5, seed=80), normal(5, seed=81)
    operator, dense = lbfgs_inverse(memory, H0), dense_inverse(memory, H0.dense())
    found, expected = (
        qn.double_damping(s, y, operator, 0.2, 0.3),
        qn.double_damping(s, y, dense, 0.2, 0.3),
    )
    assert_near(found.s, expected.s)
    assert_near(found.y, expected.y)


def test_checkpoint_of_a_memory_and_its_matrix() -> None:
    memory = filled(4, 3)
    H = lbfgs_inverse(memory, Kronecker((spd(2), spd(2, 1))))
    back = ops.unpack_operator(ops.pack(H))
    assert torch.equal(back @ normal(4), H @ normal(4))
    again = ops.unpack(ops.pack(memory))
    assert isinstance(again, Memory)
    assert again.capacity == 3
    assert torch.equal(again.S, memory.S)
    assert torch.equal(again.Y, memory.Y)


# Base and refinement.


def compact_12(U: Tensor, V: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """C and P of S2QN (12), entry by entry; pairs are columns."""
    p = U.shape[1]
    L = torch.zeros(p, p, dtype=DOUBLE)
    for i in range(p):
        for j in range(i):
            L[i, j] = U[:, i] @ V[:, j]
    D = torch.diag(torch.stack([U[:, i] @ V[:, i] for i in range(p)]))
    return torch.cat([initial @ U, V], 1), torch.cat(
        [torch.cat([U.T @ initial @ U, L], 1), torch.cat([L.T, -D], 1)]
    )


@bases
@pytest.mark.parametrize("p", [1, 3])
def test_equation_12_is_lbfgs(base: str, p: int) -> None:
    initial, memory = BASES[base](), filled(6, p)
    C, P = compact_12(memory.S.T, memory.Y.T, initial.dense())
    assert_near(
        lbfgs(memory, initial).dense(), initial.dense() - C @ torch.linalg.inv(P) @ C.T, 1e-10
    )


@bases
@pytest.mark.parametrize("p", [1, 3])
def test_equation_13(base: str, p: int) -> None:
    """(H_k + Λ + λI)⁻¹, for a base of any kind: the dense inverse, and (13) as it is written."""
    gamma, damping, memory = 0.4, 0.2, filled(6, p)
    H_k = BASES[base]().dense()
    eye = torch.eye(6, dtype=DOUBLE)
    Lambda = torch.linalg.inv(dense_inverse(memory, eye / gamma))
    H_tilde = H_k + (gamma + damping) * eye
    matrix = refined(Dense(H_tilde), memory, multiple_of_identity(gamma, normal(6)))
    assert_near(matrix.dense(), H_k + Lambda + damping * eye, 1e-10)
    assert_near(matrix.inv().dense(), torch.linalg.inv(H_k + Lambda + damping * eye), 1e-10)
    C, P = compact_12(memory.S.T, memory.Y.T, gamma * eye)
    inverse = torch.linalg.inv(H_tilde)
    T = P - C.T @ inverse @ C
    assert_near(
        matrix.inv().dense(), inverse + inverse @ C @ torch.linalg.inv(T) @ C.T @ inverse, 1e-10
    )


def test_equation_13_over_a_base_that_is_never_formed() -> None:
    """H_k of few outer products in a layer: LowRank of γ + λ is H̃, and its inverse is
    Woodbury's.
    """
    rows, memory, gamma, damping = Rows(normal(3, 2), normal(3, 4, seed=1)), filled(8, 2), 0.4, 0.2
    found = refined(
        LowRank(rows, gamma + damping), memory, multiple_of_identity(gamma, normal(8))
    ).inv()
    Lambda = lbfgs(memory, multiple_of_identity(gamma, normal(8))).dense()
    matrix = rows.dense().T @ rows.dense() + Lambda + damping * torch.eye(8, dtype=DOUBLE)
    assert_near(found.dense(), torch.linalg.inv(matrix), 1e-11)


def test_refinement_satisfies_the_structured_secant_equation() -> None:
    """(10): (H_k + Λ) u = v̂ where Λ learned v = v̂ − H_k u."""
    H_k, u = spd(5), normal(5)
    v_hat = (H_k + spd(5, 1)) @ u
    memory = (
        empty_memory(2, u).append(normal(5, seed=3), normal(5, seed=3)).append(u, v_hat - H_k @ u)
    )
    # λ = 0
    found = refined(
        Dense(H_k + 0.3 * torch.eye(5, dtype=DOUBLE)), memory, multiple_of_identity(0.3, u)
    )
    assert_near(found @ u, v_hat, 1e-11)


def test_refinement_of_an_indefinite_base_is_refused() -> None:
    base = Dense(torch.diag(torch.tensor([1.0, -5.0, 1.0], dtype=DOUBLE)))
    with pytest.raises(CurvlabError, match="not positive definite: damp it"):
        refined(base, filled(3, 1), multiple_of_identity(1.0, normal(3))).inv()


@pytest.mark.parametrize("p", [0, 1, 4])
@pytest.mark.parametrize("r", [1, 3, 8])
def test_equation_14(p: int, r: int) -> None:
    """(QQᵀ + Λ + λI)⁻¹: the dense inverse, and (14) as it is written but with P̃ = diag(P, −I)."""
    gamma, damping, memory, Q = 0.4, 0.2, filled(6, p), normal(6, r, seed=9)
    eye = torch.eye(6, dtype=DOUBLE)
    Lambda = torch.linalg.inv(dense_inverse(memory, eye / gamma))
    matrix = refined_low_rank(Q, memory, gamma, damping)
    assert_near(matrix.dense(), Q @ Q.T + Lambda + damping * eye, 1e-11)
    expected = torch.linalg.inv(Q @ Q.T + Lambda + damping * eye)
    assert_near(matrix.inv().dense(), expected, 1e-11)
    assert_near(matrix.inv().inv().dense(), matrix.dense(), 1e-11)
    C, P = compact_12(memory.S.T, memory.Y.T, gamma * eye) if p else (eye[:, :0], eye[:0, :0])
    C_tilde, Lambda_tilde_inverse = torch.cat([C, Q], 1), eye / (gamma + damping)

    def equation_14(first: Tensor) -> Tensor:
        T = (
            torch.block_diag(first, -torch.eye(r, dtype=DOUBLE))
            - C_tilde.T @ Lambda_tilde_inverse @ C_tilde
        )
        return (
            Lambda_tilde_inverse
            + Lambda_tilde_inverse
            @ C_tilde
            @ torch.linalg.inv(T)
            @ C_tilde.T
            @ Lambda_tilde_inverse
        )

    assert_near(equation_14(P), expected, 1e-10)
    if p:
        printed = equation_14(torch.linalg.inv(P))
        assert float((printed - expected).norm()) > 1e-3 * float(expected.norm())


def test_equations_13_and_14_agree() -> None:
    Q, memory = normal(7, 3), filled(7, 2)
    one = refined_low_rank(Q, memory, 0.4, 0.2).inv()
    other = refined(
        LowRank(Rows(Q.T.contiguous()), 0.6), memory, multiple_of_identity(0.4, Q[:, 0])
    ).inv()
    assert_near(one.dense(), other.dense(), 1e-12)
    assert_near(one @ normal(7), other @ normal(7), 1e-12)


@pytest.mark.parametrize("order", [4, 30, 200])
@pytest.mark.parametrize("columns", [3, 50])
@pytest.mark.parametrize("pairs", [1, 8, 40])
def test_operations_of_the_compact_form_and_of_its_matrix(
    order: int, columns: int, pairs: int
) -> None:
    """Counted by PyTorch, but for the solves with the core: 2 R² for each column."""
    generator = torch.Generator().manual_seed(0)
    S = torch.randn(pairs, order, generator=generator, dtype=torch.float64)
    H = lbfgs_inverse(Memory(pairs, S, 2 * S), multiple_of_identity(1.0, S[0]))
    v, rows = torch.ones(order, columns, dtype=torch.float64), 2 * pairs
    with FlopCounterMode(display=False) as as_it_is:
        H @ v
    with FlopCounterMode(display=False) as formed:
        H.dense() @ v
    compact = as_it_is.get_total_flops() + 2 * rows**2 * columns
    dense = formed.get_total_flops() + 2 * rows**2 * order
    assert compact_is_cheaper(order, columns, pairs) is (compact < dense)
