"""The padding mask: which places count in KFAC's factors, and that labels are no mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvlab as cl

N, T, W, S, C = 4, 5, 4, 9, 3
LENGTHS = (5, 3, 4, 1)


class Encoder(nn.Module):
    """One attention head that looks at no padding; sequence first, or with a tied head."""

    def __init__(self, tied: bool = False, first: bool = False) -> None:
        super().__init__()
        self.word, self.qkv, self.out = nn.Embedding(S, W), nn.Linear(W, 3 * W), nn.Linear(W, W)
        self.head = None if tied else nn.Linear(W, S)
        self.first = first

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.word(ids.T if self.first else ids)
        qkv = self.qkv(h)
        q, k, v = (qkv.transpose(0, 1) if self.first else qkv).chunk(3, -1)
        scores = (q @ k.mT / math.sqrt(W)).masked_fill(mask[:, None] == 0, -torch.inf)
        mixed = scores.softmax(-1) @ v
        h = h + torch.tanh(self.out(mixed.transpose(0, 1) if self.first else mixed))
        z = nn.functional.linear(h, self.word.weight) if self.head is None else self.head(h)
        return z.transpose(0, 1) if self.first else z


def batch(more: int = 0) -> dict[str, Tensor]:
    """Sequences of several lengths, `more` places of padding behind all of them."""
    torch.manual_seed(0)
    ids, labels = torch.randint(1, S, (N, T)), torch.randint(S, (N, T))
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
    ids, labels = ids * mask, labels.masked_fill(mask == 0, -100)
    pad = torch.zeros(N, more, dtype=torch.long)
    return {
        "ids": torch.cat([ids, pad], 1),
        "mask": torch.cat([mask, pad], 1),
        "labels": torch.cat([labels, pad - 100], 1),
    }


def factors(
    name: str, data: dict[str, Tensor], mask: Any, *, labels: Any = "data", **options: Any
) -> list[Tensor]:
    torch.manual_seed(1)
    sharing = {k: options.pop(k) for k in ("sharing",) if k in options}
    model = Encoder(**options).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    objective = cl.Objective(model, cl.likelihoods.Categorical(axis=-1), mask=mask)
    kfac: Any = cl.approximation(name, objective, labels=labels, **sharing)
    kfac.update(objective.closure(data).observe(kfac.needs | {"gradient"}))
    return [f for b in kfac.blocks.values() for f in (b.A, b.G)]


@pytest.mark.parametrize("labels", ["data", "exact", "token"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("first", [False, True])
def test_more_padding_changes_no_factor(labels: str, sharing: str, first: bool) -> None:
    found = [
        factors("kfac", batch(more), "mask", labels=labels, sharing=sharing, first=first)
        for more in (0, 3)
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    without = [
        factors("kfac", batch(more), None, labels=labels, sharing=sharing, first=first)
        for more in (0, 3)
    ]
    apart = [float((one - other).abs().max()) for one, other in zip(*without, strict=True)]
    assert max(apart) > 1e-3  # what the mask is there for


def test_a_tied_head_counts_no_padding_either() -> None:
    found = [factors("kfac-ef", batch(more), "mask", tied=True) for more in (0, 3)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize("first", [False, True])
def test_factors_are_the_sums_over_places_that_are_no_padding(first: bool) -> None:
    """A = (1/N) Σ a aᵀ with a one of the bias, G = (1/M) Σ g gᵀ, M of all places; by hooks."""
    data = batch(2)
    inside = (data["mask"] == 1).flatten()
    count = int(inside.sum())
    torch.manual_seed(1)
    model = Encoder(first=first).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    seen: dict[str, Tensor] = {}
    for name in ("qkv", "out", "head"):
        module = getattr(model, name)

        def keep(module: nn.Module, x: Any, h: Tensor, name: str = name) -> None:
            seen[name] = x[0].detach()
            h.register_hook(lambda g: seen.update({name + "'": g}))

        module.register_forward_hook(keep)
    z = model(data["ids"], data["mask"])
    nn.functional.cross_entropy(
        z.flatten(0, 1), data["labels"].flatten(), reduction="sum"
    ).backward()
    found = factors("kfac-ef", data, "mask", first=first)
    wanted = [torch.bincount(data["ids"].flatten()[inside], minlength=S).double() / N, None]
    for name in ("qkv", "out", "head"):
        a, g = (seen[k].transpose(0, 1) if first else seen[k] for k in (name, name + "'"))
        a, g = a.flatten(0, 1)[inside], g.flatten(0, 1)
        a = torch.cat([a, torch.ones(len(a), 1).double()], 1)
        wanted += [a.mT @ a / N, g.mT @ g / count]
    for one, other in zip(found, wanted, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_labels_are_no_mask() -> None:
    """A place without a label still acts on others: its input counts."""
    data = batch()
    fewer = data | {"labels": data["labels"].clone()}
    fewer["labels"][:, 0] = -100
    fewer["labels"][0, 2:4] = -100
    whole, part = factors("kfac-ef", data, "mask"), factors("kfac-ef", fewer, "mask")
    for one, other in zip(whole[::2], part[::2], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(whole[3], part[3])  # G


def test_exact_matrices_need_no_mask() -> None:
    found = []
    for mask, more in ((None, 0), ("mask", 0), ("mask", 3)):
        torch.manual_seed(1)
        objective = cl.Objective(Encoder().double(), cl.likelihoods.Categorical(axis=-1), mask=mask)
        found.append(cl.exact.matrices(objective, batch(more), kind="ggn"))
    for other in found[1:]:
        for name, one in found[0].items():
            torch.testing.assert_close(one.dense(), other[name].dense(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["ef", "hessian"])
def test_what_assumptions_cost_does_not_depend_on_padding(kind: Any) -> None:
    found = []
    for more in (0, 3):
        torch.manual_seed(1)
        objective = cl.Objective(
            Encoder().double(), cl.likelihoods.Categorical(axis=-1), mask="mask"
        )
        data = batch(more)
        y = data.pop("labels")
        terms = cl.exact.kronecker_terms(objective, data, y, kind, "3")
        found.append([terms.dense(), terms.averaged(), terms.single().dense()])
        if kind == "ef":
            kfac: Any = cl.approximation("kfac-ef", objective)
            kfac.update(objective.closure(data, y).observe(kfac.needs))
            torch.testing.assert_close(
                kfac.blocks["3"].matrix().dense(), found[-1][2], rtol=0, atol=1e-13
            )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_a_function_of_the_inputs_is_a_mask_too() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(S, W), nn.Linear(W, S)).double()
    data = batch(2)
    found = []
    for x, mask in ((data["ids"], lambda x: x != 0), (data["ids"][:, :T], lambda x: x != 0)):
        objective = cl.Objective(model, cl.likelihoods.Categorical(axis=-1), mask=mask)
        kfac: Any = cl.approximation("kfac-ef", objective)
        y = data["labels"][:, : x.shape[1]]
        kfac.update(objective.closure(x, y).observe(kfac.needs))
        found.append([f for b in kfac.blocks.values() for f in (b.A, b.G)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    assert found[0][0][0] == 0  # the symbol of padding


@pytest.mark.parametrize("name", ["kflr", "kfac", "kfac-reduce"])
def test_steps_with_a_mask_do_not_depend_on_padding(name: str) -> None:
    ends = []
    for more in (0, 3):
        torch.manual_seed(1)
        model = Encoder().double()
        objective = cl.Objective(model, cl.likelihoods.Categorical(axis=-1), mask="mask")
        optimizer = cl.optimizer(name, objective, lr=0.01, labels="data")
        for _ in range(3):
            optimizer.step(objective.closure(batch(more)))
        ends.append(objective.layout.flatten(dict(objective.parameters)).detach())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (
            "attention_mask",
            r"mask='attention_mask'.* no tensor of the inputs \(known: 'ids', 'mask'\)",
        ),
        (lambda x: x["mask"][:2], r"must be \[4, T\].*not \[2, 5\]"),
        (lambda x: 3, r"must be \[4, T\].*not int"),
        (lambda x: (1 - x["mask"]) * -1e9, r"0 at padding and 1 elsewhere, not -1e\+09"),
        (7, "mask must be the name of a tensor in the inputs, or a function"),
        ("", "mask must be the name of a tensor in the inputs, or a function"),
    ],
)
def test_what_is_no_mask_is_one_line(mask: Any, words: str) -> None:
    with pytest.raises(cl.CurvlabError, match=words) as caught:
        factors("kfac-ef", batch(), mask)
    assert "\n" not in str(caught.value)


def test_a_mask_of_places_that_no_layer_has_is_said() -> None:
    objective = cl.Objective(
        nn.Sequential(nn.Flatten(), nn.Linear(T, C)).double(),
        cl.likelihoods.Categorical(),
        mask=lambda x: x != 0,
    )
    with pytest.warns(cl.CurvlabWarning, match="5 places, and no layer has as many"):
        objective.closure(torch.randn(N, T).double(), torch.randint(C, (N,))).observe()
