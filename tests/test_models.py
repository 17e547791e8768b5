"""Models by name."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from optional import load_or_skip
from torch import Tensor, nn

import curvlab as cl
from curvlab.datasets import DATASETS
from curvlab.likelihoods import LIKELIHOODS
from curvlab.models import MODELS, PaddedShortcut, ResidualBlock

KINDS = {  # {name: (inputs, outputs, parameters)}; beside them, where a count is published
    "mlp-256-20": ((256,), 10, 7_030),
    "mlp-256-20-printed": ((256,), 10, 6_610),
    "mnist-ae": ((784,), 784, 2_837_314),
    "curves-ae": ((784,), 784, 842_340),
    "faces-ae": ((625,), 625, 7_537_655),
    "curves-ae-1000": ((784,), 784, 2_837_314),
    "faces-ae-1000": ((625,), 625, 2_519_155),
    "logistic": ((123,), 1, 123),
    "logistic-sparse": ((62_061,), 1, 62_061),
    "mnist-500": ((784,), 10, 397_510),
    "cifar-400": ((3072,), 10, 1_393_610),
    "webspam-400": ((254,), 1, 262_801),
    "a9a-400": ((123,), 1, 210_401),
    "convnet": ((3, 32, 32), 10, 89_578),
    "all-cnn-c": ((3, 32, 32), 10, 1_369_738),  # about 1.4 M, Springenberg et al. 2015, table 3
    "vgg16": ((3, 32, 32), 10, 14_728_266),
    "vgg16-printed": ((3, 32, 32), 10, 33_638_218),
    "resnet32": ((3, 32, 32), 10, 464_154),  # 0.46 M, He et al. 2016, table 6
    "resnet32-4": ((3, 32, 32), 10, 7_386_186),
    "resnet18": ((3, 32, 32), 10, 11_173_962),
    "gpt-tiny": ((32,), 62, 28_480),
    "gpt-small": ((64,), 62, 803_712),  # 0.80 M, Karpathy 2022
    "vit-tiny": ((784,), 10, 27_914),
    "lstm-tiny": ((32,), 62, 12_478),
}
SYMBOLIC = ("gpt-tiny", "gpt-small", "lstm-tiny")
WIDTHS = {  # as the documents print them
    "mlp-256-20": [256, 20, 20, 20, 20, 20, 10],
    "mlp-256-20-printed": [256, 20, 20, 20, 20, 10],
    "mnist-ae": [784, 1000, 500, 250, 30, 250, 500, 1000, 784],
    "faces-ae": [625, 2000, 1000, 500, 30, 500, 1000, 2000, 625],
    "curves-ae": [784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784],
    "curves-ae-1000": [784, 1000, 500, 250, 30, 250, 500, 1000, 784],
    "faces-ae-1000": [625, 1000, 500, 250, 30, 250, 500, 1000, 625],
    "mnist-500": [784, 500, 10],
    "cifar-400": [3072, 400, 400, 10],
    "webspam-400": [254, 400, 400, 1],
    "a9a-400": [123, 400, 400, 1],
}


def batch(name: str, n: int = 2) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the model's shapes."""
    inputs, outputs, _ = KINDS[name]
    draw = torch.Generator().manual_seed(0)
    if name in SYMBOLIC:
        x, y = torch.randint(outputs, (2, n, *inputs), generator=draw)
        return x, y
    x = torch.rand(n, *inputs, generator=draw)
    likelihood = MODELS[name].likelihood
    return x, torch.arange(n) % outputs if likelihood == "categorical" else torch.rand(n, outputs)


def test_the_table_here_is_complete_and_every_entry_names_its_problem() -> None:
    assert set(KINDS) == set(MODELS)
    for entry in MODELS.values():
        assert entry.data in DATASETS
        assert entry.likelihood in LIKELIHOODS
        assert any(
            document in entry.source
            for document in (
                "thesis",
                "S2QN",
                "Ren and Goldfarb",
                "practice",
                "curvlab",
                "Karpathy",
            )
        )


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_its_shape_and_size_and_fits_its_likelihood(name: str) -> None:
    model = cl.models.build(name)
    x, y = batch(name)
    _, outputs, parameters = KINDS[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    with torch.no_grad():
        z = model(x)
    assert z.shape == ((*x.shape, outputs) if name in SYMBOLIC else (2, outputs))
    LIKELIHOODS[MODELS[name].likelihood]().check(z, y)
    assert torch.isfinite(
        cl.Objective(model, LIKELIHOODS[MODELS[name].likelihood]()).closure(x, y)()
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_its_data(name: str) -> None:
    data = str(MODELS[name].data)
    # smaller, of the same shapes
    train, _ = load_or_skip(data.replace("cifar10", "cifar10-subset"))
    assert (train.inputs, train.outputs) == KINDS[name][:2]
    objective = cl.Objective(cl.models.build(name), LIKELIHOODS[MODELS[name].likelihood]())
    assert torch.isfinite(objective.closure(train.x[:3], train.y[:3])())


@pytest.mark.parametrize("name", WIDTHS)
def test_widths_are_those_of_the_documents(name: str) -> None:
    linear = [m for m in cl.models.build(name).children() if isinstance(m, nn.Linear)]
    assert [m.in_features for m in linear] + [linear[-1].out_features] == WIDTHS[name]


@pytest.mark.parametrize("name", [name for name in MODELS if "-ae" in name])
def test_autoencoders_have_a_relu_after_every_layer_but_code_and_output(name: str) -> None:
    layers = list(cl.models.build(name).children())
    code = min(m.out_features for m in layers if isinstance(m, nn.Linear))
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, nn.Linear):
            bare = layer.out_features == code or following is None
            assert isinstance(
                following,
                nn.Linear if layer.out_features == code else type(None) if bare else nn.ReLU,
            )


@pytest.mark.parametrize("name", ["mnist-500", "cifar-400", "webspam-400", "a9a-400"])
def test_networks_of_5_8_are_logistic(name: str) -> None:
    assert {type(m) for m in cl.models.build(name).children()} == {nn.Linear, nn.Sigmoid}


def test_the_mnist_autoencoder_starts_where_it_is_known_to() -> None:
    train, _ = cl.datasets.load("mnist-ae")
    loss = cl.Objective(cl.models.build("mnist-ae"), cl.likelihoods.Bernoulli()).closure(
        train.x[:2000], train.y[:2000]
    )
    assert float(loss.observe().loss) == pytest.approx(543.67, abs=1)  # practice


@pytest.mark.parametrize(
    "name", ["convnet", "all-cnn-c", "vgg16", "vgg16-printed", "resnet32", "resnet18"]
)
def test_convolutional_networks_are_as_described(name: str) -> None:
    modules = list(cl.models.build(name).modules())

    def count(kind: type[nn.Module]) -> int:
        return sum(isinstance(m, kind) for m in modules)

    convolutions, linear, norms = (count(kind) for kind in (nn.Conv2d, nn.Linear, nn.BatchNorm2d))
    assert (convolutions, linear, norms) == {
        "convnet": (3, 1, 0),
        "all-cnn-c": (9, 0, 0),
        "vgg16": (13, 1, 13),
        "vgg16-printed": (13, 3, 0),
        "resnet32": (31, 1, 31),
        "resnet18": (17 + 3, 1, 17 + 3),
    }[name]


@pytest.mark.parametrize("name", ["convnet", "all-cnn-c", "resnet32"])
def test_curvature_of_convolutional_networks(name: str) -> None:
    objective = cl.Objective(cl.models.build(name), cl.likelihoods.Categorical())
    x, y = batch(name)
    observed = objective.closure(x, y).observe(frozenset({"data", "model"}))
    gradients = torch.autograd.grad(
        F.cross_entropy(objective.model(x), y), list(objective.parameters.values())
    )
    scattered = {
        k: v for b in objective.blocks for k, v in b.scatter(observed.gradients[b.name]).items()
    }
    for key, gradient in zip(objective.parameters, gradients, strict=True):
        torch.testing.assert_close(scattered[key], gradient, rtol=1e-3, atol=1e-6)


def test_padded_shortcut_has_no_parameter_and_keeps_every_other_pixel() -> None:
    x = torch.rand(2, 3, 6, 6)
    out = PaddedShortcut(5, 2)(x)
    assert torch.equal(out[:, :3], x[:, :, ::2, ::2])
    assert not out[:, 3:].any()
    for name, learned in (("resnet32", False), ("resnet32-4", False), ("resnet18", True)):
        shortcuts = [
            m.shortcut for m in cl.models.build(name).modules() if isinstance(m, ResidualBlock)
        ]
        assert any(list(s.parameters()) for s in shortcuts) == learned
        assert sum(isinstance(s, nn.Identity) for s in shortcuts) == {"resnet18": 5}.get(name, 13)


@pytest.mark.parametrize(
    "name", [name for name, entry in MODELS.items() if entry.sized and name not in SYMBOLIC]
)
def test_sized_models_take_the_shapes_of_other_data(name: str) -> None:
    inputs = (7,) if len(KINDS[name][0]) == 1 and name != "vit-tiny" else (1, 32, 32)
    model = cl.models.build(name, data=SimpleNamespace(inputs=inputs, outputs=7))
    with torch.no_grad():
        assert model(torch.rand(2, *inputs)).shape == (2, 7)


def test_logistic_regression_fits_any_of_its_data_sets() -> None:
    for name in ("a9a", "w8a", "news20"):
        train, _ = load_or_skip(name)
        model = cl.models.build("logistic", data=train)
        x, y = next(iter(train.batches(5)))
        assert cl.Objective(model, cl.likelihoods.Bernoulli()).closure(x, y)().ndim == 0
        assert [n for n, _ in model.named_parameters()] == ["weight"]


def test_networks_of_one_size_ignore_other_data() -> None:
    model = cl.models.build("mnist-500", data=SimpleNamespace(inputs=(3,), outputs=2))
    assert model(torch.zeros(1, 784)).shape == (1, 10)


@pytest.mark.parametrize(
    "name", ["mlp-256-20", "curves-ae", "logistic", "resnet32", "gpt-tiny", "vit-tiny", "lstm-tiny"]
)
def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone(name: str) -> None:
    before = torch.get_rng_state()
    one, same, other = (dict(cl.models.build(name, seed).named_parameters()) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not any(
        torch.equal(one[k], other[k])
        for k in one
        if "norm" not in k and one[k].unique().numel() > 1
    )


def test_unknown_model() -> None:
    with pytest.raises(
        cl.CurvlabError,
        match=r"unknown model 'mlp-256'; did you mean 'mlp-256-20'\? \(known: mlp-256-20, ",
    ):
        cl.models.build("mlp-256")


YOURS = """
import torch
from torch import nn

WIDTH = 4

def net():
    return nn.Linear(256, 10)

def whole():
    return nn.Linear(784, 784), "bernoulli", "mnist-ae"

def number():
    return 3

def halves():
    return nn.Linear(2, 2), "bernoulli"

def guessed():
    return nn.Linear(2, 2), "bernouli", "mnist"

def failing():
    raise RuntimeError("no such\\nluck")

def wants(width):
    return nn.Linear(width, width)
"""


@pytest.fixture
def yours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, which is not on the path."""
    (tmp_path / "yours_of_the_test.py").write_text(YOURS)
    (tmp_path / "broken_of_the_test.py").write_text("import nothing_of_the_kind")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "yours_of_the_test", raising=False)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    return "yours_of_the_test"


def test_a_function_of_yours_is_a_model(yours: str) -> None:
    path, before = list(sys.path), torch.get_rng_state()
    one, same, other = (cl.models.build(f"{yours}:net", seed) for seed in (1, 1, 2))
    assert sys.path == path
    assert torch.equal(before, torch.get_rng_state())
    weights = [net.get_parameter("weight") for net in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    entry = cl.models.find(f"{yours}:net")
    assert (entry.likelihood, entry.data_name("mnist16")) == ("categorical", "mnist16")
    with pytest.raises(
        cl.CurvlabError, match=f"model '{yours}:net' names no data set: choose one with --data"
    ):
        entry.data_name()
    whole = cl.models.find(f"{yours}:whole")
    assert (whole.likelihood, whole.data_name(), whole.data_name("curves")) == (
        "bernoulli",
        "mnist-ae",
        "curves",
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere_at_all:net", "there is no module 'nowhere_at_all': run where it lies"),
        ("{}.part:net", "there is no module 'yours_of_the_test.part'"),
        (":net", "importing '' failed"),
        (
            "broken_of_the_test:net",
            "importing 'broken_of_the_test' failed: ModuleNotFoundError: .*nothing_of_the_kind",
        ),
        ("{}:nett", "unknown function of yours_of_the_test 'nett'; did you mean 'net'"),
        ("{}:", "unknown function of yours_of_the_test ''"),
        ("{}:WIDTH", "'WIDTH' is no function but int"),
        ("{}:number", "returned int: return an nn.Module or"),
        ("{}:halves", "returned tuple: return an nn.Module or"),
        ("{}:guessed", "unknown likelihood 'bernouli'; did you mean 'bernoulli'"),
        ("{}:failing", "failed: RuntimeError: no such luck"),
        ("{}:wants", "failed: TypeError: .*missing 1 required positional argument"),
    ],
)
def test_what_is_wrong_with_yours_is_said_in_one_line(yours: str, name: str, says: str) -> None:
    path = list(sys.path)
    with pytest.raises(cl.CurvlabError, match=says) as info:
        cl.models.build(name.format(yours))
    assert "\n" not in str(info.value)
    assert sys.path == path
