"""Block BFGS: multi-secant equations, the three choices of P, τ, sketches, the conditions (19) and
(20) of S2QN.
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_near, normal, spd
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.linalg import bfgs as qn
from curvlab.linalg.block_bfgs import (
    Choice,
    block_bfgs,
    gaussian_sketch,
    parameter_secant,
    preactivation_secant,
    sketched_block_bfgs,
)

MANY = settings(deadline=None, max_examples=50)
SEEDS = st.integers(0, 9999)
DOUBLE = torch.float64
CHOICES: tuple[Choice, ...] = get_args(Choice)
choices = pytest.mark.parametrize("choice", CHOICES)


def eye(order: int) -> Tensor:
    return torch.eye(order, dtype=DOUBLE)


@MANY
@given(st.integers(1, 7), st.integers(1, 9), SEEDS)
def test_multi_secant_equation(order: int, m: int, seed: int) -> None:
    """Λ⁺U = V for V = MU with M positive definite; also with more columns than rows, where Λ⁺ =
    M.
    """
    U, M = normal(order, m, seed=seed), spd(order, seed + 1)
    found = block_bfgs(spd(order, seed + 2), U, M @ U, mu=1e-6)
    assert (found.skipped, found.tau, found.rank) == ("", 1, min(order, m))
    assert_near(found.matrix @ U, M @ U, 1e-7)
    if m > order:
        assert_near(found.matrix, M, 1e-7)


@MANY
@given(st.integers(2, 7), SEEDS, st.floats(0.1, 1))
def test_symmetric_choice_as_it_is_written(order: int, seed: int, tau: float) -> None:
    """(21) with inverses written out."""
    m = order - 1
    Lambda, U, V = (
        spd(order, seed),
        normal(order, m, seed=seed + 1),
        normal(order, m, seed=seed + 2),
    )
    V = V + 3 * Lambda @ U
    damped = tau * V + (1 - tau) * Lambda @ U
    P, W = (damped.T @ U + U.T @ damped) / 2, U.T @ Lambda @ U
    expected = (
        Lambda
        + damped @ torch.linalg.inv(P) @ damped.T
        - Lambda @ U @ torch.linalg.inv(W) @ U.T @ Lambda
    )
    found = block_bfgs(Lambda, U, V, tau=tau)
    positive = float(torch.linalg.eigvalsh(P)[0]) > 0
    assert (found.skipped == "") == positive
    if positive:
        assert float((found.matrix - expected).norm()) <= 1e-6 * float(expected.norm())
    else:
        assert found.matrix is Lambda


@choices
@MANY
@given(order=st.integers(2, 7), m=st.integers(1, 5), seed=SEEDS, mu=st.floats(0.05, 0.9))
def test_tau_is_powells_rule_for_the_block(
    choice: Choice, order: int, m: int, seed: int, mu: float
) -> None:
    """P, of the damped V, is at least μ times its value at V = ΛU, with equality where V was
    changed.
    """
    Lambda, U, V = (
        spd(order, seed),
        normal(order, m, seed=seed + 1),
        normal(order, m, seed=seed + 2),
    )
    found = block_bfgs(Lambda, U, V, choice=choice, mu=mu)
    assert found.skipped == ""
    assert 0 <= found.tau <= 1
    assert (found.tau < 1) == (found.least < mu)
    if m > order:
        return
    damped, reference = found.tau * V + (1 - found.tau) * Lambda @ U, U.T @ Lambda @ U
    product = damped.T @ U
    if choice == "symmetric":
        P = (product + product.T) / 2
    elif choice == "trace":
        P, reference = product.trace()[None, None], reference.trace()[None, None]
    else:
        P, reference = torch.diag(product.diagonal()), torch.diag(reference.diagonal())
    least = float(torch.linalg.eigvals(torch.linalg.solve(reference, P)).real.amin())
    assert least == pytest.approx(max(mu, found.least), rel=1e-6)
    V_P_V = damped @ damped.T / P if choice == "trace" else damped @ torch.linalg.inv(P) @ damped.T
    projected = Lambda @ U @ torch.linalg.inv(U.T @ Lambda @ U) @ U.T @ Lambda
    expected = Lambda + V_P_V - projected
    assert float((found.matrix - expected).norm()) <= 1e-6 * float(
        expected.norm() + projected.norm()
    )
    values = torch.linalg.eigvalsh(found.matrix)
    assert float(values[0]) > (
        0 if choice == "symmetric" and m < order else -1e-9 * float(values[-1])
    )


@choices
@MANY
@given(order=st.integers(1, 6), seed=SEEDS, mu=st.floats(0.05, 0.9))
def test_one_pair_is_bfgs_with_powells_damping_on_b(
    choice: Choice, order: int, seed: int, mu: float
) -> None:
    B, s, y = spd(order, seed), normal(order, seed=seed + 1), normal(order, seed=seed + 2)
    found = block_bfgs(B, s[:, None], y[:, None], choice=choice, mu=mu)
    pair = qn.powell_on_b(s, y, B, torch.linalg.inv(B), mu)
    assert found.tau == pytest.approx(float(pair.damping.theta2), rel=1e-9)
    assert found.least == pytest.approx(float(s @ y / (s @ B @ s)), rel=1e-8, abs=1e-10)
    assert_near(found.matrix, qn.bfgs(B, pair.s, pair.y), 1e-9)


# τ that is bounded from above, too: S2QN's Assumption 2.4.


def conditions(
    Lambda: Tensor, U: Tensor, V: Tensor, choice: Choice, tau: float, mu1: float
) -> tuple[float, float]:
    """Least eigenvalues of P_τ relative to P at V = ΛU, and of P_τ / μ₁ − V_τᵀΛ⁻¹V_τ likewise;
    inverses written out.
    """
    W, VU = U.T @ Lambda @ U, V.T @ U
    one = torch.eye(len(W), dtype=DOUBLE)
    P, reference = {
        "symmetric": ((VU + VU.T) / 2, W),
        "trace": (VU.trace() * one, W.trace() * one),
        "diagonal": (torch.diag(VU.diagonal()), torch.diag(W.diagonal())),
    }[choice]
    P, V = tau * P + (1 - tau) * reference, tau * V + (1 - tau) * Lambda @ U
    above = P / mu1 - V.T @ torch.linalg.solve(Lambda, V)
    root = torch.linalg.cholesky(reference)
    first, second = (torch.linalg.solve(root, torch.linalg.solve(root, M).T).T for M in (P, above))
    return (
        float(torch.linalg.eigvalsh((first + first.T) / 2)[0]),
        float(torch.linalg.eigvalsh((second + second.T) / 2)[0]),
    )


@choices
@MANY
@given(
    order=st.integers(2, 7),
    m=st.integers(1, 5),
    seed=SEEDS,
    mu=st.floats(0.05, 0.9),
    mu1=st.floats(0.05, 0.9),
    long=st.floats(-3, 6),
)
def test_the_bounded_tau_is_the_largest_and_bounds_the_matrix(
    choice: Choice, order: int, m: int, seed: int, mu: float, mu1: float, long: float
) -> None:
    """Λ⁺ ⪯ (1 + 1/μ₁) Λ, hence ‖Λ⁺‖ ≤ (1 + 1/μ₁) ‖Λ‖, whatever the pairs; no larger τ ≤ 1 keeps
    both conditions.
    """
    Lambda, U = spd(order, seed), normal(order, m, seed=seed + 1)
    V = 10**long * normal(order, m, seed=seed + 2)
    found = block_bfgs(Lambda, U, V, choice=choice, mu=mu, mu1=mu1)
    if found.skipped:
        assert choice == "diagonal"  # whose P at V = ΛU may be too small for columns that lean
        assert conditions(Lambda, U, V, choice, 0.0, mu1)[1] < 1e-12
        return
    root = torch.linalg.cholesky(Lambda)
    relative = torch.linalg.solve(root, torch.linalg.solve(root, found.matrix).T)
    relative = (relative + relative.T) / 2
    assert float(torch.linalg.eigvalsh(relative)[-1]) <= (1 + 1 / mu1) * (1 + 1e-9)
    norms = [float(torch.linalg.eigvalsh(M)[-1]) for M in (found.matrix, Lambda)]
    assert norms[0] <= (1 + 1 / mu1) * norms[1] * (1 + 1e-9)
    assert 0 <= found.tau <= 1
    if m <= order and choice != "trace":
        least, above = conditions(Lambda, U, V, choice, found.tau, mu1)
        assert least >= mu - 1e-8
        assert above >= -1e-8 / mu1
        if 0 < found.tau < 1:
            assert min(least - mu, above * mu1) <= 1e-6


@choices
@MANY
@given(
    order=st.integers(2, 7),
    m=st.integers(1, 5),
    seed=SEEDS,
    room=st.floats(1.01, 30),
    long=st.floats(-3, 6),
)
def test_a_ceiling_is_kept_and_met(
    choice: Choice, order: int, m: int, seed: int, room: float, long: float
) -> None:
    """Λ⁺ ⪯ hI, Assumption 2.4, with equality where it is what has lowered τ."""
    Lambda, U = spd(order, seed), normal(order, m, seed=seed + 1)
    V = 10**long * normal(order, m, seed=seed + 2)
    h = room * float(torch.linalg.eigvalsh(Lambda)[-1])
    found, free = (block_bfgs(Lambda, U, V, choice=choice, ceiling=top) for top in (h, None))
    if found.skipped:
        assert choice == "diagonal"
        return
    greatest = float(torch.linalg.eigvalsh(found.matrix)[-1])
    assert greatest <= h * (1 + 1e-9)
    if found.tau < free.tau:
        assert greatest == pytest.approx(h, rel=1e-6)
    else:
        assert found.tau == free.tau


def test_above_the_ceiling_nothing_is_updated() -> None:
    Lambda, U = spd(4), normal(4, 2)
    found = block_bfgs(Lambda, U, Lambda @ U, ceiling=1e-3)
    assert (found.skipped, found.matrix is Lambda) == ("curvature", True)


@choices
@MANY
@given(
    order=st.integers(2, 6),
    seed=SEEDS,
    mu=st.floats(0.05, 0.9),
    mu1=st.floats(0.05, 0.9),
    long=st.floats(-2, 4),
)
def test_the_bounded_tau_of_one_pair_in_closed_form(
    choice: Choice, order: int, seed: int, mu: float, mu1: float, long: float
) -> None:
    """With w = uᵀΛu, s = uᵀv, a = vᵀΛ⁻¹v the bound is a quadratic inequality in τ:
    τ² a + 2 τ (1 − τ) s + (1 − τ)² w ≤ (τ s + (1 − τ) w) / μ₁.
    """
    Lambda, u = spd(order, seed), normal(order, seed=seed + 1)
    v = 10**long * normal(order, seed=seed + 2)
    w, s, a = (
        float(u @ Lambda @ u),
        float(u @ v),
        float(v @ torch.linalg.solve(Lambda, v)),
    )
    square, linear, rest = a - 2 * s + w, 2 * (s - w) - (s - w) / mu1, w - w / mu1
    root = (-linear + (linear**2 - 4 * square * rest) ** 0.5) / (2 * square)
    powell = 1.0 if s >= mu * w else (1 - mu) * w / (w - s)
    found = block_bfgs(Lambda, u[:, None], v[:, None], choice=choice, mu=mu, mu1=mu1)
    assert found.tau == pytest.approx(min(1.0, powell, root), rel=1e-7)


def test_a_long_v_across_u_no_longer_makes_the_matrix_huge() -> None:
    """V nearly orthogonal to U: P ⪰ μ UᵀΛU says nothing of V P⁻¹ Vᵀ. After forty updates with
    Powell's rule alone Λ is far beyond ‖V‖ / ‖U‖ and singular to rounding; with the bound neither.
    """
    skew = normal(20, 20, seed=9)
    skew = skew - skew.T
    size = float(torch.linalg.matrix_norm(skew, 2))
    found = {}
    for mu1 in (None, 0.2):
        Lambda, greatest = 0.1 * eye(20), 0.0
        for k in range(40):
            U = normal(20, 4, seed=k)
            Lambda = block_bfgs(Lambda, U, skew @ U, mu1=mu1).matrix
            values = torch.linalg.eigvalsh(Lambda)
            greatest = max(greatest, float(values[-1]))
        found[mu1] = (greatest, float(values[0]))
    assert found[None][0] > 100 * size
    assert found[None][1] < 1e-10
    assert found[0.2][0] < size
    assert found[0.2][1] > 1e-4


def test_an_update_that_no_tau_bounds_is_skipped() -> None:
    """Of five columns that are nearly one the diagonal P is a fifth of what it would have to be; of
    a matrix that rounding has made indefinite there is no bound.
    """
    U = normal(4, 1) + 1e-3 * normal(4, 5, seed=1)
    Lambda = spd(4)
    found = block_bfgs(Lambda, U, Lambda @ U, choice="diagonal", mu1=0.3)
    assert (found.skipped, found.matrix is Lambda) == ("curvature", True)
    assert block_bfgs(Lambda, U, Lambda @ U, choice="diagonal").skipped == ""
    broken = torch.diag(torch.tensor([1.0, -1e-12], dtype=DOUBLE))
    found = block_bfgs(broken, eye(2)[:, :1], eye(2)[:, :1], mu1=0.2)
    assert (found.skipped, found.matrix is broken) == ("curvature", True)
    for mu1 in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(CurvlabError, match="mu1 must lie between 0 and 1"):
            block_bfgs(Lambda, U, U, mu1=mu1)


def test_no_other_choice_satisfies_the_secant_equations_of_several_pairs() -> None:
    U, M = normal(5, 2), spd(5, 1)
    holding: dict[Choice, bool] = {"symmetric": True, "trace": False, "diagonal": False}
    for choice, holds in holding.items():
        found = block_bfgs(eye(5), U, M @ U, choice=choice, mu=1e-6)
        assert (float((found.matrix @ U - M @ U).norm()) < 1e-10) == holds


def test_trace_and_diagonal_may_leave_a_singular_matrix() -> None:
    """Uᵀ V = [[1, 1], [1, 1]] has a positive trace and diagonal; across (1, −1) nothing is left."""
    U, V = eye(2), torch.ones(2, 2, dtype=DOUBLE)
    for choice in ("trace", "diagonal"):
        found = block_bfgs(eye(2), U, V, choice=choice)
        assert (found.skipped, found.tau) == ("", 1)
        assert float(torch.linalg.eigvalsh(found.matrix)[0].abs()) < 1e-12
    found = block_bfgs(eye(2), U, V)
    assert found.tau < 1
    assert float(torch.linalg.eigvalsh(found.matrix)[0]) > 0.1


@choices
def test_repeated_and_zero_columns_change_nothing_of_the_projection(choice: Choice) -> None:
    """Steps of a rank below the number of pairs: UᵀΛU has no inverse, its range has."""
    Lambda, U, M = spd(6), normal(6, 2), spd(6, 1)
    more = torch.cat([U, U, torch.zeros(6, 1, dtype=DOUBLE)], 1)
    few, many = (
        block_bfgs(Lambda, U, M @ U, choice=choice),
        block_bfgs(Lambda, more, M @ more, choice=choice),
    )
    assert (many.rank, many.skipped) == (2, "")
    assert many.tau == pytest.approx(few.tau, rel=1e-9)
    if choice == "diagonal":  # two columns of one direction count twice
        V_P_V = many.matrix - few.matrix
        assert_near(V_P_V, M @ U @ torch.diag(1 / (U * (M @ U)).sum(0)) @ U.T @ M, 1e-9)
    else:
        assert_near(many.matrix, few.matrix, 1e-9)


@choices
@pytest.mark.parametrize(
    ("U", "V", "reason"),
    [
        (torch.zeros(3, 2, dtype=DOUBLE), normal(3, 2), "curvature"),
        (normal(3, 2), torch.full((3, 2), float("nan"), dtype=DOUBLE), "not finite"),
        (torch.full((3, 2), float("inf"), dtype=DOUBLE), normal(3, 2), "not finite"),
    ],
    ids=["no-step", "nan", "inf"],
)
def test_blocks_that_are_skipped(choice: Choice, U: Tensor, V: Tensor, reason: str) -> None:
    Lambda = spd(3)
    found = block_bfgs(Lambda, U, V, choice=choice)
    assert found.matrix is Lambda
    assert found.skipped == reason


@choices
def test_a_matrix_that_rounding_has_made_indefinite_skips(choice: Choice) -> None:
    """The columns see −1e-9 and an eigenvalue above 0 between them: nothing to scale P by."""
    Lambda = torch.tensor([[-1e-9, 1.0], [1.0, -1e-9]], dtype=DOUBLE)
    found = block_bfgs(Lambda, eye(2), eye(2), choice=choice)
    assert (found.matrix is Lambda) == (choice != "symmetric")
    assert found.skipped == ("" if choice == "symmetric" else "curvature")


@choices
def test_a_given_tau_that_leaves_p_indefinite_skips(choice: Choice) -> None:
    Lambda, U = spd(4), normal(4, 2)
    found = block_bfgs(Lambda, U, -(Lambda @ U), choice=choice, tau=0.6)
    assert found.matrix is Lambda
    assert (found.skipped, found.tau) == ("curvature", 0.6)
    assert found.least == pytest.approx(-1, rel=1e-9)
    assert block_bfgs(Lambda, U, -(Lambda @ U), choice=choice, tau=0.4).skipped == ""


def test_mu_outside_its_range() -> None:
    with pytest.raises(CurvlabError, match=r"μ in \(0, 1\], not 0"):
        block_bfgs(spd(2), normal(2, 1), normal(2, 1, seed=1), mu=0)


# Sketches.


@choices
@MANY
@given(order=st.integers(2, 6), m=st.integers(4, 12), k=st.integers(1, 3), seed=SEEDS)
def test_sketch_is_the_block_update_of_fewer_columns(
    choice: Choice, order: int, m: int, k: int, seed: int
) -> None:
    Lambda, U, V = (
        spd(order, seed),
        normal(order, m, seed=seed + 1),
        normal(order, m, seed=seed + 2),
    )
    sketch = gaussian_sketch(m, k, torch.Generator().manual_seed(seed), DOUBLE, torch.device("cpu"))
    assert sketch.shape == (m, k)
    found = sketched_block_bfgs(Lambda, U, V, sketch, choice=choice)
    assert torch.equal(
        found.matrix, block_bfgs(Lambda, U @ sketch, V @ sketch, choice=choice).matrix
    )
    assert found.rank <= min(order, k)


def test_sketch_satisfies_the_compressed_secant_equations() -> None:
    U, M = normal(6, 20), spd(6, 1)
    sketch = gaussian_sketch(20, 3, torch.Generator().manual_seed(0), DOUBLE, torch.device("cpu"))
    found = sketched_block_bfgs(eye(6), U, M @ U, sketch, mu=1e-6)
    assert_near(found.matrix @ (U @ sketch), M @ U @ sketch, 1e-9)
    assert float((found.matrix @ U - M @ U).norm()) > 0.1


def test_gaussian_sketch_is_a_tight_frame_in_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [gaussian_sketch(3, 2, generator, DOUBLE, torch.device("cpu")) for _ in range(4000)]
    assert float((torch.stack([d @ d.T for d in draws]).mean(0) - eye(3)).abs().amax()) < 0.1


# The two conditions on a Kronecker factor.


@MANY
@given(st.integers(1, 5), st.integers(1, 5), SEEDS)
def test_condition_19(o: int, i: int, seed: int) -> None:
    """(A ⊗ (G + Λ)) vec U = vec V, before sketching, where some positive definite Λ does that; as
    printed it does not.
    """
    A, G, Lambda, U = spd(i, seed), spd(o, seed + 1), spd(o, seed + 2), normal(o, i, seed=seed + 3)
    V = (G + Lambda) @ U @ A
    found = block_bfgs(eye(o), *parameter_secant(U, V, A, G), mu=1e-9).matrix
    whole = torch.kron(G + found, A)  # row-major: outputs first
    assert_near(whole @ U.flatten(), V.flatten(), 1e-6)
    printed = block_bfgs(eye(o), *parameter_secant(U, V, A, G, as_printed=True), mu=1e-9).matrix
    if i > 1:
        assert float(
            (torch.kron(G + printed, A) @ U.flatten() - V.flatten()).norm()
        ) > 1e-4 * float(V.norm())


@MANY
@given(st.integers(1, 5), st.integers(1, 12), SEEDS)
def test_condition_20(o: int, m: int, seed: int) -> None:
    """(G + Λ) Ũ = Ṽ, before sketching."""
    G, Lambda, U = spd(o, seed), spd(o, seed + 1), normal(o, m, seed=seed + 2)
    V = (G + Lambda) @ U
    found = block_bfgs(eye(o), *preactivation_secant(U, V, G), mu=1e-9).matrix
    assert_near((G + found) @ U, V, 1e-6)


def test_no_symmetric_matrix_satisfies_the_conditions_where_vu_is_not_symmetric() -> None:
    """What is left is of the size of the skew part of VᵀU."""
    U, M, skew = normal(6, 3), spd(6, 1), normal(6, 6, seed=2)
    for size in (1e-3, 1e-2):
        V = (M + size * (skew - skew.T)) @ U
        error = float((block_bfgs(eye(6), U, V, mu=1e-6).matrix @ U - V).norm())
        assert 0.1 * size < error < 100 * size


@choices
def test_float32_stays_float32(choice: Choice) -> None:
    found = block_bfgs(
        spd(4).float(), normal(4, 6).float(), normal(4, 6, seed=1).float(), choice=choice
    )
    assert found.skipped == ""
    assert found.matrix.dtype == torch.float32
    assert float(torch.linalg.eigvalsh(found.matrix)[0]) > -1e-5
