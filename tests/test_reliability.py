"""Every call that hostile use once broke, by kind, with its answer now: exit code and what the one
line says.

What needs a process, a signal or a damaged file of its own stands in a test elsewhere, which the
row names.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5netcdf
import pytest
import torch
import xarray as xr
from problems import dense
from test_hostile import small
from torch import nn

import curvlab as cl
from curvlab import datasets
from curvlab.cli import app as cli
from curvlab.datasets import DataEntry, Dataset

pytestmark = pytest.mark.filterwarnings("default::curvlab.errors.CurvlabWarning")

MODEL = ["--model", "mlp-256-20"]
SHORT = [*MODEL, "--steps", "2", "--batch-size", "100"]
OWN = """
import os, sys
import torch
from torch import nn

def of(error):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(256, 10)
        def forward(self, x):
            return error(self.layer(x))
    return lambda: (Net(), "categorical", "mnist16")

key = of(lambda z: {}["absent"])
zero = of(lambda z: 1 / 0)
none = of(lambda z: z.absent)
fails = of(lambda z: [].index(1))
free = of(lambda z: z.detach())
turned = of(lambda z: z.to(torch.complex64))
whole = of(lambda z: z.argmax(1))
lazy = lambda: (nn.LazyLinear(10), "categorical", "mnist16")
exits = lambda: sys.exit(0)
"""


@dataclass(frozen=True)
class Row:
    """A call, the exit code, and what standard error says (a pattern); `environment` around it."""

    kind: int
    call: list[str]
    code: int
    says: str
    environment: tuple[tuple[str, str], ...] = ()


COMMANDS = [
    Row(
        4,
        ["train", *SHORT, "--seed", "18446744073709551616"],
        2,
        r"seed must be .*18446744073709551616",
    ),
    Row(
        4,
        ["compare", *MODEL, "--steps", "9223372036854775808"],
        2,
        r"steps.* must be .*9223372036854775808",
    ),
    Row(4, ["spectrum", *MODEL, "--draws", "99999999999999999999"], 2, r"99999999999999999999"),
    Row(
        4,
        ["compare", *SHORT, "--update-every", "-999999999999999999999"],
        2,
        r"-999999999999999999999",
    ),
    Row(4, ["spectrum", *MODEL, "--after", "9223372036854775808"], 2, r"9223372036854775808"),
    Row(8, ["train", *SHORT, "--out", "x" * 300], 2, r"a name of 300 bytes"),
    Row(
        8, ["train", *SHORT, "--out", "/".join(["d"] * 1000)], 2, r"1000 new folders in one another"
    ),
    Row(8, ["plot", "x" * 300], 2, r"a name of 300 bytes"),
    Row(8, ["report", "x" * 300], 2, r"a name of 300 bytes"),
    Row(8, ["train", "--resume", "--out", "x" * 300], 2, r"a name of 300 bytes"),
    Row(
        8,
        ["train", *SHORT, "--out", "taken"],
        2,
        r"training\.png cannot be written: it is a folder",
    ),
    Row(
        8,
        ["compare", *SHORT, "--out", "taken"],
        2,
        r"cosine\.png cannot be written: it is a folder",
    ),
    Row(8, ["plot", "run", "-o", "x.pgf"], 2, r"\.png, \.svg, \.pdf|pgf"),
    Row(
        8,
        ["train", *MODEL, "--data", "a9a"],
        2,
        r"CURVLAB_DATA.*no such user",
        (("CURVLAB_DATA", "~nosuch"),),
    ),
    Row(
        8,
        ["train", *MODEL, "--data", "a9a"],
        2,
        r"CURVLAB_CACHE.*no such user",
        (("CURVLAB_CACHE", "~nosuch"),),
    ),
    Row(
        10,
        [
            "train",
            *SHORT,
            "--schedule",
            "StepLR",
            "--schedule-set",
            "step_size=1",
            "--schedule-set",
            "gamma=abc",
        ],
        2,
        r"gamma.*abc",
    ),
    Row(
        10,
        ["train", *SHORT, "--schedule", "PolynomialLR", "--schedule-set", "power=-1"],
        2,
        r"power.*-1",
    ),
    Row(
        10,
        [
            "train",
            *MODEL,
            "--epochs",
            "9",
            "--schedule",
            "OneCycleLR",
            "--schedule-set",
            "total_steps=2",
            "--schedule-set",
            "max_lr=0.1",
        ],
        2,
        r"OneCycleLR.*2|total_steps",
    ),
    Row(
        10,
        ["train", *SHORT, "--schedule", "ReduceLROnPlateau", "--schedule-set", "patience=abc"],
        2,
        r"patience.*abc",
    ),
    Row(
        11, ["train", "--model", "own:key", "--steps", "1"], 2, r'own\.py", line \d+[\s\S]*KeyError'
    ),
    Row(
        11,
        ["train", "--model", "own:zero", "--steps", "1"],
        2,
        r'own\.py", line \d+[\s\S]*ZeroDivisionError',
    ),
    Row(
        11,
        ["train", "--model", "own:none", "--steps", "1"],
        2,
        r'own\.py", line \d+[\s\S]*AttributeError',
    ),
    Row(
        11,
        ["compare", "--model", "own:fails", "--steps", "1"],
        2,
        r'own\.py", line \d+[\s\S]*ValueError',
    ),
    Row(11, ["train", "--model", "own:free", "--steps", "1"], 2, r"outputs"),
    Row(11, ["train", "--model", "own:turned", "--steps", "1"], 2, r"complex"),
    Row(11, ["train", "--model", "own:whole", "--steps", "1"], 2, r"outputs are torch\.int64"),
    Row(11, ["train", "--model", "own:lazy", "--steps", "1"], 2, r"lazy"),
    Row(
        13,
        [
            "train",
            *MODEL,
            "--steps",
            "20",
            "--batch-size",
            "100",
            "--algorithm",
            "lbfgs",
            "--lr",
            "1e30",
        ],
        1,
        r"diverged",
    ),
    Row(
        12,
        ["train", *SHORT, "--algorithm", "kfac", "--lr", "1e30", "--refresh-every", "1"],
        1,
        r"diverged",
    ),
    Row(
        19,
        [
            "compare",
            *SHORT,
            "--reference",
            "sgd-m",
            "--algorithms",
            "adam,rmsprop",
            "--damping",
            "0",
        ],
        1,
        r"adam.*step 0",
    ),
    Row(
        20,
        [
            "train",
            *MODEL,
            "--steps",
            "20",
            "--batch-size",
            "100",
            "--algorithm",
            "skqn-b1",
            "--lr",
            "1e30",
        ],
        1,
        r"diverged",
    ),
    Row(22, ["train", "--model", "own:exits", "--steps", "1"], 2, r"SystemExit|exit"),
    Row(22, ["compare", *SHORT, "--damping", "-1", "--out", "new"], 2, r"damping"),
]

ELSEWHERE = {
    1: [
        "test_storage.test_a_full_disk_ends_every_command_with_one_line",
        "test_storage.test_a_full_disk_of_a_process_by_itself",
    ],
    2: [
        "test_signals.test_a_signal_in_a_step_loses_no_step",
        "test_signals.test_a_real_process_that_slurm_ends",
    ],
    3: [
        "test_signals.test_while_importing",
        "test_signals.test_a_second_signal_comes_at_once_and_leaves_nothing_half_written",
    ],
    5: [
        "test_foreign_logs.test_hostile_text_everywhere_in_a_log",
        "test_foreign_logs.test_any_name_is_drawn",
    ],
    6: [
        "test_foreign_logs.test_any_attribute_may_be_odd",
        "test_foreign_logs.test_report_and_plot_leave_nothing_beside",
    ],
    7: [
        "test_streams.test_a_pipe_that_ends_is_no_error",
        "test_streams.test_other_encodings_get_replacements",
    ],
    9: [
        "test_storage.test_a_folder_in_which_another_process_writes_is_refused_and_a_killed_one_is_not"
    ],
    14: ["test_streams.test_a_process_with_head_closed_streams_and_a_backend_that_is_not_there"],
    15: ["test_storage.test_a_file_does_not_decide_what_is_imported"],
    16: [
        "test_storage.test_no_flipped_bit_goes_unseen",
        "test_storage.test_contents_that_no_run_wrote_are_refused_and_nothing_is_taken",
    ],
    17: ["test_storage.test_a_run_killed_before_its_first_checkpoint_starts_anew_and_says_so"],
    18: ["test_storage.test_of_two_that_start_at_once_one_runs"],
    21: ["test_numbers_out_of_range.test_a_pair_that_is_left_out_starts_the_averages_again"],
}
"""{kind: tests, as module.function}"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reliability") / "run"
    objective = cl.Objective(nn.Linear(3, 2), cl.likelihoods.Categorical())
    cl.train(objective, [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))], epochs=2, folder=folder)
    return folder


def dark() -> tuple[Dataset, Dataset]:
    """With pixels that are always black, as MNIST's."""
    train, test = small()
    for part in (train, test):
        dense(part)[:, :4] = 0
    return train, test


@pytest.fixture
def here(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a module of the user's, folders where pictures would go, and a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(datasets.DATASETS, "mnist16", DataEntry("made", dark))
    (tmp_path / "own.py").write_text(OWN)
    for name in ("training.png", "cosine.png"):
        (tmp_path / "taken" / name).mkdir(parents=True)
    (tmp_path / "run").symlink_to(finished)
    yield tmp_path
    sys.modules.pop("own", None)


def answer(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["curvlab", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: f"{row.kind} {' '.join(row.call)[:70]}")
def test_commands(
    row: Row, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in row.environment:
        monkeypatch.setenv(name, value)
    there = {*here.rglob("*")}
    code = answer(row.call, monkeypatch)
    said = capsys.readouterr().err
    assert (code, bool(re.search(row.says, said)), "Traceback" in said) == (
        row.code,
        True,
        False,
    ), said
    assert len(said.strip().splitlines()) <= 6
    if code == 2:
        assert {p for p in here.rglob("*") if "__pycache__" not in p.parts} == there


def test_pictures_and_text_of_odd_folders(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind 5: the run's own pictures, redrawing and reporting."""
    for name in ("$\\frac{$", "a\x1b[31m\n[/b]"):
        assert answer(["train", *SHORT, "--out", name], monkeypatch) == 0
        assert answer(["plot", name], monkeypatch) == 0
        assert answer(["report", name], monkeypatch) == 0


@pytest.mark.parametrize("attribute", ["versions", "call", "settings", "error", "algorithm"])
@pytest.mark.parametrize("value", ["", 3])
def test_attributes_of_a_log(
    attribute: str, value: object, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind 6: a page, or one line; nothing beside it."""
    folder = tmp_path / "odd"
    folder.mkdir()
    ds = xr.load_dataset(finished / "run.h5", engine="h5netcdf")
    ds.attrs.pop("schema")
    ds.attrs[attribute] = value
    ds.to_netcdf(folder / "run.h5", engine="h5netcdf")
    with h5netcdf.File(folder / "run.h5") as file:
        assert attribute in file.attrs
    code = answer(["report", str(folder)], monkeypatch)
    assert code in (0, 2)
    assert {p.name for p in folder.iterdir()} == {"run.h5", *(["report.html"] if code == 0 else [])}


def test_every_kind_has_its_answer() -> None:
    assert {row.kind for row in COMMANDS} | set(ELSEWHERE) | {5, 6} == set(range(1, 23))


@pytest.mark.parametrize("name", [name for names in ELSEWHERE.values() for name in names])
def test_what_stands_elsewhere_is_there(name: str) -> None:
    module, function = name.split(".")
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
