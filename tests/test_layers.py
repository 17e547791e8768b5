"""Blocks: names, partition, layout; what cannot be partitioned says so."""

from __future__ import annotations

import pytest
import torch
from problems import MODELS, problem
from torch import Tensor, nn

from curvlab.errors import CurvlabError
from curvlab.layers import RULES, blocks

models = pytest.mark.parametrize("model", MODELS)


def layout(model: nn.Module) -> list[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    return [(b.name, b.params, b.shape) for b in blocks(model)]


@models
def test_blocks_partition_the_trainable_parameters(model: str) -> None:
    net = problem(model).model
    found = blocks(net)
    assert [b.name for b in found] == [str(i) for i in range(1, len(found) + 1)]
    names = [name for b in found for name in b.params]
    assert sorted(names) == sorted(name for name, _ in net.named_parameters())
    for b in found:
        assert b.numel == sum(net.get_parameter(name).numel() for name in b.params)


@models
def test_gather_and_scatter_are_inverse(model: str) -> None:
    net = problem(model).model
    values = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    for b in blocks(net):
        gathered = b.gather(values)
        assert gathered.shape == b.shape
        scattered = b.scatter(gathered)
        assert list(scattered) == list(b.params)
        for name, value in scattered.items():
            assert torch.equal(value, values[name])
        assert torch.equal(b.gather(b.scatter(gathered.flatten())), gathered)


def test_bias_is_the_last_column() -> None:
    net = nn.Linear(2, 3)
    (block,) = blocks(net)
    gathered = block.gather(dict(net.named_parameters()))
    assert torch.equal(gathered[:, :2], net.weight)
    assert torch.equal(gathered[:, 2], net.bias)
    assert block.biased
    assert block.rule is RULES[nn.Linear]


def test_names_follow_the_order_of_the_modules() -> None:
    assert layout(problem("tanh").model) == [
        ("1", ("0.weight", "0.bias"), (4, 6)),
        ("2", ("2.weight", "2.bias"), (4, 5)),
        ("3", ("4.weight", "4.bias"), (3, 5)),
    ]


def test_layer_without_a_rule_is_a_block_for_each_parameter() -> None:
    net = problem("norm").model
    assert layout(net) == [
        ("1", ("first.weight", "first.bias"), (4, 6)),
        ("2", ("norm.weight",), (4,)),
        ("3", ("norm.bias",), (4,)),
        ("4", ("second.weight", "second.bias"), (3, 5)),
    ]
    assert [b.rule is None for b in blocks(net)] == [False, True, True, False]
    assert str(blocks(net)[0]) == "block 1 (first.weight, first.bias)"


def test_subclass_of_a_layer_with_a_rule_has_none() -> None:
    """A subclass may do anything in its forward."""

    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square()

    assert layout(Odd(2, 3)) == [("1", ("weight",), (3, 2)), ("2", ("bias",), (3,))]


def test_parameters_of_the_model_itself() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(2)), nn.Linear(2, 2)

    assert layout(Scaled()) == [("1", ("scale",), (2,)), ("2", ("inner.weight", "inner.bias"), (2, 3))]


def test_frozen_bias() -> None:
    net = nn.Linear(2, 3)
    net.bias.requires_grad_(False)
    (block,) = blocks(net)
    assert (block.params, block.shape, block.biased) == (("weight",), (3, 2), False)


def test_frozen_weight_leaves_the_bias_as_a_block_of_its_own() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net[0].weight.requires_grad_(False)
    assert layout(net) == [("1", ("0.bias",), (3,)), ("2", ("1.weight", "1.bias"), (1, 4))]
    assert blocks(net)[0].rule is None


def test_frozen_layer_is_no_block() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net[0].requires_grad_(False)
    assert layout(net) == [("1", ("1.weight", "1.bias"), (1, 4))]


@pytest.mark.parametrize("net", [nn.Linear(2, 3).requires_grad_(False), nn.Tanh(), nn.ParameterList([torch.zeros(0)])])
def test_nothing_to_train(net: nn.Module) -> None:
    with pytest.raises(CurvlabError, match="no trainable layer"):
        blocks(net)


def test_tied_parameters_are_both_named() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    with pytest.raises(CurvlabError, match=r"'0\.weight' and '2\.weight' are tied"):
        blocks(net)


def test_module_under_two_names_is_tied() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(CurvlabError, match=r"'0\.weight' and '1\.weight' are tied"):
        blocks(nn.Sequential(layer, layer))


@models
def test_rules_read_the_layer_as_one_matrix(model: str) -> None:
    """h[n, t] = W a[n, t] + b, what a rule promises, on the inputs and outputs of a real pass."""
    p = problem(model)
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    for b in blocks(p.model):
        if b.module is not None:
            b.module.register_forward_hook(lambda m, args, out: seen.update({m: (args[0].clone(), out.clone())}))
    p.model(p.x)
    assert seen
    for module, (x, out) in seen.items():
        rule = RULES[type(module)]
        a, h = rule.inputs(module, x), rule.outputs(out)
        assert a.shape[:2] == h.shape[:2]
        assert len(a) == len(p.x)
        expected = torch.einsum("oi,nti->nto", module.weight.flatten(1), a)
        expected = expected if module.bias is None else expected + module.bias
        torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-12)
