"""Models that draw random numbers: whoever looks, what is drawn next is what it would have been."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import normal
from torch import Tensor, nn

import curvlab as cl
from curvlab.algorithms import ALGORITHMS
from curvlab.errors import CurvlabError
from curvlab.system import random_state

pytestmark = [
    pytest.mark.filterwarnings("ignore::curvlab.errors.CurvlabWarning"),
    pytest.mark.skipif(
        os.environ.get("CURVLAB_CHECK_SHAPES") == "1",
        reason="beartype draws from Python's generator where it checks a container",
    ),
]


class Noisy(nn.Module):
    """Noise of torch's, numpy's and Python's generators, maybe with dropout."""

    def __init__(self, dropout: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.drop = nn.Dropout(0.3) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.a(x)))
        h = h + 0.1 * torch.randn_like(h) + 0.01 * random.random()
        return self.b(h) * (1 + 0.01 * float(np.random.rand()))  # noqa: NPY002


REFUSED = {True: ("block-hessian", "hf"), False: ("block-hessian",)}
"""Methods whose exact derivatives no dropout, or no noise at all, is to enter."""


def drawn(name: str, dropout: bool, options: dict[str, Any]) -> list[Any]:
    """What each generator would draw after the warm start and after every step."""
    with random_state.kept(torch.device("cpu")):
        random_state.seed(3)
        o = cl.Objective(Noisy(dropout), cl.likelihoods.Categorical())
        optimizer = cl.optimizer(name, o, lr=1e-3, **options)
        found: list[Any] = []
        y = torch.arange(40).remainder(2)
        for step in range(4):
            optimizer.step(o.closure(normal(40, 3, seed=step), y))
            with random_state.kept(torch.device("cpu")):
                found.append((float(torch.rand(())), random.random(), float(np.random.rand())))  # noqa: NPY002
        return found


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_step_uses_up_what_one_forward_pass_does(name: str, every: int, dropout: bool) -> None:
    wanted = drawn("sgd-m", dropout, {})
    assert len(set(wanted)) == 4
    options = {"update_every": every, "refresh_every": every}
    if name in REFUSED[dropout]:
        with pytest.raises(CurvlabError, match="random"):
            drawn(name, dropout, options)
        return
    assert drawn(name, dropout, options) == wanted


def losses(algorithms: list[str], probes: list[str]) -> Any:
    with random_state.kept(torch.device("cpu")):
        random_state.seed(4)
        o = cl.Objective(Noisy(False), cl.likelihoods.Categorical())
        y = torch.arange(40).remainder(2)
        data = [(normal(40, 3, seed=seed), y) for seed in range(4)]
        run = cl.compare(
            o,
            data,
            reference="sgd-m",
            algorithms=algorithms,
            probes=probes,
            warm=data[:2],
            progress=False,
        )
        return run.dataset["loss"].values


def test_a_comparison_draws_the_same_alone_and_in_company() -> None:
    """Neither members, nor their warm start, nor probes use up what the reference draws."""
    alone = losses([], [])
    warmed = losses(["kfac"], [])
    company = [name for name in sorted(ALGORITHMS) if name not in REFUSED[False]]
    together = losses(company, ["damping", "bounds", "noise", "memory"])
    assert len(set(alone)) == 4
    np.testing.assert_array_equal(warmed, together)


def test_a_model_of_the_users_own_is_seeded_whatever_generator_it_draws_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "features_of_mine.py").write_text(
        "import random\n"
        "import numpy as np\n"
        "import torch\n"
        "from torch import nn\n"
        "def build():\n"
        "    model = nn.Linear(3, 2)\n"
        "    with torch.no_grad():\n"
        "        model.weight.copy_(torch.from_numpy(np.random.randn(2, 3)))\n"
        "        model.bias.fill_(random.random())\n"
        "    return model\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    before = random_state.states(torch.device("cpu"))
    one, same, other = (
        cl.models.build("features_of_mine:build", seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert not random_state.drawn_since(before, torch.device("cpu"))


FIRST = """
import os
import random
import subprocess
import sys
import numpy as np
import torch
import curvlab as cl
from curvlab.system import random_state
model = torch.nn.Linear(3, 2)
before = random_state.states(torch.device("cpu"))
o = cl.Objective(model, cl.likelihoods.Categorical())
data = [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))]
cl.train(o, data, data, algorithm="sgd-m", epochs=1, progress=False)
cl.compare(o, data, algorithms=["kfac"], warm=(), progress=False)
print(before.python == random.getstate(), random_state.drawn_since(before, torch.device("cpu")))
"""


def test_the_first_run_of_a_process_draws_what_later_ones_do() -> None:
    """What is imported for it, rich among it, draws from Python's generator."""
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"], done.stderr
