"""Errors of a user's own code: exit code 2, their own frames, one line of curvlab's; no folder of a
run that took no step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import call
from test_signals import RUN, small  # a fixture  # noqa: F401
from torch import Tensor, nn

import curvlab as cl
from curvlab import comparison_run, datasets, likelihoods, models
from curvlab.cli import terminal
from curvlab.datasets import DataEntry, Dataset, files
from curvlab.errors import CurvlabError, cause_of
from curvlab.models import MODELS
from curvlab.observation import Stream
from curvlab.probes import PROBES
from curvlab.system import blame, paths

OWN = """import sys
import torch
from torch import nn

RAISED = {raised!r}
AT = {at}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(6, 3), 0

    def forward(self, x):
        self.calls += 1
        if self.calls > AT:
            self.fail()
        return self.layer(x)

    def fail(self):
        exec(RAISED)


def loading():
    exec(RAISED)


def outputs():
    return Odd()


class Odd(Net):
    def forward(self, x):
        return eval(RAISED)(self.layer(x))


def lazy():
    return nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))


def misfit():
    return nn.Sequential(nn.Linear(6, 4), nn.Linear(5, 3))
"""

KINDS = {
    "KeyError": "{}['weights']",
    "AttributeError": "torch.nosuch",
    "ZeroDivisionError": "1 / 0",
    "AssertionError": "assert False, 'never'",
    "TypeError": "len(3)",
    "IndexError": "[][2]",
    "RuntimeError": "raise RuntimeError('mine')",
    "RecursionError": "(lambda f: f(f))(lambda f: f(f))",
    "StopIteration": "raise StopIteration",
    "FileNotFoundError": "open('/nowhere/at/all')",
    "SystemExit": "sys.exit(0)",
    "Exception": "raise Exception('[red]markup[/b] \\x1b[31m')",
    "BaseException": "raise BaseException('odd')",
}
COMMANDS = {
    "train": RUN[:1] + RUN[3:],
    "compare": [
        "compare",
        "--reference",
        "kfac",
        "--algorithms",
        "sgd-m",
        "--batch-size",
        "10",
        "--steps",
        "2",
    ],
    "spectrum": ["spectrum", "--samples", "20", "--batch-size", "10", "--after", "0,2"],
}


Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Makes a module of the user's in the working folder; gives its name."""
    monkeypatch.chdir(tmp_path)
    made: list[str] = []

    def new(raised: str, at: int = 0) -> str:
        name = f"own_of_user_errors_{len(made)}"
        (tmp_path / f"{name}.py").write_text(OWN.format(raised=raised, at=at))
        made.append(name)
        sys.modules.pop(name, None)
        return name

    yield new
    for name in made:
        sys.modules.pop(name, None)


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> list[str]:
    """Run what fails for the user's own code; the lines on standard error, of which the last is
    curvlab's.
    """
    capsys.readouterr()
    assert call(*words) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("epoch ")]
    assert [i for i, line in enumerate(lines) if line.startswith("curvlab: ")] == [
        len(lines) - 1
    ], lines
    assert not any(
        "Traceback" in line or "curvlab/" in line or "site-packages" in line for line in lines
    ), lines
    return lines


@pytest.mark.parametrize("kind", KINDS)
def test_in_forward(
    kind: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write(KINDS[kind])
    lines = told(
        capsys, *COMMANDS["train"], "--model", f"{name}:Net", "--data", "made", "--out", "out"
    )
    assert lines[0] == f'  File "{tmp_path / name}.py", line 17, in forward'
    assert lines[1].strip() == "self.fail()"
    assert any(line.startswith(kind) for line in lines[:-1])
    assert len(lines) < 40
    assert lines[-1].startswith("curvlab: your own code ")
    assert "curvlab -v train" in lines[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["KeyError", "SystemExit"])
@pytest.mark.parametrize("command", COMMANDS)
def test_at_load(
    kind: str, command: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write(KINDS[kind])
    lines = told(
        capsys, *COMMANDS[command], "--model", f"{name}:loading", "--data", "made", "--out", "out"
    )
    assert f'  File "{tmp_path / name}.py", line 25, in loading' in lines
    assert not (tmp_path / "out").exists()


def test_a_module_that_is_no_python(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_no_python.py").write_text("def f(:\n")
    lines = told(capsys, "train", "--model", "own_no_python:f", "--data", "made")
    assert f'  File "{tmp_path}/own_no_python.py", line 1' in lines
    assert "SyntaxError: invalid syntax" in lines
    assert "importing 'own_no_python' failed" in lines[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_in_the_first_steps_and_later(
    command: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step nothing is left; after it log and checkpoint are, and the line says
    where.
    """
    found = []
    for at in range(1, 20) if command == "compare" else (1, 6, 16, 36, 80):
        name = write(KINDS["KeyError"], at)
        out = tmp_path / str(at)
        capsys.readouterr()
        code = call(
            *COMMANDS[command], "--model", f"{name}:Net", "--data", "made", "--out", str(out)
        )
        lines = capsys.readouterr().err.splitlines()
        if code == 0:
            break
        assert code == 2
        assert "KeyError: 'weights'" in lines
        saved = (out / "run.h5").exists()
        assert saved or not out.exists()
        assert (f"the log so far is saved in {out}/run.h5" in lines[-1]) is saved
        assert not saved or len(cl.open(out).dims)
        found.append(saved)
    assert found[0] is False
    assert found == sorted(found)
    assert found[-1] is True


@pytest.mark.parametrize("step", [1, 2])
def test_only_a_run_without_a_step_is_taken_back(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the first step all of it, though epoch 0 was evaluated, logged and kept."""
    steps = []
    real = cl.Objective.closure

    def closure(self: cl.Objective, x: Any, y: Any = None, stream: Stream = "step") -> object:
        steps.extend([1] * (stream == "step"))
        if len(steps) == step:
            raise KeyError("a loader's")
        return real(self, x, y, stream)

    monkeypatch.setattr(cl.Objective, "closure", closure)
    told(capsys, *RUN, "--out", str(tmp_path / "out"))
    found = (
        sorted(p.name for p in (tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else []
    )
    assert found == ([] if step == 1 else ["checkpoint.pt", "run.h5"])


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        ("lambda z: z.detach()", "do not depend on a trainable parameter"),
        ("lambda z: z.to(torch.complex64)", "the model's outputs are torch.complex64"),
        ("lambda z: z.argmax(1)", "the model's outputs are torch.int64"),
        ("lambda z: [z]", "the model returned a list, not one tensor"),
        ("lambda z: None", "the model returned a NoneType"),
        ("lambda z: z[:2]", "one for each example"),
        ("lambda z: z * float('nan')", "nan"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_odd_outputs(
    command: str,
    raised: str,
    says: str,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        *COMMANDS[command],
        "--model",
        f"{write(raised)}:outputs",
        "--data",
        "made",
        "--out",
        "out",
    ]
    lines = told(capsys, *words)
    assert says in lines[-1].lower() or says in lines[-1]
    assert len(lines) == 1
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("function", ["lazy", "misfit"])
def test_layers_that_do_not_fit(
    command: str, function: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *COMMANDS[command],
        "--model",
        f"{write('')}:{function}",
        "--data",
        "made",
        "--out",
        "out",
    ]
    assert len(told(capsys, *words)) <= 3
    assert not (tmp_path / "out").exists()


def test_in_a_likelihood_a_data_set_and_a_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each in turn, put into curvlab's tables as a user's module does it; this file stands for
    theirs.
    """

    class Bad(likelihoods.Categorical):
        def loss(self, z: Tensor, y: Tensor) -> Tensor:
            raise KeyError("likelihood")

    def bad() -> tuple[Dataset, Dataset]:
        raise KeyError("data set")

    def take(frame: object) -> dict[str, Any]:
        raise KeyError("probe")

    words = [*RUN, "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setitem(likelihoods.LIKELIHOODS, "bad", Bad)
        patch.setitem(MODELS, "small", replace(MODELS["small"], likelihood="bad"))
        assert "KeyError: 'likelihood'" in told(capsys, *words)
    with monkeypatch.context() as patch:
        patch.setitem(datasets.DATASETS, "made", DataEntry("made", bad))
        assert "KeyError: 'data set'" in told(capsys, *words)
    with monkeypatch.context() as patch:
        patch.setitem(PROBES, "loss", replace(PROBES["loss"], measure=take))
        assert "KeyError: 'probe'" in told(capsys, *words)
    assert not (tmp_path / "out").exists()


def test_the_whole_traceback_with_v(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    name = write(KINDS["KeyError"])
    words = [*COMMANDS["train"], "--model", f"{name}:Net", "--data", "made"]
    for before, after in ((["-v"], []), ([], ["--verbose"])):
        assert call(*before, *words, *after) == 2
        err = capsys.readouterr().err
        assert "Traceback (most recent call last)" in err
        assert "curvlab/training/run.py" in err
        assert f"{name}.py" in err


def test_an_error_of_curvlabs_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing: dict[str, object] = {}
    monkeypatch.setattr(models, "find", lambda name, seed: nothing["entry"])
    monkeypatch.setattr(blame, "_is_own", lambda file: False)  # this file is no user's here
    assert call("compare", "--model", "small") == blame.BUG == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "curvlab: an error of curvlab's own, KeyError: 'entry' (curvlab/problem.py, line "
    )
    assert line.endswith("please report it, with the whole traceback: curvlab -v compare …")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), OSError(28, "No space left")],
)
def test_an_error_of_the_machine(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(named: object) -> None:
        raise error

    monkeypatch.setattr(comparison_run, "prepare_comparison", fail)
    monkeypatch.setattr(blame, "_is_own", lambda file: False)
    assert call("compare", "--model", "small") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ("not enough memory" in line) is not isinstance(error, OSError)


@pytest.mark.parametrize("kind", ["KeyError", "SystemExit", "TypeError"])
def test_in_python_they_stay_what_they_are(kind: str, tmp_path: Path) -> None:
    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            exec(KINDS[kind], {"sys": sys})
            return x

    objective = cl.Objective(Net(6, 3), cl.likelihoods.Categorical())
    minibatches = [(torch.zeros(4, 6), torch.zeros(4, dtype=torch.long))]
    kinds = {"KeyError": KeyError, "SystemExit": SystemExit, "TypeError": TypeError}
    with pytest.raises(kinds[kind]):
        cl.train(objective, minibatches, folder=tmp_path / "out")
    with pytest.raises(kinds[kind]):
        cl.compare(objective, minibatches, algorithms=["sgd-m"], path=tmp_path / "run.h5")
    assert not list(tmp_path.glob("**/*.h5"))


# ------------------------------------------------------------------------------------------------
# errors of the system


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("the share is gone\nat 3 o'clock"), "the share is gone"),
        (OSError(), "OSError"),
        (RuntimeError("a writer\nof torch"), "a writer"),
        (PermissionError(), "PermissionError"),
    ],
)
def test_an_error_of_the_system_is_never_none(error: Exception, said: str) -> None:
    """One without a number has no `strerror`."""
    assert cause_of(error) == said


def test_nobody_prints_what_may_be_none() -> None:
    root = Path(cl.__file__).parent
    assert [p.name for p in root.rglob("*.py") if "strerror" in p.read_text()] == ["errors.py"]


def test_folders_and_files_that_cannot_be_written_for_a_reason_without_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("the share is gone")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(CurvlabError, match="cannot be written: the share is gone"):
        terminal.folder_for(tmp_path / "new", "run")
    with pytest.raises(CurvlabError, match=r"cannot be written: .*new: the share is gone"):
        paths.check_folder(tmp_path / "new", ("run.h5",))
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(CurvlabError, match="cannot be read: the share is gone"):
        files.verify(tmp_path / "data", "data", ("0" * 64,))
