"""Bad input of language models: one line that says what, where, the remedy and what is known."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import call
from torch import Tensor, nn

import curvlab as cl
from curvlab import datasets
from curvlab.datasets import DataEntry, Dataset
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Categorical, Tokens

N, T, S = 4, 6, 9


class Model(nn.Module):
    """A table of symbols, one of places, a head; outputs as a tensor, or as `form` makes of it."""

    def __init__(
        self, symbols: int = S, places: int = T, form: Callable[[Tensor], Any] | None = None
    ):
        super().__init__()
        self.word, self.place = nn.Embedding(symbols, 4), nn.Embedding(places, 4)
        self.head, self.form = nn.Linear(4, symbols), form

    def forward(self, ids: Tensor) -> Any:
        h = self.word(ids) + self.place(torch.arange(ids.shape[1]).expand(ids.shape))
        z = self.head(torch.tanh(h))
        return z if self.form is None else self.form(z)


def objective(per: Any = "sequence", **options: Any) -> cl.Objective:
    torch.manual_seed(0)
    return cl.Objective(Model(**options), Categorical(axis=-1, per=per))


def ids(places: int = T, symbols: int = S) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(symbols, (N, places))


def changed(at: int, value: int) -> Tensor:
    y = ids()
    y[1, at] = value
    return y


def batch(**change: Any) -> dict[str, Any]:
    return {"ids": ids(), "labels": ids()} | change


def little(call: Callable[[], Any], memory: int = 40_000) -> Callable[[], Any]:
    """The call on a machine of little memory."""

    def on_it() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("curvlab.errors._memory", lambda: memory)
            return call()

    return on_it


def stepped(name: str, o: cl.Objective, *data: Any) -> Any:
    return cl.optimizer(name, o, lr=0.01).step(o.closure(*data))


ROWS: dict[str, tuple[Callable[[], Any], str]] = {
    "a label out of range": (
        lambda: stepped("kfac", objective(), ids(), changed(2, S)),
        r"label 9 is out of range: the model has 9 outputs, so labels run from 0 to 8",
    ),
    "a label below 0 that is not the ignored one": (
        lambda: cl.exact.matrix(objective(), ids(), changed(2, -1), "ggn", "1"),
        r"label -1 is out of range.*Categorical\(ignore_index=-1\)",
    ),
    "the exact pass of a long sequence": (
        little(lambda: stepped("kflr", objective(), ids(), ids()), 150_000),
        r"what 54 vectors are at all layers of 4 examples would need .* labels are drawn",
    ),
    "no counted place": (
        lambda: stepped("kfac", objective("token"), ids(), torch.full((N, T), -100)),
        r"no place of the 4 examples is counted .*: leave them out, or take per=\"sequence\"",
    ),
    "no counted place, exact": (
        lambda: cl.exact.matrix(objective("token"), ids(), torch.full((N, T), -100), "ef", "1"),
        r"no place of the 4 examples is counted",
    ),
    "no counted place in any minibatch": (
        lambda: cl.exact.diagonal(objective("token"), [(ids(), torch.full((N, T), -100))] * 2),
        r"no place of the 8 examples is counted",
    ),
    "a mapping without the label key": (
        lambda: stepped("kfac", objective(), {"ids": ids(), "targets": ids()}),
        r"no key 'labels' for its labels \(keys: 'ids', 'targets'\): name it by labels='…'",
    ),
    "a mapping without the label key, exact": (
        lambda: cl.exact.matrix(objective(), {"ids": ids()}, None, "ggn", "1"),
        r"no key 'labels' for its labels \(keys: 'ids'\)",
    ),
    "an output that is no tensor and has no logits": (
        lambda: stepped("kfac", objective(form=lambda z: {"scores": z, "hidden": z}), batch()),
        r"returned a dict, not one tensor \(fields: 'scores', 'hidden'\): pick one by outputs='…'",
    ),
    "outputs that are a tuple": (
        lambda: cl.exact.matrix(objective(form=lambda z: (z, z)), ids(), ids(), "ggn", "1"),
        r"returned a tuple, not one tensor \(2 parts\): pick one by outputs=.*lambda out: out\[0\]",
    ),
    "logits that are no tensor": (
        lambda: stepped("kfac", objective(form=lambda z: {"logits": [z, z]}), batch()),
        r"returned a dict, of which outputs= picked a list, not one tensor",
    ),
    "examples that differ between leaves": (
        lambda: stepped("kfac", objective(), batch(mask=torch.ones(N - 1, T))),
        r"differ in their number of examples \('ids' 4, 'mask' 3\).*shared=",
    ),
    "examples that differ between inputs and labels": (
        lambda: stepped("kfac", objective(), batch(labels=ids()[:2])),
        r"has 4 inputs but 2 targets",
    ),
    "a sequence longer than the position table": (
        lambda: stepped("kfac", objective(), ids(T + 2), ids(T + 2)),
        r"inputs of shape \(4, 8\): index 7 is beyond the 6 rows of 'place\.weight': give shorter",
    ),
    "a sequence longer than the position table, unheard": (
        lambda: objective().closure(ids(T + 2), ids(T + 2))(),
        r"index 7 is beyond the 6 rows of 'place\.weight'",
    ),
    "a sequence longer than the position table, exact": (
        lambda: cl.exact.gradients(objective(), ids(T + 2), ids(T + 2)),
        r"index 7 is beyond the 6 rows of 'place\.weight'",
    ),
    "a symbol that the table has not": (
        lambda: stepped("kfac", objective(), ids(T, S + 6), ids()),
        r"index 1\d is beyond the 9 rows of 'word\.weight'",
    ),
    "a symbol below 0": (
        lambda: stepped("kfac", objective(), changed(1, -100), ids()),
        r"index -100 is beyond the 9 rows of 'word\.weight'.*padding",
    ),
    "a sequence longer than a model of curvlab's takes": (
        lambda: stepped("kfac", cl.Objective(gpt(), Tokens(axis=-1)), ids(T + 2), ids(T + 2)),
        r"sequences of 8 places, but the model has positions for 6: give windows of 6 or fewer",
    ),
    "a vocabulary too large for a dense block of its table": (
        little(lambda: cl.exact.matrix(objective(symbols=40), ids(), ids(), "ef", "1")),
        r"dense ef of block 1 \(word\.weight\) would need .*curvlab\.exact\.occurring",
    ),
    "a vocabulary too large for a dense block of the head": (
        little(lambda: cl.exact.matrix(objective(symbols=40), ids(), ids(), "ef", "3")),
        r"dense ef of block 3 \(head\.weight, head\.bias\) would need .*curvlab\.exact\.product",
    ),
    "a vocabulary too large for a Kronecker factor": (
        little(lambda: stepped("kfac", objective(symbols=60), ids(), ids())),
        r"factor G .*block 3 \(head\.weight, head\.bias\), \[60, 60\].*smw-ng-bd",
    ),
    "a vocabulary too large for the root": (
        little(lambda: cl.exact.diagonal(objective(symbols=40), ids(), ids(), "ggn")),
        r"root of the output Hessian \(240 columns.*fisher-mc",
    ),
}


def gpt() -> nn.Module:
    from curvlab.sequence_networks import GPT

    return GPT(T, S, layers=1, width=4, heads=2, bias=True)


@pytest.mark.filterwarnings("ignore:.*follow the gradient:curvlab.errors.CurvlabWarning")
@pytest.mark.parametrize("name", ROWS)
def test_it_is_one_line(name: str) -> None:
    call, words = ROWS[name]
    with pytest.raises(CurvlabError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 420


OWN = f"""
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, symbols={S}, places={T}, form=None):
        super().__init__()
        self.word, self.place = nn.Embedding(symbols, 4), nn.Embedding(places, 4)
        self.head, self.form = nn.Linear(4, symbols), form

    def forward(self, ids):
        h = self.word(ids) + self.place(torch.arange(ids.shape[1]).expand(ids.shape))
        z = self.head(torch.tanh(h))
        return z if self.form is None else self.form(z)


def good():
    return Model(), "tokens", "made"


def short():
    return Model(places={T} - 2), "tokens", "made"


def few():
    return Model(symbols={S} - 4), "tokens", "made"


def named():
    return Model(form=lambda z: {{"scores": z}}), "tokens", "made"


def large():
    return Model(symbols=200), "tokens", "made"
"""

COMMANDS = {
    "train": ["train", "--algorithm", "kfac", "--batch-size", "4", "--epochs", "1"],
    "compare": [
        *("compare", "--reference", "kfac", "--algorithms", "sgd-m"),
        *("--batch-size", "4", "--steps", "1"),
    ],
}
CALLS: dict[str, tuple[str, Callable[[Tensor], tuple[Tensor, Tensor]], str]] = {
    "labels": ("good", lambda x: (x, x + S), r"label \d+ is out of range: the model has 9 outputs"),
    "ignored": ("good", lambda x: (x, x * 0 - 100), "no place of the 4 examples is counted"),
    "length": ("short", lambda x: (x, x), r"index 5 is beyond the 4 rows of 'place\.weight'"),
    "symbols": ("few", lambda x: (x, x), r"index \d is beyond the 5 rows of 'word\.weight'"),
    "outputs": ("named", lambda x: (x, x), r"returned a dict, not one tensor \(fields: 'scores'\)"),
    "large": ("large", lambda x: (x, x), r"\[200, 200\].*smw-ng-bd"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", CALLS)
def test_on_the_command_line_it_is_one_line_and_exit_code_2(
    command: str,
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    function, data, words = CALLS[case]
    module = f"own_language_{case}_{command}"
    (tmp_path / f"{module}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)

    def load() -> tuple[Dataset, Dataset]:
        x, y = data(ids())
        return Dataset("made", x, y, "made"), Dataset("made", x, y, "made")

    monkeypatch.setitem(datasets.DATASETS, "made", DataEntry("made", load))
    if case == "large":
        monkeypatch.setattr("curvlab.errors._memory", lambda: 400_000)
    try:
        code = call(*COMMANDS[command], "--model", f"{module}:{function}", "--out", "out")
    finally:
        sys.modules.pop(module, None)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("curvlab: ")]
    assert code == 2
    assert len(lines) == 1
    assert re.search(words, lines[0]), lines
