"""BFGS: secant equations, Theorem 1, dampings and what they guarantee, acceptance."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import assert_near, normal, spd
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.linalg import bfgs as qn
from curvlab.linalg.bounds import mu3
from curvlab.linalg.operators import Dense, Inverse, Kronecker

MANY = settings(deadline=None, max_examples=50)
SEEDS = st.integers(0, 9999)
ORDERS = st.integers(1, 8)
MU1 = st.floats(0.01, 0.95)
MU2 = st.floats(0.01, 1.0)
SCALES = st.sampled_from([1e-6, 1e-2, 1.0, 1e3])
DOUBLE = torch.float64


def drawn(order: int, seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """A positive definite H and a pair that need not agree with any."""
    return spd(order, seed), scale * normal(order, seed=seed + 1), normal(order, seed=seed + 2)


def curved(order: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """H and a pair with sᵀy well above 0."""
    H, s, y = drawn(order, seed)
    y = y + (0.1 * s.norm() * y.norm() + (s @ y).abs()) / (s @ s) * s
    return H, s, y


# Updates.


@MANY
@given(ORDERS, SEEDS)
def test_bfgs_inverse_is_the_product_form(order: int, seed: int) -> None:
    H, s, y = curved(order, seed)
    rho, identity = 1 / (s @ y), torch.eye(order, dtype=DOUBLE)
    left = identity - rho * torch.outer(s, y)
    expected = left @ H @ left.T + rho * torch.outer(s, s)
    found = qn.bfgs_inverse(H, s, y)
    assert_near(found, expected, 1e-11)
    assert torch.equal(found, found.T)
    assert torch.equal(qn.bfgs_inverse(H, s, y, H @ y), found)


@MANY
@given(ORDERS, SEEDS, st.floats(0, 1))
def test_secant_equations(order: int, seed: int, phi: float) -> None:
    H, s, y = curved(order, seed)
    for new in (
        qn.bfgs_inverse(H, s, y),
        qn.broyden_inverse(H, s, y, phi),
        qn.broyden_inverse(H, s, y, 0.0),
    ):
        assert float((new @ y - s).norm()) <= 1e-11 * float(new.norm() * y.norm())
    for new in (qn.bfgs(H, s, y), qn.bfgs_inverse(H, y, s)):  # BFGS and DFP of B
        assert float((new @ s - y).norm()) <= 1e-11 * float(new.norm() * s.norm())


@MANY
@given(ORDERS, SEEDS)
def test_both_forms_are_inverse_to_each_other(order: int, seed: int) -> None:
    """BFGS of B and of H; DFP of B, which is BFGS of H with s and y exchanged, and φ = 0."""
    H, s, y = curved(order, seed)
    B = torch.linalg.inv(H)
    assert_near(qn.broyden_inverse(H, s, y, 1.0), qn.bfgs_inverse(H, s, y), 1e-11)
    for new, inverse in (
        (qn.bfgs(B, s, y), qn.bfgs_inverse(H, s, y)),
        (qn.bfgs_inverse(B, y, s), qn.broyden_inverse(H, s, y, 0.0)),
    ):
        error = new @ inverse - torch.eye(order, dtype=DOUBLE)
        assert float(error.norm()) <= 1e-11 * float(new.norm() * inverse.norm())


@MANY
@given(st.integers(2, 8), SEEDS)
def test_bfgs_stays_positive_definite_if_and_only_if_sy_is_positive(order: int, seed: int) -> None:
    """yᵀH⁺y = sᵀy, so that it cannot be definite otherwise."""
    H, s, y = drawn(order, seed)
    cosine = float(s @ y / (s.norm() * y.norm()))
    assume(abs(cosine) > 1e-3)
    for sign in (1.0, -1.0):
        for new in (qn.bfgs_inverse(H, s, sign * y), qn.bfgs(H, s, sign * y)):
            least = float(torch.linalg.eigvalsh(new)[0])
            assert (least > 0) == (sign * cosine > 0)


@MANY
@given(st.integers(2, 8), SEEDS, st.floats(0, 1))
def test_the_broyden_family_between_dfp_and_bfgs_is_positive_definite(
    order: int, seed: int, phi: float
) -> None:
    H, s, y = curved(order, seed)
    assert float(torch.linalg.eigvalsh(qn.broyden_inverse(H, s, y, phi))[0]) > 0


# Theorem 1 and Hessian action.


@MANY
@given(ORDERS, SEEDS, st.floats(-2, 3), st.floats(0.01, 100))
def test_theorem_1(order: int, seed: int, phi: float, c: float) -> None:
    """With H = A⁻¹, s = H a and y = (A + c a aᵀ) s every member of the family is Sherman and
    Morrison's inverse.
    """
    A, a = spd(order, seed), normal(order, seed=seed + 1)
    H = torch.linalg.inv(A)
    grown = A + c * torch.outer(a, a)
    pair = qn.hessian_action(H, a, grown)
    assert_near(pair.s, H @ a)
    assert_near(pair.y, grown @ (H @ a), 1e-11)
    expected = torch.linalg.inv(grown)
    assert_near(qn.sherman_morrison(H, a, c), expected, 1e-10)
    assert_near(qn.broyden_inverse(H, pair.s, pair.y, phi), expected, 1e-10)
    assert_near(qn.bfgs_inverse(H, pair.s, pair.y, pair.Hy), expected, 1e-10)
    assert_near(qn.updated_inverse(H, qn.accept(pair))[0], expected, 1e-10)


def test_theorem_1_with_a_decaying_average_needs_h_scaled() -> None:
    """A⁺ = β A + (1 − β) a aᵀ: only H / β in place of H gives the inverse (thesis 2.4)."""
    A, a, beta = spd(4), normal(4, seed=1), 0.9
    H, grown = torch.linalg.inv(A), beta * A + (1 - beta) * torch.outer(a, a)
    scaled = qn.hessian_action(H / beta, a, grown)
    assert_near(qn.bfgs_inverse(H / beta, scaled.s, scaled.y), torch.linalg.inv(grown), 1e-11)
    plain = qn.hessian_action(H, a, grown)
    assert float((qn.bfgs_inverse(H, plain.s, plain.y) - torch.linalg.inv(grown)).norm()) > 1e-2


def test_hessian_action_adds_the_damping() -> None:
    A, H, a = spd(3), spd(3, 1), normal(3, seed=2)
    pair = qn.hessian_action(H, a, A, 0.7)
    assert_near(pair.y, (A + 0.7 * torch.eye(3, dtype=DOUBLE)) @ H @ a)
    assert pair.damping.after.sy > 0
    again = qn.action_pair(H, H @ a, A @ H @ a, 0.7)
    assert torch.equal(again.s, pair.s)
    assert_near(again.y, pair.y)


# Damping.


@MANY
@given(ORDERS, SEEDS, SCALES, MU1)
def test_powell_on_h(order: int, seed: int, scale: float, mu: float) -> None:
    """s̃ᵀy ≥ μ yᵀHy, with equality where s was changed; y stays."""
    H, s, y = drawn(order, seed, scale)
    pair = qn.powell(s, y, H, mu)
    assert pair.y is y
    q = float(y @ H @ y)
    assert float(pair.s @ y) >= mu * q * (1 - 1e-10)
    if pair.damping.theta1 < 1:
        assert float(s @ y) < mu * q
        assert float(pair.damping.theta1) == pytest.approx(
            (1 - mu) * q / (q - float(s @ y)), rel=1e-12
        )
        assert_near(pair.s, pair.damping.theta1 * s + (1 - pair.damping.theta1) * (H @ y), 1e-12)
        assert float(pair.s @ y) == pytest.approx(mu * q, rel=1e-9)
    else:
        assert torch.equal(pair.s, s)


@MANY
@given(ORDERS, SEEDS, SCALES, MU1)
def test_powell_on_b(order: int, seed: int, scale: float, mu: float) -> None:
    """sᵀỹ ≥ μ sᵀBs; the mirror image of Powell's damping on H."""
    B, s, y = drawn(order, seed, scale)
    H = torch.linalg.inv(B)
    pair = qn.powell_on_b(s, y, B, H, mu)
    assert pair.s is s
    q = float(s @ B @ s)
    assert float(s @ pair.y) >= mu * q * (1 - 1e-9)
    mirror = qn.powell(y, s, B, mu)
    assert float(pair.damping.theta2) == pytest.approx(float(mirror.damping.theta1), rel=1e-9)
    assert_near(pair.y, mirror.s, 1e-9)


@MANY
@given(ORDERS, SEEDS, SCALES, MU2)
def test_identity_damping_is_powell_on_b_with_the_identity(
    order: int, seed: int, scale: float, mu: float
) -> None:
    H, s, y = drawn(order, seed, scale)
    pair = qn.identity_damping(s, y, H, mu)
    same = qn.powell_on_b(s, y, torch.eye(order, dtype=DOUBLE), H, mu)
    assert_near(pair.y, same.y)
    assert float(s @ pair.y) >= mu * float(s @ s) * (1 - 1e-10)


@MANY
@given(ORDERS, SEEDS, SCALES, st.floats(0.01, 100))
def test_levenberg_marquardt(order: int, seed: int, scale: float, mu: float) -> None:
    """As if the matrix had been G + μ₂ I."""
    H, s, y = drawn(order, seed, scale)
    pair = qn.levenberg_marquardt(s, y, H, mu)
    assert torch.equal(pair.s, s)
    assert_near(pair.y, y + mu * s)


@MANY
@given(ORDERS, SEEDS, SCALES, MU1, MU2)
def test_algorithm_3(order: int, seed: int, scale: float, mu1: float, mu2: float) -> None:
    """DD, line by line. Line 3: s̃ᵀy ≥ μ₁ yᵀHy. Line 5: s̃ᵀỹ ≥ μ₂ s̃ᵀs̃."""
    H, s, y = drawn(order, seed, scale)
    sy, q = float(s @ y), float(y @ H @ y)
    theta1 = (1 - mu1) * q / (q - sy) if sy < mu1 * q else 1.0
    s1 = theta1 * s + (1 - theta1) * (H @ y)
    s1y, s1s1 = float(s1 @ y), float(s1 @ s1)
    theta2 = (1 - mu2) * s1s1 / (s1s1 - s1y) if s1y < mu2 * s1s1 else 1.0
    y1 = theta2 * y + (1 - theta2) * s1
    pair = qn.double_damping(s, y, H, mu1, mu2)
    assert_near(pair.s, s1, 1e-10)
    assert_near(pair.y, y1, 1e-9)
    assert (pair.damping.theta1, pair.damping.theta2) == pytest.approx((theta1, theta2), rel=1e-9)
    assert float(pair.s @ y) >= mu1 * q * (1 - 1e-10)
    assert pair.damping.after.step <= (1 + 1e-9) / mu2
    assert 0 <= pair.damping.theta2 <= 1


def test_algorithm_3_leaves_the_first_inequality_violated_in_some_pairs() -> None:
    """Hence the ratio after both steps is logged, and the fraction that holds is a measurement
    (thesis Figure 2.1).
    """
    kept = []
    for seed in range(300):
        H, s, y = drawn(4, 3 * seed, 0.3)
        kept.append(qn.double_damping(s, y, H, 0.2, 0.5).damping.after.curvature <= 1 / 0.2)
    assert 0 < sum(kept) < len(kept)


@MANY
@given(ORDERS, SEEDS, SCALES, MU1, st.floats(0.01, 100))
def test_algorithm_8(order: int, seed: int, scale: float, mu1: float, mu2: float) -> None:
    """D_P D_LM: s̃ᵀy ≥ μ₁ yᵀHy ≥ 0, and so s̃ᵀỹ ≥ μ₂ s̃ᵀs̃ (thesis 3.3.2), for any μ₂ above 0."""
    H, s, y = drawn(order, seed, scale)
    pair = qn.powell_levenberg(s, y, H, mu1, mu2)
    first = qn.powell(s, y, H, mu1)
    assert_near(pair.s, first.s)
    assert_near(pair.y, y + mu2 * first.s)
    assert pair.damping.theta1 == first.damping.theta1
    assert float(pair.s @ y) >= mu1 * float(y @ H @ y) * (1 - 1e-10)
    assert pair.damping.after.step <= (1 + 1e-10) / mu2


@MANY
@given(ORDERS, SEEDS, SCALES, MU1, st.floats(0.01, 100), st.sampled_from([None, 1.0]))
def test_algorithm_11_and_lemma_4(
    order: int, seed: int, scale: float, mu1: float, mu2: float, initial: float | None
) -> None:
    """D_P(I) D_LM, of the thesis (H₀ = I/μ₂) and of 2021 (H₀ = I): sᵀs/sᵀy ≤ 1/μ₂ and yᵀy/sᵀy ≤
    1/μ₃.
    """
    H, s, y = drawn(order, seed, scale)
    pair = qn.scaled_identity_levenberg(s, y, H, mu1, mu2, initial)
    h = 1 / mu2 if initial is None else initial
    same = qn.powell_levenberg(s, y, h * torch.eye(order, dtype=DOUBLE), mu1, mu2)
    assert_near(pair.s, same.s, 1e-11)
    assert_near(pair.y, same.y, 1e-11)
    assert float(pair.damping.theta1) == pytest.approx(float(same.damping.theta1), rel=1e-11)
    assert pair.damping.after.step <= (1 + 1e-10) / mu2
    third = mu1 / (mu2 * (1 + 2 * mu1)) if initial is None else mu1 / (1 + 2 * mu1 * mu2)
    assert mu3(mu1, mu2, initial) == pytest.approx(third, rel=1e-12)
    assert pair.damping.after.change <= (1 + 1e-9) / third


def test_lemma_4_is_near_its_bound_somewhere() -> None:
    """s against y, so that s̃ = (μ₁/μ₂) y: yᵀy/sᵀy = (1 + μ₁)² μ₂ / (μ₁ (1 + μ₁)), of (1 + 2 μ₁) μ₂
    / μ₁ allowed.
    """
    y = torch.tensor([1.0, 0.0], dtype=DOUBLE)
    pair = qn.scaled_identity_levenberg(-y, y, torch.eye(2, dtype=DOUBLE), 0.2, 0.5)
    assert_near(pair.s, 0.4 * y, 1e-12)
    assert float(pair.damping.after.change) == pytest.approx(1.2 * 0.5 / 0.2, rel=1e-12)


@pytest.mark.parametrize("name", qn.DAMPINGS)
@MANY
@given(order=st.integers(2, 8), seed=SEEDS, mu1=MU1, mu2=MU2)
def test_every_damping_by_its_name(
    name: str, order: int, seed: int, mu1: float, mu2: float
) -> None:
    """The record is of the pairs; a pair that needs no damping stays; what was damped keeps H⁺
    positive definite.
    """
    H, s, y = drawn(order, seed)
    pair = qn.damp(name, s, y, H, mu1=mu1, mu2=mu2)
    for products, (u, v) in ((pair.damping.before, (s, y)), (pair.damping.after, (pair.s, pair.y))):
        expected = [float(u @ v), float(v @ H @ v), float(u @ u), float(v @ v)]
        assert [products.sy, products.yHy, products.ss, products.yy] == pytest.approx(
            expected, rel=1e-9, abs=1e-12
        )
        assert products.curvature == pytest.approx(expected[1] / expected[0], rel=1e-6)
        assert products.step == pytest.approx(expected[2] / expected[0], rel=1e-6)
        assert products.change == pytest.approx(expected[3] / expected[0], rel=1e-6)
    assert_near(pair.Hy, H @ pair.y, 1e-11)
    assert 0 <= pair.damping.theta1 <= 1
    assert 0 <= pair.damping.theta2 <= 1
    if name not in ("none", "lm"):
        new, accepted = qn.updated_inverse(H, qn.accept(pair))
        assert accepted.skipped == ""
        assert float(torch.linalg.eigvalsh(new)[0]) > 0
        assert float((new @ pair.y - pair.s).norm()) <= 1e-9 * float(new.norm() * pair.y.norm())


@pytest.mark.parametrize("name", ["none", "p", "i", "dd"])
def test_a_good_pair_is_left_as_it_is(name: str) -> None:
    H, s = torch.eye(3, dtype=DOUBLE), normal(3)
    pair = qn.damp(name, s, 1.0 * s, H, mu2=0.5)
    assert torch.equal(pair.s, s)
    assert torch.equal(pair.y, s)
    assert (pair.damping.theta1, pair.damping.theta2) == (1, 1)
    assert pair.damping.before == pair.damping.after


def test_operators_serve_as_h() -> None:
    factors = (spd(2), spd(3, 1))
    s, y = normal(6), normal(6, seed=1)
    dense = torch.kron(*factors)
    found, expected = (
        qn.double_damping(s, y, Kronecker(factors), 0.2, 0.3),
        qn.double_damping(s, y, dense, 0.2, 0.3),
    )
    assert_near(found.s, expected.s)
    assert_near(found.y, expected.y)
    other = qn.powell_on_b(s, y, Dense(dense), Inverse(torch.linalg.cholesky(dense)), 0.4)
    assert_near(other.y, qn.powell_on_b(s, y, dense, torch.linalg.inv(dense), 0.4).y)


def test_pairs_of_zeros_are_not_damped_and_refused() -> None:
    zero = torch.zeros(3, dtype=DOUBLE)
    for name in qn.DAMPINGS:
        pair = qn.accept(qn.damp(name, zero, zero, spd(3), mu2=0.5))
        assert pair.skipped == "curvature"
        assert math.isnan(pair.damping.after.curvature)


def test_an_h_that_lost_its_definiteness_is_not_damped_with() -> None:
    pair = qn.powell(normal(2), normal(2, seed=1), -torch.eye(2, dtype=DOUBLE), 0.2)
    assert pair.damping.theta1 == 1
    minus, zero = torch.tensor(-1.0), torch.tensor(0.0)
    assert qn.powell_factor(minus, zero, 0.2) == 1


@pytest.mark.parametrize("mu", [0.0, -1.0, 1.5, math.nan])
def test_powell_says_what_mu_it_takes(mu: float) -> None:
    with pytest.raises(
        CurvlabError, match=r"μ in \(0, 1\], not .*: a μ₂ above 1 needs Levenberg-Marquardt damping"
    ):
        qn.double_damping(normal(2), normal(2, seed=1), spd(2), 0.2, mu)
    with pytest.raises(CurvlabError, match=r"μ in \(0, 1\]"):
        qn.powell_levenberg(normal(2), normal(2, seed=1), spd(2), mu, 1.0)


@pytest.mark.parametrize("mu", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", ["lm", "p-lm", "pi-lm"])
def test_levenberg_marquardt_says_what_mu_it_takes(name: str, mu: float) -> None:
    with pytest.raises(CurvlabError, match="μ₂ above 0"):
        qn.damp(name, normal(2), normal(2, seed=1), spd(2), mu2=mu)


def test_unknown_damping() -> None:
    with pytest.raises(CurvlabError, match=r"unknown damping of pairs 'ddd'; did you mean 'dd'\?"):
        qn.damp("ddd", normal(2), normal(2), spd(2), mu2=1.0)


# Acceptance.


def pair_of(s: list[float], y: list[float]) -> qn.Pair:
    return qn.undamped(
        torch.tensor(s, dtype=DOUBLE),
        torch.tensor(y, dtype=DOUBLE),
        torch.eye(len(s), dtype=DOUBLE),
    )


SKIPPED: dict[str, tuple[Callable[[], qn.Pair], qn.Skip]] = {
    "good": (lambda: qn.accept(pair_of([1, 0], [2, 0])), ""),
    "nan": (lambda: qn.accept(pair_of([1, math.nan], [1, 0])), "not finite"),
    "inf": (lambda: qn.accept(pair_of([1, 0], [math.inf, 0])), "not finite"),
    "against": (lambda: qn.accept(pair_of([1, 0], [-1, 0])), "curvature"),
    "across": (lambda: qn.accept(pair_of([1, 0], [0, 1])), "curvature"),
    "short": (
        lambda: qn.accept(pair_of([1, 0], [1e-4, 5]), v=torch.tensor([0.6, 0.8])),
        "length",
    ),  # equality is refused
    "long": (lambda: qn.accept(pair_of([1, 0], [1.01e-4, 5]), v=torch.tensor([0.6, 0.8])), ""),
    "dd": (
        lambda: qn.accept(pair_of([1, 0], [1, 2.01]), mu1=0.2),
        "double damping",
    ),  # yᵀHy = 5.04, sᵀy = 1
    "dd-equal": (lambda: qn.accept(pair_of([1, 0], [1, 2]), mu1=0.2), ""),
    "dd-of-the-text": (lambda: qn.accept(pair_of([1, 0], [1, 2.01]), mu1=0.2 / 2), ""),
    "cosine": (lambda: qn.accept(pair_of([1, 0], [1e-9, 1]), cosine=1e-8), "cosine"),
    "cosine-enough": (lambda: qn.accept(pair_of([1, 0], [1e-7, 1]), cosine=1e-8), ""),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_acceptance(name: str) -> None:
    make, reason = SKIPPED[name]
    pair = make()
    assert pair.skipped == reason
    assert reason in qn.SKIPS
    H = torch.eye(2, dtype=DOUBLE)
    new, same = qn.updated_inverse(H, pair)
    assert same.skipped == reason
    assert torch.equal(new, H) == bool(reason)


def test_an_update_that_overflows_is_skipped() -> None:
    """In float32 ρ s sᵀ of 1e-30 over 1e-70 is Inf."""
    s = torch.tensor([1e-5, 1e20])
    y = torch.tensor([1e-5, 0.0])
    H = torch.eye(2)
    pair = qn.undamped(s, y, H)
    forced = qn.Pair(s, y, pair.Hy, pair.damping)
    new, told = qn.updated_inverse(H, forced)
    assert torch.equal(new, H)
    assert told.skipped == "not finite"


def test_an_update_without_curvature_is_skipped_though_nobody_judged_the_pair() -> None:
    H = torch.eye(2, dtype=DOUBLE)
    new, told = qn.updated_inverse(H, pair_of([1, 0], [0, 1]))
    assert torch.equal(new, H)
    assert told.skipped == "not finite"


@MANY
@given(st.integers(2, 6), SEEDS, MU1, MU2)
def test_dd_skip_keeps_both_inequalities(order: int, seed: int, mu1: float, mu2: float) -> None:
    """What thesis Alg. 5 uses satisfies (2.8) and (2.10)."""
    H, s, y = drawn(order, seed)
    pair = qn.accept(qn.double_damping(s, y, H, mu1, mu2), mu1=mu1)
    if not pair.skipped:
        assert float(pair.y @ H @ pair.y) <= float(pair.s @ pair.y) / mu1 * (1 + 1e-9)
        assert float(pair.s @ pair.s) <= float(pair.s @ pair.y) / mu2 * (1 + 1e-9)


def test_float32_stays_float32() -> None:
    H, s, y = spd(4).float(), normal(4).float(), normal(4, seed=1).float()
    for name in qn.DAMPINGS:
        pair = qn.damp(name, s, y, H, mu2=0.5)
        assert pair.s.dtype == pair.y.dtype == pair.Hy.dtype == torch.float32
    assert qn.bfgs_inverse(H, s, s).dtype == torch.float32
