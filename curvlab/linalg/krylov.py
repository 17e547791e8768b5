"""Krylov methods, which take products only: conjugate gradients, Lanczos, spectral densities.

Legend: D order of the matrix A; m Lanczos steps, V [D, m] their basis, T = Vᵀ A V [m, m]
tridiagonal, θ its eigenvalues (Ritz values); n draws of a starting vector; P points of a grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import CurvlabError, Diverged, guard_memory
from curvlab.finite import all_finite
from curvlab.linalg.operators import Operator
from curvlab.linalg.products import finite_product
from curvlab.linalg.spectral import symmetric_eigh
from curvlab.linalg.traces import StochasticEstimate, average, gaussian


class Indefinite(Diverged):
    """Raised for a direction p of no positive curvature; `curvature` is pᵀ A p / pᵀ p."""

    def __init__(self, message: str, curvature: float = math.nan) -> None:
        super().__init__(message)
        self.curvature = curvature


@dataclass(frozen=True)
class CgResult:
    """Solution x of A x = b by conjugate gradients.

    `residual` is ‖b − A x‖ / ‖b‖, computed from x and not by the recursion; `converged`: at or
    below the tolerance.
    """

    x: Float[Tensor, " D"]
    residual: float
    iterations: int
    converged: bool


def conjugate_gradients(
    operator: Operator,
    b: Float[Tensor, " D"],
    *,
    tolerance: float = 1e-10,
    maximum: int | None = None,
    precondition: Operator | None = None,
) -> CgResult:
    """Solve A x = b for a positive definite A by preconditioned conjugate gradients, from x = 0.

    Saad 2003, Alg. 9.1. The residual of the recursion drifts from the true one. Where it reaches
    the tolerance the true one is computed; if that does not, the iteration starts again from there,
    for as long as this halves it.

    >>> from curvlab.linalg.operators import Diagonal
    >>> A, b = Diagonal(torch.tensor([1.0, 4.0])), torch.tensor([1.0, 1.0])
    >>> found = conjugate_gradients(A, b, tolerance=1e-6)
    >>> found.iterations, found.converged
    (2, True)

    Args:
        operator: A.
        b: the right-hand side.
        tolerance: on ‖b − A x‖ / ‖b‖.
        maximum: of iterations; by default 10 D.
        precondition: stands for A⁻¹, positive definite.

    Raises:
        CurvlabError: b of another length than A; no tolerance above 0, or no iteration.
        Indefinite: pᵀ A p ≤ 0.
        Diverged: rᵀ M r ≤ 0: the preconditioner is not positive definite; NaN or Inf in b or in a
            product.
    """
    _check_vector(operator, b, "the right-hand side")
    maximum = 10 * len(b) if maximum is None else maximum
    if not tolerance > 0 or maximum < 1:
        raise CurvlabError(
            "conjugate gradients need a tolerance above 0 and a maximum of at least 1, not"
            f" {tolerance:g}, {maximum}"
        )
    length = torch.linalg.vector_norm(b)
    x, iterations = torch.zeros_like(b), 0
    if not bool(length > 0):
        return CgResult(x, 0.0, 0, True)
    b = b / length  # norms of r are relative residuals then, and squares of a tiny b do not vanish
    r, residual, before = b, 1.0, math.inf
    while residual > tolerance and residual <= before / 2 and iterations < maximum:
        # A run starts without a direction: ρ/∞ = 0 makes p = z. The p of the run before came of a
        # residual that had drifted, and would carry that on.
        p, rho = torch.zeros_like(b), math.inf
        while float(torch.linalg.vector_norm(r)) > tolerance and iterations < maximum:
            z = r if precondition is None else finite_product(precondition, r)
            rho, old = float(r @ z), rho
            if not rho > 0:
                raise Diverged(
                    f"rᵀMr = {rho:.3g} at iteration {iterations + 1}: the preconditioner is not"
                    " positive definite"
                )
            p = torch.add(z, p, alpha=rho / old)
            product = finite_product(operator, p)
            curvature = float(p @ product)
            if not curvature > 0:
                curvature /= float(p @ p)
                raise Indefinite(
                    f"conjugate gradients met pᵀAp = {curvature:.3g} pᵀp at iteration"
                    f" {iterations + 1}: the matrix is not positive definite; raise the damping, or"
                    " take the Gauss-Newton matrix",
                    curvature,
                )
            alpha = rho / curvature
            x, r, iterations = (
                torch.add(x, p, alpha=alpha),
                torch.sub(r, product, alpha=alpha),
                iterations + 1,
            )
        r = b - finite_product(operator, x)
        residual, before = float(torch.linalg.vector_norm(r)), residual
    return CgResult(x * length, residual, iterations, residual <= tolerance)


def solve_columns(
    operator: Operator, b: Float[Tensor, "D K"], *, tolerance: float, maximum: int
) -> Float[Tensor, "D K"]:
    """Return A⁻¹ b, every column by `conjugate_gradients`. Raises as that does."""
    each = [conjugate_gradients(operator, c, tolerance=tolerance, maximum=maximum) for c in b.mT]
    return torch.stack([one.x for one in each], 1)


@dataclass(frozen=True)
class Truncated:
    """Some iterates of conjugate gradients, the last one last, and φ(x) = ½ xᵀ A x − bᵀ x at each.

    `stopped`: by the rule or by a residual that is zero to rounding, not by the maximum.
    """

    iterates: tuple[Float[Tensor, " D"], ...]
    values: tuple[float, ...]
    iterations: int
    stopped: bool

    @property
    def x(self) -> Float[Tensor, " D"]:
        """The last iterate, [D]."""
        return self.iterates[-1]


def truncated_cg(
    operator: Operator,
    b: Float[Tensor, " D"],
    start: Float[Tensor, " D"] | None = None,
    *,
    progress: float = 5e-4,
    maximum: int = 250,
    growth: float = 1.3,
) -> Truncated:
    """Solve A x ≈ b by conjugate gradients that stop where φ hardly falls any more.

    Martens 2010, section 4.4: after iteration i > k, where φ(xᵢ) < 0 and (φ(xᵢ) − φ(xᵢ₋ₖ)) / φ(xᵢ)
    < k · progress, k = max(10, ⌈i / 10⌉). Kept are the iterates ⌈growthʲ⌉ (section 4.6), each once,
    and the last.

    Args:
        operator: A.
        b: the right-hand side.
        start: x₀; zero where None.
        progress: 0 stops at the maximum, or where the residual is zero to rounding.
        maximum: of iterations.
        growth: of the numbers of the iterates that are kept.

    Raises:
        CurvlabError: b of another length than A; arguments outside their ranges.
        Diverged: pᵀ A p ≤ 0: A is not positive definite; NaN or Inf in b or in a product.
    """
    _check_vector(operator, b, "the right-hand side")
    if not progress >= 0 or maximum < 1 or not growth > 1:
        raise CurvlabError(
            "truncated conjugate gradients need progress of at least 0, a maximum of at least 1"
            f" and growth above 1, not {progress:g}, {maximum}, {growth:g}"
        )
    x = torch.zeros_like(b) if start is None else start
    r = b if start is None else b - finite_product(operator, x)
    p, rho = r, float(r @ r)
    enough = (torch.finfo(b.dtype).eps * float(torch.linalg.vector_norm(b))) ** 2
    values = [_quadratic(x, b, r)]
    kept: list[tuple[Tensor, float]] = []
    i, stopped, next_kept = 0, rho <= enough, growth
    while not stopped and i < maximum:
        product = finite_product(operator, p)
        curvature = float(p @ product)
        if not curvature > 0:
            raise Diverged(
                f"conjugate gradients met pᵀAp = {curvature / float(p @ p):.3g} pᵀp at iteration"
                f" {i + 1}: the matrix is not positive definite; raise the damping"
            )
        alpha = rho / curvature
        x, r, i = torch.add(x, p, alpha=alpha), torch.sub(r, product, alpha=alpha), i + 1
        values.append(_quadratic(x, b, r))
        if i >= math.ceil(next_kept):
            kept.append((x, values[i]))
            while math.ceil(next_kept) <= i:
                next_kept *= growth
        rho, old = float(r @ r), rho
        p = torch.add(r, p, alpha=rho / old)
        k = max(10, math.ceil(i / 10))
        slow = i > k and values[i] < 0 and (values[i] - values[i - k]) / values[i] < k * progress
        stopped = slow or rho <= enough
    if not kept or kept[-1][0] is not x:
        kept.append((x, values[-1]))
    return Truncated(tuple(k for k, _ in kept), tuple(v for _, v in kept), i, stopped)


def _quadratic(x: Float[Tensor, " D"], b: Float[Tensor, " D"], r: Float[Tensor, " D"]) -> float:
    """Return φ(x) = −½ xᵀ (b + r) with r = b − A x."""
    return -(float(x @ b) + float(x @ r)) / 2


@dataclass(frozen=True)
class Lanczos:
    """Lanczos decomposition A V = V T + β_m v_{m+1} e_mᵀ.

    T has the diagonal `alpha`, beside it all of `beta` but the last, which is β_m ≥ 0.
    """

    alpha: Float[Tensor, " m"]
    beta: Float[Tensor, " m"]
    basis: Float[Tensor, "D m"] | None = None

    def __len__(self) -> int:
        return len(self.alpha)

    def matrix(self) -> Float[Tensor, "m m"]:
        """Return the tridiagonal T, [m, m], dense."""
        beside = self.beta[:-1]
        return torch.diag(self.alpha) + torch.diag(beside, 1) + torch.diag(beside, -1)

    def ritz(self) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"], Float[Tensor, "m m"]]:
        """Return the Ritz values, the lengths of their residuals, and the eigenvectors of T.

        θ, ascending; |β_m s_m| of each; s as columns. Within that length of θ there is an
        eigenvalue of A (Parlett 1998, Theorem 4.5.1 and section 13.2).
        """
        theta, s = symmetric_eigh(self.matrix())
        return theta, (self.beta[-1] * s[-1]).abs(), s

    def quadrature(self) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
        """Return the nodes θ and the weights of Gauss's rule for v₁ᵀ f(A) v₁.

        It is exact for polynomials of degree < 2m (Golub, Meurant 1994).
        """
        theta, _, s = self.ritz()
        return theta, s[0].square()


def lanczos(
    operator: Operator, start: Float[Tensor, " D"], steps: int, *, basis: bool = False
) -> Lanczos:
    """Run Lanczos from v₁ = start / ‖start‖ with full reorthogonalisation.

    Every new vector is made orthogonal to all before it, twice (Parlett 1998, section 6.9). Stops
    early where the Krylov space is invariant: at β_j ≤ 100 ε ‖T‖, or after D steps. Where rounding
    hides that, it goes on from what is left, a vector of noise: Ritz values may then come twice,
    weights do not. Holds [D, m].

    Args:
        operator: A.
        start: the starting vector, of any length but 0.
        steps: m at most.
        basis: keep V in the result.

    Raises:
        CurvlabError: a starting vector that is zero or does not fit; no step; a basis larger than
            the memory.
        Diverged: NaN or Inf in the starting vector or in a product.
    """
    _check_vector(operator, start, "the starting vector")
    if steps < 1:
        raise CurvlabError(f"Lanczos needs at least 1 step, not {steps}")
    length = torch.linalg.vector_norm(start)
    if not bool(length > 0):
        raise CurvlabError("Lanczos needs a starting vector that is not zero")
    size, steps = len(start), min(steps, len(start))
    guard_memory(
        steps * size * start.element_size(),
        f"a Lanczos basis of {steps} vectors of {size}",
        "take fewer steps",
    )
    eps = torch.finfo(start.dtype).eps
    rows, alpha, beta = start.new_empty(steps, size), start.new_zeros(steps), start.new_zeros(steps)
    v, done, largest = start / length, 0, 0.0
    for j in range(steps):
        rows[j] = v
        w = finite_product(operator, v)
        alpha[j] = v @ w
        for _ in range(2):
            w = w - rows[: j + 1].mT @ (rows[: j + 1] @ w)
        beta[j] = torch.linalg.vector_norm(w)
        done, largest = j + 1, max(largest, float(alpha[j].abs() + beta[j]))
        if float(beta[j]) <= 100 * eps * largest:
            break
        v = w / beta[j]
    return Lanczos(alpha[:done], beta[:done], rows[:done].mT if basis else None)


@dataclass(frozen=True)
class Extremes:
    """Least and greatest Ritz value, which lie within the spectrum, and the errors of both.

    An eigenvalue lies within `lowest_error` of `lowest`, another within `highest_error` of
    `highest` (Parlett 1998, section 13.2): the extreme ones, unless the starting vector has next to
    nothing of their eigenvectors.
    """

    lowest: float
    highest: float
    lowest_error: float
    highest_error: float
    steps: int


def extremes(operator: Operator, *, steps: int = 50, generator: torch.Generator) -> Extremes:
    """Estimate both ends of the spectrum by Lanczos from a normal random vector.

    At most D steps are taken.
    """
    run = lanczos(operator, gaussian(operator, 1, generator)[:, 0], steps)
    theta, error, _ = run.ritz()
    return Extremes(float(theta[0]), float(theta[-1]), float(error[0]), float(error[-1]), len(run))


@dataclass(frozen=True)
class Density:
    """Spectral density (1/D) Σ_d δ(x − λ_d) as weighted nodes, a row for each starting vector.

    The weights of a row sum to 1.

    A row that ended early repeats its last node with the weight 0. Standard errors are over the
    draws: of sampling only, not of what the quadrature leaves out between two nodes; NaN for one
    draw.
    """

    nodes: Float[Tensor, "n m"]
    weights: Float[Tensor, "n m"]

    def smooth(self, grid: Float[Tensor, " P"], width: float) -> Float[Tensor, " P"]:
        """Return the density on a grid, every node a normal one of standard deviation `width`.

        It integrates to 1 (Ghorbani et al. 2019, section 2).
        """
        if not width > 0:
            raise CurvlabError(f"a smooth density needs a width above 0, not {width:g}")
        distance = (grid[:, None, None] - self.nodes) / width
        kernel = torch.exp(-distance.square() / 2) / (width * math.sqrt(2 * math.pi))
        return (kernel * self.weights).sum(2).mean(1)

    def moment(self, k: int) -> StochasticEstimate:
        """Return an estimate of tr(Aᵏ) / D; unbiased for k < 2m."""
        return self._average((self.weights * self.nodes**k).sum(1))

    def count_below(self, x: float) -> StochasticEstimate:
        """Return an estimate of the fraction of the eigenvalues that are less than x."""
        return self._average((self.weights * (self.nodes < x)).sum(1))

    def _average(self, of_draws: Float[Tensor, " n"]) -> StochasticEstimate:
        return average(of_draws, self.nodes.numel())


def density(operator: Operator, *, draws: int, steps: int, generator: torch.Generator) -> Density:
    """Estimate the spectral density by stochastic Lanczos quadrature from points of the sphere.

    Ubaru, Chen, Saad 2017, Alg. 1; Ghorbani, Krishnan, Xiao 2019. E v vᵀ = I / D for v uniform on
    the sphere, so that the mean of vᵀ f(A) v over draws is an estimate of tr f(A) / D.
    """
    if draws < 1:
        raise CurvlabError(f"a spectral density needs at least 1 draw, not {draws}")
    if steps < 1:
        raise CurvlabError(f"a spectral density needs at least 1 step, not {steps}")
    rules = [
        lanczos(operator, gaussian(operator, 1, generator)[:, 0], steps).quadrature()
        for _ in range(draws)
    ]
    nodes = [torch.cat([node, node[-1:].expand(steps - len(node))]) for node, _ in rules]
    weights = [torch.cat([weight, weight.new_zeros(steps - len(weight))]) for _, weight in rules]
    return Density(torch.stack(nodes), torch.stack(weights))


def _check_vector(operator: Operator, v: Float[Tensor, " D"], what: str) -> None:
    if v.shape != (len(operator),):
        raise CurvlabError(
            f"{what} has the shape {list(v.shape)}: the operator takes [{len(operator)}]"
        )
    if not all_finite(v):
        raise Diverged(f"{what} contains NaN or Inf")
