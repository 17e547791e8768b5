"""Checkpoints: what goes in comes out, nothing else can go in, damaged files are one line."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import curvlab as cl
from curvlab.training import checkpoint


def state() -> dict[str, Any]:
    tensor = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {
        "a": {"b": [1, 2.5, None, True, "text"], 3: tensor, "empty": torch.zeros(0)},
        "inf": float("inf"),
    }


def test_round_trip_and_plain_torch_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, state())
    for found in (checkpoint.load_state(path), torch.load(path, weights_only=True)):
        assert torch.equal(found["a"].pop(3), state()["a"][3])
        assert found["a"].pop("empty").shape == (0,)
        assert found == {"format": 2, "a": {"b": [1, 2.5, None, True, "text"]}, "inf": float("inf")}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"x": [1, {"y": object()}]}, r"state\['x'\]\[1\]\['y'\] is of type object"),
        ({"f": print}, r"state\['f'\] is of type builtin_function_or_method"),
        ({"p": Path("a")}, r"state\['p'\] is of type PosixPath"),
    ],
)
def test_what_would_need_pickled_code_is_refused_and_the_old_file_stays(
    value: dict[str, Any], where: str, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, state())
    before = path.read_bytes()
    with pytest.raises(cl.CurvlabError, match=where):
        checkpoint.save(path, value)
    assert path.read_bytes() == before


def test_counters_of_torchs_schedulers_can_go_in(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c.pt", {"milestones": collections.Counter({2: 1})})
    assert checkpoint.load_state(tmp_path / "c.pt")["milestones"] == {2: 1}


class Code:
    """A pickle that would run something."""

    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Code, "ran", True)


def test_no_code_runs_and_damage_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, state())
    whole = path.read_bytes()
    torch.save({"format": 1, "x": Code()}, tmp_path / "code.pt")
    spoiled = {
        "short": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"no checkpoint",
        "pickle": pickle.dumps(Code()),
    }
    spoiled |= {
        "code": (tmp_path / "code.pt").read_bytes(),
        "middle": whole[:200] + b"\xff" * 200 + whole[400:],
    }
    for name, content in spoiled.items():
        path.write_bytes(content)
        with pytest.raises(cl.CurvlabError, match="is damaged") as caught:
            checkpoint.load_state(path)
        assert "\n" not in str(caught.value), name
    assert not Code.ran


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(
        cl.CurvlabError, match=r"there is no checkpoint at .*start the run without --resume"
    ):
        checkpoint.load_state(tmp_path / "checkpoint.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "checkpoint.pt")
    with pytest.raises(cl.CurvlabError, match="no checkpoint of this version"):
        checkpoint.load_state(tmp_path / "checkpoint.pt")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(cl.CurvlabError, match="cannot be written"):
        checkpoint.save(tmp_path / "absent" / "checkpoint.pt", state())
