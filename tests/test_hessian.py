"""The block Hessian against `torch.func`, its shift against all eigenvalues, the average against
the recursion.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import Problem, assert_near, batches, curvature_of, laid_out, problem
from torch import Tensor

import curvlab as cl
from curvlab.curvature.block_diagonal import BlockDiagonal
from curvlab.curvature.hessian import DenseHessian, least_eigenvalue

DAMPING = 0.01
MODELS = ["tanh", "tokens", "conv", "batch-norm", "embedding"]


def hessian(p: Problem, block: cl.layers.Block, x: Tensor, y: Tensor) -> Tensor:
    """∂²(mean loss) on the row-major flattening of the block, by autograd, laid out apart from the
    library.
    """
    fixed = {n: t.detach() for n, t in [*p.model.named_parameters(), *p.model.named_buffers()]}
    held = {n: fixed[n] for n in block.params}

    def loss(free: dict[str, Tensor]) -> Tensor:
        return p.likelihood.loss(torch.func.functional_call(p.model, fixed | free, (x,)), y).mean()

    # forward mode knows nothing of a padding token's row
    found = torch.func.jacrev(torch.func.jacrev(loss))(held)
    sizes = [held[n].numel() for n in block.params]
    whole = torch.cat(
        [torch.cat([found[r][c].reshape(i, j) for c, j in zip(held, sizes, strict=True)], 1)
         for r, i in zip(held, sizes, strict=True)]
    )  # fmt: skip
    entries = iter(torch.arange(sum(sizes)).split(sizes))
    places = laid_out(block, {n: next(entries).view(held[n].shape) for n in block.params}).flatten()
    return whole[places[:, None], places]


def assert_inverts(curvature: BlockDiagonal, block: str, expected: Tensor) -> float:
    """(M + τI + λI)⁻¹ with τ = max(0, −λ_min(M)). Returns τ."""
    found, eye = curvature.blocks[block], torch.eye(len(expected), dtype=expected.dtype)
    assert isinstance(found, DenseHessian)
    shift = max(0.0, -float(torch.linalg.eigvalsh(expected)[0]))
    assert found.shift == pytest.approx(shift, rel=1e-9, abs=1e-14)
    damped = expected + (shift + DAMPING) * eye
    torch.testing.assert_close(found.matrix(DAMPING).dense(), damped, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(curvature.inverse[block].dense() @ damped, eye, rtol=0, atol=1e-9)
    assert float(torch.linalg.eigvalsh(found.matrix(DAMPING).dense())[0]) >= DAMPING * (1 - 1e-9)
    return shift


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("model", MODELS)
def test_is_the_hessian_of_torch_func(model: str, likelihood: str) -> None:
    p = problem(model, likelihood)
    objective = p.objective()
    curvature: Any = cl.approximation("block-hessian", objective, damping=DAMPING)
    curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
    shifts = [assert_inverts(curvature, b.name, hessian(p, b, p.x, p.y)) for b in objective.blocks]
    assert max(shifts) > 1e-3 or model == "batch-norm"  # indefinite somewhere


def test_moving_average_is_the_explicit_recursion() -> None:
    p = problem("tanh")
    objective = p.objective()
    curvature: Any = cl.approximation("block-hessian", objective, damping=DAMPING, decay=0.7)
    expected: dict[str, Tensor] = {}
    for k, (x, y) in enumerate(batches(p, 5), 1):
        curvature.update(objective.closure(x, y).observe(curvature.needs))
        weight = max(1 / k, 0.3)
        for block in objective.blocks:
            new = hessian(p, block, x, y)
            expected[block.name] = (1 - weight) * expected.get(block.name, 0 * new) + weight * new
        with torch.no_grad():
            for w in p.model.parameters():
                w.mul_(1.02)
    for block in objective.blocks:
        assert_inverts(curvature, block.name, expected[block.name])


def test_a_convex_block_is_not_shifted() -> None:
    """The Hessian of logistic regression is its GGN."""
    p = problem("linear", n=60)
    objective = p.objective()
    found = {}
    for name in ("block-hessian", "block-ggn"):
        curvature: Any = cl.approximation(name, objective, damping=DAMPING)
        curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))
        found[name] = curvature.inverse["1"].dense()
        if name == "block-hessian":
            assert curvature.blocks["1"].shift < 1e-15
    assert_near(found["block-hessian"], found["block-ggn"], 1e-10)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rank", [3, 200, 400])
def test_least_eigenvalue_by_lanczos_is_a_lower_bound(rank: int, sign: int) -> None:
    """Full rank; far from it, with many zeros at the lower end; negative."""
    rows = torch.randn(rank, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = sign * rows.mT @ rows / 400
    expected = float(torch.linalg.eigvalsh(matrix)[0])
    size = float(torch.linalg.matrix_norm(matrix, 2))
    assert expected - 1e-6 * size <= least_eigenvalue(matrix, direct=10) <= expected + 1e-12 * size
    assert least_eigenvalue(matrix, direct=400) == expected


def test_labels_are_not_to_be_chosen() -> None:
    with pytest.raises(cl.CurvlabError, match="block-hessian has no labels to choose but 'data'"):
        cl.approximation("block-hessian", problem("tanh").objective(), labels="exact")


def test_a_model_that_mixes_its_examples_has_no_such_matrix() -> None:
    p = problem("batch-norm")
    objective = p.objective()
    p.model.train()
    curvature = cl.approximation("block-hessian", objective)
    with pytest.raises(cl.CurvlabError, match=r"normalises over the batch.*model\.eval"):
        curvature.update(objective.closure(p.x, p.y).observe(curvature.needs))


def test_the_shift_is_logged() -> None:
    p = problem("tanh")
    run = cl.compare(
        p.objective(),
        batches(p, 3),
        reference="block-hessian",
        algorithms=["kfac"],
        damping=0.1,
        lr=0.1,
    )
    q = problem("tanh")
    objective = q.objective()
    optimizer = cl.optimizer("block-hessian", objective, damping=0.1, lr=0.1)
    for step, (x, y) in enumerate(batches(q, 3)):
        optimizer.step(objective.closure(x, y))
        expected = [block.shift for block in curvature_of(optimizer).blocks.values()]
        assert run.dataset["shift"].sel(algorithm="block-hessian")[step].values.tolist() == expected
        assert max(expected) > 0
    assert not bool(run.dataset["shift"].sel(algorithm="kfac").any())
