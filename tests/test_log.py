"""The log: schema, whole on disk at any moment, damaged files named."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xarray as xr

import curvlab as cl
import curvlab.logs.log as log_module
from curvlab.logs.log import SAVE_EVERY, SAVE_SHARE, SCHEMA, Log
from curvlab.logs.reading import open_log


def log_of(path: Path | None, seeds: tuple[int, ...] = (0,), **more: object) -> Log:
    coordinates: dict[str, Any] = {
        "algorithm": ["a", "b"],
        "block": ["1", "2", "3"],
        "parameters": ("block", ["u", "v", "w"]),
    }
    variables = {
        "cosine": {"long_name": "cosine", "units": "1"},
        "loss": {"long_name": "loss", "units": "nat"},
    }
    return Log(coordinates, variables, {"reference": "a", "call": {"x": 1}} | more, path, seeds)


def record(value: float) -> dict[str, Any]:
    return {
        "cosine": (("algorithm", "block"), np.full((2, 3), value)),
        "loss": ((), np.asarray(value)),
    }


def test_round_trip_keeps_labels_units_and_values(tmp_path: Path) -> None:
    log = log_of(tmp_path / "run.h5")
    for step in (0, 5, 10):
        log.append(step, record(step / 7))
    log.save()
    with xr.open_dataset(tmp_path / "run.h5", engine="h5netcdf") as ds:
        assert ds.attrs["schema"] == SCHEMA
        xr.testing.assert_identical(ds.load(), log.dataset().assign_attrs(schema=SCHEMA))
        assert ds["cosine"].dims == ("step", "algorithm", "block")
        assert ds["cosine"].attrs == {"long_name": "cosine", "units": "1"}
        assert ds["parameters"].sel(block="2").item() == "v"
        assert ds["cosine"].sel(step=5, algorithm="b", block="3").item() == 5 / 7
        assert json.loads(ds.attrs["call"]) == {"x": 1}
    with h5py.File(tmp_path / "run.h5") as file:
        assert file["loss"][:].tolist() == [0, 5 / 7, 10 / 7]


def test_every_log_says_where_it_comes_from(tmp_path: Path) -> None:
    log = log_of(None)
    log.append(0, record(1.0))
    attributes = log.dataset().attrs
    assert {"curvlab", "torch", "numpy", "xarray", "python"} <= json.loads(
        attributes["versions"]
    ).keys()
    assert attributes["git_commit"]
    assert np.datetime64(attributes["created"].removesuffix("+00:00")) <= np.datetime64("now")


def test_several_seeds_become_a_dimension_and_missing_steps_are_nan() -> None:
    log = log_of(None, seeds=(3, 4))
    for step in range(3):
        log.append(step, record(step), seed=3)
    log.append(0, record(9.0), seed=4)
    ds = log.dataset()
    assert ds["seed"].values.tolist() == [3, 4]
    assert ds["loss"].sel(seed=3).values.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(ds["loss"].sel(seed=4).values, [9, np.nan, np.nan])
    assert ds.attrs["reference"] == "a"


def test_saved_after_the_first_record_and_then_only_when_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, saves, now = log_of(tmp_path / "run.h5"), [], [100.0]
    real = log.save

    def counted() -> None:
        saves.append(now[0])
        real()

    monkeypatch.setattr(log, "save", counted)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for step in range(121):
        log.append(step, record(step))
        now[0] += 0.1
    assert len(saves) == 3  # at 0, 5 and 10 of 12 seconds
    assert all(0 <= later - earlier - SAVE_EVERY < 0.2 for earlier, later in pairwise(saves))
    log._cost = 1.0  # a save that costs a second is due once in 1 / SAVE_SHARE seconds
    now[0] += 1 / SAVE_SHARE - 3
    log.append(121, record(0.0))
    assert len(saves) == 3
    now[0] += 3
    log.append(122, record(0.0))
    assert len(saves) == 4


def test_a_save_that_fails_leaves_the_old_file_whole(tmp_path: Path) -> None:
    log = log_of(tmp_path / "run.h5")
    log.append(0, record(1.0))
    before = (tmp_path / "run.h5").read_bytes()
    (tmp_path / ".run.h5.part").mkdir()  # where the next one would be written
    log._saved = -1e9
    with pytest.raises(cl.CurvlabError, match="cannot be written"):
        log.append(1, record(2.0))
    assert (tmp_path / "run.h5").read_bytes() == before


def test_a_save_after_one_that_was_broken_off(tmp_path: Path) -> None:
    """Ctrl-C leaves the file that was being written open in HDF5."""
    with h5py.File(tmp_path / ".run.h5.part", "w"):
        log = log_of(tmp_path / "run.h5")
        log.append(0, record(1.0))
    assert open_log(tmp_path)["step"].values.tolist() == [0]


@pytest.mark.parametrize("content", [b"", b"not HDF5 at all", None])
def test_damaged_log_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "run.h5"
    log = log_of(path)
    log.append(0, record(1.0))
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(cl.CurvlabError, match="damaged") as caught:
        open_log(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(cl.CurvlabError, match="no log at"):
        cl.open(tmp_path)
    xr.Dataset({"x": ("t", [1.0])}).to_netcdf(tmp_path / "run.h5", engine="h5netcdf")
    with pytest.raises(cl.CurvlabError, match="no curvlab log"):
        cl.open(tmp_path / "run.h5")


def test_late_cosine_is_the_mean_of_the_last_three_quarters() -> None:
    log = log_of(None)
    for step in range(8):
        log.append(step, record(step))
    assert cl.late_cosine(log.dataset()).sel(algorithm="a", block="1").item() == np.mean(
        [2, 3, 4, 5, 6, 7]
    )


def _write_for_ever(path: Path) -> None:
    # save at every record: the kill falls into a save
    log_module.SAVE_EVERY, log_module.SAVE_SHARE = (
        0.0,
        1e9,
    )
    log = Log({"algorithm": ["a"]}, {}, {}, path)
    for step in range(10**9):
        log.append(
            step,
            {
                "x": (("algorithm",), np.full(1, float(step))),
                "y": (("algorithm", "n"), np.zeros((1, 20_000))),
            },
        )
        if step > 60:
            log._records[0], log._steps[0] = log._records[0][-2:], log._steps[0][-2:]


def test_the_file_opens_after_sigkill_at_twenty_random_moments(tmp_path: Path) -> None:
    """Twenty kills; on a machine that is busy elsewhere more, and later ones, until they have
    fallen at four places.
    """
    path, seen = tmp_path / "run.h5", []
    moments = np.random.default_rng(0).uniform(0.02, 0.25, 100)
    for moment in moments * np.repeat([1, 2, 4, 8, 16], 20):
        process = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(path,))
        process.start()
        while not path.exists():
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(moment)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        ds = cl.open(path)
        np.testing.assert_array_equal(ds["x"].values[:, 0], ds["step"].values)
        seen.append(int(ds["step"][-1]))
        path.unlink()
        if len(seen) >= 20 and len(set(seen)) > 3:
            break
    assert len(set(seen)) > 3, seen


def test_what_is_taken_more_rarely_has_an_axis_of_its_own(tmp_path: Path) -> None:
    """In chunks; through the file, and through a state without pickled code; along several
    seeds.
    """
    coordinates = {"algorithm": ["a", "b"]}
    variables = {
        "rare": {"long_name": "rare", "units": "s"},
        "rare_step": {"long_name": "steps done", "units": "1"},
    }
    log = Log(coordinates, variables, {}, tmp_path / "run.h5")
    for step in range(5):
        log.append(step, {"x": ((), np.asarray(float(step)))})
    assert log.since("rare_step", 0) == {}
    log.extend("rare_step", [0, 2], {"rare": (("algorithm",), np.array([[0.0, 1.0], [2.0, 3.0]]))})
    log.extend("rare_step", [4], {"rare": (("algorithm",), np.array([[4.0, 5.0]]))})
    np.testing.assert_array_equal(log.since("rare_step", 2)["rare"], [[2, 3], [4, 5]])
    log.save()
    ds = cl.open(tmp_path)
    xr.testing.assert_identical(ds, log.dataset())
    assert ds["rare"].dims == ("rare_step", "algorithm")
    assert ds["rare_step"].values.tolist() == [0, 2, 4]
    assert ds["rare"].sel(rare_step=2, algorithm="b") == 3
    assert ds["rare_step"].attrs == variables["rare_step"]
    torch.save(log.state_dict(until=2), tmp_path / "state.pt")
    again = Log(coordinates, variables, {})
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    xr.testing.assert_identical(again.dataset()["rare"], ds["rare"])
    assert again.dataset()["step"].values.tolist() == [0, 1, 2]
    again.extend("rare_step", [6], {"rare": (("algorithm",), np.array([[6.0, 7.0]]))})
    assert again.dataset()["rare_step"].values.tolist() == [0, 2, 4, 6]

    several = Log(coordinates, variables, {}, seeds=(3, 4))
    for seed in (3, 4):
        several.append(0, {"x": ((), np.asarray(0.0))}, seed)
        several.extend(
            "rare_step", [0, 5], {"rare": (("algorithm",), np.full((2, 2), float(seed)))}, seed
        )
    assert several.dataset()["rare"].dims == ("seed", "rare_step", "algorithm")
    assert several.dataset()["rare"].sel(seed=4, rare_step=5, algorithm="a") == 4
