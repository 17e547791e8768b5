"""Logistic regression's data: LIBSVM files, sparse text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from optional import load_or_skip

import curvlab as cl
from curvlab.datasets import FILES, File, SparseRows, libsvm


def test_a9a_is_a9a() -> None:
    train, test = load_or_skip("a9a")
    assert int(train.y.sum()) == 7841  # those who earn more, of the UCI data
    assert int(test.y.sum()) == 3846
    for part in (train, test):
        assert set(part.x[:].unique().tolist()) == {0.0, 1.0}
        assert part.x[:].sum(1).max() == 14


def test_w8a_is_w8a() -> None:
    train, _ = load_or_skip("w8a")
    assert int(train.y.sum()) == 1479
    assert set(train.x[:].unique().tolist()) == {0.0, 1.0}


def test_news20_is_sparse_with_rows_of_length_one() -> None:
    train, _ = load_or_skip("news20")
    assert isinstance(train.x, SparseRows)
    x, y = next(iter(train.batches(50)))
    assert torch.allclose(x.norm(dim=1), torch.ones(50), atol=1e-6)
    assert (x != 0).float().mean() < 0.01
    assert y.shape == (50, 1)
    assert 0.49 < float(train.y.mean()) < 0.51  # ten groups against ten


def test_loss_on_news20_is_26_of_s2qn() -> None:
    train, _ = load_or_skip("news20")
    model = cl.models.build("logistic", data=train)
    x, y = next(iter(train.batches(20)))
    loss = cl.Objective(model, cl.likelihoods.Bernoulli()).closure(x, y).observe().loss
    signs = 2 * y[:, 0] - 1
    assert isinstance(model, torch.nn.Linear)
    assert loss == pytest.approx(
        float(torch.log1p(torch.exp(-signs * (x @ model.weight[0].detach()))).mean()), rel=1e-5
    )


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    for name in ("a9a", "a9a.t", "w8a", libsvm.WEBSPAM):
        monkeypatch.setitem(FILES, name, File())
    return tmp_path


def test_an_index_beyond_32_bits_is_one_line(small: Path) -> None:
    (small / "some").write_text("1 1:0.5 2147483649:1\n")
    with pytest.raises(cl.CurvlabError, match="some is no LIBSVM file of 6 features"):
        libsvm._read(small / "some", 6, 1)


def test_libsvm_text_is_read(small: Path) -> None:
    (small / "some").write_text("-1 3:1 5:0.5\n+1 1:1 \n-1 \n")
    x, y = libsvm._read(small / "some", 6, 3)
    assert x.toarray().tolist() == [[0, 0, 1, 0, 0.5, 0], [1, 0, 0, 0, 0, 0], [0] * 6]
    assert y.tolist() == [[0.0], [1.0], [0.0]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("-1 3:1\n+1 4:1\n", "has 2 examples of classes .* not 49749 of −1 and 1"),
        ("-1 3:1\n+1 400:1\n", "is no LIBSVM file of 300 features"),
        ("words, not numbers\n", "is no LIBSVM file"),
        ("", "has 0 examples|is no LIBSVM file"),
    ],
)
def test_what_is_no_such_file_is_refused(small: Path, text: str, says: str) -> None:
    (small / "w8a").write_text(text)
    with pytest.raises(cl.CurvlabError, match=says):
        cl.datasets.load("w8a")


def test_webspam_is_divided_and_standardised(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import scipy.sparse

    x = torch.rand(350_000, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1
    y = torch.arange(350_000)[:, None].float()
    monkeypatch.setattr(libsvm, "_read", lambda *_: (scipy.sparse.csr_matrix(x.numpy()), y))
    (small / libsvm.WEBSPAM).write_text("")
    train, test = cl.datasets.load("webspam")
    assert (len(train), len(test)) == (300_000, 50_000)
    assert torch.cat([train.y, test.y]).sort(0).values.equal(y)
    assert train.x[:].mean(0).abs().max() < 1e-4
    assert (train.x[:].var(0) - 1).abs().max() < 1e-3


def test_a_feature_that_never_varies_is_only_shifted() -> None:
    train, test = libsvm.standardised(
        torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[2.0, 7.0]])
    )
    assert train.tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    assert test.tolist() == [[0.0, 2.0]]
