"""Numbers that leave the finite range: whatever method, whatever error they lead to, the method is
named and nothing is moved.

A contract over the whole of ALGORITHMS: a NaN or Inf is put into one derivative, a loss, a
factorisation, and what follows is either `Diverged`, with the method's and the block's name and the
weights as they were, or a skip that is said, after which the method learns again. A new line of the
table is tested here without a new test.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import curvature_of, problem
from test_cli import call
from torch import Tensor, nn

import curvlab as cl
from curvlab import runs
from curvlab.algorithms import ALGORITHMS, descent
from curvlab.closure import Closure
from curvlab.curvature.hessian_free import HessianFree
from curvlab.curvature.moments import check_moments
from curvlab.datasets import Dataset
from curvlab.divergence import Naming, broken, named, of_numbers
from curvlab.errors import CurvlabError, Diverged
from curvlab.linalg.kronecker import pi_split
from curvlab.linalg.krylov import Indefinite
from curvlab.optim import Optimizer
from curvlab.probes import PROBES
from curvlab.show import tables
from curvlab.soundness import check_direction

NAMES = list(ALGORITHMS)
ON_DISK = ["hf", "k-bfgs", "kfac", "lbfgs", "skqn-b1"]
"""Whose runs are saved; the others stay in memory, which takes a tenth of the time."""
algorithms = pytest.mark.parametrize("name", NAMES)
LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # no stub has it


def _learns(name: str) -> bool:
    found = descent(name, problem("tanh").objective())
    return (
        ALGORITHMS[name].own.get("pairs", 1) != 0
        and found.wants_step
        and bool({"data", "gradient"} & found.step_needs)
    )


TWICE = [name for name in NAMES if _learns(name)]
"""Methods that learn from a second look's derivatives."""


def value_for(name: str) -> float:
    return (math.nan, math.inf)[NAMES.index(name) % 2]


@pytest.fixture(autouse=True)
def _no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """What commit it is takes longer than these runs."""
    monkeypatch.setattr("curvlab.logs.log.git_commit", lambda: "of a test")


class Poison(nn.Module):
    """Passes numbers through; where it is armed one of them, or one derivative of one pass back,
    becomes `value`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.value, self.armed, self.passes = math.nan, "", 0

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        mask = torch.zeros_like(y, dtype=torch.bool)
        mask[(0,) * y.ndim] = True
        if self.armed == "loss":
            return torch.where(mask, self.value, y)
        if self.armed and y.requires_grad:
            wanted, seen = self.armed, [0]

            def hook(g: Tensor) -> Tensor:
                seen[0] += 1
                at = wanted == "every" or seen[0] == int(wanted)
                return torch.where(mask, self.value, g) if at else g

            y.register_hook(hook)
        return y


@dataclass
class Case:
    """A method on a tiny model that can be poisoned, some steps on."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    clean: int = 3

    def __post_init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.poison = Poison()
            model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), self.poison, nn.Linear(5, 3)).to(
                self.dtype
            )
        draw = torch.Generator().manual_seed(1)
        self.x = torch.randn(12, 4, generator=draw).to(self.dtype)
        self.y = torch.randint(3, (12,), generator=draw)
        self.objective = cl.Objective(model, cl.likelihoods.Categorical())
        self.optimizer = cl.optimizer(
            self.name, self.objective, **{"lr": 1e-3, "refresh_every": 1} | self.options
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cl.CurvlabWarning)
            self.optimizer.warm_start([(self.x, self.y)])
            for _ in range(self.clean):
                self.step()

    def step(self) -> None:
        self.optimizer.step(self.objective.closure(self.x, self.y))

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.objective.parameters.values()]

    @property
    def state(self) -> dict[str, Any]:
        return self.optimizer.descent.state_dict()


@contextmanager
def poisoned(case: Case, look: str, value: float, armed: str = "every") -> Iterator[None]:
    """The first or the second look of `Optimizer.step`, and no other, sees the poison."""
    plain = Closure.observe

    def observe(self: Closure, *args: Any, **kwargs: Any) -> Any:
        second = not kwargs.get("move_buffers", True)
        case.poison.value = value
        case.poison.armed = armed if "checked" in kwargs and second == (look == "second") else ""
        try:
            found = plain(self, *args, **kwargs)
            for statistics in (
                s for one in found.passes.values() for s in one.values() if case.poison.armed
            ):
                _ = statistics.structured  # captured here and now
            return found
        finally:
            case.poison.armed = ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Closure, "observe", observe)
        yield


FACTORISATIONS = ("cholesky_ex", "eigh", "eigvalsh", "solve_triangular", "lu_factor_ex")


@contextmanager
def failing(how: str, which: tuple[str, ...] = FACTORISATIONS) -> Iterator[None]:
    """Factorisations, solves and inverses raise torch's error, or give NaN."""

    def broken_of(function: Callable[..., Any]) -> Callable[..., Any]:
        def spoilt(*args: Any, **kwargs: Any) -> Any:
            if how == "raise":
                raise LinAlgError("linalg: The algorithm failed to converge")
            found = function(*args, **kwargs)
            if isinstance(found, Tensor):
                return torch.full_like(found, torch.nan)
            return type(found)(
                [torch.full_like(f, torch.nan) if f.is_floating_point() else f for f in found]
            )

        return spoilt

    with pytest.MonkeyPatch.context() as patch:
        for name in (w for w in which if w != "inverse"):
            patch.setattr(torch.linalg, name, broken_of(getattr(torch.linalg, name)))
        if "cholesky_ex" in which or "inverse" in which:
            patch.setattr(torch, "cholesky_inverse", broken_of(torch.cholesky_inverse))
        yield


@dataclass(frozen=True)
class Outcome:
    """What a poisoned step did, and three clean ones after it."""

    error: Exception | None
    said: list[str]
    after: list[Exception | None]
    moved: int


def attempt(case: Case) -> Exception | None:
    try:
        case.step()
    except Exception as error:
        return error
    return None


def outcome(case: Case, context: Any, *, unmoved: bool = True) -> Outcome:
    """The contract, of one case. Raises AssertionError where it is broken."""
    before = case.weights
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with context:
            error = attempt(case)
        check_error(case, error)
        if error is not None and unmoved:
            assert all(map(torch.equal, case.weights, before)), f"weights moved before {error}"
        after, moved = [], 0
        for _ in range(3):
            held = case.weights
            after.append(attempt(case))
            check_error(case, after[-1])
            here = not all(map(torch.equal, case.weights, held))
            moved += here
            assert here or after[-1] is not None, "a step moved nothing and nobody said so"
            if after[-1] is not None:
                assert not here or "loss" in str(after[-1])
        if not any(after):
            assert not broken(case.state["curvature"]), "a state holds NaN or Inf in silence"
            assert not broken(case.state["momentum"])
    said = [str(w.message) for w in caught if issubclass(w.category, cl.CurvlabWarning)]
    return Outcome(error, said, after, moved)


def check_error(case: Case, error: Exception | None) -> None:
    """Diverged, and whose; the weights are finite in any case."""
    assert not broken(case.weights)
    if error is None:
        return
    assert isinstance(error, Diverged), f"{type(error).__name__}: {error}"
    line = str(error)
    assert "\n" not in line
    if not line.startswith("the loss is"):
        assert error.method == case.name or "block" in line
        assert error.block
        assert "block" in line


# ------------------------------------------------------------------------------------------------
# the contract


@algorithms
def test_derivatives_of_the_first_look(name: str) -> None:
    """Nothing moves, the block is named, and no statistic takes it up: the next steps are as if it
    had not come.

    Then of the last pass alone, of labels drawn or the exact one; of methods that read the data's
    labels it is the only one.
    """
    case, same = Case(name), Case(name)
    with poisoned(case, "first", value_for(name)):
        error = attempt(case)
    check_error(case, error)
    assert isinstance(error, Diverged)
    assert "block 1 (0.weight, 0.bias)" in str(error)
    assert error.block == "1"
    assert all(map(torch.equal, case.weights, same.weights))
    assert not broken(case.state["curvature"])
    same.objective.closure(same.x, same.y)  # the number that the poisoned step has used up
    for _ in range(2):
        assert attempt(case) is None
        same.step()
    assert all(map(torch.equal, case.weights, same.weights))
    needs = case.optimizer.descent.needs
    passes = len(needs - ({"gradient"} if "data" in needs else set()))
    found = outcome(case, poisoned(case, "first", value_for(name), str(passes)))
    if not ALGORITHMS[name].whole:
        assert isinstance(found.error, Diverged)
    assert found.after == [None] * 3


@algorithms
def test_the_second_look_and_the_loss(name: str) -> None:
    """The pair is left out, counted and said, and the next pair is learnt from. A loss that is not
    finite ends the step.
    """
    case = Case(name)
    found = outcome(case, poisoned(case, "second", value_for(name)))
    assert found.error is None
    assert found.after == [None] * 3
    assert found.moved == 3
    said = [line for line in found.said if "left out" in line]
    assert case.optimizer.descent.left_out == (name in TWICE)
    assert [line.startswith(f"{name}: ") for line in said] == [True] * (name in TWICE)
    for look in ("first", "second"):
        found = outcome(case, poisoned(case, look, math.nan, "loss"), unmoved=look == "first")
        assert isinstance(found.error, Diverged) == (
            look == "first" or case.optimizer.descent.wants_step
        )
        assert found.after == [None] * 3


@algorithms
def test_factorisations_that_fail(name: str) -> None:
    case = Case(name)
    assert outcome(case, failing("raise"), unmoved=False).after == [None] * 3


@algorithms
def test_train_stops_alike_whatever_the_method(name: str, tmp_path: Path) -> None:
    """`stopped` in the log, and the last good weights put back."""
    case = Case(name, clean=0)
    before, data = case.weights, Dataset("made", case.x, case.y, "made here")
    folder = tmp_path if name in ON_DISK else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cl.CurvlabWarning)
        run = cl.train(
            case.objective,
            data.batches(12),
            algorithm=name,
            lr=1e30,
            refresh_every=1,
            steps=2,
            folder=folder,
            progress=False,
        )
    assert all(map(torch.equal, case.weights, before))
    ds = cl.open(tmp_path) if folder else run.dataset
    assert ds.attrs["stopped"] == run.stopped
    assert run.stopped.startswith("diverged in epoch ")
    assert "block" in run.stopped
    assert all(
        np.isfinite(ds[v].values[1:][~np.isnan(ds[v].values[1:])]).all() for v in ds.data_vars
    )


@algorithms
def test_a_damping_of_zero(name: str) -> None:
    """Bad input where a document needs one above 0; else a step, or Diverged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cl.CurvlabWarning)
        try:
            case = Case(name, {"damping": 0.0}, clean=0)
            error = attempt(case)
        except CurvlabError as refused:
            error = refused
    if error is None:
        return
    assert isinstance(error, CurvlabError)
    assert "damping" in str(error) or "learning rate" in str(error)
    if not isinstance(error, Diverged):
        assert name.startswith(("k-bfgs", "kf-bfgs", "smw", "hf"))


# ------------------------------------------------------------------------------------------------
# singly


def test_a_pair_that_is_left_out_starts_the_averages_again() -> None:
    case = Case("k-bfgs", {"lr": 0.03})
    with (
        poisoned(case, "second", math.nan),
        pytest.warns(cl.CurvlabWarning, match="k-bfgs: block 1 .* is left out"),
    ):
        case.step()
    block, other = (curvature_of(case.optimizer).blocks[name] for name in "12")
    H_g = block.factors[0].clone()
    assert block.last["g"].skipped == "not finite"
    assert not block.s.any()
    assert not block.y.any()
    assert other.s.any()
    case.step()
    assert block.last["g"].skipped == ""
    assert not torch.equal(block.factors[0], H_g)
    assert int(block.left_out) == 1


def test_it_is_said_once_and_counted() -> None:
    case = Case("k-bfgs-l")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            with poisoned(case, "second", math.inf):
                case.step()
    assert len([w for w in caught if "left out" in str(w.message)]) == 1
    assert case.optimizer.descent.left_out == 3
    again = Case("k-bfgs-l")
    again.optimizer.load_state_dict(case.optimizer.state_dict())
    assert again.optimizer.descent.left_out == 3


def test_double_grad_leaves_out_a_second_gradient() -> None:
    case = Case("k-bfgs-20", {"double_grad": True})
    with poisoned(case, "second", math.nan), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        case.step()
    assert sum("double_grad" in str(w.message) for w in caught) == 1
    assert case.optimizer.descent.left_out == 2
    assert attempt(case) is None


def test_the_pairs_left_out_are_in_the_log_of_training() -> None:
    case = Case("skqn-l", clean=0)
    data = Dataset("made", case.x, case.y, "made here")
    with (
        poisoned(case, "second", math.nan),
        pytest.warns(cl.CurvlabWarning, match="skqn-l: block 1 .* is left out"),
    ):
        ds = cl.train(
            case.objective, data.batches(6), algorithm="skqn-l", epochs=2, progress=False
        ).dataset
    assert ds["pairs_left_out"].values.tolist() == [
        0,
        1,
        3,
    ]  # a pair is looked at with the next minibatch
    assert "pairs_left_out" in ds


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["A", "G"])
def test_no_pi_of_what_is_not_finite(bad: float, which: str) -> None:
    factors = {"A": torch.eye(3), "G": torch.eye(2)}
    factors[which][0, 0] = bad
    with pytest.raises(Diverged, match=f"the factor {which} contains NaN or Inf"):
        pi_split(factors["A"], factors["G"], 1.0)


def test_pi_of_a_zero_factor_is_one() -> None:
    """A layer that no example reaches: its derivatives are zero, and the split is even."""
    zero, one = torch.zeros(2, 2), torch.eye(3)
    for A, G in (
        (one, zero),
        (zero, one),
        (zero, zero),
        (1e300 * one.double(), 1e-300 * one.double()),
    ):
        assert pi_split(A, G, 0.25) == (0.5, 0.5)
    assert pi_split(1e-300 * one.double(), 1e300 * one.double(), 0.25) == (0.5, 0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_moment_that_is_not_finite_is_named(bad: float) -> None:
    good, spoilt, large = torch.eye(3), torch.eye(2), torch.full((600, 600), 1e36)
    moments = [("1", "A", good), ("1", "G", large), ("2", "A", spoilt)]
    check_moments(moments)  # though a length overflows
    spoilt[1, 1] = bad
    with pytest.raises(Diverged, match=r"^A contains NaN or Inf") as caught:
        check_moments(moments)
    assert caught.value.block == "2"


def test_lbfgs_at_a_learning_rate_of_1000() -> None:
    """A step whose length is beyond the dtype is no step."""
    case = Case("lbfgs", clean=0)
    with torch.no_grad():
        case.objective.model.get_parameter("3.weight").mul_(1e19)
    before = case.weights
    case.optimizer.param_groups[0]["lr"] = 1000.0
    error = attempt(case)
    assert isinstance(error, Diverged)
    assert "block" in str(error)
    assert all(map(torch.equal, case.weights, before))


def test_a_step_that_the_weights_do_not_hold() -> None:
    objective = problem("tanh", dtype=torch.float32).objective()
    direction = {b.name: torch.zeros(b.shape) for b in objective.blocks}
    direction["2"][0, 0] = 1e10
    check_direction(objective, direction, 1e5)
    for rate, says in (
        (1e10, "the step of block 2 .* a learning rate of 1e.10"),
        (math.inf, "the step of block 2"),
    ):
        with pytest.raises(Diverged, match=says):
            check_direction(objective, direction, rate)
    direction["1"][0, 0] = math.nan
    with pytest.raises(
        Diverged, match=r"the direction of block 1 .* is not finite; nothing was moved"
    ):
        check_direction(objective, direction, 0.0)


def test_hessian_free_does_not_start_from_what_is_not_finite() -> None:
    case = Case("hf")
    curvature = case.optimizer.descent.curvature
    assert isinstance(curvature, HessianFree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HessianFree, "_best", lambda self, iterates: iterates[-1] * math.nan)
        assert isinstance(attempt(case), Diverged)
    assert curvature.solution is None
    assert attempt(case) is None


@pytest.mark.parametrize(
    ("error", "numerical"),
    [
        (ZeroDivisionError("float division by zero"), True),
        (OverflowError("int too large"), True),
        (LinAlgError("linalg.cholesky: not positive-definite"), True),
        (np.linalg.LinAlgError("Singular matrix"), True),
        (RuntimeError("value cannot be converted to type float without overflow"), True),
        (ValueError("math domain error"), True),
        (ValueError("array must not contain infs or NaNs"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (CurvlabError("damping must be 0 or positive"), False),
        (KeyError("singular"), False),
        (TypeError("unsupported"), False),
    ],
)
def test_which_errors_are_divergence(error: Exception, numerical: bool) -> None:
    found = named(error, "block 1 (w)", block="1", method="m")
    assert (of_numbers(error), isinstance(found, Diverged)) == (numerical, numerical)
    if numerical:
        assert str(found).startswith("block 1 (w): ")
        assert isinstance(found, Diverged)
        assert (found.block, found.method) == ("1", "m")
    else:
        assert found is error or type(found) is type(error)


def test_an_error_is_named_once_and_keeps_its_kind() -> None:
    with (
        pytest.raises(Indefinite, match=r"^block 1: not definite$") as caught,
        Naming("block 1", "1"),
        Naming("block 1", "1"),
    ):
        raise Indefinite("not definite", -2.0)
    assert caught.value.block == "1"
    with pytest.raises(KeyError), Naming("block 1", "1"):
        raise KeyError("a bug stays what it is")


def test_numbers_that_are_not_finite_make_any_error_of_theirs_divergence() -> None:
    error = CurvlabError("the model has no such thing")
    assert named(error, "m", unsound=lambda: False) is not error
    assert not isinstance(named(error, "m", unsound=lambda: False), Diverged)
    assert isinstance(named(error, "m", unsound=lambda: True), Diverged)
    assert named(TypeError("a bug"), "m", unsound=lambda: True).args == ("a bug",)


def test_bad_input_stays_bad_input() -> None:
    case = Case("kfac")
    with pytest.raises(CurvlabError, match="out of range") as caught:
        case.optimizer.step(case.objective.closure(case.x, case.y + 7))
    assert not isinstance(caught.value, Diverged)
    with pytest.raises(CurvlabError, match="damping above 0") as of_damping:
        Case("k-bfgs", {"damping": 0.0})
    assert not isinstance(of_damping.value, Diverged)


# ------------------------------------------------------------------------------------------------
# compare


def minibatches(case: Case, count: int) -> list[tuple[Tensor, Tensor]]:
    return [(case.x, case.y)] * count


@contextmanager
def refreshing(name: str, at: int) -> Iterator[None]:
    """A method's update fails with torch's own error, from its call number `at` on."""
    kind = type(descent(name, problem("tanh").objective()).curvature)
    plain, calls = kind.update, [0]

    def update(self: Any, observation: Any) -> None:
        if self.name == name:
            calls[0] += 1
            if calls[0] > at:
                raise LinAlgError("linalg.eigh: The algorithm failed to converge")
        plain(self, observation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "update", update)
        yield


@pytest.mark.thinned(2)
@algorithms
def test_compare_names_the_method_and_the_others_go_on(name: str, tmp_path: Path) -> None:
    case = Case("sgd-m", clean=0)
    reference = "kfac" if name == "sgd-m" else "sgd-m"
    others = [name, "adam"] if name != "adam" else ["adam", "tnt"]
    path = tmp_path / "run.h5" if name in ON_DISK else None
    with (
        refreshing(name, 2),
        pytest.warns(
            cl.CurvlabWarning, match=f"{name} left the finite range and is NaN from step 2 on"
        ),
    ):
        run = cl.compare(
            case.objective, minibatches(case, 4), reference=reference, algorithms=others, path=path
        )
    assert list(run.diverged) == [name]
    [lost] = run.diverged[name]
    assert (lost["seed"], lost["step"]) == (0, 2)
    assert "LinAlgError" in lost["reason"]
    ds = cl.open(tmp_path) if path else run.dataset
    assert json.loads(ds.attrs["diverged"]) == run.diverged
    norms = ds["direction_norm"]
    assert np.isnan(norms.sel(algorithm=name).values[2:]).all()
    assert np.isfinite(norms.sel(algorithm=name).values[:2]).all()
    rest = [n for n in ds["algorithm"].values if n != name]
    assert np.isfinite(norms.sel(algorithm=rest)).all()
    assert np.isnan(run.table().sel(algorithm=name)).all()
    assert [row[0] for row in tables.cosines(ds).rows if row[0].startswith(name)] == [
        f"{name} (diverged at step 2)"
    ]


def test_compare_of_damping_zero_with_every_probe() -> None:
    """What adam -- damping 0 -- was: NaN in silence, and means over the steps that were left."""
    case = Case("sgd-m", clean=0)
    with torch.no_grad():
        case.x[:, 0] = 0.0  # its weights have no gradient: 0 / 0
    probes = [f"{n}:1" for n, p in PROBES.items() if "compare" in p.where and n not in runs.ALWAYS]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = cl.compare(
            case.objective,
            minibatches(case, 3),
            reference="k-bfgs-20",
            algorithms=["adam", "kfac", "block-hessian"],
            damping=0.01,
            probes=probes,
        )
        assert not run.diverged
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                runs.CompareSettings,
                "dampings",
                lambda self, size: dict.fromkeys(self.names, 0.01) | {"adam": 0.0},
            )
            run = cl.compare(
                case.objective,
                minibatches(case, 3),
                reference="k-bfgs-20",
                algorithms=["adam", "kfac", "block-hessian"],
                damping=0.01,
                probes=probes,
            )
    assert {name: (one["step"], one["block"]) for name, [one] in run.diverged.items()} == {
        "adam": (0, "1")
    }
    assert any("adam left the finite range" in str(w.message) for w in caught)
    assert np.isnan(run.dataset["cosine"].sel(algorithm="adam")).all()
    assert np.isfinite(run.dataset["cosine"].sel(algorithm=["kfac", "block-hessian"])).all()


def test_the_reference_stops_the_comparison_and_the_log_is_saved(tmp_path: Path) -> None:
    case = Case("sgd-m", clean=0)
    with (
        refreshing("kfac", 2),
        pytest.raises(Diverged, match="the reference kfac left the finite range at step 2: "),
    ):
        cl.compare(
            case.objective,
            minibatches(case, 4),
            reference="kfac",
            algorithms=["adam"],
            path=tmp_path / "run.h5",
        )
    ds = cl.open(tmp_path)
    assert ds.sizes["step"] == 2
    assert ds.attrs["stopped"].startswith("the reference kfac left the finite range at step 2: ")
    assert list(json.loads(ds.attrs["diverged"])) == ["kfac"]


def test_learning_that_fails_is_named(tmp_path: Path) -> None:
    case = Case("sgd-m", clean=0)
    kind = type(descent("k-bfgs", problem("tanh").objective()).curvature)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "learn", lambda self, transition: 1 / 0)
        with pytest.warns(cl.CurvlabWarning, match="k-bfgs left the finite range .* step 1"):
            run = cl.compare(
                case.objective, minibatches(case, 3), reference="sgd-m", algorithms=["k-bfgs"]
            )
    assert [one["step"] for one in run.diverged["k-bfgs"]] == [1]


def test_a_warm_start_that_fails_is_named() -> None:
    case = Case("sgd-m", clean=0)
    kind = type(descent("kfac", problem("tanh").objective()).curvature)
    plain = kind.absorb

    def absorb(self: Any, observation: Any) -> None:
        if self.name == "kfac":
            raise OverflowError("cannot convert float infinity to integer")
        plain(self, observation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "absorb", absorb)
        with pytest.warns(cl.CurvlabWarning, match="kfac left the finite range .* step 0 on"):
            run = cl.compare(
                case.objective,
                minibatches(case, 3),
                reference="block-fisher",
                algorithms=["kfac", "tnt"],
                warm=minibatches(case, 2),
            )
    assert list(run.diverged) == ["kfac"]
    assert np.isfinite(run.dataset["cosine"].sel(algorithm="tnt")).all()


@pytest.mark.filterwarnings("always::curvlab.errors.CurvlabWarning")
def test_the_commands_exit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1, with the method named in table, log and a line; of several seeds likewise."""
    out = tmp_path / "two"
    words = [
        "compare",
        "--model",
        "mlp-256-20",
        "--batch-size",
        "20000",
        "--steps",
        "1",
        "--reference",
        "sgd-m",
    ]
    assert (
        call(*words, "--algorithms", "adam", "--damping", "0", "--seeds", "2", "--out", str(out))
        == 1
    )
    stdout, stderr = capsys.readouterr()
    assert "adam (diverged" in stdout
    assert "adam (seed 0) left the finite range and is NaN from step 0 on" in stderr
    assert "Traceback" not in stderr
    assert [one["seed"] for one in json.loads(cl.open(out).attrs["diverged"])["adam"]] == [0, 1]


# ------------------------------------------------------------------------------------------------
# the sweep


def injections() -> dict[str, tuple[Callable[..., Any], bool]]:
    """{name: (case → context of one step, whether nothing may move where it ends in an error)}."""
    found: dict[str, tuple[Callable[..., Any], bool]] = {}
    for value in (math.nan, math.inf, -math.inf):
        for look in ("first", "second"):
            found[f"{look} look, {value}"] = (
                lambda c, v=value, k=look: poisoned(c, k, v),
                look == "first",
            )
            found[f"{look} look's loss, {value}"] = (
                lambda c, v=value, k=look: poisoned(c, k, v, "loss"),
                look == "first",
            )
        for number in ("1", "2"):
            found[f"pass {number}, {value}"] = (
                lambda c, v=value, n=number: poisoned(c, "first", v, n),
                True,
            )
    for how in ("raise", "nan"):
        for which in (*((one,) for one in (*FACTORISATIONS, "inverse")), FACTORISATIONS):
            found[f"{'+'.join(which)} {how}"] = (lambda c, h=how, w=which: failing(h, w), False)
    return found


class _Rates:
    """A learning rate, for one step."""

    def __init__(self, case: Case, rate: float) -> None:
        self.case, self.rate = case, rate

    def __enter__(self) -> None:
        self.before = [group["lr"] for group in self.case.optimizer.param_groups]
        for group in self.case.optimizer.param_groups:
            group["lr"] = self.rate

    def __exit__(self, *args: object) -> None:
        for group, rate in zip(self.case.optimizer.param_groups, self.before, strict=True):
            group["lr"] = rate


@pytest.mark.slow
def test_sweep() -> None:
    """At least 1,500 short runs: every method, every injection, both precisions where numbers
    overflow in one alone.
    """
    failures, total = [], 0
    for name in NAMES:
        for what, (inject, unmoved) in injections().items():
            dtype = torch.float32 if total % 2 else torch.float64
            total += 1
            case = Case(name, dtype=dtype)
            try:
                outcome(case, inject(case), unmoved=unmoved)
            except AssertionError as error:
                failures.append(f"{name}, {what}, {dtype}: {str(error).splitlines()[0]}")
        for rate in (1e3, 1e8, 1e16, 1e30):
            for dtype in (torch.float32, torch.float64):
                total += 1
                case = Case(name, dtype=dtype)
                with _Rates(case, rate), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    errors = [attempt(case) for _ in range(8)]
                for seen in errors:
                    try:
                        check_error(case, seen)
                    except AssertionError as wrong:
                        failures.append(
                            f"{name}, lr {rate:g}, {dtype}: {str(wrong).splitlines()[0]}"
                        )
                        break
        for every in (1, 3):
            for value in (math.nan, math.inf):
                for look in ("first", "second"):
                    total += 1
                    case = Case(name, {"update_every": every, "refresh_every": 20}, clean=2)
                    try:
                        outcome(case, poisoned(case, look, value), unmoved=look == "first")
                    except AssertionError as error:
                        failures.append(
                            f"{name}, T {every}, {look} {value}: {str(error).splitlines()[0]}"
                        )
    print(f"{len(failures)} of {total} failed")
    assert total >= 1500
    assert not failures, "\n".join(failures)


def test_the_optimizer_is_torchs() -> None:
    assert isinstance(Case("adam", clean=0).optimizer, Optimizer)
