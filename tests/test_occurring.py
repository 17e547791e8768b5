"""Blocks of an embedding on the symbols that occur, and what is said of large vocabularies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvlab as cl
from curvlab.exact import Kind

N, T, W, S = 3, 4, 3, 11


class Words(nn.Module):
    """A table and a place table, mixed over places, with a head of its own or the table's."""

    def __init__(self, symbols: int = S, out: int = 2, tied: bool = False, **options: Any) -> None:
        super().__init__()
        self.word = nn.Embedding(symbols, W, **options)
        self.mix = nn.Linear(W, W)
        self.head = None if tied else nn.Linear(W, out)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.word(ids)))
        h = torch.tanh(h.cumsum(1))
        return nn.functional.linear(h, self.word.weight) if self.head is None else self.head(h)


def made(symbols: int = S, **options: Any) -> tuple[cl.Objective, Tensor, Tensor]:
    torch.manual_seed(0)
    objective = cl.Objective(
        Words(symbols, **options).double(), cl.likelihoods.Categorical(axis=-1)
    )
    ids = torch.tensor([[1, 4, 4, 9], [4, 1, 7, 1], [9, 9, 4, 0]])
    return objective, ids, torch.randint(2, (N, T))


@pytest.mark.parametrize("kind", [*cl.exact.KINDS, "ef-token"])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 9}])
def test_the_block_is_that_of_the_whole_table(kind: Kind, options: Any) -> None:
    objective, x, y = made(**options)
    found = cl.exact.occurring(objective, x, y, kind, "1")
    objective.closures["exact"] = 0  # labels are drawn once more
    whole = cl.exact.matrix(objective, x, y, kind, "1").dense()
    assert found.symbols.tolist() == [s for s in (0, 1, 4, 7, 9) if s != options.get("padding_idx")]
    some = whole[found.entries[:, None], found.entries]
    torch.testing.assert_close(found.matrix.dense(), some, rtol=0, atol=1e-12)
    assert float(whole.norm()) == pytest.approx(float(some.norm()), rel=1e-13)  # the rest is zero
    # by the table's own [V, W]
    objective.closures["exact"] = 0
    own = cl.exact.matrix(objective, x, y, kind, "word.weight").dense().view(S, W, S, W)
    mine = found.matrix.dense().view(W, len(found.symbols), W, len(found.symbols))
    part = own[found.symbols][:, :, found.symbols].permute(1, 0, 3, 2)
    torch.testing.assert_close(mine, part, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["ggn", "ef", "hessian"])
def test_over_a_loader_it_is_of_the_symbols_of_all_minibatches(kind: Kind) -> None:
    objective, x, y = made()
    whole = cl.exact.occurring(objective, x, y, kind, "1")
    found = cl.exact.occurring(objective, [(x[:1], y[:1]), (x[1:], y[1:])], None, kind, "1")
    assert torch.equal(found.symbols, whole.symbols)
    torch.testing.assert_close(found.matrix.dense(), whole.matrix.dense(), rtol=0, atol=1e-13)


def test_a_table_that_is_read_twice() -> None:
    class Twice(Words):
        def forward(self, ids: Tensor) -> Tensor:
            h = self.word(ids) + torch.tanh(self.mix(self.word((ids + 1) % S)))
            return self.head(h)  # type: ignore[misc]  # it has one

    torch.manual_seed(0)
    objective = cl.Objective(Twice().double(), cl.likelihoods.Categorical(axis=-1))
    _, x, y = made()
    for kind in ("ggn", "ef"):
        found = cl.exact.occurring(objective, x, y, kind, "1")
        whole = cl.exact.matrix(objective, x, y, kind, "1").dense()
        some = whole[found.entries[:, None], found.entries]
        assert found.symbols.tolist() == [0, 1, 2, 4, 5, 7, 8, 9, 10]
        torch.testing.assert_close(found.matrix.dense(), some, rtol=0, atol=1e-12)


def test_relabelling_into_a_vocabulary_of_a_million_changes_nothing() -> None:
    objective, x, y = made()
    small = cl.exact.occurring(objective, x, y, "fisher", "1")
    order = torch.randperm(1_000_000)[:S].sort().values
    large, _, _ = made(1_000_000)
    with torch.no_grad():
        for name, p in objective.parameters.items():
            mine = large.parameters[name]
            if name.startswith("word"):
                mine[order] = p
            else:
                mine.copy_(p)
    found = cl.exact.occurring(large, order[x], y, "fisher", "1")
    assert torch.equal(found.symbols, order[small.symbols])
    torch.testing.assert_close(found.matrix.dense(), small.matrix.dense(), rtol=0, atol=1e-12)


def memory(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    """Let the machine have memory for so many numbers in double precision."""
    monkeypatch.setattr("curvlab.errors._memory", lambda: int(numbers * 8 / 0.8))


def test_memory_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, x, y = made()
    memory(monkeypatch, 100)  # of (5 · 3)² = 225
    with pytest.raises(cl.CurvlabError, match=r"5 symbols that occur.*exact\.product") as caught:
        cl.exact.occurring(objective, x, y, "ggn", "1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("block", "options", "words"),
    [
        ("2", {}, r"block 2 \(mix\.weight, mix\.bias\) is no table of symbols.*exact\.matrix"),
        ("1", {"tied": True}, r"is a head too.*every symbol.*exact\.product"),
        ("word", {}, "unknown block 'word'"),
    ],
)
def test_what_has_no_symbols_is_one_line(block: str, options: Any, words: str) -> None:
    objective, x, y = made(**options)
    with pytest.raises(cl.CurvlabError, match=words) as caught:
        cl.exact.occurring(objective, x, y, "ggn", block)
    assert "\n" not in str(caught.value)


V = 300  # of a large vocabulary, where the machine has little memory


def large(tied: bool = False) -> tuple[cl.Objective, Tensor, Tensor]:
    objective, x, _ = made(V, out=V, tied=tied)
    return objective, x, torch.randint(V, (N, T))


def line(of: pytest.ExceptionInfo[cl.CurvlabError]) -> str:
    assert "\n" not in str(of.value)
    return str(of.value)


def test_the_block_of_an_embedding_names_the_symbols_that_occur(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective, x, y = large()
    memory(monkeypatch, 500_000)  # of (3 · 300)² = 810 000
    with pytest.raises(
        cl.CurvlabError, match=r"dense ef of block 1.*curvlab\.exact\.occurring"
    ) as of:
        cl.exact.matrix(objective, x, y, "ef", "1")
    assert "curvlab.exact.product" in line(of)
    found = cl.exact.occurring(objective, x, y, "ef", "1")
    product: Any = cl.exact.product(objective, x, y, "ef", "1")
    v = torch.randn(len(found.entries)).double()
    full = torch.zeros(3 * V).double()
    full[found.entries] = v
    torch.testing.assert_close((product @ full)[found.entries], found.matrix @ v)


@pytest.mark.parametrize("kind", ["ef", "fisher-mc"])
def test_the_block_of_a_head_names_its_product(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, x, y = large()
    memory(monkeypatch, 1_000_000)  # of (300 · 4)²
    with pytest.raises(cl.CurvlabError, match=r"block 3.*curvlab\.exact\.product") as of:
        cl.exact.matrix(objective, x, y, kind, "3")
    assert "occurring" not in line(of)
    product: Any = cl.exact.product(objective, x, y, kind, "3")
    v = torch.randn(len(product)).double()
    assert float(v @ (product @ v)) > 0


@pytest.mark.parametrize("name", ["kfac", "kfac-ef", "kfac-reduce", "tnt", "shampoo", "k-bfgs"])
def test_a_factor_of_the_vocabularys_order_names_who_needs_none(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, x, y = large()
    memory(monkeypatch, 200_000)  # of 3 · 300²
    optimizer = cl.optimizer(name, objective, lr=0.01)
    with pytest.raises(cl.CurvlabError, match=r"\[300, 300\].*smw-ng-bd.*adam") as of:
        optimizer.step(objective.closure(x, y))
    line(of)


@pytest.mark.parametrize("name", ["smw-ng-bd", "smw-ng", "adam", "sgd-m"])
def test_those_that_need_none_take_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, x, y = large()
    memory(monkeypatch, 200_000)
    optimizer = cl.optimizer(name, objective, lr=0.01)
    losses = [float(optimizer.step(objective.closure(x, y))) for _ in range(3)]
    assert losses[-1] < losses[0]


def test_an_embedding_alone_is_no_trouble_for_kfac(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its A is a diagonal, unless places are averaged first."""
    objective, x, y = made(100_000)
    memory(monkeypatch, 20_000_000)
    optimizer = cl.optimizer("kfac", objective, lr=0.01)
    assert torch.isfinite(optimizer.step(objective.closure(x, y)))
    reduced = cl.optimizer("kfac-reduce", objective, lr=0.01)
    with pytest.raises(cl.CurvlabError, match=r"sharing='expand'") as of:
        reduced.step(objective.closure(x, y))
    line(of)


def test_a_tied_table_has_a_dense_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, x, y = large(tied=True)
    memory(monkeypatch, 200_000)
    optimizer = cl.optimizer("kfac", objective, lr=0.01)
    with pytest.raises(cl.CurvlabError, match=r"factor A .*block 1.*\[300, 300\].*smw-ng-bd") as of:
        optimizer.step(objective.closure(x, y))
    line(of)


def test_dense_blocks_name_the_woodbury_system(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, x, y = large()
    memory(monkeypatch, 200_000)
    optimizer = cl.optimizer("block-fisher", objective, lr=0.01)
    with pytest.raises(cl.CurvlabError, match="smw-ng-bd") as of:
        optimizer.step(objective.closure(x, y))
    line(of)
